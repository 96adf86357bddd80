"""One uid for one live guest: never shared by two, whatever folders their supervisors use.

Each supervisor holds a lock on the byte of a file whose offset is its guest's uid. The file belongs to root, lies at a
fixed path and is empty for ever. The lock is one of an open file description (fcntl(2)), so it ends with the
supervisor, however that ends; QEMU does not inherit it, since a holder could lock other bytes, too. A QEMU that
outlives its supervisor for a moment is seen in /proc.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vmmback.errors import HostUnfit
from vmmback.linux import byte_locks, procfs

if TYPE_CHECKING:
    from vmmback.config.process import Process

LOCKS = Path("/run/vmmback-uids.lock")


@contextmanager
def claimed(process: Process, locks: Path | None = None) -> Iterator[tuple[int, int]]:
    """Hold a uid that no other guest and no live process has; yield it and its gid. `locks`: another file, for tests.

    Raises HostUnfit where there is none.
    """
    descriptor = _open(locks or LOCKS)
    try:
        if process.user is not None:
            account = pwd.getpwnam(process.user)
            if not _claim(descriptor, account.pw_uid):
                raise HostUnfit(
                    f"process.user: another guest, or another process, runs as {process.user}",
                    "give each guest an account of its own, or write uids, a range of which each guest gets one",
                )
            yield account.pw_uid, account.pw_gid
        else:
            first, last = process.uids
            uid = _first_free(_from_anywhere(first, last), lambda uid: _claim(descriptor, uid))
            if uid is None:
                raise HostUnfit(f"process.uids: every uid from {first} to {last} is taken", "write a larger range")
            yield uid, uid
    finally:
        os.close(descriptor)


def _open(locks: Path) -> int:
    try:
        return os.open(locks, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        problem = f"the file {locks} cannot be opened: {error.strerror}"
        raise HostUnfit(problem, "is its folder there, and writable?") from error


def _from_anywhere(first: int, last: int) -> Iterator[int]:
    """Yield each uid of the range, beginning anywhere: so a uid that was just given back is hardly ever the next."""
    import secrets  # it takes some milliseconds, and whoever examines a host needs no uid

    count = last - first + 1
    start = secrets.randbelow(count)
    return (first + (start + step) % count for step in range(count))


def _first_free(uids: Iterable[int], claim: Callable[[int], bool]) -> int | None:
    return next((uid for uid in uids if claim(uid)), None)


def _claim(descriptor: int, uid: int) -> bool:
    """Lock the uid's byte; only who has it looks for processes, so that two supervisors never both find none."""
    try:
        byte_locks.set_lock(descriptor, fcntl.F_WRLCK, uid)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    if _is_in_use(uid):
        byte_locks.set_lock(descriptor, fcntl.F_UNLCK, uid)
        return False
    return True


def _is_in_use(uid: int, proc: Path = procfs.PROC) -> bool:
    """Tell whether a live process has this effective uid: the folder of a process is its (fs/proc/base.c)."""
    with os.scandir(proc) as entries:
        return any(entry.name.isdecimal() and _owner(entry) == uid for entry in entries)


def _owner(process: os.DirEntry[str]) -> int | None:
    with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return process.stat(follow_symlinks=False).st_uid
    return None
