"""Nodes and zones of the host's memory: /proc/zoneinfo. Source: mm/vmstat.c, zoneinfo_show_print; sizes in bytes.

`root` is another folder with files of the same shape, for tests of the parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vmmback.linux.procfs import PAGE_SIZE, PROC

# Zones that the kernel's own allocations and secret pages can come from, in their order (include/linux/mmzone.h).
_KERNEL_ZONES = frozenset({"DMA", "DMA32", "Normal"})

_ZONE = re.compile(r"^Node (\d+), zone +(\S+)$", re.MULTILINE)
_COUNTER = re.compile(r"^ +(?:pages )?(\w+)(?::| ) *(\d+)$", re.MULTILINE)
_PROTECTION = re.compile(r"^ +protection: \(([\d, ]*)\)$", re.MULTILINE)


class Zone(NamedTuple):
    """One zone of a node, in bytes.

    `high` is the watermark at which the kernel stops to reclaim, without `boost`: that one is taken back as soon as
    kswapd has run (mm/vmscan.c, balance_pgdat), though the file adds it to every watermark. `protection` is what an
    allocation that may use a higher zone must leave here (lowmem_reserve_ratio), by the index of that zone. `cma` is
    part of `managed` and `free_cma` part of `free`: only movable pages may lie there. `file` is page cache.
    """

    name: str
    present: int = 0
    managed: int = 0
    free: int = 0
    min: int = 0
    low: int = 0
    high: int = 0
    boost: int = 0
    protection: tuple[int, ...] = ()
    cma: int = 0
    free_cma: int = 0
    file: int = 0
    anon: int = 0
    unevictable: int = 0
    mlocked: int = 0

    @property
    def for_kernel(self) -> bool:
        """Whether the kernel's own allocations, and so secret pages, can come from it."""
        return self.name in _KERNEL_ZONES


class Node(NamedTuple):
    """A NUMA node with its zones, those that are empty left out, and what the kernel itself uses of it, in bytes."""

    number: int
    zones: tuple[Zone, ...]
    page_tables: int = 0
    slab_reclaimable: int = 0
    slab_unreclaimable: int = 0
    kernel_stacks: int = 0
    protected_for: int = 0
    """The index in `Zone.protection` of the highest zone that secret pages may come from."""

    @property
    def kernel_zones(self) -> tuple[Zone, ...]:
        """The zones that secret pages can come from."""
        return tuple(zone for zone in self.zones if zone.for_kernel)

    @property
    def managed(self) -> int:
        """Bytes of all zones that the page allocator manages."""
        return sum(zone.managed for zone in self.zones)


def nodes(root: Path = PROC) -> tuple[Node, ...]:
    """Return the nodes that have memory, in the order of their numbers. Raises OSError."""
    text = (root / "zoneinfo").read_text()
    found: dict[int, list[tuple[str, str]]] = {}
    for number, name, block in _blocks(text):
        found.setdefault(number, []).append((name, block))
    made = (_node(number, blocks) for number, blocks in sorted(found.items()))
    return tuple(node for node in made if node.zones)


def _blocks(text: str) -> Iterator[tuple[int, str, str]]:
    parts = _ZONE.split(text)
    return zip(map(int, parts[1::3]), parts[2::3], parts[3::3], strict=True)


def _node(number: int, blocks: list[tuple[str, str]]) -> Node:
    zones = [_zone(name, block) for name, block in blocks]
    counters: dict[str, int] = {}
    for _, block in blocks:
        if "per-node stats" in block:  # in that of the first zone that has memory, before its own
            counters = _counters(block.partition("pages free")[0])
    kernel = [index for index, (name, _) in enumerate(blocks) if name in _KERNEL_ZONES]
    return Node(
        number=number,
        zones=tuple(zone for zone in zones if zone.present),
        page_tables=counters.get("nr_page_table_pages", 0) * PAGE_SIZE,
        slab_reclaimable=counters.get("nr_slab_reclaimable", 0) * PAGE_SIZE,
        slab_unreclaimable=counters.get("nr_slab_unreclaimable", 0) * PAGE_SIZE,
        kernel_stacks=counters.get("nr_kernel_stack", 0) * 1024,  # the one counter in KiB (NR_KERNEL_STACK_KB)
        protected_for=max(kernel, default=0),
    )


def _zone(name: str, block: str) -> Zone:
    counters = _counters("pages free" + block.partition("pages free")[2])
    protection = _PROTECTION.search(block)

    def size(*names: str) -> int:
        return sum(counters.get(each, 0) for each in names) * PAGE_SIZE

    boost = size("boost")
    return Zone(
        name=name,
        present=size("present"),
        managed=size("managed"),
        free=size("free"),
        min=size("min") - boost,
        low=size("low") - boost,
        high=size("high") - boost,
        boost=boost,
        protection=tuple(int(pages) * PAGE_SIZE for pages in protection[1].split(",")) if protection else (),
        cma=size("cma"),
        free_cma=size("nr_free_cma"),
        file=size("nr_zone_active_file", "nr_zone_inactive_file"),
        anon=size("nr_zone_active_anon", "nr_zone_inactive_anon"),
        unevictable=size("nr_zone_unevictable"),
        mlocked=size("nr_mlock"),
    )


def _counters(block: str) -> dict[str, int]:
    # `high` and others come again, behind a colon, for each processor's own pages: the zone's own come first.
    counters: dict[str, int] = {}
    for name, value in _COUNTER.findall(" " + block if block.startswith("pages") else block):
        counters.setdefault(name, int(value))
    return counters
