"""The budget of memory that can never be moved: how much secret RAM a host can still give. docs/ADMISSION.md has why.

Pure: the same judgement of a snapshot serves a launch and the plan of a machine that is not there yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from vmmback.errors import AdmissionRefused
from vmmback.host.memory import HostMemory
from vmmback.linux.zones import Node, Zone

Backing = Literal["secret", "ordinary"]

# The kernel's own growth. Page tables of densely mapped memory are 1/512 of it, of sparsely mapped memory many times
# that; for page cache the kernel takes 113 bytes a page (a slot of a tree of 576 bytes for 64, a buffer head), 1/36.
_OVERHEAD_SHARE = 25
_SPARE_SHARE = 50
_SPARE_BYTES = 64 << 20

# What a guest takes besides its RAM: page tables of QEMU and of the process that touches it first, 8 bytes for each
# page.
_PAGE_TABLES_SHARE = 256

KERNEL_SIDE_BYTES = 8 << 20
"""The kernel's side of a guest's processes, and its other RAM blocks where they are secret."""

# A page of 4 KiB with the entries for 2 MiB, once that is no huge page any more.
_DIRECT_MAP_SHARE = 512

PROCESSES_BYTES = 96 << 20
"""User memory of a guest's processes. It is movable, so kernel zones give it only where no movable memory is left."""


class NodeBudget(NamedTuple):
    """What one node can give, in bytes: free + reclaimable - held - reserve.

    `free` is that of the kernel zones, without CMA; `reclaimable` their page cache and half of the slab that the kernel
    calls so; `held` what watermarks and lowmem_reserve hold back of the free; `reserve` what stays for the kernel.
    `movable` is what only movable memory can use, and counts for nothing here.
    """

    number: int
    free: int
    reclaimable: int
    held: int
    reserve: int
    movable: int

    @property
    def available(self) -> int:
        """What is left for secret RAM; less than nothing where the kernel may come to need other nodes' memory."""
        return self.free + self.reclaimable - self.held - self.reserve

    @classmethod
    def of(cls, node: Node) -> NodeBudget:
        """Judge a node."""
        kernel = node.kernel_zones
        return cls(
            number=node.number,
            free=sum(zone.free - zone.free_cma for zone in kernel),
            reclaimable=sum(map(_cache, kernel)) + node.slab_reclaimable // 2,
            held=sum(held(zone, node.protected_for) for zone in kernel),
            reserve=_reserve(node),
            movable=sum(zone.free_cma for zone in kernel)
            + sum(max(0, zone.free - zone.high) + _cache(zone) for zone in node.zones if not zone.for_kernel),
        )


@dataclass(frozen=True)
class Budget:
    """What a host can still give to guests, in bytes."""

    nodes: tuple[NodeBudget, ...]
    promised: int
    group_room: int | None
    direct_map: int = 0
    """What page tables of the direct map can come to need: a page for each 2 MiB of kernel zones that are whole yet."""

    @classmethod
    def of(cls, memory: HostMemory) -> Budget:
        """Judge a snapshot."""
        whole = min(memory.huge_direct_map, sum(zone.managed for node in memory.nodes for zone in node.kernel_zones))
        nodes = tuple(NodeBudget.of(node) for node in memory.nodes)
        return cls(nodes, memory.promised, memory.group_room, whole // _DIRECT_MAP_SHARE)

    @cached_property
    def movable(self) -> int:
        """Room that only movable memory, such as that of processes, can use."""
        return sum(node.movable for node in self.nodes)

    def available(self, backing: Backing = "secret") -> int:
        """Return what the kernel zones can give to one more guest; for ordinary RAM, all zones."""
        given = sum(node.available for node in self.nodes) - self.direct_map - self.promised - self.overhead
        return given + self.movable if backing == "ordinary" else given

    @cached_property
    def overhead(self) -> int:
        """What a guest takes of the kernel zones whatever its size: its processes' memory where none is movable."""
        return KERNEL_SIDE_BYTES + max(0, PROCESSES_BYTES - self.movable)

    @property
    def _available_in_group(self) -> int:
        """What the memory cgroup has left for RAM and page tables."""
        return (self.group_room or 0) - PROCESSES_BYTES - KERNEL_SIDE_BYTES

    def group_decides(self, backing: Backing = "secret") -> bool:
        """Tell whether the memory cgroup has less room than the host."""
        return self.group_room is not None and self._available_in_group < self.available(backing)

    def largest_guest(self, backing: Backing = "secret") -> int:
        """Return the size in bytes of the largest guest that fits now, in whole MiB."""
        room = self._available_in_group if self.group_decides(backing) else self.available(backing)
        return max(0, room * _PAGE_TABLES_SHARE // (_PAGE_TABLES_SHARE + 1)) >> 20 << 20

    def admit(self, size: int, backing: Backing = "secret") -> None:
        """Raise AdmissionRefused, with the numbers, unless `size` bytes of RAM fit."""
        largest = self.largest_guest(backing)
        if size > largest:
            smaller = f"set [memory] size to at most {largest >> 20}MiB, or " if largest else ""
            in_group = self.group_decides(backing)
            more = "raise the limit of the memory cgroup" if in_group else "free memory on the host"
            refused = AdmissionRefused(
                f"{size >> 20} MiB of {backing} RAM do not fit: {largest >> 20} MiB do. {self.explanation(backing)}",
                f"{smaller}{more}",
            )
            refused.largest = largest
            raise refused

    def explanation(self, backing: Backing = "secret") -> str:
        """Return the sum in words."""
        if self.group_room is not None and self.group_decides(backing):
            return (
                f"The memory cgroup has room for {_mib(self.group_room)} MiB more than was promised to its guests, and "
                "a guest's processes take of that, too"
            )

        def total(name: str) -> str:
            return _mib(sum(getattr(node, name) for node in self.nodes))

        movable = f", and {total('movable')} MiB that only movable memory can use," if backing == "ordinary" else ""
        return (
            f"Of {total('free')} MiB that are free where they can lie and {total('reclaimable')} MiB of caches there"
            f"{movable} {total('held')} MiB are held by watermarks, {total('reserve')} MiB stay for the kernel's page "
            f"tables and slab, {_mib(self.direct_map)} MiB for those of its direct map, and {_mib(self.promised)} MiB "
            "were promised to guests that have not touched them yet"
        )


def with_page_tables(size: int) -> int:
    """Return what RAM of `size` bytes takes of the kernel zones."""
    return size + -(-size // _PAGE_TABLES_SHARE)


def held(zone: Zone, protected_for: int) -> int:
    """Return what of a zone's free memory secret pages cannot get (mm/page_alloc.c, __zone_watermark_ok).

    Where less is free, as on a host that is full of page cache, what is reclaimed goes there first.
    """
    protection = zone.protection[protected_for] if protected_for < len(zone.protection) else 0
    return min(zone.free - zone.free_cma + _cache(zone), zone.high + protection)


def _cache(zone: Zone) -> int:
    """Return what the kernel can take back of a zone's page cache, as it estimates it itself (si_mem_available).

    Without what must lie in CMA, where no secret page can come in its place: what is used there and no process's.
    """
    file = max(0, zone.file - max(0, zone.cma - zone.free_cma - zone.anon))
    return file - min(file // 2, zone.low)


def _reserve(node: Node) -> int:
    """Return what stays for the kernel: page tables and slab that user memory can come to need, and a spare."""
    taken = node.page_tables + node.kernel_stacks + node.slab_reclaimable // 2 + node.slab_unreclaimable
    return max(_SPARE_BYTES, node.managed // _SPARE_SHARE, node.managed // _OVERHEAD_SHARE - taken)


def _mib(size: int) -> str:
    return f"{size >> 20:,}"
