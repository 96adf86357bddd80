"""A plan as people read it: lines and bars for a terminal, and the picture that SVG draws."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmmback.cli.output import is_terminal
from vmmback.render import bars, text
from vmmback.render.bars import Bar, Picture, Segment

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vmmback.host.plan import Guests, NodePlan, Plan

# A sign and a colour of a terminal for each look: neither is needed where the other is seen.
_CELLS = {
    "system": ("▒", "bright_black"),
    "held": ("░", "yellow"),
    "guest": ("█", "green"),
    "parts": ("▓", "green"),
    "spare": ("·", "green"),
    "cma": ("=", "magenta"),
    "movable": ("-", "blue"),
}
_NARROWEST = 20
_TOTALS = frozenset({"RAM", "budget for secret RAM", "left", "missing"})


def shown(plan: Plan) -> str:
    """Return what a terminal shows of a plan."""
    from rich.text import Text

    from vmmback.cli.tables import rendered, rich_console

    picture = _picture(plan)
    width = rich_console(sys.stdout, is_terminal=True).width if is_terminal(sys.stdout) else 100
    verdict = Text(picture.verdict, style="bold green" if plan.fits else "bold red")
    head: list[RenderableType] = [Text.assemble(f"{picture.title}, for {mix(plan.guests)}: ", verdict), ""]
    facts = [f"{name:<16}  {value}" for name, value in picture.facts]
    return rendered(*head, *_bars(picture, width), "", _terms(plan), "", *facts)


def svg(plan: Plan) -> str:
    """Return the picture of a plan as an SVG document."""
    return bars.svg(_picture(plan))


def mix(guests: Iterable[Guests]) -> str:
    """Return guests as people write them: `40 x 4 GiB, 10 x 16 GiB`."""
    return ", ".join(f"{some.count:,} x {text.size(some.size)}" for some in guests)


def _picture(plan: Plan) -> Picture:
    machine = plan.machine
    nodes = text.count(machine.nodes, "node")
    subtitle = f"for {mix(plan.guests)}"
    if not plan.fits:
        subtitle += f"; drawn with what fits: {mix(some for some in plan.fitting if some.count) or 'none'}"
    return Picture(
        title=f"{text.size(machine.ram)} of RAM on {nodes}",
        subtitle=subtitle,
        verdict="fits" if plan.fits else "does not fit",
        good=plan.fits,
        bars=tuple(_bar(node, plan) for node in plan.nodes),
        facts=tuple(_facts(plan)),
    )


def _bar(node: NodePlan, plan: Plan) -> Bar:
    """Cut a node up. Firmware keeps as much of each; what ZONE_MOVABLE has of the memory map counts as movable."""
    budget = node.budget
    firmware = plan.taken.firmware // plan.machine.nodes
    available = max(0, budget.available)
    placed = [
        Segment("guest", node.whole * (some.count * some.size) // whole, mix([some]), some.count)
        for whole in [sum(some.count * some.size for some in node.placed)]
        for some in node.placed
    ]
    spare = max(0, available - sum(part.size for part in placed) - node.parts)
    system = node.kernel_zones - budget.free - node.cma
    return Bar(
        f"node {node.number}",
        (
            Segment("system", firmware + system, text.size(firmware + system)),
            Segment("held", budget.free - available, text.size(budget.free - available)),
            *placed,
            Segment("parts", node.parts, "parts"),
            Segment("spare", spare, f"{text.size(spare)} left"),
            Segment("cma", node.cma, "CMA"),
            Segment("movable", node.movable_zone, f"ZONE_MOVABLE, {text.size(node.movable_zone)}"),
        ),
    )


def _facts(plan: Plan) -> list[tuple[str, str]]:
    facts = [("spare", f"{text.size(plan.spare)} of secret RAM are left with all guests")]
    if not plan.fits:
        fitting = mix(some for some in plan.fitting if some.count) or "none of these guests"
        facts = [
            ("missing", f"{text.size(-plan.spare)} of memory that secret pages can use"),
            ("would fit", f"{fitting}; all of them with {_enough(plan)}"),
        ]
    if plan.fits:
        facts.append(("may be movable", _movable(plan)))
    if plan.straddling:
        facts.append(("several nodes", f"{text.count(plan.straddling, 'guest')} will have RAM of more than one node"))
    mapped = sum(node.kernel_zones + node.movable_zone for node in plan.nodes)
    facts.append(("direct map", f"about {text.size(plan.huge_direct_map)} of {text.size(mapped)} stay in huge pages"))
    return [*facts, ("boot with", " ".join(plan.boot)), *_memlock(plan)]


def _enough(plan: Plan) -> str:
    """Say what would be enough for all guests."""
    ways = []
    if plan.machine.core and plan.least_kernelcore:
        ways.append(f"kernelcore={_parameter(plan.least_kernelcore)}")
    if plan.least_ram:
        ways.append(f"{text.size(plan.least_ram)} of RAM")
    return " or ".join(ways) or "no RAM as long as these parameters stand"


def _movable(plan: Plan) -> str:
    """Say how much need not be for the kernel: the least kernelcore= is None only where nothing fits."""
    least = plan.least_kernelcore or plan.machine.ram
    rest = plan.machine.ram - plan.taken.firmware - least
    if rest <= 0:
        return "nothing: the guests need all memory that the kernel can use"
    return f"{text.size(rest)}, with kernelcore={_parameter(least)}: movable huge pages, CMA, memory to be removed"


def _memlock(plan: Plan) -> list[tuple[str, str]]:
    one, together = f"LimitMEMLOCK={plan.memlock}", f"LimitMEMLOCK={plan.memlock_of_all}"
    return [
        ("RLIMIT_MEMLOCK", f"{one} for each QEMU without CAP_IPC_LOCK"),
        ("", f"{together} where the kernel adds up a user's (Debian's 6.1.192)"),
    ]


def _parameter(size: int) -> str:
    from vmmback.host.machine import boot_size

    return boot_size(size)


def _bars(picture: Picture, width: int) -> list[RenderableType]:
    from rich.text import Text

    longest = max(bar.size for bar in picture.bars)
    room = max(_NARROWEST, width - 20)
    lines: list[RenderableType] = []
    for bar in picture.bars:
        line = Text(f"{bar.name:<8}{text.size(bar.size):>10} ")
        for segment, count in bars.cells(bar, longest, room):
            sign, style = _CELLS[segment.look]
            line.append(sign * count, style)
        lines.append(line)
    lines.append("")
    for look, name, size in picture.totals():
        sign, style = _CELLS[look]
        lines.append(Text.assemble("  ", (sign * 2, style), f" {name:<40}{text.size(size):>10}"))
    return lines


def _terms(plan: Plan) -> RenderableType:
    """Return the sum, from the RAM to what is left, in MiB."""
    from rich.table import Table

    taken, nodes = plan.taken, plan.nodes
    held, reserve = sum(node.budget.held for node in nodes), sum(node.budget.reserve for node in nodes)
    known = [
        ("RAM", plan.machine.ram),
        ("firmware", -taken.firmware),
        ("memory map", -taken.memmap),
        ("kernel image, tables", -taken.image),
        ("page tables of a split direct map", -taken.direct_map),
        ("kernel and services, idle", -taken.idle),
        ("page cache that stays", -taken.held_back),
        ("watermarks, lowmem_reserve", -held),
        ("reserve for page tables and slab", -reserve),
        ("CMA", -plan.machine.cma),
    ]
    movable = plan.budget - sum(size for _, size in known)
    rows = [*known, ("rest of ZONE_MOVABLE", movable), ("budget for secret RAM", plan.budget)]
    rows += [("guests", plan.spare - plan.budget), ("left" if plan.fits else "missing", plan.spare)]
    table = Table()
    table.add_column("of the RAM", no_wrap=True)
    table.add_column("MiB", justify="right")
    for name, size in rows:
        if size:
            table.add_row(
                name, f"{size / (1 << 20):,.0f}", style="bold" if name in {"RAM", "budget for secret RAM"} else ""
            )
    return table
