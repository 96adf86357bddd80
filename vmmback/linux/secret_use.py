"""Secret RAM that the host's processes map: /proc/PID/maps and smaps (proc(5), linux/procmap.py).

The kernel counts secret pages nowhere by themselves: they are among Unevictable, Mlocked and the page cache.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmmback.linux import procfs, procmap
from vmmback.linux.procfs import PROC, SECRETMEM

_NAME = SECRETMEM.encode()
_LINE = rb"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +%s\n" % re.escape(_NAME)
_MAPPING = re.compile(b"^" + _LINE, re.MULTILINE)
_DETAILED = re.compile(b"^" + _LINE + rb"(?:(?!Rss:)\w+: .*\n)*Rss: +(\d+) kB$", re.MULTILINE)


_Row = tuple[int, int, int, int]
"""A mapping of a secret file: its start and end, the inode, and how many KiB of it this process has touched."""
Mappings = dict[int, list[_Row]]


class SecretFile(NamedTuple):
    """A memfd_secret file that processes map: bytes mapped and present by the one with most of it, and their pids."""

    mapped: int
    present: int
    pids: frozenset[int]


def secret_mappings(root: Path = PROC) -> Mappings:
    """Return the mappings of memfd_secret files, for `secret_files`, by the pid of the process that has them."""
    found = {}
    for pid in procfs.processes(root):
        with suppress(OSError):  # it is gone, or another user's
            if rows := _mappings(f"{root}/{pid}/maps"):  # most processes have none
                found[pid] = rows
    return found


def secret_files(
    root: Path = PROC, known: Collection[int] = (), mappings: Mappings | None = None
) -> dict[int, SecretFile]:
    """Return the memfd_secret files that are mapped, by inode; each counts once, however many processes map it.

    `present` is what those processes have touched: pages that another one made present, and that has ended, are not
    seen before they are touched again. What no process maps is not seen, nor what belongs to processes that may not be
    looked at (no CAP_SYS_PTRACE). Of the inodes in `known` it is not looked at what is present, which takes the kernel
    some milliseconds for each QEMU: it is 0. `mappings` are those of before, without which they are read now.
    """
    found, settled = dict[int, SecretFile](), frozenset(known)
    for pid, rows in (secret_mappings(root) if mappings is None else mappings).items():
        with suppress(OSError):  # it is gone, or another user's
            if not {inode for _, _, inode, _ in rows} <= settled:
                rows = _present(f"{root}/{pid}/smaps")
            for inode, (mapped, present) in _sums(rows).items():
                other = found.get(inode, SecretFile(0, 0, frozenset()))
                found[inode] = SecretFile(max(mapped, other.mapped), max(present, other.present), other.pids | {pid})
    return found


def _mappings(maps: str) -> list[_Row]:
    """Return a process's, with nothing touched."""
    descriptor = os.open(maps, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [
            (file.start, file.end, file.inode, 0) for file in procmap.shared_files(descriptor) if file.path == _NAME
        ]
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            text = file.readall()
        # To search all lines takes far longer than to find that there is none.
        return [_row(*match.groups()) for match in _MAPPING.finditer(text)] if _NAME in text else []
    finally:
        os.close(descriptor)


def _present(smaps: str) -> list[_Row]:
    with open(smaps, "rb", buffering=0) as file:
        return [_row(*fields) for fields in _DETAILED.findall(file.readall())]


def _row(start: bytes, end: bytes, inode: bytes, rss: bytes = b"0") -> _Row:
    return int(start, 16), int(end, 16), int(inode), int(rss)


def _sums(rows: Iterable[_Row]) -> dict[int, tuple[int, int]]:
    """Return bytes mapped and present of each file of a process; madvise(2) may have split a mapping in several."""
    files: dict[int, tuple[int, int]] = {}
    for start, end, inode, rss in rows:
        mapped, present = files.get(inode, (0, 0))
        files[inode] = mapped + end - start, present + rss * 1024
    return files
