"""The memory of a machine that is not there, or not booted in this way: what it has at least once it is idle.

The plan judges it by the same budget as admission does a real one, so it must be a lower bound of that in every term.
What nobody can know beforehand (how much RAM lies below 4 GiB) is tried in every way; what a kernel takes is assumed as
high as docs/PLAN.md says, and from the zones that secret pages need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import isqrt
from pathlib import Path

from vmmback.host.budget import held
from vmmback.host.memory import HostMemory
from vmmback.linux import zones as zoneinfo
from vmmback.linux.procfs import PAGE_SIZE, PROC
from vmmback.linux.zones import Node, Zone

_GIB, _MIB, _KIB = 1 << 30, 1 << 20, 1 << 10

# What firmware keeps, and never tells the kernel of: up to 1/64, at most 1 GiB.
_FIRMWARE_SHARE, _FIRMWARE_MOST = 64, _GIB
_STRUCT_PAGE_BYTES = 64  # include/linux/mm_types.h; the memory map has one for each page
# The kernel's image (under 64 MiB), the bounce buffers of swiotlb (64 MiB), and hash tables made at boot, of which
# those of the file system are the largest: 1/1024 and 1/2048 (fs/dcache.c, fs/inode.c).
_IMAGE_BYTES, _TABLES_SHARE = 128 * _MIB, 512
# A page of entries for each 2 MiB, a page for each GiB of them: the direct map once all its huge pages are split.
_DIRECT_MAP_SHARE = 2 * _MIB // PAGE_SIZE
# What kernel and services use once the machine is up: slab, per-CPU memory, rings of drivers, processes.
_IDLE_BYTES, _IDLE_SHARE = 256 * _MIB, 64

_DMA_BYTES, _DMA32_END = 16 * _MIB, 4 * _GIB
# Below 4 GiB lie devices, too: RAM has from 1 GiB to all of it there, the rest above.
_LOW_SIZES = tuple(range(_GIB, _DMA32_END + 1, _GIB // 2))
_RESERVE_RATIO = 256  # mm/page_alloc.c, sysctl_lowmem_reserve_ratio of DMA and DMA32
_NORMAL = 2  # the index of that zone in Zone.protection

# mm/page_alloc.c, calculate_min_free_kbytes: 4 * sqrt(KiB of the kernel zones), in these limits.
_MIN_FREE_LEAST, _MIN_FREE_MOST = 128 * _KIB, 256 * _MIB
# mm/khugepaged.c, set_recommended_min_free_kbytes: for each kernel zone two blocks, and three times three of the types
# of pages that per-CPU lists have; at most 1/20 of the kernel zones.
_HUGE_BLOCKS, _HUGE_BLOCK_BYTES, _HUGE_SHARE = 2 + 3 * 3, 2 * _MIB, 20
_SCALE = 1000  # vm.watermark_scale_factor: 10 of 10,000


@dataclass(frozen=True)
class Core:
    """`kernelcore=` or `movablecore=`: bytes, or percents of all RAM. `movable` says which of the two it is."""

    movable: bool
    size: int = 0
    percent: int = 0

    def kernel(self, total: int) -> int:
        """Return how much of `total` bytes goes to the kernel zones; 0 for all (find_zone_movable_pfns_for_nodes)."""
        wanted = total * self.percent // 100 if self.percent else self.size
        kernel = total - min(total, wanted) if self.movable and wanted else wanted
        return kernel if kernel < total else 0

    def __str__(self) -> str:
        """Return the boot parameter. The kernel knows K, M, G and T (lib/cmdline.c, memparse)."""
        value = f"{self.percent}%" if self.percent else boot_size(self.size)
        return f"{'movablecore' if self.movable else 'kernelcore'}={value}"


@dataclass(frozen=True)
class Machine:
    """A machine with `ram` bytes, evenly on its nodes, and the boot parameters that say what may lie where."""

    ram: int
    nodes: int = 1
    core: Core | None = None
    cma: int = 0


@dataclass(frozen=True)
class Taken:
    """What of a machine's RAM is gone before the first guest, in bytes. `held_back` is page cache that stays."""

    firmware: int
    memmap: int
    image: int
    direct_map: int
    idle: int
    held_back: int


@dataclass(frozen=True)
class Idle:
    """A machine that is up: what it took, and the snapshot that a budget is made of."""

    taken: Taken
    memory: HostMemory


def boot_size(size: int) -> str:
    """Return a size as the kernel reads it, in the largest unit that is whole."""
    for unit, letter in ((1 << 40, "T"), (_GIB, "G"), (_MIB, "M"), (_KIB, "K")):
        if size % unit == 0 and size:
            return f"{size // unit}{letter}"
    return str(size)


@lru_cache(maxsize=64)
def idle(machine: Machine) -> tuple[Idle, ...]:
    """Return the machine in every way that its RAM may lie below and above 4 GiB."""
    usable = machine.ram - min(machine.ram // _FIRMWARE_SHARE, _FIRMWARE_MOST)
    lows = [low for low in _LOW_SIZES if low < usable]
    return tuple(_idle(machine, usable, low) for low in [*lows, *([usable] if usable <= _DMA32_END else [])])


def take(memory: HostMemory, size: int) -> HostMemory:
    """Take memory of the kernel zones, where a budget counts it, from the highest zone on; the last of it as promised.

    What admission would hold back is left, though a real allocation may take of it first: that costs a budget less.
    """

    def room(zone: Zone, node: Node) -> int:
        return zone.free - zone.free_cma - held(zone, node.protected_for) if zone.for_kernel else 0

    taken, rest = _take(memory, size, room, lambda zone, part: zone._replace(free=zone.free - part))
    return taken._replace(promised=taken.promised + rest)


def take_movable(memory: HostMemory, size: int) -> HostMemory:
    """Take memory that only movable pages can use, as far as there is any."""

    def room(zone: Zone, _node: Node) -> int:
        return zone.free_cma if zone.for_kernel else max(0, zone.free - zone.high)

    def less(zone: Zone, part: int) -> Zone:
        return zone._replace(free=zone.free - part, free_cma=zone.free_cma - part if zone.for_kernel else 0)

    return _take(memory, size, room, less)[0]


def _take(
    memory: HostMemory, size: int, room: Callable[[Zone, Node], int], less: Callable[[Zone, int], Zone]
) -> tuple[HostMemory, int]:
    nodes = []
    for node in memory.nodes:
        zones = []
        for zone in reversed(node.zones):
            part = min(size, room(zone, node))
            size -= part
            zones.append(less(zone, part) if part else zone)
        nodes.append(node._replace(zones=tuple(reversed(zones))))
    return memory._replace(nodes=tuple(nodes)), size


def _idle(machine: Machine, usable: int, low: int) -> Idle:
    bounds = [usable * number // machine.nodes // PAGE_SIZE * PAGE_SIZE for number in range(machine.nodes + 1)]
    spans = list(pairwise(bounds))
    starts = _movable_starts(spans, low, machine.core.kernel(usable) if machine.core else 0)
    zones = [_zones(first, last, movable, low) for (first, last), movable in zip(spans, starts, strict=True)]
    nodes = _with_watermarks(zones)
    memmap = [-(-(last - first) * _STRUCT_PAGE_BYTES // PAGE_SIZE) for first, last in spans]
    taken = Taken(
        firmware=machine.ram - usable,
        memmap=sum(memmap),
        image=_IMAGE_BYTES + usable // _TABLES_SHARE,
        direct_map=usable // _DIRECT_MAP_SHARE + usable // _DIRECT_MAP_SHARE**2,
        idle=_IDLE_BYTES + usable // _IDLE_SHARE,
        held_back=sum(min(zone.low, zone.free) for node in nodes for zone in node.zones),
    )
    memory = _with_cma(_without_memmap(nodes, memmap), machine.cma)
    return Idle(taken, take(memory, taken.image + taken.direct_map + taken.idle))


def _movable_starts(spans: list[tuple[int, int]], low: int, kernel: int) -> list[int]:
    """Return where ZONE_MOVABLE begins in each node, its end for none.

    mm/mm_init.c, find_zone_movable_pfns_for_nodes: ZONE_MOVABLE is cut from the highest zone only, what lies below
    counts for the kernel first; the kernel's share is spread evenly, and anew over the nodes that still have memory.
    Without its rounding up to 4 MiB, which gives the kernel zones more.
    """
    if not kernel:
        return [last for _, last in spans]
    total = spans[-1][1]
    first_movable = low if total > low else _DMA_BYTES
    starts = [first for first, _ in spans]
    for left in range(len(spans), 0, -1):
        share = kernel // left
        for number, (_, last) in enumerate(spans):
            if kernel < share:
                share = kernel // left
            below = max(0, min(last, first_movable) - starts[number])
            start = starts[number] + below
            size = min(last - start, share - min(below, share))
            kernel -= min(kernel, below + size)
            starts[number] = start + size
        if kernel <= (left - 1) * PAGE_SIZE:
            break
    return starts


def _zones(first: int, last: int, movable: int, low: int) -> tuple[Zone, ...]:
    """Cut a node, from `first` to `last` byte of RAM, into zones without watermarks."""
    ends = {"DMA": _DMA_BYTES, "DMA32": low, "Normal": last, "Movable": last}
    zones = []
    for name, end in ends.items():
        stop = end if name == "Movable" else min(end, movable)
        size = min(last, stop) - first
        if size > 0:
            zones.append(Zone(name, present=size, managed=size, free=size))
            first += size
    return tuple(zones)


def _with_watermarks(nodes: list[tuple[Zone, ...]]) -> tuple[Node, ...]:
    """Set what the kernel holds back. All RAM counts as managed: the more there is, the more is held."""
    everything = [zone for zones in nodes for zone in zones]
    kernel = sum(zone.managed for zone in everything if zone.for_kernel)
    total = sum(zone.managed for zone in everything)
    # A node has one kernel zone; the first has DMA besides, and one has memory on both sides of 4 GiB.
    min_free = _min_free(kernel, len(nodes) + 2)

    def marked(zone: Zone, above: int) -> Zone:
        # Since Linux 6.5 ZONE_MOVABLE takes no part of min_free_kbytes, before that it did: each as high as it can be.
        least = min_free * zone.managed // (kernel if zone.for_kernel else total)
        step = max(least // 4, zone.managed // _SCALE)
        low, high = least + step, least + 2 * step
        # Page cache is left up to the low watermark, wherever files were read: it is no free memory.
        free = max(0, zone.free - low)
        protection = (0,) * _NORMAL + (above // _RESERVE_RATIO,) if zone.name in {"DMA", "DMA32"} else ()
        return zone._replace(min=least, low=low, high=high, free=free, protection=protection)

    def node(number: int, zones: tuple[Zone, ...]) -> Node:
        sizes = [zone.managed if zone.for_kernel else 0 for zone in zones]
        above = [sum(sizes) - below for below in accumulate(sizes)]
        return Node(number, tuple(map(marked, zones, above)), protected_for=_NORMAL)

    return tuple(node(number, zones) for number, zones in enumerate(nodes))


def _min_free(kernel: int, zones: int) -> int:
    """Return the bytes of vm.min_free_kbytes."""
    calculated = min(_MIN_FREE_MOST, max(_MIN_FREE_LEAST, isqrt(kernel // _KIB * 16) * _KIB))
    return max(calculated, min(zones * _HUGE_BLOCKS * _HUGE_BLOCK_BYTES, kernel // _HUGE_SHARE))


def _without_memmap(nodes: tuple[Node, ...], sizes: list[int]) -> HostMemory:
    """Take the memory map off each node's end, where it is allocated (mm/memblock.c: from the top): ZONE_MOVABLE first.

    What does not fit there is taken where a budget counts it, of this node as far as possible.
    """
    parts = [take(*_off_movable(node, size)) for node, size in zip(nodes, sizes, strict=True)]
    memory = HostMemory(tuple(part.nodes[0] for part in parts))
    return take(memory, sum(part.promised for part in parts))


def _off_movable(node: Node, size: int) -> tuple[HostMemory, int]:
    *others, last = node.zones
    part = 0 if last.for_kernel else min(size, last.free)
    return HostMemory((node._replace(zones=(*others, last._replace(free=last.free - part))),)), size - part


def _with_cma(memory: HostMemory, size: int) -> HostMemory:
    """Give CMA its part of the kernel zones; in ZONE_MOVABLE it would cost secret RAM nothing."""

    def reserved(zone: Zone, part: int) -> Zone:
        return zone._replace(cma=part, free_cma=part)

    def room(zone: Zone, node: Node) -> int:
        return zone.free - held(zone, node.protected_for) if zone.for_kernel else 0

    taken, rest = _take(memory, size, room, reserved)
    return taken._replace(promised=taken.promised + rest)


def kernel_sizes(memory: HostMemory) -> tuple[int, ...]:
    """Return the bytes of each node's kernel zones."""
    return tuple(sum(zone.managed for zone in node.kernel_zones) for node in memory.nodes)


def of_this_host(root: Path = PROC) -> Machine:
    """Return this host's RAM and nodes: what its kernel knows of, and what firmware keeps, to a round size.

    The size is rounded up by less than the plan takes off it for firmware, so it stays a lower bound. Raises OSError.
    """
    nodes = zoneinfo.nodes(root)
    known = sum(zone.present for node in nodes for zone in node.zones)
    grain = min(1 << max(0, (known // _FIRMWARE_SHARE).bit_length() - 1), _FIRMWARE_MOST)
    return Machine(-(-known // grain) * grain, len(nodes))
