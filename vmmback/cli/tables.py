"""Reports as text for a terminal: tables and the verdict."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TYPE_CHECKING, TextIO

from vmmback.cli.output import is_terminal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from vmmback.report import DirectMap, Hunt, IsolationReport, Process, SelftestReport

_COLOURS = {
    "blocked": "green",
    "isolated": "bold green",
    "readable": "red",
    "exposed": "bold red",
    "passed": "bold green",
    "failed": "bold red",
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
    from rich.text import Text

    blocks = plain_table("RAM block", "size", "backing", "guest can write")
    for block in report.ram_blocks:
        blocks.add_row(block.name, _size(block.size), block.backing, "yes" if block.guest_writable else "no")
    exposures = plain_table("exposure", "who holds the key", "what was measured")
    for exposure in report.exposures:
        exposures.add_row(exposure.name, exposure.holders, exposure.detail)
    hunt = _hunt_tables(report.hunt) if report.hunt else []
    process = [_process_table(report.process)] if report.process else []
    return [blocks, exposures, *process, _probe_table(report, 0), *hunt, *_verdict(report), Text()]


def at_the_end(report: IsolationReport, shown: int) -> list[RenderableType]:
    """Return what the guest's end added to the `shown` rows, and the last word."""
    return [*([_probe_table(report, shown)] if report.probes[shown:] else []), *_verdict(report)]


def selftest_tables(report: SelftestReport) -> list[RenderableType]:
    """Return what a self-test found."""
    from rich.text import Text

    vectors = plain_table("vector", "secret RAM", "control", "what was seen", "ms")
    vectors.columns[4].justify = "right"
    holes = plain_table("known hole", "who holds the key", "secret RAM", "what was seen")
    for vector in report.vectors:
        verdict = Text("missing") if vector.missing else _coloured(vector.verdict.value)
        if vector.kind == "exposure":
            holes.add_row(vector.name, vector.holders, verdict, vector.detail)
        else:
            vectors.add_row(vector.name, verdict, vector.control.value, vector.detail, f"{vector.seconds * 1000:.1f}")
    notable = plain_table("host setting", "value", "risk", "what it means")
    for setting in report.settings:
        if setting.risk != "ok":
            notable.add_row(setting.name, setting.value, setting.risk, setting.detail)
    probes = [vector for vector in report.vectors if vector.kind == "probe"]
    missing = sum(bool(vector.missing) for vector in report.vectors)
    blocked = sum(vector.verdict == "blocked" for vector in probes)
    summary = (
        f"{len(report.vectors)} vectors in {report.seconds:.1f} s: {blocked} of {len(probes)} probes blocked, "
        f"{len(report.vectors) - len(probes)} known holes measured, {missing} not to be tried on this host: "
    )
    end: list[RenderableType] = [Text.assemble(summary, _coloured(report.verdict.value))]
    end += [f"  {reason}" for reason in report.reasons]
    return [vectors, holes, notable, *end]


def _process_table(process: Process) -> RenderableType:
    from vmmback.render.text import process_facts

    table = plain_table("QEMU's process", "as the kernel shows it")
    for name, value in process_facts(process):
        table.add_row(name, value)
    return table


def _probe_table(report: IsolationReport, start: int) -> RenderableType:
    table = plain_table("probe", "guest RAM", "control", "what was seen", "ms")
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


def _hunt_tables(hunt: Hunt) -> list[RenderableType]:
    places = plain_table("the canary begins in", "of", "frames", "for example, frame number")
    places.columns[2].justify = "right"
    for place in hunt.places:
        examples = ", ".join(f"{example:x}" for example in place.examples)
        places.add_row(place.place, place.owner or "-", str(place.hits), examples)
    gib = (hunt.scanned_bytes + hunt.unreadable_bytes) / (1 << 30)
    summary = (
        f"hunt: {hunt.hits} frames of {gib:.1f} GiB hold the canary's beginning, {hunt.guest_hits} of them the guest's "
        f"({hunt.gib_per_s:.1f} GiB/s)"
    )
    return [*([places] if hunt.places else []), summary]


def _verdict(report: IsolationReport) -> list[RenderableType]:
    from rich.text import Text

    memory = report.memory
    summary = (
        f"guest {report.guest}: {_size(memory.secret)} of {_size(memory.size)} secret, "
        f"{memory.checked_pages} of {memory.size // 4096} pages checked, {memory.readable_pages} readable: "
    )
    lines: list[RenderableType] = [Text.assemble(summary, _coloured(report.verdict.value))]
    lines += [f"  {reason}" for reason in report.reasons]
    if report.direct_map:
        lines.append(f"  direct map   {_direct_map(report.direct_map)}")
    if report.validated_after:
        lines.append(f"  validated after {report.validated_after}")
    lines += [f"  drift at {drift.at}: {drift.probe}: {drift.detail}" for drift in report.drifts]
    if report.denied_commands:
        denied = ", ".join(f"{name} ({count})" for name, count in sorted(report.denied_commands.items()))
        lines.append(f"  QMP commands that were denied: {denied}")
    return lines


def plain_table(*headings: str) -> Table:
    """Return an empty table whose cells are shown whole, on several lines where they must; names on one."""
    from rich.table import Table

    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == headings[0])
    return table


def _coloured(verdict: str) -> Text:
    from rich.text import Text

    return Text(verdict, style=_COLOURS[verdict])


def _direct_map(found: DirectMap) -> str:
    """Return in one line what secret RAM did to the direct map."""
    splits = "splits not counted here" if found.splits_2m is None else f"{found.splits_2m} splits"
    touched = "regions known to root alone" if found.regions is None else f"{found.regions} regions of 2 MiB touched"
    return f"{touched} (ideal {found.ideal}), {splits}"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size % (1 << 20) == 0 and size else f"{size >> 10} KiB"
