"""`vmmback host plan` as a command: its refusals, its output, its picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from vmmback.cli import commands, plan_view
from vmmback.errors import UsageError
from vmmback.host import plan
from vmmback.host.machine import Core, Machine
from vmmback.host.plan import Guests
from vmmback.render import bars
from vmmback.render.bars import Bar, Segment

GIB = 1 << 30
SERVER = ("--ram", "256GiB", "--nodes", "2")


class Ran(NamedTuple):
    code: int
    text: str


def run(*arguments: str) -> Ran:
    result = CliRunner().invoke(commands, ["host", "plan", *arguments])
    if isinstance(result.exception, UsageError):
        raise result.exception
    return Ran(result.exit_code, result.stdout)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--guests", ""], "'' is not a number and a size", "40x4GiB"),
        (["--guests", "4x1GiB,"], "'' is not a number and a size", "40x4GiB"),
        (["--guests", "0x4GiB"], '"0x4GiB" is not a size', ""),
        (["--guests", "4GiBx40"], '"4GiBx40" is not a size', ""),
        (["--guests", "4x4"], '--guests: "4" is not a size; write it like "256MiB"', ""),
        (["--guests", "4x4097KiB"], "not a multiple of 8KiB", ""),
        (["--guests", "9999x1GiB,2x2GiB"], "these are 10,001 guests", "10,000 at most"),
        (["--ram", "256"], '--ram: "256" is not a size', ""),
        (["--ram", "1GiB", "--nodes", "5"], "1024 MiB are too little for 5 nodes", "1280MiB or more"),
        (["--nodes", "0"], "--nodes: 0 is out of range", "1 to 64"),
        (["--nodes", "65"], "--nodes: 65 is out of range", "1 to 64"),
        (["--kernelcore", "1GiB", "--movablecore", "1GiB"], "both given", "give one"),
        (["--kernelcore", "mirror"], "firmware decides", "25%"),
        (["--kernelcore", "101%"], "101% is more than all RAM", '"0%" to "100%"'),
        (["--movablecore", "1.5%"], '--movablecore: "1.5%" is not a size', "25%"),
        (["--kernelcore", "4G"], '--kernelcore: "4G" is not a size', "25%"),
        (["--cma", "300GiB"], "--cma: 300GiB is as much as all RAM", "less than --ram"),
        (["--cma", "x"], '--cma: "x" is not a size', ""),
        (["--svg", "/"], "--svg /: is a folder", "a file in it"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_to_write(arguments: list[str], message: str, hint: str) -> None:
    given = [*SERVER, *(() if "--guests" in arguments else ("--guests", "1GiB")), *arguments]
    with pytest.raises(UsageError) as refused:
        run(*given)
    assert message in refused.value.message
    assert hint in refused.value.hint
    assert refused.value.exit_code == 2


def test_guests_must_be_given() -> None:
    assert run(*SERVER).code == 2


def test_what_fits_ends_with_0_and_what_does_not_with_4() -> None:
    fitting = run(*SERVER, "--guests", "40x4GiB, 4x16GiB")
    assert fitting.code == 0
    assert fitting.text.startswith("256 GiB of RAM on 2 nodes, for 40 x 4 GiB, 4 x 16 GiB: fits\n")
    assert "kernelcore=243G" in fitting.text
    too_many = run(*SERVER, "--guests", "40x4GiB,10x16GiB")
    assert too_many.code == 4
    for part in (
        "does not fit",
        "would fit         40 x 4 GiB, 4 x 16 GiB; all of them with 360 GiB of RAM",
        "missing",
    ):
        assert part in too_many.text


def test_this_host_s_own_ram_and_nodes_are_taken_where_none_are_given() -> None:
    machine = json.loads(run("--guests", "1MiB", "--json").text)["machine"]
    assert machine["nodes"] >= 1
    assert machine["ram"] >= GIB // 2


def test_the_table_adds_up() -> None:
    given = (*SERVER, "--guests", "20x4GiB", "--kernelcore", "150GiB", "--cma", "4GiB")
    rows = dict(re.findall(r"│ (.*?) +│ +(-?[\d,]+) │", run(*given).text))
    sizes = {name: int(size.replace(",", "")) for name, size in rows.items()}
    left, budget = sizes.pop("left"), sizes.pop("budget for secret RAM")
    guests = sizes.pop("guests")
    assert abs(sum(sizes.values()) - budget) <= len(sizes)
    assert abs(budget + guests - left) <= 2
    assert sizes["CMA"] == -4096
    assert -108 << 10 < sizes["rest of ZONE_MOVABLE"] < -98 << 10


def test_json_has_every_term() -> None:
    document = json.loads(run(*SERVER, "--guests", "2x4GiB", "--json", "--movablecore", "50%").text)
    made = plan.make(Machine(256 * GIB, 2, Core(movable=True, percent=50)), [Guests(2, 4 * GIB)])
    assert document["machine"]["core"] == {"movable": True, "size": 0, "percent": 50}
    assert document["boot"] == ["secretmem.enable=1", "movablecore=50%"]
    assert set(document["taken"]) == {"firmware", "memmap", "image", "direct_map", "idle", "held_back"}
    given = sum(node["budget"]["available"] for node in document["nodes"])
    assert document["budget"] == given == made.budget
    assert document["fits"] is True
    assert document["least_kernelcore"] == made.least_kernelcore


def test_the_picture_is_written_and_says_what_the_plan_says(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    assert run(*SERVER, "--guests", "30x4GiB", "--kernelcore", "190GiB", "--svg", str(path)).code == 0
    text = path.read_text("ascii")
    svg = ET.fromstring(text)
    shown = [" ".join(element.itertext()) for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    for wanted in (
        "256 GiB of RAM on 2 nodes",
        "fits",
        "node 0",
        "node 1",
        "128 GiB",
        "secretmem.enable=1 kernelcore=190G",
    ):
        assert wanted in shown
    for forbidden in ("<script", "href", "url(http", "@import", "var("):  # librsvg and resvg know no var()
        assert forbidden not in text


def test_the_same_plan_gives_the_same_picture() -> None:
    made = plan.make(Machine(64 * GIB), [Guests(3, GIB)])
    assert plan_view.svg(made) == plan_view.svg(made)


def test_a_bar_is_as_long_as_its_node() -> None:
    made = plan.make(
        Machine(64 * GIB, 3, Core(movable=False, size=40 * GIB), GIB), [Guests(3, GIB), Guests(1, 20 * GIB)]
    )
    for bar in plan_view._picture(made).bars:
        assert abs(bar.size - 64 * GIB // 3) <= 64 * 1024


def test_cells_of_a_bar_are_whole_and_no_segment_vanishes() -> None:
    bar = Bar("node 0", (Segment("system", 1), Segment("held", 0), Segment("guest", 899), Segment("spare", 100)))
    assert [count for _, count in bars.cells(bar, 1000, 50)] == [1, 0, 44, 5]
    assert sum(count for _, count in bars.cells(bar, 2000, 50)) == 25
    assert [count for _, count in bars.cells(bar, 1000, 2)] == [1, 0, 1, 0]


def test_the_example_of_the_docs_is_what_the_command_says() -> None:
    page = (Path(__file__).parents[1] / "docs/PLAN.md").read_text()
    command = re.search(r"^    vmmback host plan (.*)$", page, re.MULTILINE)
    assert command
    for line in run(*command[1].split()).text.splitlines():
        assert f"    {line}\n" in page or not line
