"""Secret RAM that the host's processes map: /proc/PID/maps and smaps (proc(5)).

The kernel counts secret pages nowhere by themselves: they are among Unevictable, Mlocked and the page cache.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmmback.linux import procfs
from vmmback.linux.procfs import PROC, SECRETMEM


@dataclass(frozen=True)
class SecretFile:
    """A memfd_secret file that processes map: bytes mapped and present by the one with most of it, and their pids."""

    mapped: int
    present: int
    pids: frozenset[int]


def secret_files(root: Path = PROC) -> dict[int, SecretFile]:
    """Return the memfd_secret files that are mapped, by inode; each counts once, however many processes map it.

    What no process maps is not seen, nor what belongs to processes that may not be looked at (no CAP_SYS_PTRACE).
    """
    found: dict[int, SecretFile] = {}
    for pid in procfs.processes(root):
        with suppress(OSError):  # it is gone, or another user's
            if SECRETMEM.encode() not in (root / str(pid) / "maps").read_bytes():  # most processes have none
                continue
            for inode, (mapped, present) in _of(pid, root).items():
                other = found.get(inode, SecretFile(0, 0, frozenset()))
                found[inode] = SecretFile(max(mapped, other.mapped), max(present, other.present), other.pids | {pid})
    return found


def _of(pid: int, root: Path) -> dict[int, tuple[int, int]]:
    """Return bytes mapped and present of each file of a process; madvise(2) may have split a mapping in several."""
    files: dict[int, tuple[int, int]] = {}
    for mapping in procfs.smaps(pid, root):
        if mapping.path == SECRETMEM:
            mapped, present = files.get(mapping.inode, (0, 0))
            files[mapping.inode] = mapped + mapping.size, present + mapping.sizes.get("Rss", 0)
    return files
