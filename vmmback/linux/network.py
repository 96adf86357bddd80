"""A network of one's own, for one thread, and news of the interfaces of a network.

Sources: network_namespaces(7), unshare(2), netdevice(7), rtnetlink(7).
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Callable
from typing import TypeVar

from vmmback.linux.own_thread import in_own_thread
from vmmback.linux.syscall import libc

LOOPBACK = "lo"
"""The only interface of a new network."""

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1

_RTMGRP_LINK = 1
_HEADER, _INDEX_AT = struct.Struct("=IHHII"), 20  # struct nlmsghdr, and behind it ifi_index of struct ifinfomsg

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

    return in_own_thread(enter)


class LinkEvents:
    """Tells which interfaces of this thread's network changed, came or went, from its making on."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        try:
            self._socket.bind((0, _RTMGRP_LINK))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is news."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()

    def read(self) -> set[int] | None:
        """Return the indices of what there is news of, without waiting; None if news was lost, so of any."""
        indices: set[int] = set()
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return indices
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # netlink(7): more came than the socket holds
                    return None
                raise
            while len(data) >= _INDEX_AT + 4:
                length = _HEADER.unpack_from(data)[0]
                indices.add(struct.unpack_from("=i", data, _INDEX_AT)[0])
                data = data[-(-length // 4) * 4 :]
