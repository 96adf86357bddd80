"""Whose memory a frame is: what it is used for, and the process, file or slab cache that uses it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeAlias

from vmmback.errors import HostUnfit
from vmmback.linux import kpage, procfs
from vmmback.linux.kpage import Flag, KernelPages, User
from vmmback.linux.page_records import CachedFile, PageRecord, PageRecords, Reader

PlaceName: TypeAlias = Literal["process", "page cache", "shared memory", "slab", "free", "kernel"]

_NAMED_USERS = 3

# proc_pid_mountinfo(5): number, parent, device, root in the file system, mount point; octal escapes for white space.
_MOUNT = re.compile(r"^\d+ \d+ (\d+:\d+) (\S+) (\S+) ", re.MULTILINE)
_OCTAL = re.compile(r"\\([0-7]{3})")


class Owner(NamedTuple):
    """What a frame is used for, and by whom in words."""

    place: PlaceName
    name: str


class FrameOwners:
    """Tells the owners of frames. A context manager. Raises OSError without CAP_SYS_ADMIN."""

    def __init__(self, reader: Reader, frames: Iterable[int], go_on: Callable[[], bool]) -> None:
        """Take a look at all processes for `frames`, those that will be asked for."""
        with ExitStack() as stack:
            self._pages = stack.enter_context(KernelPages())
            self._users = kpage.users({frame for frame in frames if self._pages.maps(frame)}, go_on)
            self._records: PageRecords | None = None
            self._no_records = ""
            try:
                self._records = PageRecords(reader)
            except HostUnfit as error:
                self._no_records = error.message
            self._mounts = mounts()
            self._stack = stack.pop_all()

    def of(self, frame: int) -> Owner:
        """Return whose memory a frame is now."""
        flags = self._pages.flags(frame)
        slab = bool(flags & Flag.SLAB)
        record = None
        # Those two say enough; but slab memory shows as ANON by chance (stable_page_flags() of fs/proc/page.c).
        if self._records and (slab or not flags & (Flag.ANON | Flag.BUDDY)):
            record = self._records.of(frame, slab=slab)
        return judge(flags, record, self._users.get(frame, []), self._mounts, self._no_records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def judge(
    flags: Flag, record: PageRecord | None, users: list[User], mounts: list[tuple[str, str, str]], no_records: str = ""
) -> Owner:
    """Return the owner of a frame by all that is known of it; `no_records` says why `record` is not known."""
    if flags & Flag.SLAB:
        return Owner("slab", record.slab if record else "")
    if flags & Flag.BUDDY:
        return Owner("free", "")
    if flags & Flag.ANON or (users and not users[0].path.startswith("/")):
        return Owner("process", _who(users) or "no process maps it any more")
    if users or flags & Flag.LRU or (record and record.file):
        file = _file(record.file if record else None, users, mounts)
        return Owner("shared memory" if flags & Flag.SWAPBACKED else "page cache", file)
    # Pages that wait in a processor's own list of free ones bear no mark, but nobody refers to them.
    if record and record.references == 0 and not flags & (Flag.RESERVED | Flag.PGTABLE | Flag.NOPAGE):
        return Owner("free", "")
    return Owner("kernel", _kernel_use(flags, no_records))


def _kernel_use(flags: Flag, no_records: str) -> str:
    if flags & Flag.PGTABLE:
        return "page table"
    if flags & (Flag.RESERVED | Flag.NOPAGE):
        return "the kernel's image, or reserved"
    if no_records:
        return f"free, or the kernel's: {no_records}"
    return "pipe, socket, kernel stack, vmalloc or other"


def _who(users: list[User]) -> str:
    named = [f"{user.pid} ({user.comm}): {user.path or 'anonymous'}" for user in users[:_NAMED_USERS]]
    if len(users) > _NAMED_USERS:
        named.append(f"{len(users) - _NAMED_USERS} more")
    return ", ".join(named)


def _file(file: CachedFile | None, users: list[User], mounts: list[tuple[str, str, str]]) -> str:
    name = users[0].path if users else "file not known"
    if file is not None:
        name = path_of(file, mounts)
    if not users:
        return name
    more = f" and {len(users) - _NAMED_USERS} more" if len(users) > _NAMED_USERS else ""
    return f"{name}, mapped by " + ", ".join(f"{user.pid} ({user.comm})" for user in users[:_NAMED_USERS]) + more


def path_of(file: CachedFile, mounts: list[tuple[str, str, str]]) -> str:
    """Return the path at which a file is mounted here, or its name there, its inode and its file system's device."""
    for device, root, mount_point in mounts:
        below = root.rstrip("/") + "/"
        if device == file.device and file.path.startswith(below):
            return os.path.join(mount_point, file.path[len(below) :])  # noqa: PTH118 - a path of the kernel's, as text
    return f"{file.path or 'name not known'} (inode {file.inode} of device {file.device})"


def mounts(root: Path = procfs.PROC) -> list[tuple[str, str, str]]:
    """Return the device, the root within its file system and the mount point of each mount of ours."""
    text = (root / "self/mountinfo").read_bytes().decode(errors="surrogateescape")
    return [(device, _unescaped(inner), _unescaped(point)) for device, inner, point in _MOUNT.findall(text)]


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
