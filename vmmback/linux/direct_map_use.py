"""How large the pages are with which the kernel maps all RAM, and how many of them a guest's frames break up.

A page that leaves the direct map for secret RAM splits the huge page that maps it: 1 GiB into 2 MiB, 2 MiB into 4 KiB
(arch/x86/mm/pat/set_memory.c, __change_page_attr).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vmmback.linux import procfs

REGION = 2 << 20
_FRAMES = REGION // 4096


class DirectMapUse(NamedTuple):
    """Bytes of the direct map in pages of each size, and how many pages were split, and put together, since boot.

    They are of the whole host. None where the kernel does not tell: arm64 has none of them, and older kernels count no
    collapses.
    """

    in_4k: int | None
    in_2m: int | None
    in_1g: int | None
    splits_2m: int | None
    splits_1g: int | None
    collapses_2m: int | None
    collapses_1g: int | None

    @property
    def in_huge_pages(self) -> int | None:
        """Bytes in pages of 2 MiB and 1 GiB."""
        if self.in_2m is None:
            return None
        return self.in_2m + (self.in_1g or 0)  # a processor without pages of 1 GiB shows no such line


def of(root: Path = procfs.PROC) -> DirectMapUse:
    """Read /proc/meminfo and /proc/vmstat (arch/x86/mm/pat/set_memory.c, arch_report_meminfo; mm/vmstat.c)."""
    sizes, counts = procfs.meminfo(root), procfs.vmstat(root)
    return DirectMapUse(
        sizes.get("DirectMap4k"),
        sizes.get("DirectMap2M"),
        sizes.get("DirectMap1G"),
        counts.get("direct_map_level2_splits"),
        counts.get("direct_map_level3_splits"),
        counts.get("direct_map_level2_collapses"),
        counts.get("direct_map_level3_collapses"),
    )


def region_numbers(entries: Iterable[int]) -> set[int]:
    """Return which 2 MiB of the physical addresses, counted from 0, hold a page of these pagemap entries.

    None where the kernel hides frames, which it then shows as 0 (without CAP_SYS_ADMIN): no process has that one.
    """
    frames = (entry & procfs.PFN_MASK for entry in entries if entry & procfs.PRESENT)
    return {frame // _FRAMES for frame in frames if frame}


def regions(entries: Iterable[int]) -> int:
    """Return how many 2 MiB of the physical addresses hold a page of these pagemap entries."""
    return len(region_numbers(entries))


def ideal_regions(size: int) -> int:
    """Return the fewest such regions in which `size` bytes fit."""
    return -(-size // REGION)
