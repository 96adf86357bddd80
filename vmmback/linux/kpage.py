"""What the kernel says of a frame to root: /proc/kpageflags and kpagecount, and the frames that processes map.

Source: Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/kernel-page-flags.h of the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from enum import IntFlag
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from vmmback.linux import procfs
from vmmback.linux.procfs import PAGE_SIZE, Mapping

_WORD = struct.Struct("=Q")

# Pagemap entries that are looked at at a time: enough to be quick, few enough to need no memory to speak of.
_BATCH = 8192
_BATCH_MASK = int.from_bytes(array("Q", [procfs.PFN_MASK]).tobytes() * _BATCH, sys.byteorder)

# PAGEMAP_SCAN and struct pm_scan_arg, struct page_region of include/uapi/linux/fs.h
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_SCAN = struct.Struct("=12Q")
_WALK_END = 4
_PRESENT_PAGES = 1 << 3  # PAGE_IS_PRESENT
_REGIONS = 256


class Flag(IntFlag):
    """Bits of /proc/kpageflags that tell what a frame is used for."""

    LRU = 1 << 5
    SLAB = 1 << 7
    BUDDY = 1 << 10
    MMAP = 1 << 11
    ANON = 1 << 12
    SWAPBACKED = 1 << 14
    UNEVICTABLE = 1 << 18
    HWPOISON = 1 << 19
    NOPAGE = 1 << 20
    PGTABLE = 1 << 26
    RESERVED = 1 << 32


class KernelPages:
    """Readers of /proc/kpageflags and /proc/kpagecount. A context manager. Raises OSError without CAP_SYS_ADMIN."""

    def __init__(self, root: Path = procfs.PROC) -> None:
        self._flags = os.open(root / "kpageflags", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._counts = os.open(root / "kpagecount", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._flags)
            raise

    def flags(self, frame: int) -> Flag:
        """Return a frame's flags, NOPAGE where the kernel has no record of it."""
        data = os.pread(self._flags, _WORD.size, frame * _WORD.size)
        return Flag(_WORD.unpack(data)[0] & _KNOWN) if len(data) == _WORD.size else Flag.NOPAGE

    def maps(self, frame: int) -> int:
        """Return how often processes map a frame."""
        data = os.pread(self._counts, _WORD.size, frame * _WORD.size)
        return int(_WORD.unpack(data)[0]) if len(data) == _WORD.size else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._flags)
        os.close(self._counts)


_KNOWN = sum(Flag)


class Lists(NamedTuple):
    """Of some frames: how many are on the lists of what can be reclaimed and swapped out, how many are unevictable.

    A new frame is on no list for a moment, and the kernel reclaims from lists alone: it counts as neither.
    """

    evictable: int
    unevictable: int


def lists(frames: Iterable[int], root: Path = procfs.PROC) -> Lists:
    """Return on which of the kernel's lists frames are: 256 MiB in some 50 ms. Raises OSError without CAP_SYS_ADMIN."""
    if not (runs := _runs(frames)):
        return Lists(0, 0)
    words = bytearray()
    with (root / "kpageflags").open("rb", buffering=0) as file:
        for first, count in runs:
            words += os.pread(file.fileno(), count * _WORD.size, first * _WORD.size)
    # An AND of all words at once leaves the two bits, at C's speed; so does count().
    mask = int.from_bytes(_LISTS.to_bytes(_WORD.size, sys.byteorder) * (len(words) // _WORD.size), sys.byteorder)
    found = array("Q", (int.from_bytes(words, sys.byteorder) & mask).to_bytes(len(words), sys.byteorder))
    return Lists(found.count(_LRU), found.count(_UNEVICTABLE) + found.count(_LISTS))


_LRU, _UNEVICTABLE = int(Flag.LRU), int(Flag.UNEVICTABLE)
_LISTS = _LRU | _UNEVICTABLE


def _runs(frames: Iterable[int]) -> list[tuple[int, int]]:
    """Put frames that follow each other together; return the first of each run, and how many it has."""
    runs: list[tuple[int, int]] = []
    for frame in sorted(frames):
        if runs and (last := runs[-1])[0] + last[1] == frame:
            runs[-1] = last[0], last[1] + 1
        else:
            runs.append((frame, 1))
    return runs


class User(NamedTuple):
    """A process that maps a frame: its pid, its name, and the path that /proc/PID/maps shows, "" for anonymous."""

    pid: int
    comm: str
    path: str


def users(frames: set[int], go_on: Callable[[], bool], root: Path = procfs.PROC) -> dict[int, list[User]]:
    """Return which processes map each of `frames`; those that end meanwhile are left out.

    It reads the page tables of all processes. Ends early when `go_on` says so.
    """
    found: dict[int, list[User]] = {}
    for pid in sorted(int(entry.name) for entry in root.iterdir() if entry.name.isdecimal()):
        if not go_on():
            break
        with contextlib.suppress(OSError):  # it ended, or is a thread of the kernel's
            comm = (root / str(pid) / "comm").read_text(errors="replace").rstrip("\n")
            for mapping, frame in _mapped(pid, frames, go_on, root):
                user = User(pid, comm, mapping.path)
                if user not in (known := found.setdefault(frame, [])):
                    known.append(user)
    return found


def _mapped(pid: int, frames: set[int], go_on: Callable[[], bool], root: Path) -> Iterator[tuple[Mapping, int]]:
    mappings = procfs.maps(pid, root)
    if not mappings:
        return
    with (root / str(pid) / "pagemap").open("rb", buffering=0) as pagemap:
        for mapping in mappings:
            # Secret memory is no place where a kernel address leads to; [vsyscall] is in no page table of a process.
            if mapping.path in (procfs.SECRETMEM, "[vsyscall]"):
                continue
            for first, end in _present(pagemap.fileno(), mapping):
                for start in range(first, end, _BATCH):
                    if not go_on():
                        return
                    count = min(_BATCH, end - start)
                    for frame in _among(os.pread(pagemap.fileno(), count * 8, start * 8), frames):
                        yield mapping, frame


def _present(pagemap: int, mapping: Mapping) -> Iterator[tuple[int, int]]:
    """Yield where a mapping has pages, as page numbers [first, end), and all of it where this cannot be asked for.

    Some programs reserve terabytes: PAGEMAP_SCAN (Linux 6.7) skips what is not there, reading pagemap does not.
    """
    if mapping.size <= _BATCH * PAGE_SIZE:
        yield mapping.start // PAGE_SIZE, mapping.end // PAGE_SIZE
        return
    regions = array("Q", bytes(_REGIONS * 3 * 8))
    start = mapping.start
    while start < mapping.end:
        fields = (_SCAN.size, 0, start, mapping.end, 0, regions.buffer_info()[0], _REGIONS, 0, 0, _PRESENT_PAGES, 0)
        request = bytearray(_SCAN.pack(*fields, _PRESENT_PAGES))
        try:
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, request, True)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            yield start // PAGE_SIZE, mapping.end // PAGE_SIZE
            return
        for index in range(count):
            yield regions[index * 3] // PAGE_SIZE, regions[index * 3 + 1] // PAGE_SIZE
        start = _SCAN.unpack(request)[_WALK_END]


def _among(entries: bytes, frames: set[int]) -> Iterator[int]:
    """Yield those of `frames` that raw pagemap entries, up to _BATCH of them, show as present."""
    # An AND of all entries at once leaves the numbers of the frames, at C's speed.
    number = int.from_bytes(entries, sys.byteorder) & _BATCH_MASK
    if number and not frames.isdisjoint(array("Q", number.to_bytes(len(entries), sys.byteorder))):
        for entry in array("Q", entries):
            if entry & procfs.PRESENT and entry & procfs.PFN_MASK in frames:
                yield entry & procfs.PFN_MASK
