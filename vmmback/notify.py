"""sd_notify(3): tells the service manager that started us how far we are, and what it keeps, a datagram at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress

_FIRST_PASSED = 3  # SD_LISTEN_FDS_START


def notify(*lines: str) -> None:
    """Send lines such as "READY=1" to $NOTIFY_SOCKET; do nothing where there is none, or nobody at it."""
    _send(lines)


def store(name: str, *descriptors: int) -> bool:
    """Have the manager keep copies of descriptors, for the next process of this service; tell whether it was told.

    It passes them as those that it listens at, under this name (FDSTORE=1 of sd_notify(3), sd_listen_fds(3)), where it
    keeps any (FileDescriptorStoreMax= of systemd.service(5)).
    """
    # Without FDPOLL=0 it would drop those that poll(2) finds fault with.
    return _send(("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0"), descriptors)


def forget(name: str) -> bool:
    """Have the manager close its copies of the descriptors of this name; tell whether it was told.

    It takes up what it is told in order, so it has closed them before it starts another process of this service.
    """
    return _send(("FDSTOREREMOVE=1", f"FDNAME={name}"))


def stored() -> list[tuple[str, int]]:
    """Return what the manager passed to this process, by name, from now on close-on-exec (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    passed = []
    for descriptor, name in enumerate(os.environ.get("LISTEN_FDNAMES", "").split(":"), _FIRST_PASSED):
        with suppress(OSError):
            os.set_inheritable(descriptor, False)
            passed.append((name, descriptor))
    return passed


def _send(lines: Sequence[str], descriptors: Sequence[int] = ()) -> bool:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in {"/", "@"}:
        return False
    if address.startswith("@"):  # a name in the abstract namespace (unix(7))
        address = "\0" + address[1:]
    text = "\n".join(line.replace("\n", " ") for line in lines).encode(errors="replace")
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outgoing:
        outgoing.setblocking(False)  # a manager that stands still must not stop a guest
        outgoing.connect(address)
        if descriptors:
            socket.send_fds(outgoing, [text], descriptors)
        else:
            outgoing.send(text)
        return True
    return False
