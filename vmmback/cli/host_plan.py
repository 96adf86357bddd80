"""`vmmback host plan`: does a mix of guests fit a machine, and what to boot it with."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmmback.cli.files import check_place, write_whole
from vmmback.cli.output import EXIT_REFUSED, finish, print_result
from vmmback.errors import UsageError

if TYPE_CHECKING:
    from vmmback.host.machine import Core, Machine
    from vmmback.host.plan import Guests, Plan

MAX_NODES, MAX_GUESTS = 64, 10_000
_LEAST_NODE_BYTES = 256 << 20
_GUESTS = re.compile(r"(?:([1-9][0-9]{0,5})x)?(.+)")
_PERCENT = re.compile(r"([0-9]{1,3})%")
_CORE = 'write a size like "64GiB", or a share of all RAM like "25%"'


@click.command(epilog="Exit codes: 0 fits, 2 wrong argument, 4 does not fit.")
@click.option("--guests", required=True, metavar="MIX", help='The guests, such as "40x4GiB,10x16GiB".')
@click.option("--ram", metavar="SIZE", help="RAM that is built in, such as 256GiB (default: this host's).")
@click.option("--nodes", type=int, metavar="N", help="NUMA nodes, with as much RAM each (default: this host's).")
@click.option("--kernelcore", metavar="SIZE|PERCENT", help="Boot parameter: what is not to be ZONE_MOVABLE.")
@click.option("--movablecore", metavar="SIZE|PERCENT", help="Boot parameter: what is to be ZONE_MOVABLE.")
@click.option("--cma", metavar="SIZE", help="Boot parameter: what the contiguous memory allocator gets.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document, with every term.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write the picture as SVG, too.")
def plan(
    guests: str,
    ram: str | None,
    nodes: int | None,
    kernelcore: str | None,
    movablecore: str | None,
    cma: str | None,
    as_json: bool,
    svg: Path | None,
) -> None:
    """Tell whether guests fit on a machine that is to be bought or booted, and with which boot parameters.

    The machine is judged as a launch on it would be, with all guests running and all their RAM in use. The plan assumes
    that a kernel takes much: what fits by plan is admitted by the machine, and what does not fit may still.

    \b
    Examples:
      vmmback host plan --ram 256GiB --nodes 2 --guests 40x4GiB,4x16GiB
      vmmback host plan --ram 256GiB --guests 20x4GiB --kernelcore 128GiB --svg plan.svg
      vmmback host plan --guests 4x2GiB --json | jq .fits
    """
    from vmmback.cli import plan_view
    from vmmback.host import plan as planning

    if svg:
        check_place("--svg", svg)
    mix = parse_guests(guests)
    made = planning.make(_machine(ram, nodes, parse_core(kernelcore, movablecore), cma), mix)
    outputs = [partial(print_result, as_text(made) if as_json else plan_view.shown(made))]
    if svg:
        outputs.append(partial(write_whole, svg, plan_view.svg(made)))
    finish(0 if made.fits else EXIT_REFUSED, *outputs)


def parse_guests(text: str) -> list[Guests]:
    """Return the guests of a text such as `40x4GiB,10x16GiB`. Raises UsageError."""
    from vmmback.host.plan import Guests

    found = []
    for part in text.split(","):
        match = _GUESTS.fullmatch(part.strip())
        if not match:
            raise UsageError(f"--guests: {part!r} is not a number and a size", 'write them like "40x4GiB,10x16GiB"')
        found.append(Guests(int(match[1] or 1), _size("--guests", match[2])))
    if (count := sum(some.count for some in found)) > MAX_GUESTS:
        raise UsageError(f"--guests: these are {count:,} guests", f"write {MAX_GUESTS:,} at most")
    return found


def parse_core(kernelcore: str | None, movablecore: str | None) -> Core | None:
    """Return the one that is given. Raises UsageError."""
    from vmmback.host.machine import Core

    if kernelcore is not None and movablecore is not None:
        raise UsageError("--kernelcore and --movablecore are both given", "give one: each says what the other is")
    option, text = ("--kernelcore", kernelcore) if kernelcore is not None else ("--movablecore", movablecore)
    if text is None:
        return None
    if text == "mirror":
        raise UsageError(
            f"{option}=mirror: firmware decides what it mirrors", f"find out how much that is, and {_CORE}"
        )
    if percent := _PERCENT.fullmatch(text):
        if int(percent[1]) > 100:
            raise UsageError(f"{option}: {text} is more than all RAM", 'write "0%" to "100%"')
        return Core(option == "--movablecore", percent=int(percent[1]))
    return Core(option == "--movablecore", size=_size(option, text, _CORE))


def _machine(ram: str | None, nodes: int | None, core: Core | None, cma: str | None) -> Machine:
    from vmmback.host.machine import Machine, of_this_host

    own = of_this_host() if ram is None or nodes is None else Machine(0)
    machine = Machine(
        ram=own.ram if ram is None else _size("--ram", ram),
        nodes=own.nodes if nodes is None else nodes,
        core=core,
        cma=_size("--cma", cma) if cma is not None else 0,
    )
    if not 1 <= machine.nodes <= MAX_NODES:
        raise UsageError(f"--nodes: {machine.nodes} is out of range", f"write 1 to {MAX_NODES}")
    if machine.ram < machine.nodes * _LEAST_NODE_BYTES:
        raise UsageError(
            f"--ram: {machine.ram >> 20} MiB are too little for {machine.nodes} nodes",
            f"write {machine.nodes * _LEAST_NODE_BYTES >> 20}MiB or more, or fewer --nodes",
        )
    if machine.cma >= machine.ram:
        raise UsageError(f"--cma: {cma} is as much as all RAM", "write less than --ram")
    return machine


def _size(option: str, text: str, hint: str = "") -> int:
    from vmmback.config.values import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}", hint) from error


def as_text(plan: Plan) -> str:
    """Return the plan as JSON, with what is computed of it."""
    document = asdict(plan) | {"boot": plan.boot}
    for node, each in zip(document["nodes"], plan.nodes, strict=True):
        node["budget"] = {**each.budget._asdict(), "available": each.budget.available}
    return json.dumps(document, indent=2) + "\n"
