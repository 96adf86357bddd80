"""RAM that is plugged into a guest of another hypervisor while it runs: borrowed from the broker when QEMU maps it.

Imported by the worker that answers that QEMU's calls (handoff_worker.py), which stands still meanwhile, as QEMU does.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmmback.linux import procfs

_METHOD, _RELEASE = "org.vmmback.Broker.Make", "org.vmmback.Broker.Release"
_RESTART_S = 10.0
"""How long a broker may be gone, or silent before it has heard: QEMU, and the guest, wait."""
_A_GIB_S = 10.0
"""How long it may take for each GiB besides, which it may have to touch first."""
_TRY_AGAIN_S = 0.1
_RELEASE_S = 1.0
"""How long it may take to give back: QEMU waits meanwhile if it stops, and it is tried again."""
_MOST_ANSWER_BYTES = 1 << 16


class More:
    """Borrows for one QEMU, and gives back what that has unplugged."""

    def __init__(self, pid: int, broker: str, purpose: str, room: int) -> None:
        """`broker` is the path of its socket, `room` the most bytes that may be plugged in at a time."""
        self._pid, self._broker, self._purpose, self._room = pid, broker, purpose, room
        self._leases: dict[int, tuple[int, int]] = {}
        """By inode: the lease, and its size in bytes."""
        self._missing = set[int]()
        """What was not mapped at the last look."""

    @property
    def look_again_ms(self) -> int | None:
        """After how long to look for what was unplugged, None while nothing is plugged in."""
        return 500 if self._leases else None

    def has_room(self) -> bool:
        """Tell whether anything can still be plugged in."""
        self.release_unplugged()
        return self._left > 0

    @property
    def _left(self) -> int:
        return self._room - sum(leased for _, leased in self._leases.values())

    def of_size(self, size: int) -> int:
        """Return the descriptor of so many bytes of secret RAM. Raises OSError: ENOMEM where there is none to be had.

        A broker that has ended may be started again meanwhile.
        """
        self.release_unplugged()
        if size > self._left:
            raise OSError(errno.ENOMEM, "more than the domain's <maxMemory>")
        deadline = time.monotonic() + _RESTART_S
        while True:
            try:
                answer, descriptors = self._call(_METHOD, _RESTART_S + size / (1 << 30) * _A_GIB_S, size=size,
                                                 purpose=self._purpose)  # fmt: skip
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise OSError(errno.ENOMEM, "no broker answers") from None
                time.sleep(_TRY_AGAIN_S)
        if not descriptors:
            raise OSError(errno.ENOMEM, f"refused: {answer}")
        for unneeded in descriptors[1:]:
            os.close(unneeded)
        self._leases[os.fstat(descriptors[0]).st_ino] = answer["parameters"]["lease"], size
        return descriptors[0]

    def release_unplugged(self) -> None:
        """Give back what QEMU had not at two looks: at one it may not have it yet. What it holds open it has."""
        try:
            mapped = {mapping.inode for mapping in procfs.maps(self._pid)}
            held = _open_inodes(self._pid)
        except OSError:  # it ends
            return
        missing = self._leases.keys() - mapped - held
        for inode in missing & self._missing:
            with suppress(OSError):  # without a broker: the next one is told at the next look
                self._call(_RELEASE, _RELEASE_S, lease=self._leases[inode][0])
                del self._leases[inode]
        self._missing = missing

    def _call(self, method: str, timeout_s: float, **parameters: object) -> tuple[dict[str, Any], list[int]]:
        """Make one call of the broker. Raises OSError where it does not answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(self._broker)
            connection.sendall(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0")
            received, descriptors = b"", list[int]()
            while not received.endswith(b"\0"):
                data, passed, _, _ = socket.recv_fds(connection, _MOST_ANSWER_BYTES, 2)
                received, descriptors = received + data, descriptors + passed
                if not data:
                    raise ConnectionAbortedError(errno.ECONNABORTED, "the broker hung up")
        return dict(json.loads(received[:-1])), descriptors


def _open_inodes(pid: int) -> set[int]:
    """Return the inodes of what a process has open. Raises OSError."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found.add(link.stat().st_ino)
    return found
