"""Secret RAM that the host's processes map: /proc/PID/maps and smaps (proc(5)).

The kernel counts secret pages nowhere by themselves: they are among Unevictable, Mlocked and the page cache.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmmback.linux import procfs
from vmmback.linux.procfs import PROC, SECRETMEM

_NAME = SECRETMEM.encode()
_MAPPING = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +%s\n(?:(?!Rss:)\w+: .*\n)*Rss: +(\d+) kB$" % re.escape(_NAME),
    re.MULTILINE,
)


@dataclass(frozen=True)
class SecretFile:
    """A memfd_secret file that processes map: bytes mapped and present by the one with most of it, and their pids."""

    mapped: int
    present: int
    pids: frozenset[int]


def secret_files(root: Path = PROC, leave_out: Collection[int] = ()) -> dict[int, SecretFile]:
    """Return the memfd_secret files that are mapped, by inode; each counts once, however many processes map it.

    `present` is what those processes have touched: pages that another one made present, and that has ended, are not
    seen before they are touched again. What no process maps is not seen, nor what belongs to processes that may not be
    looked at (no CAP_SYS_PTRACE), nor to those of the pids in `leave_out`.
    """
    found: dict[int, SecretFile] = {}
    for pid in procfs.processes(root):
        if pid in leave_out:
            continue
        with suppress(OSError):  # it is gone, or another user's
            if _NAME not in (root / str(pid) / "maps").read_bytes():  # most processes have none
                continue
            for inode, (mapped, present) in _of(pid, root).items():
                other = found.get(inode, SecretFile(0, 0, frozenset()))
                found[inode] = SecretFile(max(mapped, other.mapped), max(present, other.present), other.pids | {pid})
    return found


def _of(pid: int, root: Path) -> dict[int, tuple[int, int]]:
    """Return bytes mapped and present of each file of a process; madvise(2) may have split a mapping in several.

    A QEMU has some 300 mappings: to take all of them apart, as procfs.smaps does, would take 5 ms for each process.
    """
    files: dict[int, tuple[int, int]] = {}
    for start, end, inode, rss in _MAPPING.findall((root / str(pid) / "smaps").read_bytes()):
        mapped, present = files.get(int(inode), (0, 0))
        files[int(inode)] = mapped + int(end, 16) - int(start, 16), present + int(rss) * 1024
    return files
