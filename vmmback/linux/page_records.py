"""What the kernel's own record of a frame, its struct page, tells beyond /proc: users of it, its file, its slab cache.

It is read through the direct map, as everything else here, with the places that the kernel's BTF names. The records
form one array (vmemmap). Where that starts is found by a page of ours: our task_struct leads to the struct file of a
memfd, and that to the record of its only page, whose frame number pagemap tells.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from vmmback.errors import HostUnfit
from vmmback.linux import procfs
from vmmback.linux.btf import Btf
from vmmback.linux.direct_map import current_task
from vmmback.linux.memfd_secret import address_of
from vmmback.linux.procfs import PAGE_SIZE

_WORD = 8
_DEEPEST = 64  # folders above a file
_LONGEST_NAME = 255
# mapping: the lowest bits tell memory of processes from files (PAGE_MAPPING_FLAGS of include/linux/page-flags.h);
# compound_head: bit 0 is set in a page that belongs to one before it.
_MAPPING_FLAGS = 3
_TAIL = 1
_MINOR_BITS = 20  # include/linux/kdev_t.h


class Reader(Protocol):
    """Reads the kernel's memory; see direct_map_scan.Scanner."""

    def read(self, address: int, size: int) -> bytes | None:
        """Return bytes at an address of the kernel's, None where it faults."""


class CachedFile(NamedTuple):
    """A file with pages in memory: its file system as `major:minor`, its inode, its path in that file system or ""."""

    device: str
    inode: int
    path: str


class PageRecord(NamedTuple):
    """How many hold the frame (0: it is free), which file's page it is, which slab cache's."""

    references: int
    file: CachedFile | None
    slab: str


class PageRecords:
    """Records of frames. Raises HostUnfit where the kernel has no BTF, or another layout than is known here."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._btf = Btf()
        self._size = self._btf.size("page")
        self._references = self._btf.offset("page", "_refcount")
        self._head = self._btf.offset("page", "compound_head")
        self._mapping = self._btf.offset("folio", "mapping")
        self._files: dict[int, CachedFile | None] = {}
        self._slabs: dict[int, str] = {}
        with _memfd_page() as (first, first_frame), _memfd_page() as (second, second_frame):
            self._start = self._record_of(first) - first_frame * self._size
            if self._record_of(second) - second_frame * self._size != self._start:
                raise HostUnfit("the kernel's records of its pages were not found", "its layout is not known yet")

    def of(self, frame: int, *, slab: bool) -> PageRecord | None:
        """Return the record of a frame, or of the block of frames it belongs to; `slab` tells that it is slab memory.

        None where it cannot be read. What changes meanwhile can make it wrong: the caller looks at the frame again.
        """
        record = self._reader.read(self._start + frame * self._size, self._size)
        if record is not None and (head := _number(record, self._head)) & _TAIL:
            record = self._reader.read(head - _TAIL, self._size)
        if record is None:
            return None
        references = _number(record, self._references, 4)
        if slab:
            cache = _number(record, self._btf.offset("slab", "slab_cache"))
            if cache not in self._slabs:
                name = self._pointer(cache, "kmem_cache", "name")
                self._slabs[cache] = self._text(name, _LONGEST_NAME)
            return PageRecord(references, None, self._slabs[cache])
        mapping = _number(record, self._mapping)
        if not references or not mapping or mapping & _MAPPING_FLAGS:
            return PageRecord(references, None, "")
        if mapping not in self._files:
            self._files[mapping] = self._file(mapping)
        return PageRecord(references, self._files[mapping], "")

    def _file(self, mapping: int) -> CachedFile | None:
        inode = self._pointer(mapping, "address_space", "host")
        block = self._pointer(inode, "inode", "i_sb")
        number = self._pointer(inode, "inode", "i_ino")
        raw_device = self._reader.read(block + self._btf.offset("super_block", "s_dev"), 4) if block else None
        if raw_device is None:
            return None
        device = _number(raw_device, 0, 4)
        major, minor = device >> _MINOR_BITS, device & (1 << _MINOR_BITS) - 1
        alias = self._pointer(inode, "inode", "i_dentry")
        dentry = alias - self._btf.offset("dentry", "d_u", "d_alias") if alias else 0
        return CachedFile(f"{major}:{minor}", number, self._path(dentry))

    def _path(self, dentry: int) -> str:
        """Return the path of a dentry; that of a memfd, which is in no folder, is its name."""
        names: list[str] = []
        for _ in range(_DEEPEST if dentry else 0):
            raw_length = self._reader.read(dentry + self._btf.offset("dentry", "d_name", "len"), 4)
            length = min(_number(raw_length, 0, 4), _LONGEST_NAME) if raw_length else 0
            name = self._text(self._pointer(dentry, "dentry", "d_name", "name"), length)
            parent = self._pointer(dentry, "dentry", "d_parent")
            if parent in (dentry, 0):
                return "/" + "/".join(reversed(names)) if name == "/" else "/".join([name, *reversed(names)])
            names.append(name)
            dentry = parent
        return ""

    def _record_of(self, descriptor: int) -> int:
        """Return the address of the record of the only page of an open file of ours."""
        files = self._pointer(current_task(), "task_struct", "files")
        table = self._pointer(self._pointer(files, "files_struct", "fdt"), "fdtable", "fd")
        file = self._word(table + descriptor * _WORD)
        return self._pointer(self._pointer(file, "file", "f_mapping"), "address_space", "i_pages", "xa_head")

    def _pointer(self, address: int, structure: str, *path: str) -> int:
        """Return a word of a structure, 0 where it cannot be read."""
        return self._word(address + self._btf.offset(structure, *path)) if address else 0

    def _word(self, address: int) -> int:
        raw = self._reader.read(address, _WORD)
        return _number(raw, 0) if raw else 0

    def _text(self, address: int, length: int) -> str:
        """Return a string of at most `length` bytes; the page behind the one it ends in may be secret RAM."""
        raw = b""
        while address and len(raw) < length and b"\0" not in raw:
            part = self._reader.read(address, min(length - len(raw), PAGE_SIZE - address % PAGE_SIZE))
            if part is None:
                break
            raw += part
            address += len(part)
        return raw.split(b"\0")[0].decode(errors="backslashreplace")


def _number(raw: bytes, offset: int, size: int = _WORD) -> int:
    return int.from_bytes(raw[offset : offset + size], sys.byteorder)


@contextmanager
def _memfd_page() -> Iterator[tuple[int, int]]:
    """Make a memfd of one page; yield its descriptor and the page's frame number."""
    descriptor = os.memfd_create("vmmback-page", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, PAGE_SIZE)
        with mmap.mmap(descriptor, PAGE_SIZE) as memory:
            memory[0] = 1
            yield descriptor, procfs.pagemap("self", address_of(memory), PAGE_SIZE)[0] & procfs.PFN_MASK
    finally:
        os.close(descriptor)
