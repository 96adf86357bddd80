"""Files through which root reads physical memory: frames, whose numbers pagemap tells, are read from them.

All frames of a specimen are tried, as not all are alike. On x86-64 the kernel maps its own image a second time, and
what it frees of that can stay mapped there (arch/x86/mm/init.c, free_kernel_image_pages, unmaps it only with page table
isolation). Secret memory is taken out of the direct map alone. So frames that were part of the image stay readable, and
/proc/kcore shows them: seen on Linux 6.1, many without page table isolation, a few with pti=on. Whether a specimen has
such frames is chance, and so is the verdict there.
"""

from __future__ import annotations

import errno
import mmap
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from vmmback.isolation.probe import Missing, Reading, errorcode
from vmmback.isolation.specimen import Specimen, SpecimenProbe
from vmmback.linux import kcore, procfs
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Verdict


class _PhysicalProbe(SpecimenProbe):
    """Opens a file and reads all frames of the memory in it."""

    file: ClassVar[Path]

    @abstractmethod
    def read(self, descriptor: int, physical: int) -> list[bytes]:
        """Return what the file shows of the page at a physical address, in each place. Raises OSError."""

    def attempt(self, place: Specimen) -> Reading:
        entries = procfs.pagemap("self", place.address, place.ram.size)
        frames = [(entry & procfs.PFN_MASK) * PAGE_SIZE for entry in entries]
        if not all(frames):
            raise Missing("/proc/self/pagemap that shows frame numbers (CAP_SYS_ADMIN)")
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Missing(f"{self.file} ({errorcode(error)})") from error
        try:
            return self._search(descriptor, frames, place.canary)
        finally:
            os.close(descriptor)

    def _search(self, descriptor: int, frames: Sequence[int], canary: bytes) -> Reading:
        readable = refused = 0
        for physical in frames:
            try:
                readable += any(page.startswith(canary) for page in self.read(descriptor, physical))
            except OSError as error:
                if error.errno == errno.EPERM:  # CONFIG_STRICT_DEVMEM, lockdown: refused whatever is there
                    raise Missing(f"{self.file} that shows RAM (EPERM)") from error
                if error.errno != errno.EFAULT:
                    raise
                refused += 1
        detail = f"the canary is in {readable} of {len(frames)} frames"
        if readable:
            return Reading(Verdict.READABLE, detail)
        return Reading(Verdict.BLOCKED, f"{detail}, {refused} were refused", "EFAULT" if refused else "")


class KcoreProbe(_PhysicalProbe):
    """The kernel's memory as a core file. What the direct map lacks reads as zeroes."""

    name = "proc-kcore"
    vector = "read(2) of /proc/kcore at the memory's frames, in the direct map and in the kernel's image"
    source = "fs/proc/kcore.c, read_kcore_iter: zeroes where copy_from_kernel_nofault() fails; proc_kcore(5)"
    file = Path("/proc/kcore")

    def _search(self, descriptor: int, frames: Sequence[int], canary: bytes) -> Reading:
        try:
            start, size = kcore.table(os.pread(descriptor, kcore.HEADER_BYTES, 0))
        except ValueError as error:
            raise OSError(errno.ENOEXEC, f"{self.file}: {error}") from error
        self._ranges = kcore.segments(os.pread(descriptor, size, start))
        return super()._search(descriptor, frames, canary)

    def read(self, descriptor: int, physical: int) -> list[bytes]:
        offsets = kcore.offsets_of(physical, self._ranges)
        if not offsets:
            raise OSError(errno.ENXIO, f"{self.file} has no segment with the frame at {physical:#x}")
        return [os.pread(descriptor, PAGE_SIZE, offset) for offset in offsets]


class DevMemProbe(_PhysicalProbe):
    """Physical memory as a device. Distributions build it so that it shows no RAM (CONFIG_STRICT_DEVMEM)."""

    name = "dev-mem"
    vector = "read(2) of /dev/mem at the memory's frames"
    source = "drivers/char/mem.c, read_mem: EFAULT where copy_from_kernel_nofault() fails; mem(4)"
    file = Path("/dev/mem")

    def read(self, descriptor: int, physical: int) -> list[bytes]:
        return [os.pread(descriptor, PAGE_SIZE, physical)]


class DevMemMmapProbe(DevMemProbe):
    """A known hole: a mapping of a frame needs no direct map. CONFIG_STRICT_DEVMEM closes it."""

    name = "dev-mem-mmap"
    vector = "mmap(2) of /dev/mem at the memory's frames"
    source = "drivers/char/mem.c, mmap_mem: remap_pfn_range() of any frame; mem(4)"
    holders = "root, CAP_SYS_RAWIO, on a kernel without CONFIG_STRICT_DEVMEM"

    def read(self, descriptor: int, physical: int) -> list[bytes]:
        with mmap.mmap(descriptor, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=physical) as frame:
            return [frame[:]]
