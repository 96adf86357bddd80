"""One door to system calls that libc or Python has no function for."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Argument = int | ctypes.Array[ctypes.c_char] | ctypes.Structure | None


def syscall(number: int, *arguments: Argument) -> int:
    """Make system call `number` and return its result.

    Integers are passed as 64-bit words; structures and buffers by reference. Raises OSError with the kernel's errno.
    """
    words = [
        ctypes.c_ulong(argument & 0xFFFF_FFFF_FFFF_FFFF)
        if isinstance(argument, int)
        else ctypes.c_void_p(None)
        if argument is None
        else ctypes.byref(argument)
        for argument in arguments
    ]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result
