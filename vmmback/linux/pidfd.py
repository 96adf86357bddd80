"""pidfd_getfd(2): a copy of another process's descriptor, for who may ptrace it."""

from __future__ import annotations

from vmmback.linux import arch
from vmmback.linux.syscall import syscall


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """Return a close-on-exec copy of `descriptor` of the process that `pidfd` (os.pidfd_open) refers to.

    Raises OSError: EPERM without PTRACE_MODE_ATTACH_REALCREDS on the process, EBADF, ESRCH.
    """
    return syscall(arch.current().pidfd_getfd, pidfd, descriptor, 0)
