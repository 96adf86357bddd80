"""Memory that this process has mapped: its addresses, and the calls on it that Python has no function for.

Sources: the man pages of these calls, section 2; mm/filemap.c for cachestat.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vmmback.linux import arch
from vmmback.linux.syscall import libc, syscall

PAGE_SIZE = mmap.PAGESIZE

# include/uapi/asm-generic/mman-common.h: what Python's mmap module has no name for.
MADV_PAGEOUT, MADV_COLLAPSE = 21, 25

_MAP_FIXED = 0x10
_SPLICE_F_NONBLOCK, _SPLICE_F_GIFT = 2, 8


def address_of(memory: mmap.mmap) -> int:
    """Return the virtual address of a writable mapping."""
    # The view is gone at once: an mmap cannot be closed while a view of it lives.
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@contextmanager
def mapped_aligned(descriptor: int, size: int) -> Iterator[int]:
    """Map the first `size` bytes of a descriptor, shared, at an address that is a multiple of `size`; yield it.

    `size` is a power of two. For huge pages, which only fit where address and offset agree. Raises OSError.
    """
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    with mmap.mmap(-1, 2 * size) as room:
        address = -(-address_of(room) // size) * size
        # It takes the place of a part of `room`, and goes with it.
        syscall(arch.current().mmap, address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        yield address


def read(address: int, size: int) -> bytes:
    """Return `size` bytes at an address where this process surely has mapped memory: it dies where it has not."""
    return ctypes.string_at(address, size)


def write(address: int, data: bytes) -> None:
    """Put `data` at an address where this process surely has mapped writable memory."""
    ctypes.memmove(address, data, len(data))


def madvise(address: int, size: int, advice: int) -> None:
    """Give the kernel advice on [address, address + size) bytes. Raises OSError."""
    libc("madvise", address, size, advice)


def lock(address: int, size: int) -> None:
    """Keep the pages of [address, address + size) bytes in RAM, mlock(2). Raises OSError: ENOMEM for secret memory."""
    libc("mlock", address, size)


def unlock(address: int, size: int) -> None:
    """Take that back, munlock(2). Raises OSError."""
    libc("munlock", address, size)


def vmsplice(pipe: int, address: int, size: int, *, gift: bool = False) -> int:
    """Put the pages themselves into a pipe; return how many bytes it took. Raises OSError."""
    vector = ctypes.create_string_buffer(struct.pack("=QQ", address, size), 16)
    return libc("vmsplice", pipe, vector, 1, _SPLICE_F_NONBLOCK | (_SPLICE_F_GIFT if gift else 0))


def punch_hole(descriptor: int, offset: int, size: int) -> None:
    """Free the pages of a file from `offset` on, `size` bytes, fallocate(2). Raises OSError."""
    keep_size, punch = 1, 2
    libc("fallocate", descriptor, keep_size | punch, offset, size)


def mincore(address: int, size: int) -> tuple[bool, ...]:
    """Tell for each page of [address, address + size) bytes whether it is present. Raises OSError."""
    answer = ctypes.create_string_buffer(size // PAGE_SIZE)
    libc("mincore", address, size, answer)
    return tuple(bool(byte & 1) for byte in answer.raw)


def cached_pages(descriptor: int) -> int:
    """Return how many pages of a file are in memory, cachestat(2). Raises OSError: ENOSYS before Linux 6.5."""
    # struct cachestat_range: offset and length in bytes, length 0 for up to the end. struct cachestat: five counters.
    whole_file = ctypes.create_string_buffer(struct.pack("=QQ", 0, 0), 16)
    counters = ctypes.create_string_buffer(40)
    syscall(arch.current().cachestat, descriptor, whole_file, counters, 0)
    (cached,) = struct.unpack_from("=Q", counters.raw)
    return int(cached)


def nodes_of(addresses: Sequence[int]) -> tuple[int, ...]:
    """Return the NUMA node of each page, or a negative errno, move_pages(2). Raises OSError."""
    return _move_pages(addresses, None)


def move_pages(addresses: Sequence[int], node: int) -> tuple[int, ...]:
    """Move pages to a NUMA node; return the node where each is then, or a negative errno. Raises OSError."""
    count = len(addresses)
    return _move_pages(addresses, ctypes.create_string_buffer(struct.pack("=i", node) * count, 4 * count))


def _move_pages(addresses: Sequence[int], nodes: ctypes.Array[ctypes.c_char] | None) -> tuple[int, ...]:
    count, only_ours = len(addresses), 1 << 1  # MPOL_MF_MOVE
    pages = ctypes.create_string_buffer(struct.pack(f"={count}Q", *addresses), 8 * count)
    status = ctypes.create_string_buffer(4 * count)
    syscall(arch.current().move_pages, 0, count, pages, nodes, status, only_ours)
    return struct.unpack(f"={count}i", status.raw)


def nodes_with_memory(root: Path = Path("/sys/devices/system/node")) -> list[int]:
    """Return the NUMA nodes that have memory; none where the kernel knows no nodes."""
    try:
        text = (root / "has_memory").read_text().strip()
    except FileNotFoundError:
        return []
    ranges = [part.partition("-") for part in text.split(",") if part]
    return [node for first, _, last in ranges for node in range(int(first), int(last or first) + 1)]


def reopen_by_handle(descriptor: int) -> int:
    """Open a file anew for reading by its handle, name_to_handle_at(2) and open_by_handle_at(2). Raises OSError."""
    at_empty_path, handle_bytes = 0x1000, 128  # MAX_HANDLE_SZ
    # struct file_handle: u32 bytes, int type, then the bytes.
    handle = ctypes.create_string_buffer(struct.pack("=Ii", handle_bytes, 0), 8 + handle_bytes)
    mount_id = ctypes.create_string_buffer(8)
    libc("name_to_handle_at", descriptor, ctypes.create_string_buffer(b""), handle, mount_id, at_empty_path)
    return libc("open_by_handle_at", descriptor, handle, os.O_RDONLY | os.O_CLOEXEC)
