"""The plan of this very machine against what its kernel says of it, and its picture in a real Chromium."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from integration.browser import browser
from vmmback.cli import plan_view
from vmmback.host import machine as machines
from vmmback.host import plan
from vmmback.host.budget import Budget
from vmmback.host.machine import Core, Machine
from vmmback.host.memory import HostMemory
from vmmback.host.plan import Guests

GIB = 1 << 30

# What of the kernel's own memory is in use whatever runs: all else is added back, since other tests run meanwhile.
_KERNEL = ("SUnreclaim", "KernelStack", "PageTables", "Percpu", "VmallocUsed")


def test_this_machine_has_more_to_give_when_idle_than_its_plan_says() -> None:
    memory = HostMemory.read()
    meminfo = {name: int(size.split()[0]) << 10 for name, _, size in map(_parts, _lines("/proc/meminfo"))}
    kernel_zones = sum(zone.managed for node in memory.nodes for zone in node.kernel_zones)
    budget = Budget.of(memory)
    # What is held is at most this much, however little is free now.
    held = sum(zone.high + max(zone.protection, default=0) for node in memory.nodes for zone in node.kernel_zones)
    reserve = sum(node.managed // 25 for node in memory.nodes)
    idle = kernel_zones - held - max(reserve, sum(node.reserve for node in budget.nodes))
    # What a hypervisor's balloon has taken is missing in the zones, and may be there in the host's total.
    taken = meminfo["MemTotal"] - sum(node.managed for node in memory.nodes)
    own = Machine(machines.of_this_host().ram - taken, machines.of_this_host().nodes)
    planned = max(Budget.of(made.memory).available() for made in machines.idle(own))
    assert 0 < planned <= idle - sum(meminfo[name] for name in _KERNEL)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _parts(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def test_the_command_plans_this_machine() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "vmmback", "host", "plan", "--guests", "1x64MiB", "--json"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert json.loads(ran.stdout)["machine"]["ram"] == machines.of_this_host().ram


# Whatever a text is, and whichever of the shapes it stands in: both are as the browser laid them out.
_BEYOND = """
[...document.querySelectorAll("text, rect:not([fill^=url])")].filter(shape => {
  const box = shape.getBoundingClientRect(), all = document.documentElement.viewBox.baseVal;
  return box.left < -1 || box.right > all.width + 1 || box.bottom > all.height + 1;
}).map(shape => shape.outerHTML)
"""
_CROSSING = """
[...document.querySelectorAll("text")].map(text => text.getBoundingClientRect()).filter((one, at, boxes) =>
  boxes.some((other, number) => number > at && one.left < other.right - 1 && other.left < one.right - 1
                                && one.top < other.bottom - 4 && other.top < one.bottom - 4)).length
"""


@pytest.mark.usefixtures("needs_chromium")
def test_nothing_in_the_picture_is_cut_off_or_lies_over_another_text(tmp_path: Path) -> None:
    plans = [
        plan.make(Machine(256 * GIB, 2), [Guests(40, 4 * GIB), Guests(10, 16 * GIB)]),
        plan.make(Machine(64 * GIB, 4, Core(movable=True, percent=30), GIB), [Guests(200, GIB), Guests(3, 8 * GIB)]),
        plan.make(Machine(GIB), [Guests(1, GIB // 16)]),
        plan.make(Machine(16 * 1024 * GIB, 8), [Guests(9000, GIB)]),
    ]
    with browser(tmp_path / "browser.log") as page:
        for number, made in enumerate(plans):
            path = tmp_path / f"{number}.svg"
            path.write_text(plan_view.svg(made))
            page.open(path)
            assert page.evaluate(_BEYOND) == []
            assert page.evaluate(_CROSSING) == 0
            assert [method for method, _ in page.events if method == "Log.entryAdded"] == []
