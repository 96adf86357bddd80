"""The kernel's asynchronous I/O, which QEMU's aio=native uses. Sources: io_submit(2), include/uapi/linux/aio_abi.h."""

from __future__ import annotations

import ctypes
import os
import struct

from vmmback.linux import arch
from vmmback.linux.syscall import syscall

_PWRITE = 1
# struct iocb of a little-endian machine: data, key, rw_flags, opcode, priority, descriptor, buffer, size, offset, …
_IOCB = struct.Struct("=QIIHhIQQqQII")
_EVENT = struct.Struct("=QQqq")


def write(descriptor: int, address: int, size: int) -> int:
    """Write `size` bytes at `address` to the start of a file; return how many were. Raises OSError."""
    numbers = arch.current()
    context = ctypes.create_string_buffer(8)
    syscall(numbers.io_setup, 1, context)
    handle = int.from_bytes(context.raw, "little")
    try:
        block = ctypes.create_string_buffer(
            _IOCB.pack(0, 0, 0, _PWRITE, 0, descriptor, address, size, 0, 0, 0, 0), _IOCB.size
        )
        blocks = ctypes.create_string_buffer(struct.pack("=Q", ctypes.addressof(block)), 8)
        syscall(numbers.io_submit, handle, 1, blocks)
        event = ctypes.create_string_buffer(_EVENT.size)
        syscall(numbers.io_getevents, handle, 1, 1, event, None)
    finally:
        syscall(numbers.io_destroy, handle)
    _, _, result, _ = _EVENT.unpack(event.raw)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return int(result)
