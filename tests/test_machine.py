"""The machine that is not there: its zones as kernels cut them, and never more to give than a real one has."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from vmmback.errors import AdmissionRefused
from vmmback.host import machine as machines
from vmmback.host import plan
from vmmback.host.budget import Budget
from vmmback.host.machine import Core, Machine, Taken
from vmmback.host.memory import HostMemory
from vmmback.host.plan import Guests
from vmmback.linux import zones

MIB, GIB = 1 << 20, 1 << 30
SNAPSHOTS = Path(__file__).parent / "snapshots"

# The machines of snapshots/README.md, as they were started.
MACHINES = {
    "plain-1g": Machine(GIB),
    "tiny-96m": Machine(96 * MIB),
    "movable-1g": Machine(GIB, core=Core(movable=True, size=700 * MIB)),
    "movable-8g": Machine(8 * GIB, core=Core(movable=False, percent=25)),
    "two-nodes-2g": Machine(2 * GIB, 2),
    "two-nodes-movable-2g": Machine(2 * GIB, 2, Core(movable=True, size=GIB)),
    "large-64g": Machine(64 * GIB),
    "four-nodes-256g": Machine(256 * GIB, 4, Core(movable=True, size=128 * GIB)),
    "cma-arm64-2g": Machine(2 * GIB, cma=512 * MIB),
    "cma-movable-arm64-4g": Machine(4 * GIB, core=Core(movable=True, size=2 * GIB), cma=256 * MIB),
    "kernel-6.18-24g": Machine(24 * GIB),
}


def test_every_snapshot_is_planned() -> None:
    assert {folder.name for folder in SNAPSHOTS.iterdir() if folder.is_dir()} == set(MACHINES)


@pytest.mark.parametrize("size", [16 * MIB, 64 * MIB, 256 * MIB, GIB])
@pytest.mark.parametrize("name", MACHINES)
def test_a_real_machine_admits_what_its_plan_says_to_fit(name: str, size: int) -> None:
    real = HostMemory(zones.nodes(SNAPSHOTS / name))
    (fitting,) = plan.make(MACHINES[name], [Guests(400, size)]).fitting
    for _ in range(fitting.count):
        Budget.of(real).admit(size)
        real = plan.launch(real, Guests(1, size))
    if name == "large-64g" and size == GIB:
        assert fitting.count > 50  # of 64 GiB: the plan is a bound, and no idle one


@pytest.mark.parametrize(
    ("name", "low"),
    [
        ("movable-8g", 2 * GIB),
        ("two-nodes-movable-2g", 2 * GIB),
        ("four-nodes-256g", 2 * GIB),
        ("movable-1g", GIB),
    ],
)
def test_zone_movable_begins_where_the_kernel_has_it(name: str, low: int) -> None:
    nodes = zones.nodes(SNAPSHOTS / name)
    sizes = [sum(zone.present for zone in node.zones) for node in nodes]
    bounds = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    core = MACHINES[name].core
    assert core
    starts = machines._movable_starts(list(pairwise(bounds)), low, core.kernel(bounds[-1]))
    for node, bound, start in zip(nodes, bounds, starts, strict=False):
        real = sum(zone.present for zone in node.kernel_zones)
        assert abs(start - bound - real) <= 5 * MIB  # it rounds up to 4 MiB, and firmware keeps some KiB


def test_the_watermarks_are_the_kernel_s() -> None:
    (real,) = zones.nodes(SNAPSHOTS / "kernel-6.18-24g")
    for made in machines.idle(Machine(24 * GIB)):
        (node,) = made.memory.nodes
        theirs, ours = sum(zone.min for zone in real.zones), sum(zone.min for zone in node.zones)
        assert abs(theirs - (67584 << 10)) <= 4096 * 3  # vm.min_free_kbytes of that machine, and fractions of a page
        assert abs(ours - (67584 << 10)) <= 4096 * 3
        high = sum(zone.high for zone in real.zones)
        assert high - 64 * 1024 <= sum(zone.high for zone in node.zones) <= high + MIB  # the kernel manages a bit less


def test_the_terms_of_a_machine_by_hand() -> None:
    """64 GiB, one node, 3 GiB of it below 4 GiB: every term by the words of docs/PLAN.md."""
    (made,) = [one for one in machines.idle(Machine(64 * GIB)) if one.memory.nodes[0].zones[1].managed == 3056 * MIB]
    usable = 63 * GIB  # firmware keeps 1/64
    dma, dma32, normal = made.memory.nodes[0].zones
    assert [zone.managed for zone in (dma, dma32, normal)] == [16 * MIB, 3056 * MIB, 60 * GIB]
    assert sum(zone.min for zone in (dma, dma32, normal)) >> 10 == 67584 - 1  # 3 zones of 11 blocks of 2 MiB
    assert dma.protection[2] == (3056 * MIB + 60 * GIB) // 256
    assert dma32.protection[2] == 240 * MIB
    assert normal.protection == ()
    low = {zone.name: zone.low for zone in (dma, dma32, normal)}
    assert made.taken == Taken(
        firmware=GIB,
        memmap=usable // 64,
        image=128 * MIB + 126 * MIB,
        direct_map=126 * MIB + 252 * 1024,
        idle=256 * MIB + 1008 * MIB,
        held_back=sum(low.values()),
    )
    gone = made.taken.memmap + made.taken.image + made.taken.direct_map + made.taken.idle
    assert normal.free == 60 * GIB - low["Normal"] - gone  # the highest zone gives it all
    assert dma32.free == 3056 * MIB - low["DMA32"]
    (node,) = Budget.of(made.memory).nodes
    assert node.held == dma.free + dma32.high + 240 * MIB + normal.high
    assert node.reserve == usable // 25
    assert node.available == normal.free + dma32.free + dma.free - node.held - node.reserve


def test_a_machine_with_both_zones_by_hand() -> None:
    """16 GiB on two nodes, kernelcore=8G, cma=1G."""
    made = next(
        one
        for one in machines.idle(Machine(16 * GIB, 2, Core(movable=False, size=8 * GIB), GIB))
        if one.memory.nodes[0].zones[1].managed == 2032 * MIB
    )
    usable = 16128 * MIB  # firmware keeps 1/64
    assert made.taken.memmap == usable // 64
    first, second = made.memory.nodes
    assert [(zone.name, zone.managed >> 20) for zone in first.zones] == [
        ("DMA", 16), ("DMA32", 2032), ("Normal", 2048), ("Movable", 3968)]  # fmt: skip
    assert [(zone.name, zone.managed >> 20) for zone in second.zones] == [("Normal", 4096), ("Movable", 3968)]
    for node in (first, second):  # the memory map lies at the node's end
        movable = node.zones[-1]
        assert movable.free == 3968 * MIB - movable.low - 126 * MIB
    assert sum(zone.free_cma for node in (first, second) for zone in node.zones) == GIB
    assert first.zones[1].protection[2] == 8 * MIB  # 2 GiB of Normal above it
    budget = Budget.of(made.memory)
    assert budget.movable == GIB + sum(node.zones[-1].free - node.zones[-1].high for node in (first, second))
    gone = made.taken.image + made.taken.direct_map + made.taken.idle
    kernel = [zone for node in (first, second) for zone in node.kernel_zones]
    held = sum(zone.low + zone.high for zone in kernel if zone.name != "DMA") + 8 * MIB + 16 * MIB
    reserve = 2 * (8064 * MIB // 25)
    assert budget.available() == 8 * GIB - gone - GIB - held - reserve - budget.overhead


@pytest.mark.parametrize(
    ("core", "kernel"),
    [
        (Core(movable=False, size=3 * GIB), 3 * GIB),
        (Core(movable=True, size=3 * GIB), 5 * GIB),
        (Core(movable=False, percent=25), 2 * GIB),
        (Core(movable=True, percent=25), 6 * GIB),
        # As the kernel has it: nothing for the kernel, or all of it, means no ZONE_MOVABLE.
        (Core(movable=False, size=9 * GIB), 0),
        (Core(movable=True, size=9 * GIB), 0),
        (Core(movable=False, percent=100), 0),
        (Core(movable=True, percent=0), 0),
    ],
)
def test_the_kernel_s_share(core: Core, kernel: int) -> None:
    assert core.kernel(8 * GIB) == kernel


def test_what_cannot_be_taken_is_missed() -> None:
    made = machines.idle(Machine(GIB))[0].memory
    assert Budget.of(machines.take(made, 2 * GIB)).available() < -GIB
    with pytest.raises(AdmissionRefused):
        Budget.of(machines.take(made, GIB)).admit(MIB)


@pytest.mark.parametrize(("size", "text"), [(4 << 40, "4T"), (3 * GIB, "3G"), (1536 * MIB, "1536M"), (8192, "8K")])
def test_sizes_are_written_as_the_kernel_reads_them(size: int, text: str) -> None:
    assert machines.boot_size(size) == text
    assert str(Core(movable=True, size=size)) == f"movablecore={text}"
    assert str(Core(movable=False, percent=25)) == "kernelcore=25%"


@pytest.mark.parametrize("name", MACHINES)
def test_a_host_s_own_ram_is_what_is_built_in_and_planned_as_less(name: str) -> None:
    machine = machines.of_this_host(SNAPSHOTS / name)
    assert (machine.ram, machine.nodes) == (MACHINES[name].ram, MACHINES[name].nodes)
    known = sum(zone.present for node in zones.nodes(SNAPSHOTS / name) for zone in node.zones)
    assert machine.ram - machines.idle(machine)[0].taken.firmware <= known
