"""Removes the bridges that vmmback made once they have no port, in a process of its own that outlives a guest.

Run as `python -I -S bridge_keeper.py BRIDGES OURS LOCK_TIMEOUT_S`, lists of names with commas; standard library only,
few imports. `KEEPER` is the shell that waits for its supervisor's end, in less memory than Python's, and then runs it.

QEMU ends with its supervisor, and is dead or about to be. All of OURS is removed: the guest's taps, which a QEMU could
have made persistent, and bridges that were not made to the end. Then go those of BRIDGES that bear our mark and have no
port. The lock lets no other guest come between its look and the removal. Source: rtnetlink(7), netlink(7).
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
import sys

TYPE_CHECKING = False  # typing itself would cost to import
if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = "made by vmmback, goes with its last port"
"""The alias of a bridge that vmmback made."""

KEEPER = """trap '' HUP INT PIPE TERM
while read -r _; do :; done
exec "$@"
"""
"""A script for sh; its standard input is a pipe that closes with the supervisor."""

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_IFLA_IFNAME, _IFLA_MASTER, _IFLA_IFALIAS = 3, 10, 20
_HEADER, _LINK, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BxHiII"), struct.Struct("=HH")


def network() -> int:
    """Open the network namespace that this thread is in. flock(2) on it is the lock of all who handle its bridges.

    A bridge is one of a namespace, and so is the lock, whatever runtime folders there are. Raises OSError.
    """
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def main() -> None:
    """Remove what is to go with a guest, and bridges that nobody has a port on any more."""
    bridges, ours = ([name for name in argument.split(",") if name] for argument in sys.argv[1:3])
    lock = network()
    # Any process of the network could hold it for ever, and the end of a guest waits for this one.
    signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[3]))
    fcntl.flock(lock, fcntl.LOCK_EX)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for index, link in list(_links()):
        if _text(link, _IFLA_IFNAME) in ours:
            _remove(index)
    links = list(_links())
    ports = {link.get(_IFLA_MASTER, b"") for _, link in links}
    for index, link in links:
        is_left = _text(link, _IFLA_IFNAME) in bridges and _text(link, _IFLA_IFALIAS) == MARK
        if is_left and struct.pack("=I", index) not in ports:
            _remove(index)


def _text(link: dict[int, bytes], key: int) -> str:
    return link.get(key, b"").rstrip(b"\0").decode(errors="replace")


def _remove(index: int) -> None:
    try:
        list(_ask(_RTM_DELLINK, _NLM_F_ACK, index))
    except OSError as error:
        if error.errno != errno.ENODEV:  # a tap that went with its QEMU just now
            raise


def _give_up(*_: object) -> None:
    raise TimeoutError("another process holds the lock on this network's bridges")


def _links() -> Iterator[tuple[int, dict[int, bytes]]]:
    """Yield the index and the attributes of each interface."""
    for kind, body in _ask(_RTM_GETLINK, _NLM_F_DUMP, 0):
        if kind == _RTM_NEWLINK:
            attributes, rest = {}, body[_LINK.size :]
            while len(rest) >= _ATTRIBUTE.size:
                length, key = _ATTRIBUTE.unpack_from(rest)
                attributes[key] = rest[_ATTRIBUTE.size : length]
                rest = rest[-(-length // 4) * 4 :]
            yield _LINK.unpack_from(body)[2], attributes


def _ask(kind: int, flags: int, index: int) -> Iterator[tuple[int, bytes]]:
    """Send a request about an interface; yield the messages of its answer. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        body = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0)
        kernel.send(_HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 1, 0) + body)
        while True:
            data = kernel.recv(1 << 20)
            while data:
                length, answer, *_ = _HEADER.unpack_from(data)
                body, data = data[_HEADER.size : length], data[-(-length // 4) * 4 :]
                if answer == _NLMSG_ERROR and (code := -struct.unpack_from("=i", body)[0]):
                    raise OSError(code, os.strerror(code))
                if answer in (_NLMSG_ERROR, _NLMSG_DONE):
                    return
                yield answer, body


if __name__ == "__main__":
    main()
