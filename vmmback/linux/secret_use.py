"""Secret RAM that the host's processes map: /proc/PID/maps and smaps (proc(5)).

The kernel counts secret pages nowhere by themselves: they are among Unevictable, Mlocked and the page cache.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmmback.linux import procfs
from vmmback.linux.procfs import PROC, SECRETMEM

_NAME = SECRETMEM.encode()
_LINE = rb"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +%s\n" % re.escape(_NAME)
_MAPPING = re.compile(_LINE)
_DETAILED = re.compile(b"^" + _LINE + rb"(?:(?!Rss:)\w+: .*\n)*Rss: +(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class SecretFile:
    """A memfd_secret file that processes map: bytes mapped and present by the one with most of it, and their pids."""

    mapped: int
    present: int
    pids: frozenset[int]


def secret_files(root: Path = PROC, known: Collection[int] = ()) -> dict[int, SecretFile]:
    """Return the memfd_secret files that are mapped, by inode; each counts once, however many processes map it.

    `present` is what those processes have touched: pages that another one made present, and that has ended, are not
    seen before they are touched again. What no process maps is not seen, nor what belongs to processes that may not be
    looked at (no CAP_SYS_PTRACE). Of the inodes in `known` it is not looked at what is present, which takes the kernel
    some milliseconds for each QEMU: it is 0.
    """
    found: dict[int, SecretFile] = {}
    for pid in procfs.processes(root):
        with suppress(OSError):  # it is gone, or another user's
            folder = f"{root}/{pid}"
            if _NAME not in (maps := _contents(f"{folder}/maps")):  # most processes have none
                continue
            rows = list(_mappings(maps))
            if not known or not {int(inode) for _, _, inode, _ in rows} <= set(known):
                rows = _DETAILED.findall(_contents(f"{folder}/smaps"))
            for inode, (mapped, present) in _sums(rows).items():
                other = found.get(inode, SecretFile(0, 0, frozenset()))
                found[inode] = SecretFile(max(mapped, other.mapped), max(present, other.present), other.pids | {pid})
    return found


def _mappings(maps: bytes) -> Iterator[tuple[bytes, bytes, bytes, bytes]]:
    """Yield those of secret files as `_DETAILED` would, with nothing present; to search all lines takes ten times."""
    at = -1
    while (at := maps.find(_NAME, at + 1)) >= 0:
        if match := _MAPPING.match(maps, maps.rfind(b"\n", 0, at) + 1):
            start, end, inode = match.groups()
            yield start, end, inode, b"0"


def _sums(rows: Iterable[tuple[bytes, bytes, bytes, bytes]]) -> dict[int, tuple[int, int]]:
    """Return bytes mapped and present of each file of a process; madvise(2) may have split a mapping in several."""
    files: dict[int, tuple[int, int]] = {}
    for start, end, inode, rss in rows:
        mapped, present = files.get(int(inode), (0, 0))
        files[int(inode)] = mapped + int(end, 16) - int(start, 16), present + int(rss) * 1024
    return files


def _contents(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # as pathlib does, without its paths: there are hundreds of processes
        return file.readall()
