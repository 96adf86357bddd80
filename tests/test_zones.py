"""Zones and their fragments, by snapshots of real machines (tests/snapshots/README.md) and one that is generated."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmback.host.budget import Budget
from vmmback.host.memory import HostMemory
from vmmback.linux import fragments, procfs, zones
from vmmback.linux.zones import Node, Zone

SNAPSHOTS = Path(__file__).parent / "snapshots"
MACHINES = sorted(path for path in SNAPSHOTS.iterdir() if path.is_dir())
PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30


def snapshot(name: str) -> tuple[Node, ...]:
    return zones.nodes(SNAPSHOTS / name)


def test_a_machine_s_zones_are_read_as_they_stand_there() -> None:
    (node,) = snapshot("movable-1g")
    assert [zone.name for zone in node.zones] == ["DMA", "DMA32", "Movable"]
    assert node.kernel_zones == node.zones[:2]
    dma32 = node.zones[1]
    text = (SNAPSHOTS / "movable-1g/zoneinfo").read_text().partition("zone    DMA32")[2]
    for name, value in {
        "pages free": dma32.free, "min": dma32.min, "low": dma32.low, "high": dma32.high, "present": dma32.present,
        "managed": dma32.managed, "nr_free_cma": dma32.free_cma, "nr_mlock": dma32.mlocked,
    }.items():  # fmt: skip
        assert int(text.partition(f" {name} ")[2].split()[0]) * PAGE == value, name
    assert node.protected_for == 2  # DMA, DMA32, Normal, though that one is empty


def test_watermarks_are_read_without_their_boost() -> None:
    normal = snapshot("kernel-6.18-24g")[0].zones[2]
    text = (SNAPSHOTS / "kernel-6.18-24g/zoneinfo").read_text().partition("zone   Normal")[2]
    boost, high = (int(text.partition(f" {name} ")[2].split()[0]) * PAGE for name in ("boost", "high"))
    assert boost > 0
    assert (normal.boost, normal.high) == (boost, high - boost)


def test_each_node_has_its_own_counters() -> None:
    first, second = snapshot("two-nodes-movable-2g")
    assert (first.number, second.number) == (0, 1)
    assert [zone.name for zone in second.zones] == ["DMA32", "Movable"]
    assert first.slab_unreclaimable != second.slab_unreclaimable
    assert min(node.page_tables + node.kernel_stacks for node in (first, second)) > 0


def test_contiguous_memory_is_part_of_its_zone() -> None:
    (zone,) = snapshot("cma-arm64-2g")[0].zones
    assert zone.cma == 512 * MIB
    assert 0 < zone.free_cma <= zone.cma < zone.managed


@pytest.mark.parametrize("machine", MACHINES, ids=lambda path: path.name)
def test_zones_agree_with_the_kernel_s_other_files(machine: Path) -> None:
    """From the same machine a moment apart: free by orders and by types, and the whole of the memory."""
    nodes, total = zones.nodes(machine), procfs.meminfo(machine)["MemTotal"]
    assert abs(sum(node.managed for node in nodes) - total) <= MIB
    blocks, by_type = fragments.free_blocks(machine), fragments.free_blocks_by_type(machine)
    assert by_type is not None
    for node in nodes:
        for zone in node.zones:
            place = node.number, zone.name
            assert abs(fragments.pages(blocks[place]) * PAGE - zone.free) <= 4 * MIB
            typed = sum(fragments.pages(orders) for orders in by_type[place].values())
            assert abs(typed * PAGE - zone.free) <= 8 * MIB


@pytest.mark.parametrize("machine", MACHINES, ids=lambda path: path.name)
def test_no_machine_gives_more_than_is_available_where_secret_pages_can_lie(machine: Path) -> None:
    nodes = zones.nodes(machine)
    free = sum(zone.free - zone.free_cma + zone.file for node in nodes for zone in node.kernel_zones)
    largest = Budget.of(HostMemory(nodes)).largest_guest()
    assert largest < min(free, procfs.meminfo(machine)["MemAvailable"])
    assert largest > free * 6 // 10 or free < GIB


def block(node: int, zone: str, pages: int, protection: str, stats: str = "") -> str:
    """Return a zone as zoneinfo_show_print (mm/vmstat.c) writes it."""
    head = f"Node {node}, zone {zone:>8}\n{stats}  pages free     {pages // 2}\n"
    sizes = {"boost": 0, "min": 100, "low": 200, "high": 300, "spanned": pages, "present": pages, "managed": pages}
    body = "".join(f"        {name:<8} {size}\n" for name, size in sizes.items())
    tail = f"        cma      0\n        protection: ({protection})\n"
    if not pages:
        return head + body + tail
    pcp = "  pagesets\n    cpu: 0\n              count:    5\n              high:     14\n              batch:    1\n"
    return f"{head}{body}{tail}      nr_free_pages {pages // 2}\n      nr_free_cma  0\n{pcp}  start_pfn:           1\n"


def test_a_terabyte_on_two_nodes_with_a_movable_zone_and_a_node_without_memory(tmp_path: Path) -> None:
    """Generated from the format: no such machine was at hand. A node without memory has empty zones alone."""
    stats = (
        "  per-node stats\n      nr_slab_reclaimable 1000\n      nr_kernel_stack 8000\n      nr_page_table_pages 50\n"
    )
    guard = "0, 7, 999, 999, 999"
    text = block(0, "DMA", 3840, guard, stats) + block(0, "DMA32", 500_000, "0, 0, 992, 992, 992")
    for node in (0, 1):
        text += block(node, "DMA", 0, guard) + block(node, "DMA32", 0, guard) if node else ""
        text += block(node, "Normal", 33 << 20, "0, 0, 0, 500, 500", stats if node else "")
        text += block(node, "Movable", 100 << 20, "0, 0, 0, 0, 0") + block(node, "Device", 0, "0, 0, 0, 0, 0")
    text += "".join(block(2, zone, 0, "0, 0, 0, 0, 0") for zone in ("DMA", "DMA32", "Normal", "Movable", "Device"))
    (tmp_path / "zoneinfo").write_text(text)
    first, second = zones.nodes(tmp_path)
    assert [zone.name for zone in first.zones] == ["DMA", "DMA32", "Normal", "Movable"]
    assert second.zones == (
        Zone(
            "Normal", present=33 << 32, managed=33 << 32, free=33 << 31, min=100 * PAGE, low=200 * PAGE,
            high=300 * PAGE, protection=(0, 0, 0, 500 * PAGE, 500 * PAGE),
        ),
        Zone(
            "Movable", present=100 << 32, managed=100 << 32, free=50 << 32, min=100 * PAGE, low=200 * PAGE,
            high=300 * PAGE, protection=(0, 0, 0, 0, 0),
        ),
    )  # fmt: skip
    assert (second.slab_reclaimable, second.kernel_stacks, second.page_tables) == (1000 * PAGE, 8000 << 10, 50 * PAGE)
    assert first.zones[0].protection[first.protected_for] == 999 * PAGE


def test_who_is_not_root_does_not_learn_the_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert fragments.free_blocks_by_type(tmp_path) is None


def test_a_count_that_the_kernel_gave_up_is_at_least_so_much(tmp_path: Path) -> None:
    (tmp_path / "pagetypeinfo").write_text("Node    0, zone   Normal, type      Movable >100000      2      0 \n")
    assert fragments.free_blocks_by_type(tmp_path) == {(0, "Normal"): {"Movable": (100_000, 2, 0)}}
