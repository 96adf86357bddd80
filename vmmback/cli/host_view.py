"""A host's memory as people read it: what it can give, why, a bar for each zone, and the checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType
    from rich.table import Table

    from vmmback.doctor import Check
    from vmmback.linux.direct_map_use import DirectMapUse
    from vmmback.linux.zones import Zone
    from vmmback.overview import Overview

_COLOURS = {"ok": "green", "note": "yellow", "missing": "bold red"}
_ORDER = ("missing", "note", "ok")
_BAR = 16
_TERMS = ("free", "reclaimable", "held", "reserve", "available")


def shown(overview: Overview, checks: tuple[Check, ...]) -> str:
    """Return what a terminal shows."""
    from vmmback.cli.tables import rendered

    return rendered(*_verdict(overview, checks), "", *_budget(overview), "", _zones(overview), *_guests(overview), "",
                    *_more(overview), "", _checks(checks))  # fmt: skip


def _verdict(overview: Overview, checks: Iterable[Check]) -> list[RenderableType]:
    from rich.text import Text

    missing = [check.name for check in checks if check.state == "missing"]
    largest = overview.budget.largest_guest()
    lines = [Text(f"This host can give {largest >> 20:,} MiB of secret RAM to one more guest.", style="bold")]
    if missing:
        lines.append(Text(f"A launch would fail: {', '.join(missing)}", style="bold red"))
    elif overview.gives_nothing:
        lines.append(Text("A launch would be refused: no memory is left for a guest", style="bold red"))
    limit = None if overview.ipc_lock else overview.memlock[1]  # a launch raises the soft one itself
    if limit is not None and limit < largest:
        lines.append(Text(f"RLIMIT_MEMLOCK lets a guest of this user have at most {_mib(limit)} of it.", style="bold"))
    return [*lines]


def _budget(overview: Overview) -> list[RenderableType]:
    budget = overview.budget
    table = _table("in MiB", "free", "+ caches", "- held", "- for kernel", "= available")
    for node in budget.nodes:
        table.add_row(f"node {node.number}", *(_number(getattr(node, term)) for term in _TERMS))
    total = {term: sum(getattr(node, term) for node in budget.nodes) for term in _TERMS}
    if len(budget.nodes) > 1:
        table.add_row("all nodes", *map(_number, total.values()))
    group = budget.group_room
    return [
        table,
        f"Promised to guests, and not touched yet: {_mib(budget.promised)}. What a guest takes whatever its size: "
        f"{_mib(budget.overhead)}.",
        f"Page tables of the direct map, once it is split: {_mib(budget.direct_map)}.",
        f"Left for RAM and its page tables: {_mib(budget.available())}.",
        *([f"Room in this memory cgroup: {_mib(group)}."] if group is not None else []),
    ]


def _zones(overview: Overview) -> Table:
    from rich.text import Text

    table = _table("in MiB", "managed", "free", "CMA", "", "for")
    for node in overview.nodes:
        for zone in node.zones:
            look = "green" if zone.for_kernel else "blue"
            table.add_row(
                f"node {node.number} {zone.name}", _number(zone.managed), _number(zone.free), _number(zone.cma),
                Text(_bar(zone.managed - zone.free, zone), style=look),
                Text("secret RAM" if zone.for_kernel else "movable alone", style=look),
            )  # fmt: skip
    return table


def _bar(used: int, zone: Zone) -> str:
    full = round(_BAR * used / zone.managed) if zone.managed else 0
    return "█" * full + "·" * (_BAR - full)


def _guests(overview: Overview) -> list[RenderableType]:
    guests = overview.document()["secret_ram"]["guests"]
    if not guests:
        return []
    table = _table("guest", "promised", "touched")
    for guest in guests:
        table.add_row(guest["name"], _mib(guest["promised"]), _mib(guest["touched"]))
    return ["", table]


def _more(overview: Overview) -> list[str]:
    memory = {name: _mib(size) for name, size in overview.document()["memory"].items() if name != "overcommit"}
    soft, _ = overview.memlock
    limit = "no limit" if soft is None else _mib(soft)
    facts = {
        "secret RAM present": f"{_mib(overview.secret_present)}; {memory['unevictable']} are unevictable, "
        f"{memory['mlocked']} mlocked",
        "kernel": f"{memory['page_tables']} page tables, {memory['slab_unreclaimable']} slab that stays, "
        f"{memory['kernel_stacks']} stacks",
        "direct map": _direct_map(overview.direct_map),
        "commit": f"{memory['committed']} of {memory['commit_limit']}, vm.overcommit_memory {overview.overcommit}",
        "RLIMIT_MEMLOCK": f"{limit}, and CAP_IPC_LOCK, which frees from it" if overview.ipc_lock else limit,
    }
    return [f"{name:<20}{fact}" for name, fact in facts.items()]


def _direct_map(use: DirectMapUse) -> str:
    if use.in_4k is None:
        return "the kernel does not tell"
    return (
        f"{_mib(use.in_4k)} in pages of 4 KiB, {_mib(use.in_huge_pages or 0)} in huge ones; "
        f"{use.splits_2m or 0:,} of 2 MiB were split, {use.splits_1g or 0:,} of 1 GiB"
    )


def _checks(checks: Iterable[Check]) -> Table:
    from rich.text import Text

    table = _table("check", "state", "evidence, and what to do")
    for check in sorted(checks, key=lambda check: _ORDER.index(check.state)):
        told = f"{check.evidence}\n-> {check.remedy}" if check.remedy and check.state != "ok" else check.evidence
        table.add_row(check.name, Text(check.state, style=_COLOURS[check.state]), told)
    return table


def _table(*headings: str) -> Table:
    from rich.table import Table

    table = Table()
    checks = headings[0] == "check"
    for number, heading in enumerate(headings):
        right = number and not checks and heading not in ("", "for")
        table.add_column(heading, justify="right" if right else "left", no_wrap=not checks, overflow="fold")
    return table


def _number(size: int) -> str:
    return f"{size >> 20:,}"


def _mib(size: int) -> str:
    return f"{_number(size)} MiB"
