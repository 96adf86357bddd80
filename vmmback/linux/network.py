"""A network of one's own, for one thread. Sources: network_namespaces(7), unshare(2), netdevice(7)."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vmmback.linux.syscall import libc

LOOPBACK = "lo"
"""The only interface of a new network."""

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1

T = TypeVar("T")


def in_new_network(function: Callable[[], T]) -> T:
    """Call `function` in a thread that has a new network, with its loopback interface up; both then end.

    Sockets that it makes stay in that network, which lives until the last of them is closed. Raises OSError: EPERM
    without CAP_SYS_ADMIN, EINVAL where the kernel has no network namespaces.
    """

    def enter() -> T:
        libc("unshare", _CLONE_NEWNET)  # of this thread alone
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            # struct ifreq: a name of 16 bytes, then a union of 24, here the flags.
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("=16sH22x", LOOPBACK.encode(), _IFF_UP))
        return function()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(enter).result()
