"""What secret RAM costs the direct map, and what the kernel's own reads of memory cost on this host as it is now."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmmback import ram
from vmmback.linux import direct_map_use, procfs

MIB = 1 << 20
FILES = 100_000
_COMPACT = Path("/proc/sys/vm/compact_memory")


@dataclass(frozen=True)
class Touched:
    """The medians of a way to prefault: regions of 2 MiB that it touched and MiB/s; 2 MiB pages split for each MiB.

    The splits are the whole host's meanwhile, None where the kernel does not count them.
    """

    regions: float
    ideal: int
    rate: float
    splits_per_mib: float | None


def ways(size: int, rounds: int, threads: int) -> dict[str, Touched]:
    """Prefault `size` bytes, release them, and so on: with one thread, with `threads`, after compaction."""
    many = f"{threads} threads"
    tries = {"1 thread": (1, False), many: (threads, False), f"{many}, memory compacted before": (threads, True)}
    seen: dict[str, list[tuple[int, float, int | None]]] = {name: [] for name in tries}
    for _ in range(rounds):
        for name, (number, compact) in tries.items():
            if compact:
                _COMPACT.write_text("1")
            seen[name].append(_prefault(size, number))
    return {
        name: Touched(
            statistics.median(regions for regions, _, _ in runs),
            direct_map_use.ideal_regions(size),
            size / MIB / statistics.median(seconds for _, seconds, _ in runs),
            None if runs[0][2] is None else sum(splits or 0 for _, _, splits in runs) / (rounds * size / MIB),
        )
        for name, runs in seen.items()
    }


def _prefault(size: int, threads: int) -> tuple[int, float, int | None]:
    with ram.SecretRam(size) as secret:
        started = time.perf_counter()
        asyncio.run(secret.prefault(lambda _: None, threads))
        seconds = time.perf_counter() - started
        found = ram.direct_map([secret])
        assert found is not None
        return len(secret.regions), seconds, found.splits_2m


def kernel_reads(folder: Path, rounds: int) -> tuple[int, dict[str, float]]:
    """Return the size of the large memory, at most a quarter of what is free, and the medians of kernel_reads.c."""
    program = folder / "kernel_reads"
    subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("kernel_reads.c")], check=True)
    size = min(2048 * MIB, procfs.meminfo()["MemAvailable"] // 4) // MIB * MIB
    with _in_memory() as files:
        argv = [str(program), str(size), str(FILES), files, str(rounds)]
        lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    columns = zip(*(map(float, line.split()) for line in lines), strict=True)
    names = ("pread(2), large, ns", "pread(2), 64 MiB, ns", "stat(2), ns", "posix_spawn(3), us")
    return size, dict(zip(names, map(statistics.median, columns), strict=True))


@contextmanager
def _in_memory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="vmmback-bench-", dir="/dev/shm") as folder:
        yield folder
