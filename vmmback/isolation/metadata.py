"""Probes for what the kernel tells of a specimen's pages, without their contents: which are present, in use, mapped.

Secret memory hides its contents, not its existence: nearly all of these are known holes, and name who can look.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vmmback.isolation.probe import Missing, Reading
from vmmback.isolation.specimen import SPECIMEN_BYTES, CallProbe, Specimen, SpecimenProbe, specimen
from vmmback.linux import memory, procfs
from vmmback.linux.memory import PAGE_SIZE
from vmmback.report import Verdict

_HALF = SPECIMEN_BYTES // 2
_ROOT = "root, CAP_SYS_ADMIN"
_OWNER = "the process itself (QEMU), and who holds a copy of the descriptor"
_PTRACE = "root, CAP_SYS_PTRACE, the same user"

# Documentation/admin-guide/mm/pagemap.rst
_KPF_LRU, _KPF_MMAP, _KPF_UNEVICTABLE = 1 << 5, 1 << 11, 1 << 18


def _told(right: bool, what: str) -> str:
    return what if right else ""


class MincoreProbe(CallProbe):
    """mincore(2) tells which pages of a mapping are in memory."""

    name = "mincore"
    vector = "mincore(2): which pages are present"
    source = "mm/mincore.c, mincore_page: looks into the page cache of any file; mincore(2)"
    holders = _OWNER
    filled = _HALF

    def reach(self, place: Specimen) -> str:
        present = memory.mincore(place.address, place.ram.size)
        return _told(present == _half(place), "it told which pages are present")


class CachestatProbe(CallProbe):
    """cachestat(2) counts the pages of a file that are in memory."""

    name = "cachestat"
    vector = "cachestat(2): how many pages are present"
    source = "mm/filemap.c, cachestat: counts the page cache of any file"
    holders = _OWNER
    filled = _HALF

    def reach(self, place: Specimen) -> str:
        try:
            cached = memory.cached_pages(place.ram.fileno())
        except OSError as error:
            raise Missing(f"cachestat(2): {error.strerror}") from error
        return _told(cached == _HALF // PAGE_SIZE, f"it counted the {cached} pages that are present")


class PagemapProbe(CallProbe):
    """/proc/PID/pagemap tells which pages are present, and to CAP_SYS_ADMIN in which frames."""

    name = "pagemap"
    vector = "/proc/PID/pagemap: which pages are present, in which frames"
    source = "fs/proc/task_mmu.c, pte_to_pagemap_entry; Documentation/admin-guide/mm/pagemap.rst"
    holders = f"{_PTRACE}; for the frames {_ROOT}"
    filled = _HALF

    def reach(self, place: Specimen) -> str:
        entries = procfs.pagemap("self", place.address, place.ram.size)
        right = tuple(bool(entry >> 63) for entry in entries) == _half(place)
        return _told(right, "it told which pages are present")


class NodeProbe(CallProbe):
    """move_pages(2) without nodes to move to tells on which node each page is, hence which are present."""

    name = "move-pages-node"
    vector = "move_pages(2), asked only: on which NUMA node each present page is"
    source = "mm/migrate.c, do_pages_stat_array; move_pages(2)"
    holders = _PTRACE
    filled = _HALF
    idle = Verdict.BLOCKED  # by Linux 6.1, whose follow_page() leaves secret memory out (mm/gup.c)

    def reach(self, place: Specimen) -> str:
        nodes = memory.nodes_of([place.address + at for at in range(0, place.ram.size, PAGE_SIZE)])
        right = tuple(node >= 0 for node in nodes) == _half(place)
        return _told(right, "it told which pages are present, and their node")


class SoftDirtyProbe(CallProbe):
    """A 4 written to clear_refs forgets which pages were written to; pagemap then tells those that are written next."""

    name = "soft-dirty"
    vector = "/proc/PID/clear_refs, then pagemap: which pages were written to since"
    source = "fs/proc/task_mmu.c, clear_soft_dirty; Documentation/admin-guide/mm/soft-dirty.rst"
    holders = _PTRACE

    def require(self) -> None:
        with specimen("ordinary", PAGE_SIZE) as trial:
            if self._written(trial) != [0]:
                raise Missing("soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")

    def reach(self, place: Specimen) -> str:
        return _told(self._written(place) == [0], "it told which page was written to")

    @staticmethod
    def _written(place: Specimen) -> list[int]:
        Path("/proc/self/clear_refs").write_text("4")
        place.memory[0] = place.canary[0]
        entries = procfs.pagemap("self", place.address, place.ram.size)
        return [index for index, entry in enumerate(entries) if entry >> 55 & 1]


class PageIdleProbe(CallProbe):
    """A frame that is marked idle in the bitmap loses the mark when it is used; to write zeroes changes nothing."""

    name = "page-idle"
    vector = "/sys/kernel/mm/page_idle/bitmap: is a frame used after it was marked idle"
    source = "mm/page_idle.c, page_idle_get_folio: of frames on LRU lists alone; admin-guide/mm/idle_page_tracking.rst"
    holders = _ROOT
    idle = Verdict.BLOCKED
    bitmap = Path("/sys/kernel/mm/page_idle/bitmap")

    def require(self) -> None:
        if not self.bitmap.exists():
            raise Missing(f"{self.bitmap} (CONFIG_IDLE_PAGE_TRACKING)")

    def reach(self, place: Specimen) -> str:
        frame = procfs.pagemap("self", place.address, PAGE_SIZE)[0] & procfs.PFN_MASK
        offset, bit = frame // 64 * 8, 1 << frame % 64  # words of 64 frames, native order
        with self.bitmap.open("r+b", buffering=0) as bitmap:
            os.pwrite(bitmap.fileno(), bit.to_bytes(8, sys.byteorder), offset)
            marked = int.from_bytes(os.pread(bitmap.fileno(), 8, offset), sys.byteorder) & bit
            place.memory[0] = place.canary[0]
            still = int.from_bytes(os.pread(bitmap.fileno(), 8, offset), sys.byteorder) & bit
        return _told(bool(marked and not still), "it told that a frame was used")


class PageFlagsProbe(CallProbe):
    """/proc/kpageflags tells of each frame how the kernel uses it."""

    name = "kpageflags"
    vector = "/proc/kpageflags: how the kernel uses each frame"
    source = "fs/proc/page.c, stable_page_flags; Documentation/admin-guide/mm/pagemap.rst"
    holders = _ROOT

    def reach(self, place: Specimen) -> str:
        flags = _of_frames("kpageflags", place.address, place.ram.size)
        return _told(all(word & _KPF_MMAP for word in flags), f"it told that {len(flags)} frames are mapped")


class PageCountProbe(CallProbe):
    """/proc/kpagecount tells of each frame how often it is mapped."""

    name = "kpagecount"
    vector = "/proc/kpagecount: how often each frame is mapped"
    source = "fs/proc/page.c, kpagecount_read; Documentation/admin-guide/mm/pagemap.rst"
    holders = _ROOT

    def reach(self, place: Specimen) -> str:
        before = _of_frames("kpagecount", place.address, PAGE_SIZE)[0]
        with mmap.mmap(place.ram.fileno(), PAGE_SIZE) as again:
            again[0] = place.canary[0]
            after = _of_frames("kpagecount", place.address, PAGE_SIZE)[0]
        return _told((before, after) == (1, 2), "it told that a frame was mapped a second time")


class PageCgroupProbe(CallProbe):
    """/proc/kpagecgroup tells of each frame which memory cgroup pays for it, so whose it is."""

    name = "kpagecgroup"
    vector = "/proc/kpagecgroup: which memory cgroup each frame is charged to"
    source = "fs/proc/page.c, kpagecgroup_read; Documentation/admin-guide/mm/pagemap.rst"
    holders = _ROOT

    def require(self) -> None:
        with mmap.mmap(-1, PAGE_SIZE) as page:
            page[0] = 1
            if _of_frames("kpagecgroup", memory.address_of(page), PAGE_SIZE) == [0]:
                raise Missing("memory cgroups")

    def reach(self, place: Specimen) -> str:
        groups = set(_of_frames("kpagecgroup", place.address, place.ram.size))
        return _told(
            len(groups) == 1 and 0 not in groups, f"it told that cgroup {max(groups)} has {place.ram.size >> 10} KiB"
        )


class EvictableProbe(SpecimenProbe):
    """The kernel reclaims, and swaps, only what is on its evictable lists: what /proc/kpageflags says of each frame."""

    name = "evictable"
    vector = "/proc/kpageflags: is a frame on the lists of what can be reclaimed and swapped out?"
    source = "mm/secretmem.c, mapping_set_unevictable; Documentation/mm/unevictable-lru.rst"

    def attempt(self, place: Specimen) -> Reading:
        count = evictable(place)
        verdict = Verdict.READABLE if count else Verdict.BLOCKED
        return Reading(verdict, f"{count} of {place.ram.size // PAGE_SIZE} frames can be reclaimed")


def evictable(place: Specimen) -> int:
    """Return how many of the specimen's frames can be reclaimed. Raises Missing; OSError if none is on any list."""
    flags = _of_frames("kpageflags", place.address, place.ram.size)
    if not any(word & _KPF_LRU for word in flags):
        raise OSError(errno.EAGAIN, "no frame is on a list of the kernel's yet")
    return sum(bool(word & _KPF_LRU) and not word & _KPF_UNEVICTABLE for word in flags)


def frames(address: int, size: int) -> list[int]:
    """Return the numbers of the frames of present memory of ours. Raises Missing where the kernel hides them."""
    numbers = [entry & procfs.PFN_MASK for entry in procfs.pagemap("self", address, size)]
    if not all(numbers):
        raise Missing("frame numbers in /proc/self/pagemap (CAP_SYS_ADMIN)")
    return numbers


def _half(place: Specimen) -> tuple[bool, ...]:
    """Return how presence must be told of a specimen whose first half is filled."""
    count = place.ram.size // PAGE_SIZE
    return tuple(index < count // 2 for index in range(count))


def _of_frames(name: str, address: int, size: int) -> Sequence[int]:
    """Return the 64-bit words that /proc/NAME has for the frames of our memory. Raises Missing, OSError."""
    numbers = frames(address, size)
    with _opened(Path("/proc") / name) as descriptor:
        return [int.from_bytes(os.pread(descriptor, 8, number * 8), "little") for number in numbers]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Missing(f"{path}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
