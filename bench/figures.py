"""What a figure is, how it is taken, and how it is shown."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    """One line of the result: vmmback's median and its rival's, in `unit`, their ratio, and what we aim at."""

    name: str
    ours: float
    rival: float | None
    unit: str
    ratio: float | None
    goal: str
    rounds: int
    note: str = ""


def run_s(argv: Sequence[str]) -> float:
    """Run a program and return the seconds that it took."""
    return timed(lambda: subprocess.run(argv, check=True, stdout=subprocess.DEVNULL))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` took."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Seconds(list[float]):
    """What was measured, in seconds."""

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self)

    def __str__(self) -> str:
        return f"{min(self) * 1000:.0f} to {max(self) * 1000:.0f} ms"


def all_in_turn(rounds: int, *works: Callable[[], float]) -> list[Seconds]:
    """Take several figures in turn, after a round that does not count."""
    taken = [[work() for work in works] for _ in range(rounds + 1)][1:]
    return [Seconds(column) for column in zip(*taken, strict=True)]


def in_turn(rounds: int, ours: Callable[[], float], rival: Callable[[], float]) -> tuple[float, float]:
    """Take both figures in turn, after a round that does not count; return the medians."""
    mine, theirs = all_in_turn(rounds, ours, rival)
    return mine.median, theirs.median


def say(message: str) -> None:
    """Tell what is measured now."""
    print(f"bench: {message}", file=sys.stderr)


def show(figures: Sequence[Figure]) -> None:
    """Print the figures as a table."""
    table = Table("figure", "vmmback", "rival", "unit", "ratio", "goal", "rounds", "note")
    for figure in figures:
        rival, ratio = (f"{value:.2f}" if value is not None else "-" for value in (figure.rival, figure.ratio))
        row = (
            figure.name,
            f"{figure.ours:.2f}",
            rival,
            figure.unit,
            ratio,
            figure.goal,
            str(figure.rounds),
            figure.note,
        )
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
