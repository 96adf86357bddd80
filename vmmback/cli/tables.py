"""Reports as text for a terminal: tables and the verdict."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TYPE_CHECKING, TextIO

from vmmback.cli.output import is_terminal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from vmmback.report import IsolationReport

_COLOURS = {
    "blocked": "green",
    "isolated": "bold green",
    "readable": "red",
    "exposed": "bold red",
    "inconclusive": "yellow",
}


def rendered(*parts: RenderableType) -> str:
    """Return what standard output is to show; rich's own way of writing raises where a stream is gone."""
    from rich.text import Text

    text = StringIO()
    console = rich_console(text, is_terminal=is_terminal(sys.stdout))
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, (str, Text)))  # a table fits the width, a line need not
    return text.getvalue()


def rich_console(stream: TextIO, *, is_terminal: bool) -> Console:
    """Return rich's console without its markup: what was measured is shown as it is."""
    from rich.console import Console

    return Console(file=stream, force_terminal=is_terminal, highlight=False, markup=False, emoji=False)


def while_it_runs(report: IsolationReport) -> list[RenderableType]:
    """Return what was found while the guest runs."""
    from rich.table import Table
    from rich.text import Text

    blocks = Table("RAM block", "size", "backing", "guest can write", title_justify="left")
    for block in report.ram_blocks:
        blocks.add_row(block.name, _size(block.size), block.backing, "yes" if block.guest_writable else "no")
    exposures = Table("exposure", "who holds the key", "what was measured")
    for exposure in report.exposures:
        exposures.add_row(exposure.name, exposure.holders, exposure.detail)
    return [blocks, exposures, _probe_table(report, 0), *_verdict(report), Text()]


def at_the_end(report: IsolationReport, shown: int) -> list[RenderableType]:
    """Return what the guest's end added to the `shown` rows, and the last word."""
    return [*([_probe_table(report, shown)] if report.probes[shown:] else []), *_verdict(report)]


def _probe_table(report: IsolationReport, start: int) -> RenderableType:
    from rich.table import Table

    table = Table("probe", "guest RAM", "control", "what was seen", "ms")
    table.columns[4].justify = "right"
    for probe in report.probes[start:]:
        table.add_row(
            probe.name,
            _coloured(probe.verdict.value),
            probe.control.value,
            probe.detail,
            f"{probe.seconds * 1000:.1f}",
        )
    return table


def _verdict(report: IsolationReport) -> list[RenderableType]:
    from rich.text import Text

    memory = report.memory
    summary = (
        f"guest {report.guest}: {_size(memory.secret)} of {_size(memory.size)} secret, "
        f"{memory.checked_pages} of {memory.size // 4096} pages checked, {memory.readable_pages} readable: "
    )
    lines: list[RenderableType] = [Text.assemble(summary, _coloured(report.verdict.value))]
    lines += [f"  {reason}" for reason in report.reasons]
    if report.validated_after:
        lines.append(f"  validated after {report.validated_after}")
    return lines


def _coloured(verdict: str) -> Text:
    from rich.text import Text

    return Text(verdict, style=_COLOURS[verdict])


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size % (1 << 20) == 0 and size else f"{size >> 10} KiB"
