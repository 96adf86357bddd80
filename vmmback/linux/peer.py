"""Who is at the other end of a Unix socket, by the kernel's word (unix(7)), and whether it still lives."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SO_PEERPIDFD = 77  # include/uapi/asm-generic/socket.h, Linux 6.5; a pid alone may be another process's by now


class Peer(NamedTuple):
    """The process that called connect(2), with the ids that it had then."""

    pid: int
    uid: int
    gid: int


def of(connection: socket.socket) -> Peer:
    """Return who has connected. Raises OSError."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def pidfd_of(connection: socket.socket) -> int:
    """Return a new close-on-exec descriptor that is readable once that process has ended (pidfd_open(2)).

    Raises OSError: ESRCH or EINVAL where it has ended already.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # by its number another process would be found
            raise
        return os.pidfd_open(of(connection).pid)
