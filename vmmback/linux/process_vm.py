"""process_vm_readv(2): read another process's memory without stopping it."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read(pid: int, address: int, size: int) -> bytes:
    """Return `size` bytes (or fewer, up to the first page out of reach) of the process's memory at `address`.

    Raises OSError: EFAULT when the first page is out of reach, EPERM without PTRACE_MODE_ATTACH_REALCREDS, ESRCH.
    """
    buffer = ctypes.create_string_buffer(size)
    local = _Iovec(ctypes.addressof(buffer), size)
    remote = _Iovec(address, size)
    count = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if count < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return buffer.raw[:count]
