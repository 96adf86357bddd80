"""Starts of a libvirt domain: on secret RAM from the pool against the same domain as libvirt starts it by itself.

Both in a libvirtd of its own, as tests have it (integration/libvirtd.py).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import MIB, Figure, all_in_turn, say

_SIZE = 256 * MIB
_QUIET_S = 3.0  # what follows a start or an end, an audit above all, is over by then


def libvirt_starts(folder: Path, rounds: int) -> Iterator[Figure]:
    """Start and destroy a domain with a Linux guest, as long as `virsh start` takes, in two libvirtds."""
    from integration.conftest import eventually
    from integration.libvirtd import Libvirtd  # it needs libvirt, and pytest

    say(f"starts of a libvirt domain of {_SIZE // MIB} MiB")
    with Libvirtd(folder / "stock") as plain, Libvirtd(folder / "libvirt") as libvirtd:
        vmmback = [sys.executable, "-m", "vmmback"]
        libvirtd.run(*vmmback, "libvirt", "install")
        libvirtd.restart()
        (libvirtd.inside / "run/broker.toml").write_text(f'[[pool]]\nsize = "{_SIZE // MIB}MiB"\ncount = 1\n')
        broker = libvirtd.start(*vmmback, "broker", "/run/broker.toml")
        eventually((libvirtd.inside / "run/vmmback-broker/socket").is_socket, "the broker listens")
        for each in (plain, libvirtd):
            backing = "--memorybacking=source.type=memfd,access.mode=shared"
            each.define(each.domain_xml("bench", backing, memory_mib=_SIZE // MIB))
        libvirtd.run(*vmmback, "libvirt", "enable", "bench")

        def filled() -> bool:
            pool = json.loads(libvirtd.run(*vmmback, "pool", "--json").stdout)
            return not pool["leases"] and all(each["ready"] > each["wanted"] for each in pool["pool"])

        def start_s(where: Libvirtd) -> float:
            started = time.perf_counter()
            where.virsh("start", "bench")
            seconds = time.perf_counter() - started
            where.virsh("destroy", "bench")
            eventually(lambda: not where.qemu_pid("bench"), "it has ended")
            eventually(filled, "the pool is filled", 60)
            time.sleep(_QUIET_S)
            return seconds

        libvirtd.virsh("start", "bench")  # after the first lease the pool makes one more (docs/BROKER.md)
        time.sleep(_QUIET_S)
        libvirtd.virsh("destroy", "bench")
        ours, stock = all_in_turn(rounds, lambda: start_s(libvirtd), lambda: start_s(plain))
        broker.signal(signal.SIGTERM)
        broker.ended()
    yield Figure(
        f"virsh start of a domain of {_SIZE // MIB} MiB, against the same domain without vmmback", ours.median * 1000,
        stock.median * 1000, "ms", ours.median / stock.median, "<= 1.10", rounds, f"vmmback {ours}; libvirt {stock}",
    )  # fmt: skip
