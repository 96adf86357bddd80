"""Processes without rights that try to get at another process, and one that they must get at: the control.

Run as root: `python -I -S stranger_worker.py PIDFD_GETFD UID [PID DESCRIPTOR UID GID]...`, with the number of
pidfd_getfd(2). The first UID tries a process of its own; each further one tries descriptor DESCRIPTOR of process PID.
The gid counts as well: ptrace(2) refuses who has another one than the process.
For each it prints a line: three words, the errno's name or `done`, for pidfd_getfd(2), open(2) of /proc/PID/mem and
ptrace(2) with PTRACE_SEIZE, which stops nothing. A copy is closed at once; a tracer lets go by ending. Nothing is read.

A process whose uid changed is not dumpable (kernel/cred.c, commit_creds), so QEMU cannot get at those that have its
uid here. The control's victim is made dumpable, and allows any tracer (Documentation/admin-guide/LSM/Yama.rst).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DONE = "done"

_PR_SET_DUMPABLE, _PR_SET_PTRACER, _PR_SET_PDEATHSIG = 4, 0x59616D61, 1
_ANY_TRACER = (1 << 64) - 1
_PTRACE_SEIZE = 0x4206
_SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = _libc.ptrace.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * 4
_libc.ptrace.argtypes = (ctypes.c_long,) * 4
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def main() -> None:
    """Let each of them try, one after the other."""
    getfd, own, *others = (int(argument) for argument in sys.argv[1:])
    _in_child(lambda: _control(getfd, own))
    for start in range(0, len(others), 4):
        pid, descriptor, *ids = others[start : start + 4]
        _in_child(lambda pid=pid, descriptor=descriptor, ids=ids: _stranger(getfd, ids, pid, descriptor))  # type: ignore[misc]


def _control(getfd: int, uid: int) -> None:
    _become(uid, uid)
    gone, ours = os.pipe()
    ready, theirs = os.pipe()
    victim = os.fork()
    if victim == 0:
        os.close(ours)
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        _libc.prctl(_PR_SET_PTRACER, _ANY_TRACER, 0, 0, 0)
        os.write(theirs, b".")
        os.read(gone, 1)  # until its parent ends
        os._exit(0)
    os.read(ready, 1)
    _tell(getfd, victim, gone)


def _stranger(getfd: int, ids: Sequence[int], pid: int, descriptor: int) -> None:
    _become(*ids)
    _tell(getfd, pid, descriptor)


def _become(uid: int, gid: int) -> None:
    """Drop all groups and, with the change from uid 0, all capabilities (capabilities(7)); it ends with its parent."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def _tell(getfd: int, pid: int, descriptor: int) -> None:
    attempts = (lambda: _copy(getfd, pid, descriptor), lambda: _open(pid), lambda: _seize(pid))
    os.write(1, (" ".join(_outcome(attempt) for attempt in attempts) + "\n").encode())


def _outcome(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return DONE


def _copy(getfd: int, pid: int, descriptor: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.close(_checked(_libc.syscall(getfd, pidfd, descriptor, 0)))
    finally:
        os.close(pidfd)


def _open(pid: int) -> None:
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))


def _seize(pid: int) -> None:
    _checked(_libc.ptrace(_PTRACE_SEIZE, pid, 0, 0))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def _in_child(work: Callable[[], None]) -> None:
    """Do `work` in a child and wait for its end: with it a tracer lets go, and rights that were dropped are gone."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
