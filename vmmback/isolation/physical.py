"""Files through which root reads physical memory: a frame, whose number pagemap tells, is read from them."""

from __future__ import annotations

import errno
import mmap
import os
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from vmmback.isolation.probe import Missing, Reading, errorcode
from vmmback.isolation.specimen import Specimen, SpecimenProbe
from vmmback.linux import kcore, procfs
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Verdict

_PFN_MASK = (1 << 55) - 1


class _PhysicalProbe(SpecimenProbe):
    """Opens a file, finds the first frame of the memory in it and reads one page."""

    file: ClassVar[Path]

    @abstractmethod
    def read(self, descriptor: int, physical: int) -> bytes:
        """Return the page at a physical address. Raises OSError."""

    def attempt(self, place: Specimen) -> Reading:
        physical = (procfs.pagemap("self", place.address, PAGE_SIZE)[0] & _PFN_MASK) * PAGE_SIZE
        if not physical:
            raise Missing("/proc/self/pagemap that shows frame numbers (CAP_SYS_ADMIN)")
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Missing(f"{self.file} ({errorcode(error)})") from error
        try:
            data = self.read(descriptor, physical)
        except OSError as error:
            if error.errno == errno.EPERM:  # CONFIG_STRICT_DEVMEM, lockdown: refused whatever is there
                raise Missing(f"{self.file} that shows RAM (EPERM)") from error
            if error.errno != errno.EFAULT:
                raise
            return Reading(Verdict.BLOCKED, "refused, EFAULT", "EFAULT")
        finally:
            os.close(descriptor)
        if data.startswith(place.canary):
            return Reading(Verdict.READABLE, f"the canary is in the frame at {physical:#x}")
        contents = "nothing but zeroes" if not any(data) else "not the canary"
        return Reading(Verdict.BLOCKED, f"{len(data)} bytes of the frame at {physical:#x}: {contents}")


class KcoreProbe(_PhysicalProbe):
    """The kernel's memory as a core file. What the direct map lacks reads as zeroes."""

    name = "proc-kcore"
    vector = "read(2) of /proc/kcore at the memory's first frame"
    source = "fs/proc/kcore.c, read_kcore_iter: zeroes where copy_from_kernel_nofault() fails; proc_kcore(5)"
    file = Path("/proc/kcore")

    def read(self, descriptor: int, physical: int) -> bytes:
        try:
            start, size = kcore.table(os.pread(descriptor, kcore.HEADER_BYTES, 0))
        except ValueError as error:
            raise OSError(errno.ENOEXEC, f"{self.file}: {error}") from error
        offset = kcore.offset_of(physical, kcore.segments(os.pread(descriptor, size, start)))
        if offset is None:
            raise OSError(errno.ENXIO, f"{self.file} has no segment with the frame at {physical:#x}")
        return os.pread(descriptor, PAGE_SIZE, offset)


class DevMemProbe(_PhysicalProbe):
    """Physical memory as a device. Distributions build it so that it shows no RAM (CONFIG_STRICT_DEVMEM)."""

    name = "dev-mem"
    vector = "read(2) of /dev/mem at the memory's first frame"
    source = "drivers/char/mem.c, read_mem: EFAULT where copy_from_kernel_nofault() fails; mem(4)"
    file = Path("/dev/mem")

    def read(self, descriptor: int, physical: int) -> bytes:
        return os.pread(descriptor, PAGE_SIZE, physical)


class DevMemMmapProbe(DevMemProbe):
    """A known hole: a mapping of a frame needs no direct map. CONFIG_STRICT_DEVMEM closes it."""

    name = "dev-mem-mmap"
    vector = "mmap(2) of /dev/mem at the memory's first frame"
    source = "drivers/char/mem.c, mmap_mem: remap_pfn_range() of any frame; mem(4)"
    holders = "root, CAP_SYS_RAWIO, on a kernel without CONFIG_STRICT_DEVMEM"

    def read(self, descriptor: int, physical: int) -> bytes:
        with mmap.mmap(descriptor, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=physical) as frame:
            return frame[:]
