"""What a plan says: which of the guests fit, what would be enough, and where they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmmback.host import machine as machines
from vmmback.host import plan
from vmmback.host.budget import Budget
from vmmback.host.direct_map_estimate import left_in_huge_pages
from vmmback.host.machine import Core, Machine
from vmmback.host.plan import Guests
from vmmback.host.qemu import AUX_RAM_BYTES

MIB, GIB = 1 << 20, 1 << 30
SERVER = Machine(256 * GIB, 2)
PROCESSES, KERNEL_SIDE = 96 * MIB, 8 * MIB


def need(count: int, size: int, processes: int = PROCESSES) -> int:
    return count * (size + size // 256 + KERNEL_SIDE + processes)


def test_guests_take_their_ram_page_tables_and_processes() -> None:
    made = plan.make(SERVER, [Guests(40, 4 * GIB), Guests(4, 16 * GIB)])
    assert made.fits
    assert made.fitting == made.guests
    assert made.spare == made.budget - need(40, 4 * GIB) - need(4, 16 * GIB)
    assert sum(node.whole + node.parts for node in made.nodes) == made.budget - made.spare


def test_processes_lie_in_zone_movable_as_far_as_it_has_room() -> None:
    roomy = replace(SERVER, core=Core(movable=False, size=200 * GIB))
    made = plan.make(roomy, [Guests(40, 4 * GIB)])
    assert made.movable > 50 * GIB
    assert made.spare == made.budget - need(40, 4 * GIB, processes=0)
    tight = plan.make(replace(SERVER, core=Core(movable=True, size=6 * GIB)), [Guests(40, 4 * GIB)])
    assert 0 < tight.movable < 40 * PROCESSES
    assert tight.spare == tight.budget + tight.movable - need(40, 4 * GIB)


def test_the_worst_machine_that_it_can_be_decides() -> None:
    machine = Machine(8 * GIB, core=Core(movable=False, percent=25))
    budgets = [Budget.of(idle.memory).available() for idle in machines.idle(machine)]
    made = plan.make(machine, [Guests(1, 64 * MIB)])
    assert max(budgets) - min(budgets) > 2 * GIB  # RAM below 4 GiB is the kernel's, and nobody knows how much it is
    assert made.budget == min(budgets) + KERNEL_SIDE


def test_what_does_not_fit_is_told_with_what_would() -> None:
    made = plan.make(SERVER, [Guests(40, 4 * GIB), Guests(10, 16 * GIB)])
    assert not made.fits
    assert made.spare == made.budget - need(40, 4 * GIB) - need(10, 16 * GIB) < 0
    assert [some.count for some in made.fitting] == [40, 4]
    assert not plan.fits(SERVER, [Guests(40, 4 * GIB), Guests(5, 16 * GIB)])
    assert made.least_kernelcore is None  # all memory is the kernel's already
    assert made.least_ram == 360 * GIB
    assert plan.fits(Machine(360 * GIB, 2), made.guests)
    assert not plan.fits(Machine(340 * GIB, 2), made.guests)


def test_the_least_kernelcore_is_enough_and_the_step_below_is_not() -> None:
    guests = [Guests(20, 4 * GIB)]
    made = plan.make(SERVER, guests)
    assert made.least_kernelcore
    assert made.least_kernelcore % GIB == 0
    assert plan.fits(replace(SERVER, core=Core(movable=False, size=made.least_kernelcore)), guests)
    assert not plan.fits(replace(SERVER, core=Core(movable=False, size=made.least_kernelcore - GIB)), guests)


def test_no_ram_is_enough_while_kernelcore_stays_as_it_is() -> None:
    made = plan.make(replace(SERVER, core=Core(movable=False, size=32 * GIB)), [Guests(20, 4 * GIB)])
    assert not made.fits
    assert made.least_ram is None
    assert made.least_kernelcore == plan.make(SERVER, made.guests).least_kernelcore


def test_cma_is_taken_off() -> None:
    with_cma = plan.make(replace(SERVER, cma=8 * GIB), [Guests(1, GIB)])
    assert with_cma.budget == plan.make(SERVER, [Guests(1, GIB)]).budget - 8 * GIB
    assert sum(node.cma for node in with_cma.nodes) == 8 * GIB
    assert with_cma.movable == 8 * GIB
    assert not plan.make(replace(SERVER, cma=255 * GIB), [Guests(1, MIB)]).fits


def test_guests_that_find_no_node_with_room_straddle_some() -> None:
    whole = plan.make(Machine(64 * GIB, 4), [Guests(4, 8 * GIB)])
    assert whole.straddling == 0
    assert [node.placed for node in whole.nodes] == [(Guests(1, 8 * GIB),)] * 4
    split = plan.make(Machine(64 * GIB, 4), [Guests(1, 20 * GIB), Guests(2, 8 * GIB)])
    assert split.fits
    assert split.straddling == 1
    assert sum(node.parts for node in split.nodes) == need(1, 20 * GIB)


def test_sizes_count_as_the_whole_mib_that_admission_counts() -> None:
    made = plan.make(SERVER, [Guests(3, MIB + 8192)])
    assert made.guests == (Guests(3, 2 * MIB),)


def test_the_limit_on_locked_memory_is_that_of_the_largest_guest_or_of_all() -> None:
    made = plan.make(SERVER, [Guests(3, GIB), Guests(1, 8 * GIB)])
    assert made.memlock == 8 * GIB + AUX_RAM_BYTES
    assert made.memlock_of_all == 11 * GIB + 4 * AUX_RAM_BYTES


@pytest.mark.parametrize(
    ("machine", "boot"),
    [
        (SERVER, ("secretmem.enable=1",)),
        (
            replace(SERVER, core=Core(movable=False, size=200 * GIB), cma=GIB),
            ("secretmem.enable=1", "kernelcore=200G", "cma=1G"),
        ),
        (replace(SERVER, core=Core(movable=True, percent=30)), ("secretmem.enable=1", "movablecore=30%")),
    ],
)
def test_boot_parameters(machine: Machine, boot: tuple[str, ...]) -> None:
    assert plan.make(machine, [Guests(1, GIB)]).boot == boot


def test_what_stays_in_huge_pages_is_estimated_of_the_guests_that_fit() -> None:
    machine = replace(SERVER, core=Core(movable=False, size=128 * GIB))
    made = plan.make(machine, [Guests(40, 4 * GIB)])
    count = made.fitting[0].count
    assert 0 < count < 40
    assert made.huge_direct_map == left_in_huge_pages(128 * GIB, count * 4 * GIB) + 127 * GIB
    assert made.huge_direct_map < plan.make(machine, [Guests(1, 4 * GIB)]).huge_direct_map
