"""How much secret RAM a host can give, by the numbers of its zones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.errors import AdmissionRefused
from vmmback.host.budget import PROCESSES_BYTES, Budget, NodeBudget, with_page_tables
from vmmback.host.memory import HostMemory
from vmmback.linux.zones import Node, Zone

MIB, GIB = 1 << 20, 1 << 30
KERNEL_SIDE = 8 * MIB


def host(*zones: Zone, promised: int = 0, group_room: int | None = None, **counters: int) -> HostMemory:
    return HostMemory((Node(0, zones, **counters),), promised, group_room)


def normal(free: int, managed: int = 0, high: int = 0) -> Zone:
    return Zone("Normal", managed=managed or free, free=free, high=high)


DMA32 = Zone("DMA32", managed=GIB)
MOVABLE = Zone("Movable", managed=GIB, free=GIB)


def test_all_terms_of_a_node_s_sum_are_counted_once() -> None:
    zones = (
        DMA32._replace(free=300 * MIB, high=10 * MIB, protection=(0, 0, 20 * MIB), file=8 * MIB, low=6 * MIB),
        normal(500 * MIB, 2 * GIB, 7 * MIB)._replace(boost=100 * MIB, free_cma=50 * MIB, file=4 * MIB, low=9 * MIB),
        Zone("Movable", managed=GIB, free=700 * MIB, high=30 * MIB),
    )
    node = Node(0, zones, page_tables=2 * MIB, slab_reclaimable=20 * MIB, slab_unreclaimable=3 * MIB, protected_for=2)
    assert NodeBudget.of(node) == NodeBudget(
        number=0,
        free=(300 + 450) * MIB,
        reclaimable=(4 + 2 + 10) * MIB,  # less the half of each that is under its low watermark; half of the slab
        held=(10 + 20 + 7) * MIB,
        reserve=4 * GIB // 25 - (2 + 10 + 3) * MIB,
        movable=(50 + 670) * MIB,
    )


def test_what_is_reclaimed_fills_a_zone_to_its_watermark_before_it_is_room() -> None:
    cached = normal(GIB, high=30 * MIB)._replace(free=10 * MIB, file=100 * MIB, low=25 * MIB)
    node = NodeBudget.of(Node(0, (cached,)))
    assert node.free + node.reclaimable - node.held == (10 + 75 - 30) * MIB
    few = NodeBudget.of(Node(0, (cached._replace(file=20 * MIB),)))
    assert few.free + few.reclaimable - few.held == 0


def test_page_cache_that_must_lie_in_cma_is_none_that_secret_ram_can_replace() -> None:
    cached = normal(GIB)._replace(cma=300 * MIB, free_cma=100 * MIB, file=240 * MIB)
    assert NodeBudget.of(Node(0, (cached,))).reclaimable == 40 * MIB
    assert NodeBudget.of(Node(0, (cached._replace(file=150 * MIB),))).reclaimable == 0
    assert NodeBudget.of(Node(0, (cached._replace(anon=150 * MIB),))).reclaimable == 190 * MIB


@pytest.mark.parametrize(
    ("managed", "taken", "reserve"),
    [
        (GIB, 0, 64 * MIB),  # a small host keeps 64 MiB
        (8 * GIB, 0, 8 * GIB // 25),
        (8 * GIB, 100 * MIB, 8 * GIB // 25 - 100 * MIB),  # what the kernel has already, it needs no more
        (8 * GIB, 4 * GIB, 8 * GIB // 50),  # but always some more
    ],
)
def test_the_kernel_keeps_a_reserve(managed: int, taken: int, reserve: int) -> None:
    node = Node(0, (normal(managed),), slab_unreclaimable=taken)
    assert NodeBudget.of(node).reserve == reserve


def test_memory_that_only_movable_pages_can_use_gives_no_secret_ram_but_ordinary() -> None:
    budget = Budget.of(host(normal(64 * MIB + KERNEL_SIDE + 10 * MIB, 512 * MIB), MOVABLE))
    assert budget.largest_guest("secret") == 9 * MIB  # and page tables
    assert budget.largest_guest("ordinary") > 1000 * MIB


def test_a_guest_s_processes_take_kernel_memory_only_where_no_other_has_room_for_them() -> None:
    kernel, movable = normal(64 * MIB + KERNEL_SIDE + PROCESSES_BYTES, 512 * MIB), MOVABLE._replace(managed=GIB // 2)
    assert Budget.of(host(kernel)).largest_guest() == 0
    assert Budget.of(host(kernel, movable._replace(free=PROCESSES_BYTES))).largest_guest() == 95 * MIB


def test_what_is_promised_and_not_touched_is_not_promised_again() -> None:
    before = Budget.of(host(normal(GIB), MOVABLE)).largest_guest()
    after = Budget.of(host(normal(GIB), MOVABLE, promised=300 * MIB)).largest_guest()
    assert before - 300 * MIB <= after <= before - 298 * MIB


def test_page_tables_of_a_direct_map_that_is_not_split_yet_are_kept_for_kernel_zones_alone() -> None:
    whole = Budget.of(host(normal(4 * GIB), MOVABLE)._replace(huge_direct_map=5 * GIB))
    assert whole.direct_map == 4 * GIB // 512
    split = Budget.of(host(normal(4 * GIB), MOVABLE)._replace(huge_direct_map=0))
    assert split.available() - whole.available() == 8 * MIB


def test_a_memory_cgroup_with_less_room_decides() -> None:
    tight = host(normal(4 * GIB), group_room=PROCESSES_BYTES + KERNEL_SIDE + 257 * MIB)
    assert Budget.of(tight).largest_guest() == 256 * MIB
    with pytest.raises(AdmissionRefused, match="memory cgroup has room for 361 MiB more than was promised") as refused:
        Budget.of(tight).admit(257 * MIB)
    assert refused.value.hint == "set [memory] size to at most 256MiB, or raise the limit of the memory cgroup"


def test_nodes_are_added_up_and_one_that_is_short_takes_of_the_others() -> None:
    rich, poor = Node(0, (normal(GIB),)), Node(1, (normal(10 * MIB, GIB),))
    alone = Budget.of(HostMemory((rich,))).largest_guest()
    both = Budget.of(HostMemory((rich, poor))).largest_guest()
    assert alone - 64 * MIB < both < alone


@given(
    free=st.integers(0, 1 << 45),
    used=st.integers(0, 1 << 45),
    high=st.integers(0, 1 << 30),
    size=st.integers(MIB, 1 << 45),
    movable=st.integers(0, 1 << 40),
)
def test_a_guest_is_admitted_only_if_watermarks_and_reserve_stay(
    free: int, used: int, high: int, size: int, movable: int
) -> None:
    memory = host(normal(free, free + used, high=high), MOVABLE._replace(managed=movable, free=movable))
    budget = Budget.of(memory)
    stays = free - with_page_tables(size) - KERNEL_SIDE - max(0, PROCESSES_BYTES - movable)
    wanted = min(free, high) + budget.nodes[0].reserve
    try:
        budget.admit(size)
    except AdmissionRefused:
        assert stays < wanted + 2 * MIB
    else:
        assert stays >= wanted


def test_the_largest_guest_is_admitted_and_a_page_more_is_refused_with_the_numbers() -> None:
    budget = Budget.of(host(normal(1000 * MIB, high=4 * MIB), promised=20 * MIB))
    largest = budget.largest_guest()
    budget.admit(largest)
    with pytest.raises(AdmissionRefused) as refused:
        budget.admit(largest + 4096)
    assert refused.value.exit_code == 4
    assert refused.value.largest == largest
    for number in (f"{largest >> 20} MiB do", "1,000 MiB", " 4 MiB are held", " 64 MiB stay", " 20 MiB were promised"):
        assert number in refused.value.message
    assert f"at most {largest >> 20}MiB" in refused.value.hint


def test_where_no_guest_fits_the_hint_offers_none() -> None:
    with pytest.raises(AdmissionRefused) as refused:
        Budget.of(host(normal(50 * MIB, GIB))).admit(MIB)
    assert refused.value.hint == "free memory on the host"
