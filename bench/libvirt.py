"""Starts of a libvirt domain: on secret RAM from the pool against the same domain as libvirt starts it by itself.

Both in a libvirtd of its own, as tests have it (integration/libvirtd.py).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import MIB, Figure, Seconds, say

_SIZE = 256 * MIB
_READY = "GUEST READY"
_AFTERWARDS_S = 60.0


def libvirt_starts(folder: Path, rounds: int) -> Iterator[Figure]:
    """Start and destroy a domain with a Linux guest, by `virsh start` and until its init says so, in two libvirtds."""
    from integration.conftest import eventually
    from integration.leftovers import descendants
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

        def is_over() -> bool:
            """Tell whether all is as before a start: no audit runs, a worker waits for the next domain."""
            programs = descendants(os.getpid()).values()
            return sum("handoff_worker" in each for each in programs) == 1 and not any(
                "libvirt audit" in each or "prefault_worker" in each for each in programs
            )

        def is_filled() -> bool:
            pool = json.loads(libvirtd.run(*vmmback, "pool", "--json").stdout)
            return not pool["leases"] and all(each["ready"] >= each["wanted"] for each in pool["pool"])

        def start_s(where: Libvirtd) -> tuple[float, float]:
            began = time.perf_counter()
            where.virsh("start", "bench")
            started = time.perf_counter()
            where.wait_for("bench", _READY)
            ready = time.perf_counter()
            where.virsh("destroy", "bench")
            eventually(lambda: not where.qemu_pid("bench"), "it has ended")
            eventually(is_filled, "the pool is filled", _AFTERWARDS_S)
            eventually(is_over, "what follows a start and an end is over", _AFTERWARDS_S)
            return started - began, ready - began

        def pair_s(number: int) -> tuple[tuple[float, float], tuple[float, float]]:
            """Take both, the other one first each time, and return ours before stock's."""
            if number % 2:
                stock = start_s(plain)
                return start_s(libvirtd), stock
            return start_s(libvirtd), start_s(plain)

        # The first round does not count; after the first lease the pool makes one more (docs/BROKER.md).
        taken = [pair_s(number) for number in range(rounds + 1)][1:]
        broker.signal(signal.SIGTERM)
        broker.ended()
    what = f"a domain of {_SIZE // MIB} MiB, against the same domain without vmmback"
    for number, (name, goal) in enumerate([("virsh start of", "<= 1.10"), ("until Linux runs /init in", "stated")]):
        ours, stock = (Seconds(pair[side][number] for pair in taken) for side in (0, 1))
        yield Figure(
            f"{name} {what}", ours.median * 1000, stock.median * 1000, "ms", ours.median / stock.median, goal, rounds,
            f"vmmback {ours}; libvirt {stock}",
        )  # fmt: skip
