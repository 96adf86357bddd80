"""The guest's serial console: copied to logs and to whoever is at it, and searched for the lines we wait for.

What a guest prints may be secret. It is held in buffers that are used again and overwritten in the end, not in `bytes`,
which Python frees as they are. What a watcher makes of it is the watcher's: docs/RESIDUE.md.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from vmmback.console_clients import Clients
from vmmback.errors import UsageError

_CHUNK = 1 << 16
# What is kept, besides the length of the `ready` text, to find a text that arrives in pieces.
_TAIL_BYTES = 4096

# A guest that fills memory with a canary of its own tells its fingerprint by this line: the SHA-256 of the 64 bytes
# that the canary is. With it the guest's former frames are searched; the canary itself never leaves the guest.
_CANARY = re.compile(rb"vmmback-canary sha256:([0-9a-f]{64})\b")


# With two halves, whose XOR the canary is, all of the host's memory can be searched for it (isolation/hunt.py), and no
# memory of the host's holds the canary for that.
_HALVES = re.compile(rb"vmmback-canary halves:([0-9a-f]{128}):([0-9a-f]{128})\b")


class Watcher(Protocol):
    """Who is shown the console."""

    def console(self, data: bytes | memoryview) -> None:
        """Show what the guest printed, as it came; `data` is overwritten after the call."""

    def note(self, message: str) -> None:
        """Show a message of ours."""


class Console:
    """What a guest has printed, and who is at it. Made by `attach`."""

    def __init__(
        self, logs: Sequence[BinaryIO], watcher: Watcher, ready: bytes, clients: Clients | None = None
    ) -> None:
        self.bytes_seen = 0
        self.canary_fingerprint: str | None = None
        self.canary_halves: tuple[bytes, bytes] | None = None
        self.ready = asyncio.Event()
        self._ready_text = ready
        self._logs = list(logs)
        self._watcher = watcher
        self._clients = clients
        self._kept = _TAIL_BYTES + len(ready)
        self._recent = bytearray(self._kept + _CHUNK)
        self._held = 0

    def feed(self, data: bytes | memoryview) -> None:
        """Take what the guest printed."""
        self.bytes_seen += len(data)
        for start in range(0, len(data), _CHUNK):
            self._search(data[start : start + _CHUNK])
        for log in list(self._logs):
            try:
                log.write(data)
            except OSError as error:  # a full disk must not end the guest
                self._logs.remove(log)
                self._watcher.note(f"the console log {log.name} ends here: {error.strerror}")
        if self._clients:
            self._clients.feed(data)
        self._watcher.console(data)

    @property
    def bytes_typed(self) -> int:
        """How many bytes other processes have typed to the guest."""
        return self._clients.bytes_typed if self._clients else 0

    def attach_client(self, *, scrollback: bool) -> int:
        """Return a new client's descriptor (console_clients.Clients.attach). Raises VmmbackError."""
        assert self._clients is not None
        return self._clients.attach(scrollback=scrollback)

    def wipe(self) -> None:
        """Overwrite what is held of what the guest printed."""
        self._recent[:] = bytes(len(self._recent))
        self._held = 0

    def _search(self, data: bytes | memoryview) -> None:
        """Search what came last for the lines we wait for; nothing of it is copied but those."""
        end = self._held + len(data)
        with memoryview(self._recent) as recent:
            recent[self._held : end] = data
            if self._recent.find(self._ready_text, 0, end) >= 0:
                self.ready.set()
            for found in _CANARY.finditer(self._recent, 0, end):
                self.canary_fingerprint = found[1].decode()
            for found in _HALVES.finditer(self._recent, 0, end):
                self.canary_halves = bytes.fromhex(found[1].decode()), bytes.fromhex(found[2].decode())
            self._held = min(end, self._kept)
            recent[: self._held] = recent[end - self._held : end]


@asynccontextmanager
async def attach(
    connection: socket.socket, logs: Sequence[Path], watcher: Watcher, ready: bytes
) -> AsyncIterator[Console]:
    """Read the console from a connected socket until its end or the exit; what is there on exit is read still.

    `ready` is the text (b"" for any) that sets the event of that name. Raises UsageError when a log cannot be made.
    """
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        connection.setblocking(False)
        clients = Clients(connection)
        stack.callback(clients.close)
        console = Console([stack.enter_context(_open(path)) for path in logs], watcher, ready, clients)
        stack.callback(console.wipe)
        buffer = bytearray(_CHUNK)

        def read() -> bool:
            try:
                count = connection.recv_into(buffer)
            except BlockingIOError:
                return False
            except ConnectionError:
                count = 0
            if count:
                with memoryview(buffer) as received, received[:count] as data:
                    try:
                        console.feed(data)
                    finally:
                        received[:count] = bytes(count)
            else:
                loop.remove_reader(connection)
            return count > 0

        loop.add_reader(connection, read)
        try:
            yield console
        finally:
            while read():
                pass
            loop.remove_reader(connection)
            await clients.end()


def _open(path: Path) -> BinaryIO:
    """Open a log, and make sure that it is a regular file before anything of it is lost."""
    # O_NONBLOCK: a FIFO that nobody reads would hold us for ever (fifo(7)).
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        log = open(path, "wb", buffering=0, opener=lambda name, _: os.open(name, flags, 0o600))  # noqa: SIM115
    except OSError as error:
        problem = error.strerror
    else:
        if stat.S_ISREG(os.fstat(log.fileno()).st_mode):
            log.truncate()
            return log
        log.close()
        problem = "it is not a regular file"
    raise UsageError(f"the console log {path} cannot be written: {problem}", "choose another path for [console] log")
