"""io_uring with one request at a time. Sources: io_uring_setup(2), io_uring_enter(2), include/uapi/linux/io_uring.h."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from vmmback.linux import arch
from vmmback.linux.syscall import syscall

# struct io_uring_params: 10 u32, then struct io_sqring_offsets and io_cqring_offsets, of 8 u32 and a u64 each.
_PARAMS_BYTES, _SQ_OFFSETS, _CQ_OFFSETS, _FLAGS_AT, _USER_ADDRESS = 120, 40, 80, 8, 32
_SETUP_NO_MMAP = 1 << 14
_REGISTER_BUFFERS = 0
_ENTER_GETEVENTS = 1
_OFF_SQ_RING, _OFF_CQ_RING, _OFF_SQES = 0, 0x8000000, 0x10000000
_OP_WRITE_FIXED = 5
_SQE = struct.Struct("=BBHiQQIIQHHiQQ")
_CQE = struct.Struct("=QiI")


class _Offsets(NamedTuple):
    """Where the fields of a ring are, in bytes from its start."""

    head: int
    tail: int
    entries: int
    array: int
    cqes: int


class Ring:
    """A ring of one entry. `with Ring.open() as ring`."""

    def __init__(self, descriptor: int, submissions: mmap.mmap, completions: mmap.mmap, entries: mmap.mmap) -> None:
        self._descriptor, self._sq, self._cq, self._sqes = descriptor, submissions, completions, entries
        self._sq_at, self._cq_at = _Offsets(0, 0, 0, 0, 0), _Offsets(0, 0, 0, 0, 0)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Ring]:
        """Make a ring. Raises OSError: ENOSYS, and EPERM where kernel.io_uring_disabled forbids it."""
        params = ctypes.create_string_buffer(_PARAMS_BYTES)
        with ExitStack() as stack:
            descriptor = syscall(arch.current().io_uring_setup, 1, params)
            stack.callback(os.close, descriptor)
            sq_at, cq_at = _offsets(params.raw)
            sizes = (
                (sq_at.array + 4, _OFF_SQ_RING),
                (cq_at.cqes + 2 * _CQE.size, _OFF_CQ_RING),  # twice as many completions as submissions
                (_SQE.size, _OFF_SQES),
            )
            maps = [stack.enter_context(mmap.mmap(descriptor, size, offset=offset)) for size, offset in sizes]
            ring = cls(descriptor, *maps)
            ring._sq_at, ring._cq_at = sq_at, cq_at
            yield ring

    def register_buffer(self, address: int, size: int) -> None:
        """Pin `size` bytes at `address` as the fixed buffer 0. Raises OSError."""
        vector = ctypes.create_string_buffer(struct.pack("=QQ", address, size), 16)
        syscall(arch.current().io_uring_register, self._descriptor, _REGISTER_BUFFERS, vector, 1)

    def write_fixed(self, descriptor: int, address: int, size: int) -> int:
        """Write from fixed buffer 0 to a file's start or into a pipe; return the count of bytes. Raises OSError."""
        self._sqes[: _SQE.size] = _SQE.pack(_OP_WRITE_FIXED, 0, 0, descriptor, 0, address, size, 0, 0, 0, 0, 0, 0, 0)
        (tail,) = struct.unpack_from("=I", self._sq, self._sq_at.tail)
        struct.pack_into("=I", self._sq, self._sq_at.array, 0)
        struct.pack_into("=I", self._sq, self._sq_at.tail, tail + 1)
        # Entering the kernel is the barrier that the protocol asks for.
        syscall(arch.current().io_uring_enter, self._descriptor, 1, 1, _ENTER_GETEVENTS, None, 0)
        (head,) = struct.unpack_from("=I", self._cq, self._cq_at.head)
        slot = self._cq_at.cqes + head % 2 * _CQE.size
        _, result, _ = _CQE.unpack_from(self._cq, slot)
        struct.pack_into("=I", self._cq, self._cq_at.head, head + 1)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return int(result)


@contextmanager
def rings_in(rings: int, entries: int) -> Iterator[int]:
    """Let the kernel keep a ring of one entry in our memory: a page at `rings` for the rings, one at `entries`.

    Yields the address of a u32 where the kernel has then written the number of submissions that fit, 1. Raises OSError:
    EINVAL before Linux 6.5, which brought IORING_SETUP_NO_MMAP.
    """
    params = ctypes.create_string_buffer(_PARAMS_BYTES)
    struct.pack_into("=I", params, _FLAGS_AT, _SETUP_NO_MMAP)
    struct.pack_into("=Q", params, _SQ_OFFSETS + _USER_ADDRESS, entries)
    struct.pack_into("=Q", params, _CQ_OFFSETS + _USER_ADDRESS, rings)
    descriptor = syscall(arch.current().io_uring_setup, 1, params)
    try:
        yield rings + _offsets(params.raw)[0].entries
    finally:
        os.close(descriptor)


def _offsets(params: bytes) -> tuple[_Offsets, _Offsets]:
    # Submissions: head tail ring_mask ring_entries flags dropped array. Completions: …, overflow cqes flags.
    head, tail, _, entries, _, _, array = struct.unpack_from("=7I", params, _SQ_OFFSETS)
    submissions = _Offsets(head, tail, entries, array, 0)
    head, tail, _, entries, _, cqes = struct.unpack_from("=6I", params, _CQ_OFFSETS)
    return submissions, _Offsets(head, tail, entries, 0, cqes)
