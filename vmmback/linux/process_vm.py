"""process_vm_readv(2) and its kin: reach into another process's memory without stopping it."""

from __future__ import annotations

import ctypes
import os

from vmmback.linux import arch
from vmmback.linux.syscall import syscall

MADV_PAGEOUT = 21
"""An advice of madvise(2) that Python 3.11 has no name for."""

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


def write(pid: int, address: int, data: bytes) -> int:
    """Write `data` to the process's memory at `address`; return how many bytes were. Raises OSError as `read` does."""
    buffer = ctypes.create_string_buffer(data, len(data))
    local = _Iovec(ctypes.addressof(buffer), len(data))
    remote = _Iovec(address, len(data))
    count: int = _libc.process_vm_writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if count < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return count


def advise(pid: int, address: int, size: int, advice: int) -> int:
    """Advise the kernel on the process's memory (process_madvise(2), Linux 5.10); return how many bytes it took.

    Raises OSError: EINVAL where the advice does not fit the memory, EPERM, ESRCH.
    """
    pidfd = os.pidfd_open(pid)
    try:
        return syscall(arch.current().process_madvise, pidfd, _Iovec(address, size), 1, advice, 0)
    finally:
        os.close(pidfd)
