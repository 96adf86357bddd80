"""The limit on locked memory, which mappings of secret RAM count against. Sources: getrlimit(2), mm/secretmem.c."""

from __future__ import annotations

import errno
import resource
import select

from vmmback.errors import HostUnfit
from vmmback.linux import procfs

_CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h


def ensure(size: int) -> None:
    """Make sure that this process, and a program that it starts, may map `size` bytes of secret RAM.

    Raises HostUnfit where they may not.
    """
    if not allows(size):
        raise too_small(size)


def allows(size: int) -> bool:
    """Tell whether this process, and a program that it starts, may map `size` bytes of secret RAM.

    CAP_IPC_LOCK frees from the limit, save on kernels that count secret pages when they are first touched, all of a
    user's together, whoever touches them: Debian's 6.1.192 does. So there the limit is taken away too, or raised as far
    as that goes. Without the capability the soft limit is raised as far as `size` where the hard one allows.
    """
    soft, hard = resource.prlimit(0, resource.RLIMIT_MEMLOCK)
    if procfs.has_capability(_CAP_IPC_LOCK):
        try:
            resource.prlimit(0, resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (PermissionError, ValueError):  # CAP_SYS_RESOURCE is missing; resource says ValueError for EPERM
            resource.prlimit(0, resource.RLIMIT_MEMLOCK, (hard, hard))
        return True
    if not _covers(soft, size) and _covers(hard, size):
        resource.prlimit(0, resource.RLIMIT_MEMLOCK, (size, hard))
    return _covers(hard, size)


def let_lock(pid: int, pidfd: int, size: int) -> bool:
    """Raise the limits of another process as far as `size` bytes need; tell whether it may lock as much then.

    They are never lowered. `pidfd` is a descriptor of the same process: if it has ended, its pid may be another's, and
    nothing is done; what ends within the microseconds between cannot be told. Raises OSError: EPERM where it is another
    user's, or the hard limit is too low, without CAP_SYS_RESOURCE (prlimit(2)).
    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(0):
        return False
    limits = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    needed = raised(limits, size)
    if needed != limits:
        try:
            resource.prlimit(pid, resource.RLIMIT_MEMLOCK, needed)
        except ValueError as error:  # so resource says EPERM for a hard limit that may not be raised
            raise PermissionError(errno.EPERM, str(error)) from error
    return True


def raised(limits: tuple[int, int], size: int) -> tuple[int, int]:
    """Return the soft and the hard limit that are at least `size` bytes, and no lower than they are."""
    soft, hard = limits
    return (soft if _covers(soft, size) else size), (hard if _covers(hard, size) else size)


def most() -> int | None:
    """Return the most bytes that allows() would allow, None for any number of them; it changes no limit."""
    _, hard = resource.prlimit(0, resource.RLIMIT_MEMLOCK)
    return None if hard == resource.RLIM_INFINITY or procfs.has_capability(_CAP_IPC_LOCK) else hard


def falls_short(size: int) -> bool:
    """Tell whether the limit is less than `size` bytes, whatever frees from it."""
    return not _covers(resource.prlimit(0, resource.RLIMIT_MEMLOCK)[0], size)


class LimitTooLow(HostUnfit):
    """RLIMIT_MEMLOCK does not let this process map the secret RAM that it wants."""


def too_small(size: int) -> LimitTooLow:
    """Return the error that says by how much the limit falls short of `size` bytes, and how to raise it."""
    soft, _ = resource.prlimit(0, resource.RLIMIT_MEMLOCK)
    return LimitTooLow(
        f"RLIMIT_MEMLOCK is {soft >> 10} KiB, too small to map {size >> 10} KiB of secret RAM",
        f"raise the limit: {remedy(size)}; or run it with CAP_IPC_LOCK: as root, or by a launcher that has it "
        "(docs/BROKER.md)",
    )


def remedy(size: int) -> str:
    """Return the ways to raise the limit to `size` bytes."""
    return f"`ulimit -l {size >> 10}`, LimitMEMLOCK={size} in a systemd unit, or memlock in /etc/security/limits.conf"


def _covers(limit: int, size: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= size
