"""Probes that ask the kernel to take hold of a specimen's pages: to swap, share, copy, move or empty them.

Left out, since secret and ordinary memory answer alike or nothing comes of it: docs/PROBES.md says which and why.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import closing
from typing import ClassVar

from vmmback.isolation.metadata import evictable, frames
from vmmback.isolation.probe import Missing, Probe, Reading, Target
from vmmback.isolation.specimen import CallProbe, Specimen, SpecimenProbe, require, specimen
from vmmback.linux import memory, procfs
from vmmback.linux.memory import PAGE_SIZE
from vmmback.linux.userfaultfd import Mode, UserFault
from vmmback.ram import allocate
from vmmback.report import Verdict


def mappings(place: Specimen) -> list[procfs.Mapping]:
    """Return the VMAs through which this process maps a specimen. Raises OSError when there are none."""
    found = procfs.memory_mappings(procfs.smaps("self"), place.ram.inode)
    if not found:
        raise OSError(errno.ENOENT, "the specimen is not mapped")
    return found


def kilobytes(place: Specimen, name: str) -> int:
    """Return a size of a specimen's mappings as smaps tells it, such as `Rss`, in KiB."""
    return sum(mapping.sizes.get(name, 0) for mapping in mappings(place)) >> 10


# New pages wait on the processor that touched them, up to 31 of them (include/linux/pagevec.h), before the kernel can
# reclaim one; a process that has moved meanwhile does not reach those.
_TRIAL_PAGES = 64


class PageoutProbe(CallProbe):
    """MADV_PAGEOUT: the pages go to swap; without any, the kernel takes them out of the process and finds no place."""

    name = "madv-pageout"
    vector = "madvise(2) with MADV_PAGEOUT: the pages are reclaimed, into swap where there is one"
    source = "mm/madvise.c, can_madv_lru_vma: EINVAL for locked memory; mm/secretmem.c, mapping_set_unevictable"
    refusals = frozenset({errno.EINVAL})
    idle = Verdict.BLOCKED  # by Linux 6.1, where secret memory is not flagged as locked, though it is never reclaimed

    def require(self) -> None:
        with specimen("ordinary", _TRIAL_PAGES * PAGE_SIZE) as trial:
            if not self.reach(trial) and not procfs.meminfo()["SwapTotal"]:
                raise Missing("swap, without which this kernel leaves the pages where they are")

    def reach(self, place: Specimen) -> str:
        before = kilobytes(place, "Rss")
        memory.madvise(place.address, place.ram.size, memory.MADV_PAGEOUT)
        after = kilobytes(place, "Rss")
        if after >= before:
            return ""
        return f"{before - after} KiB were taken out of the process, {kilobytes(place, 'Swap')} KiB are in swap"


class MunlockProbe(CallProbe):
    """munlock(2): may its owner make memory swappable? Of secret memory no page ever is, locked or not."""

    name = "munlock"
    vector = "mlock(2), then munlock(2): are the frames back among what can be reclaimed and swapped out?"
    source = "mm/mlock.c, mlock_fixup: leaves secretmem as it is; mm/secretmem.c, mapping_set_unevictable; munlock(2)"
    idle = Verdict.BLOCKED

    def reach(self, place: Specimen) -> str:
        try:
            memory.lock(place.address, place.ram.size)
        except OSError as error:
            # mm/mlock.c, do_mlock: it marks the mapping, then makes its pages present, which secret memory refuses.
            if error.errno != errno.ENOMEM:
                raise
        memory.unlock(place.address, place.ram.size)
        count = evictable(place)
        return f"{count} frames can be reclaimed" if count else ""


class DodumpProbe(CallProbe):
    """MADV_DODUMP takes the flag dd, a first line of defence: what dumps still have to get past is mm/gup.c."""

    name = "madv-dodump"
    vector = "madvise(2) with MADV_DODUMP: without the flag dd the mapping has its place in core dumps"
    source = "mm/madvise.c, madvise_vma_behavior: not refused; what a dump then holds is another probe's matter"
    holders = "the process itself (QEMU, told so by qom-set of dump=on)"

    def reach(self, place: Specimen) -> str:
        place.memory.madvise(mmap.MADV_DONTDUMP)
        before = [mapping.flags for mapping in mappings(place)]
        place.memory.madvise(mmap.MADV_DODUMP)
        after = [mapping.flags for mapping in mappings(place)]
        lost = all("dd" in flags for flags in before) and not any("dd" in flags for flags in after)
        return "the flag dd is gone" if lost else ""


class RemoveProbe(CallProbe):
    """MADV_REMOVE: pages go, and their content with them."""

    name = "madv-remove"
    vector = "madvise(2) with MADV_REMOVE"
    source = "mm/madvise.c, madvise_remove: EINVAL for locked memory; fs/open.c, vfs_fallocate: EOPNOTSUPP; madvise(2)"
    refusals = frozenset({errno.EINVAL, errno.EOPNOTSUPP})

    def reach(self, place: Specimen) -> str:
        place.memory.madvise(mmap.MADV_REMOVE, 0, PAGE_SIZE)
        return "a page of the memory was emptied" if place.memory[:PAGE_SIZE] == bytes(PAGE_SIZE) else ""


class _UserFaultProbe(CallProbe):
    refusals = frozenset({errno.EINVAL})
    source = "include/linux/userfaultfd_k.h, vma_can_userfault: EINVAL save for anonymous memory, shmem and hugetlb"
    mode: ClassVar[Mode]

    def require(self) -> None:
        require(lambda: UserFault.open(self.mode), f"userfaultfd(2) for files' memory, mode {self.mode.name}")


class UserFaultMissingProbe(_UserFaultProbe):
    """Who handles the faults of absent pages sees each first touch, and chooses what the page then holds."""

    name = "userfaultfd-missing"
    vector = "userfaultfd(2): an absent page of the memory is filled by who handles its faults"
    mode = Mode.MISSING
    filled = SpecimenProbe.size - PAGE_SIZE

    def reach(self, place: Specimen) -> str:
        last = place.address + self.filled
        with UserFault.open(self.mode) as faults, mmap.mmap(-1, PAGE_SIZE) as page:
            page[:] = other = os.urandom(PAGE_SIZE)
            with faults.registered(place.address, place.ram.size):
                faults.copy(last, memory.address_of(page), PAGE_SIZE)
            return "a page of the memory was filled" if place.memory[self.filled :] == other else ""


class UserFaultWriteProbe(_UserFaultProbe):
    """Who protects pages from writes sees each of them."""

    name = "userfaultfd-wp"
    vector = "userfaultfd(2): a page of the memory is protected from writes, which then are seen"
    mode = Mode.WRITE_PROTECTED

    def reach(self, place: Specimen) -> str:
        with UserFault.open(self.mode) as faults, faults.registered(place.address, place.ram.size):
            faults.write_protect(place.address, PAGE_SIZE, on=True)
            (entry,) = procfs.pagemap("self", place.address, PAGE_SIZE)
            faults.write_protect(place.address, PAGE_SIZE, on=False)
        return "a page was protected" if entry >> 57 & 1 else ""  # Documentation/admin-guide/mm/pagemap.rst


class UserFaultMinorProbe(_UserFaultProbe):
    """Who handles minor faults maps pages of the page cache where he likes."""

    name = "userfaultfd-minor"
    vector = "userfaultfd(2): a page of the memory is mapped out of the page cache"
    mode = Mode.MINOR

    def reach(self, place: Specimen) -> str:
        with (
            closing(mmap.mmap(place.ram.fileno(), PAGE_SIZE)) as again,
            UserFault.open(self.mode) as faults,
            faults.registered(address := memory.address_of(again), PAGE_SIZE),
        ):
            faults.map_cached(address, PAGE_SIZE)  # were it not to map the page, the next line would wait for ever
            return "the canary came through" if place.holds(again[:]) else ""


class KsmProbe(Probe[mmap.mmap]):
    """MADV_MERGEABLE: KSM then reads the pages, compares and shares them; it leaves all shared mappings alone.

    That a merge really happens is not waited for: it takes the host-wide /sys/kernel/mm/ksm/run.
    """

    name = "madv-mergeable"
    vector = "madvise(2) with MADV_MERGEABLE: with the flag mg KSM reads, compares and shares the pages"
    control_is = "the same on private anonymous memory; KSM leaves a shared memfd alone as well"
    source = "mm/ksm.c, vma_ksm_compatible (of late ksm_compatible): not for shared mappings; madvise(2)"
    live_safe = False

    def target(self, target: Target) -> mmap.mmap:  # noqa: ARG002 (a guest must not be disturbed)
        ram = self._resources.enter_context(allocate("secret", PAGE_SIZE))
        return self._resources.enter_context(mmap.mmap(ram.fileno(), PAGE_SIZE))

    def control(self, target: Target) -> mmap.mmap:  # noqa: ARG002
        return self._resources.enter_context(mmap.mmap(-1, PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def attempt(self, place: mmap.mmap) -> Reading:
        try:
            place.madvise(mmap.MADV_MERGEABLE)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise Missing("KSM (CONFIG_KSM)") from error
            raise
        address = memory.address_of(place)
        (mapping,) = (m for m in procfs.smaps("self") if m.start <= address < m.end)
        if "mg" in mapping.flags:
            return Reading(Verdict.READABLE, "the mapping is KSM's to read (mg)")
        return Reading(Verdict.BLOCKED, "the kernel took the advice, but the mapping is not KSM's (no mg)")


class HugePageProbe(CallProbe):
    """MADV_COLLAPSE: the kernel copies 2 MiB of small pages into a huge one, by itself."""

    name = "madv-collapse"
    vector = "madvise(2) with MADV_COLLAPSE: the kernel copies the pages into a huge page"
    source = "mm/khugepaged.c, madvise_collapse: EINVAL save for anonymous memory, shmem, read-only text"
    refusals = frozenset({errno.EINVAL})
    size = 2 << 20

    def require(self) -> None:
        with allocate("ordinary", self.size) as ram, memory.mapped_aligned(ram.fileno(), self.size) as address:
            memory.write(address, b"x")  # of an empty range nothing is collapsed
            try:
                memory.madvise(address, self.size, memory.MADV_COLLAPSE)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise Missing("huge pages for memfds (MADV_COLLAPSE, shmem_enabled)") from error
                raise

    def reach(self, place: Specimen) -> str:
        with memory.mapped_aligned(place.ram.fileno(), self.size) as address:
            memory.read(address, self.size)  # makes the pages present in this mapping, as a guest's are
            memory.madvise(address, self.size, memory.MADV_COLLAPSE)
            huge = kilobytes(place, "ShmemPmdMapped") + kilobytes(place, "FilePmdMapped")
            copied = huge and place.holds(memory.read(address, self.size))
            return f"{huge} KiB were copied into huge pages" if copied else ""


class MigrationProbe(CallProbe):
    """move_pages(2) to another node: the kernel copies the pages into frames there."""

    name = "numa-migration"
    vector = "move_pages(2) to each NUMA node in turn: the kernel copies the pages into other frames"
    source = "mm/migrate.c, do_pages_move; mm/secretmem.c, secretmem_migrate_folio: EBUSY; move_pages(2)"
    idle = Verdict.BLOCKED  # the call succeeds; that no page was moved is told page by page

    def require(self) -> None:
        with specimen("ordinary", PAGE_SIZE) as trial:
            if not self.reach(trial):
                raise Missing("second NUMA node with memory")

    def reach(self, place: Specimen) -> str:
        addresses = range(place.address, place.address + place.ram.size, PAGE_SIZE)
        before = frames(place.address, place.ram.size)
        moved = set[int]()
        for node in memory.nodes_with_memory():
            memory.move_pages(addresses, node)
            after = frames(place.address, place.ram.size)
            moved |= {index for index, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
        return f"{len(moved)} of {len(addresses)} pages were moved" if moved else ""
