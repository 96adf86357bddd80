"""AF_XDP: packets straight out of a process's memory. Sources: Documentation/networking/af_xdp.rst, linux/if_xdp.h."""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
from contextlib import closing

from vmmback.linux.syscall import libc

_AF_XDP, _SOL_XDP = 44, 283
_MMAP_OFFSETS, _TX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING = 1, 3, 4, 5, 6
_PGOFF_TX_RING = 0x80000000
_BIND_COPY = 1 << 1
_RING_ENTRIES = 2
_DESCRIPTOR = struct.Struct("=QII")


def open_socket() -> socket.socket:
    """Return a new AF_XDP socket. Raises OSError: EAFNOSUPPORT, EPERM without CAP_NET_RAW."""
    return socket.socket(_AF_XDP, socket.SOCK_RAW)


def register_memory(xdp: socket.socket, address: int, size: int) -> None:
    """Give the socket `size` bytes at `address`, a multiple of the page, to send from. Raises OSError."""
    chunk_bytes, headroom = mmap.PAGESIZE, 0
    xdp.setsockopt(_SOL_XDP, _UMEM_REG, struct.pack("=QQIIII", address, size, chunk_bytes, headroom, 0, 0))


def send(xdp: socket.socket, interface: str, size: int) -> None:
    """Send the first `size` bytes of the registered memory as one frame. Once a socket. Raises OSError.

    The frame has gone to the interface's queue on return, as far as its driver took it.
    """
    for ring in (_TX_RING, _FILL_RING, _COMPLETION_RING):
        xdp.setsockopt(_SOL_XDP, ring, _RING_ENTRIES)
    # struct xdp_mmap_offsets: producer, consumer, desc and flags of each of the rings RX, TX, fill and completion.
    offsets = struct.unpack("=16Q", xdp.getsockopt(_SOL_XDP, _MMAP_OFFSETS, 128))
    producer, _, first, _ = offsets[4:8]
    length = first + _RING_ENTRIES * _DESCRIPTOR.size
    with closing(mmap.mmap(xdp.fileno(), length, offset=_PGOFF_TX_RING)) as ring_memory:
        _DESCRIPTOR.pack_into(ring_memory, first, 0, size, 0)
        struct.pack_into("=I", ring_memory, producer, 1)
        # struct sockaddr_xdp: family, flags, interface, queue, descriptor of a shared memory.
        place = struct.pack("=HHIII", _AF_XDP, _BIND_COPY, socket.if_nametoindex(interface), 0, 0)
        libc("bind", xdp.fileno(), ctypes.create_string_buffer(place, len(place)), len(place))
        libc("sendto", xdp.fileno(), None, 0, socket.MSG_DONTWAIT, None, 0)
