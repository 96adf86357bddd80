"""sd_notify(3): tells the service manager that started us how far a guest is, one datagram at a time."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(*lines: str) -> None:
    """Send lines such as "READY=1" to $NOTIFY_SOCKET; do nothing where there is none, or nobody at it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in {"/", "@"}:
        return
    if address.startswith("@"):  # a name in the abstract namespace (unix(7))
        address = "\0" + address[1:]
    text = "\n".join(line.replace("\n", " ") for line in lines)
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outgoing:
        outgoing.setblocking(False)  # a manager that stands still must not stop a guest
        outgoing.sendto(text.encode(errors="replace"), address)
