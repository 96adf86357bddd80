"""ptrace(2): what a debugger does to another process. It belongs to the thread that calls it, and ends with it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_SEIZE = 0x4206  # include/uapi/linux/ptrace.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_DETACH = 17
_INTERRUPT = 0x4207
_WALL = 0x40000000  # __WALL of waitpid(2)


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """Trace a process without stopping it (PTRACE_SEIZE); on exit it is stopped for a moment, and let go.

    Entry and exit must be by the same thread. Raises OSError: EPERM without the right to, ESRCH when it is gone.
    """
    _ptrace(_SEIZE, pid)
    try:
        yield
    finally:
        _ptrace(_INTERRUPT, pid)  # only a stopped process can be let go
        os.waitpid(pid, _WALL)
        _ptrace(_DETACH, pid)


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
