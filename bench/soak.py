"""Leases from the broker, many a minute for a long time: what grows in the broker and on the host."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.broker import broker, call, client, wait_until_filled
from bench.figures import MIB, Figure, say
from vmmback.linux import procfs

_A_MINUTE = 1000
_MINUTES = 10
_SIZE = 1 * MIB
_READY = 20
_FIRST = 7000  # leases before it is looked at the first time: Python's memory has grown to its size by then


@dataclass(frozen=True)
class Use:
    """What the broker has, and the pages of the whole host that cannot be swapped out, in bytes."""

    resident: int
    descriptors: int
    unevictable: int
    mlocked: int

    @classmethod
    def of(cls, pid: int) -> Use:
        """Look at the broker of a pid; none of its guests may run."""
        host = procfs.meminfo()
        return cls(
            int(procfs.status(pid)["VmRSS"].removesuffix(" kB")) * 1024,
            len(list(Path(f"/proc/{pid}/fd").iterdir())), host["Unevictable"], host["Mlocked"],
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.resident / MIB:.1f} MiB resident, {self.descriptors} descriptors, "
            f"{self.unevictable / MIB:.1f} MiB unevictable, {self.mlocked / MIB:.1f} MiB locked"
        )


def soak(folder: Path, _: int) -> Iterator[Figure]:
    """Borrow, touch and give back; a process lives for one lease of ten, the others release theirs."""
    say(f"{_A_MINUTE} leases a minute for {_MINUTES} minutes")
    with broker(folder, _SIZE, _READY) as pid:
        leases(_FIRST, 0.0)
        before = settled(pid, _READY)
        started = time.monotonic()
        leases(_A_MINUTE * _MINUTES, 60 / _A_MINUTE)
        took_s = time.monotonic() - started
        after = settled(pid, _READY)
    yield Figure(
        f"resident memory of the broker after {_A_MINUTE} leases a minute for {_MINUTES} minutes, against before",
        after.resident / MIB, before.resident / MIB, "MiB", after.resident / before.resident, "no growth", 1,
        f"{_A_MINUTE * _MINUTES / took_s * 60:.0f} leases a minute; before: {before}; after: {after}",
    )  # fmt: skip


def leases(count: int, each_s: float) -> None:
    """Have so many leases, one after the other, at most one in `each_s` seconds; none is refused."""
    started = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, started + number * each_s - time.monotonic()))
        wait_until_filled()
        if number % 10:
            borrow(release=True)
        elif child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
        else:
            try:
                borrow(release=False)
                os._exit(0)
            finally:
                os._exit(1)


def borrow(*, release: bool, ready: int = 0) -> None:
    """Have one lease, until so many are ready; without `release` it ends with this process."""
    with client() as connection:
        answer, descriptors = call(connection, "Acquire", size=_SIZE, purpose="soak")
        assert "error" not in answer, answer
        wait_until_filled(ready)
        for descriptor in descriptors:
            os.close(descriptor)
        if release:
            assert call(connection, "Release", lease=answer["parameters"]["lease"])[0]["parameters"]["ended"]


def settled(pid: int, ready: int) -> Use:
    """Return what is used once the pool is as full as it gets, and no lease is left."""
    wait_until_filled(ready)
    borrow(release=True, ready=ready)
    wait_until_filled(ready + 1)  # one more, of what came back: docs/BROKER.md
    with client() as connection:
        stats = call(connection, "Stats")[0]["parameters"]
    assert (stats["leases"], [entry["ready"] for entry in stats["pool"]]) == (0, [ready + 1]), stats
    return Use.of(pid)
