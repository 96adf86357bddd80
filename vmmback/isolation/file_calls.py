"""Probes that use a specimen's descriptor as the file that it is: the kernel reads, writes, copies, frees or opens it.

A secretmem file has no read, write, splice, fallocate, llseek or open method (mm/secretmem.c, secretmem_fops): what
the kernel finds missing, it refuses. The calls go without an offset of their own: with one, the kernel refuses any file
that cannot be sought in (ESPIPE), before it looks whether it could be read.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

from vmmback.isolation.pinning import pipe
from vmmback.isolation.specimen import CallProbe, Specimen, require
from vmmback.linux import memory
from vmmback.linux.memory import PAGE_SIZE
from vmmback.ram import allocate

_CAME_THROUGH = "the canary came through"


class FileReadProbe(CallProbe):
    """read(2), the plainest of all."""

    name = "file-read"
    vector = "read(2) of the descriptor"
    source = "fs/read_write.c, vfs_read: EINVAL without FMODE_CAN_READ; read(2)"
    refusals = frozenset({errno.EINVAL})

    def reach(self, place: Specimen) -> str:
        return _CAME_THROUGH if place.holds(os.read(place.ram.fileno(), PAGE_SIZE)) else ""


class FileWriteProbe(CallProbe):
    """write(2) to it: whoever can write into a guest's memory can change what it runs."""

    name = "file-write"
    vector = "write(2) to the descriptor"
    source = "fs/read_write.c, vfs_write: EINVAL without FMODE_CAN_WRITE; write(2)"
    refusals = frozenset({errno.EINVAL})

    def reach(self, place: Specimen) -> str:
        other = os.urandom(PAGE_SIZE)
        os.write(place.ram.fileno(), other)
        return "the memory was written" if place.memory[:PAGE_SIZE] == other else ""


class SendfileProbe(CallProbe):
    """sendfile(2): the kernel copies from file to file by itself."""

    name = "sendfile"
    vector = "sendfile(2) from the descriptor to a pipe"
    source = "fs/splice.c, do_splice_read: EINVAL without a splice_read method; sendfile(2)"
    refusals = frozenset({errno.EINVAL})

    def reach(self, place: Specimen) -> str:
        with pipe() as (read_end, write_end):
            os.sendfile(write_end, place.ram.fileno(), None, PAGE_SIZE)
            return _CAME_THROUGH if place.holds(os.read(read_end, PAGE_SIZE)) else ""


class SpliceProbe(CallProbe):
    """splice(2): the pipe holds pages of the page cache."""

    name = "splice"
    vector = "splice(2) from the descriptor to a pipe"
    source = "fs/splice.c, do_splice_read: EINVAL without a splice_read method; splice(2)"
    refusals = frozenset({errno.EINVAL})

    def reach(self, place: Specimen) -> str:
        with pipe() as (read_end, write_end):
            os.splice(place.ram.fileno(), write_end, PAGE_SIZE)
            return _CAME_THROUGH if place.holds(os.read(read_end, PAGE_SIZE)) else ""


class CopyFileRangeProbe(CallProbe):
    """copy_file_range(2). To another file of the same kind, for between kinds it is refused whatever the memory."""

    name = "copy-file-range"
    vector = "copy_file_range(2) from the descriptor to another file of its kind"
    source = "fs/splice.c, do_splice_read: EINVAL without a splice_read method; copy_file_range(2)"
    refusals = frozenset({errno.EINVAL})

    def reach(self, place: Specimen) -> str:
        with allocate(place.ram.backing, PAGE_SIZE) as copy, mmap.mmap(copy.fileno(), PAGE_SIZE) as copied:
            os.copy_file_range(place.ram.fileno(), copy.fileno(), PAGE_SIZE)
            return _CAME_THROUGH if place.holds(copied[:]) else ""


class PrivateMappingProbe(CallProbe):
    """A private mapping: the first write copies a page into ordinary anonymous memory."""

    name = "map-private"
    vector = "mmap(2) of the descriptor with MAP_PRIVATE; a write copies the page into ordinary memory"
    source = "mm/secretmem.c, secretmem_mmap: EINVAL without MAP_SHARED; mmap(2)"
    refusals = frozenset({errno.EINVAL})

    def reach(self, place: Specimen) -> str:
        private = mmap.mmap(place.ram.fileno(), PAGE_SIZE, mmap.MAP_PRIVATE)
        with closing(private):
            private[-1] = place.memory[PAGE_SIZE - 1]  # the same byte: it is the write that counts
            place.memory[:PAGE_SIZE] = bytes(PAGE_SIZE)
            return "the canary was copied into ordinary memory" if place.holds(private[:]) else ""


class PunchHoleProbe(CallProbe):
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE: pages go, and their content with them, under the owner's hands."""

    name = "punch-hole"
    vector = "fallocate(2) with FALLOC_FL_PUNCH_HOLE"
    source = "fs/open.c, vfs_fallocate: EOPNOTSUPP without a fallocate method; fallocate(2)"
    refusals = frozenset({errno.EOPNOTSUPP})

    def reach(self, place: Specimen) -> str:
        memory.punch_hole(place.ram.fileno(), 0, PAGE_SIZE)
        return "a page of the memory was emptied" if place.memory[:PAGE_SIZE] == bytes(PAGE_SIZE) else ""


class TruncateProbe(CallProbe):
    """ftruncate(2) to a smaller size: the owner's next touch of what is cut off is a SIGBUS. Nobody touches it here."""

    name = "truncate"
    vector = "ftruncate(2) of the descriptor to half its size"
    source = "mm/secretmem.c, secretmem_setattr: EINVAL for a second size"
    refusals = frozenset({errno.EINVAL})

    def reach(self, place: Specimen) -> str:
        half = place.ram.size // 2
        os.ftruncate(place.ram.fileno(), half)
        present = sum(memory.mincore(place.address + half, half))
        return f"{half >> 10} KiB of the memory were cut off" if not present else ""


class FileHandleProbe(CallProbe):
    """A file without a name has a handle still, by which CAP_DAC_READ_SEARCH opens it anew, from any process."""

    name = "file-handle"
    vector = "name_to_handle_at(2), then open_by_handle_at(2), and read"
    source = "fs/fhandle.c, do_sys_name_to_handle: EOPNOTSUPP without export operations; open_by_handle_at(2)"
    refusals = frozenset({errno.EOPNOTSUPP})

    def require(self) -> None:
        with allocate("ordinary", PAGE_SIZE) as ram:
            require(lambda: _opened_anew(ram.fileno()), "open_by_handle_at(2) of a memfd (CAP_DAC_READ_SEARCH)")

    def reach(self, place: Specimen) -> str:
        with _opened_anew(place.ram.fileno()) as again:
            return "opened anew, and read" if place.holds(os.pread(again, PAGE_SIZE, 0)) else ""


@contextmanager
def _opened_anew(descriptor: int) -> Iterator[int]:
    again = memory.reopen_by_handle(descriptor)
    try:
        yield again
    finally:
        os.close(again)


class SeekHoleProbe(CallProbe):
    """lseek(2) with SEEK_HOLE tells which pages are present, though not what is in them."""

    name = "seek-hole"
    vector = "lseek(2) with SEEK_HOLE: which pages of the file are present"
    source = "mm/secretmem.c, secretmem_fops: no llseek, hence ESPIPE (fs/read_write.c, vfs_llseek); lseek(2)"
    refusals = frozenset({errno.ESPIPE})
    filled = 16 * PAGE_SIZE

    def reach(self, place: Specimen) -> str:
        hole = os.lseek(place.ram.fileno(), 0, os.SEEK_HOLE)
        return f"the first absent page is at {hole}" if hole == self.filled else ""
