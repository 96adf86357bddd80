"""One door to system calls that Python has no function for: by number, or by the name of libc's function."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Argument = int | ctypes.Array[ctypes.c_char] | ctypes.Structure | None


def syscall(number: int, *arguments: Argument) -> int:
    """Make system call `number` and return its result.

    Integers are passed as 64-bit words; structures and buffers by reference. Raises OSError with the kernel's errno.
    """
    return _checked(_libc.syscall(ctypes.c_long(number), *_words(arguments)))


def libc(function: str, *arguments: Argument) -> int:
    """Call libc's function of that name and return its result, which must fit an int, and be -1 for an error.

    Arguments and errors are as for syscall().
    """
    result: int = _libc[function](*_words(arguments))
    return _checked(result)


def _words(arguments: Iterable[Argument]) -> list[Any]:
    return [
        ctypes.c_ulong(argument & 0xFFFF_FFFF_FFFF_FFFF)
        if isinstance(argument, int)
        else ctypes.c_void_p(None)
        if argument is None
        else ctypes.byref(argument)
        for argument in arguments
    ]


def _checked(result: int) -> int:
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result
