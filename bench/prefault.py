"""Makes secret RAM present: SecretRam against a C loop (touch.c), both from the descriptor's making."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.figures import MIB, Figure, all_in_turn, say
from vmmback import ram

THREADS = len(os.sched_getaffinity(0))
_RIVALS = (1, 2, 4)
"""The numbers of threads with which the C loop tries."""


def prefaults(folder: Path, rounds: int) -> Iterator[Figure]:
    """Compile the loop, and let both touch."""
    touch = folder / "touch"
    say("compiling the C rival")
    subprocess.run(["gcc", "-O2", "-pthread", "-o", touch, Path(__file__).with_name("touch.c")], check=True)
    for size in (256 * MIB, 1024 * MIB):
        say(f"prefault of {size // MIB} MiB")
        yield _figure(touch, size, rounds)


def _figure(touch: Path, size: int, rounds: int) -> Figure:
    def ours() -> float:
        started = time.perf_counter()
        with ram.SecretRam(size) as secret:
            asyncio.run(secret.prefault(lambda _: None, THREADS))
            return time.perf_counter() - started

    def rival(threads: int) -> float:
        result = subprocess.run([touch, str(size), str(threads)], check=True, capture_output=True, text=True)
        return float(result.stdout)

    mine, *others = all_in_turn(rounds, ours, *(partial(rival, threads) for threads in _RIVALS))
    theirs = min(other.median for other in others)
    rates = (f"{number}: {size / MIB / other.median:.0f}" for number, other in zip(_RIVALS, others, strict=True))
    return Figure(
        f"prefault {size // MIB} MiB, {THREADS} threads, against the fastest of a C loop with 1, 2 and 4 threads",
        size / MIB / mine.median, size / MIB / theirs, "MiB/s", theirs / mine.median, ">= 0.95", rounds,
        f"the loop, MiB/s by threads: {', '.join(rates)}; vmmback {mine}",
    )  # fmt: skip
