"""Makes secret RAM present: SecretRam against a C loop (touch.c), from the descriptor's making on; why it is slow.

The kernel takes each page from its direct map by itself, and waits for every processor to forget it: page_cost.c takes
that apart.
"""

from __future__ import annotations

import asyncio
import os
import statistics
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
_SIZES = (256 * MIB, 1024 * MIB)
_LONG = (256 * MIB, 1024 * MIB, 8192 * MIB)
_SAMPLE = 64 * MIB


def prefaults(folder: Path, rounds: int) -> Iterator[Figure]:
    """Compile the loops, let both touch, and take a touch apart."""
    touch, page_cost = _compiled(folder, "touch"), _compiled(folder, "page_cost")
    for size in _SIZES:
        say(f"prefault of {size // MIB} MiB")
        yield _against_the_loop(touch, size, rounds)
    yield _taken_apart(page_cost, rounds)


def linear(_: Path, rounds: int) -> Iterator[Figure]:
    """Prefault more and more, in turn: how much longer each MiB takes of much than of little."""
    sizes = ", ".join(str(size // MIB) for size in _LONG)
    say(f"prefaults of {sizes} MiB")
    taken = all_in_turn(rounds, *(partial(_prefault_s, size) for size in _LONG))
    rates = [size / MIB / seconds.median for size, seconds in zip(_LONG, taken, strict=True)]
    yield Figure(
        f"prefault of {_LONG[-1] // MIB} MiB, against {_LONG[0] // MIB} MiB", rates[-1], rates[0], "MiB/s",
        rates[-1] / rates[0], "linear", rounds,
        f"MiB/s of {sizes} MiB: {', '.join(f'{rate:.0f}' for rate in rates)}",
    )  # fmt: skip


def _prefault_s(size: int) -> float:
    started = time.perf_counter()
    with ram.SecretRam(size) as secret:
        asyncio.run(secret.prefault(lambda _: None, THREADS))
        return time.perf_counter() - started


def _against_the_loop(touch: Path, size: int, rounds: int) -> Figure:
    def rival(threads: int) -> float:
        result = subprocess.run([touch, str(size), str(threads)], check=True, capture_output=True, text=True)
        return float(result.stdout)

    mine, *others = all_in_turn(rounds, lambda: _prefault_s(size), *(partial(rival, threads) for threads in _RIVALS))
    theirs = min(other.median for other in others)
    rates = (f"{number}: {size / MIB / other.median:.0f}" for number, other in zip(_RIVALS, others, strict=True))
    return Figure(
        f"prefault {size // MIB} MiB, {THREADS} threads, against the fastest of a C loop with 1, 2 and 4 threads",
        size / MIB / mine.median, size / MIB / theirs, "MiB/s", theirs / mine.median, ">= 0.95", rounds,
        f"the loop, MiB/s by threads: {', '.join(rates)}; vmmback {mine}",
    )  # fmt: skip


def _taken_apart(page_cost: Path, rounds: int) -> Figure:
    say("what the first touch of a page consists of")
    taken = [
        [float(figure) for figure in subprocess.check_output([page_cost, str(_SAMPLE)], text=True).split()]
        for _ in range(rounds + 1)
    ][1:]
    secret, ordinary, interrupt = (statistics.median(column) for column in zip(*taken, strict=True))
    return Figure(
        "first touch of a secret page by a C loop, against one of a memfd", secret, ordinary, "us", secret / ordinary,
        "stated", rounds,
        f"an interrupt to the other processor and back {interrupt:.2f} us; left for the change of the direct map "
        f"{secret - ordinary - interrupt:.2f}",
    )  # fmt: skip


def _compiled(folder: Path, name: str) -> Path:
    source = Path(__file__).with_name(f"{name}.c")
    say(f"compiling {source.name}")
    subprocess.run(["gcc", "-O2", "-pthread", "-o", folder / name, source], check=True)
    return folder / name
