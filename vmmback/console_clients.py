"""Who is at a guest's serial console: other processes see what it prints, from a scrollback on, and type to it.

Each has one end of a socketpair. Nobody holds up the supervisor, the guest or each other: what a client does not read
in time is left out, and the client told; what it types waits in its own socket while the guest reads nothing. All that
is kept is of fixed size and overwritten in the end: what a guest prints, and what is typed to it, may be secret.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections import deque

from vmmback.errors import QemuFailed, UsageError

SCROLLBACK_BYTES = 64 * 1024
MAX_CLIENTS = 16
# What is taken of a client at a time, and kept until the guest has read it.
TYPED_BYTES = 4096
# How long clients have to read the guest's last words, once it has ended.
CLOSE_TIMEOUT_S = 1.0


class Scrollback:
    """The last bytes of a stream, in a ring; positions count from the stream's beginning."""

    def __init__(self, size: int = SCROLLBACK_BYTES) -> None:
        self.end = 0
        self._ring = bytearray(size)

    @property
    def start(self) -> int:
        """The position of the oldest byte that is kept."""
        return max(0, self.end - len(self._ring))

    def feed(self, data: bytes | memoryview) -> None:
        """Take what comes next, of which the last part is kept."""
        size = len(self._ring)
        with memoryview(data) as whole, memoryview(self._ring) as ring, whole[max(0, len(data) - size) :] as kept:
            at = (self.end + len(data) - len(kept)) % size
            first = min(len(kept), size - at)
            ring[at : at + first] = kept[:first]
            ring[: len(kept) - first] = kept[first:]
        self.end += len(data)

    def piece(self, position: int) -> memoryview:
        """Return what follows `position`, or the first part of it; empty at the stream's end. To be released soon."""
        size = len(self._ring)
        at = position % size
        with memoryview(self._ring) as ring:
            return ring[at : at + min(self.end - position, size - at)]

    def wipe(self) -> None:
        """Overwrite all of it."""
        self._ring[:] = bytes(len(self._ring))


class Clients:
    """All clients of a guest's console. `guest` is the socket, not blocking, that QEMU reads what is typed from."""

    def __init__(self, guest: socket.socket) -> None:
        self.bytes_typed = 0
        self._guest = guest
        self._loop = asyncio.get_running_loop()
        self._scrollback = Scrollback()
        self._clients: dict[int, _Client] = {}
        self._waiting: deque[_Client] = deque()  # for the guest, which does not read just now
        self._all_read = asyncio.Event()
        # A client is watched for its end even while nothing is read from it: epoll(7) reports EPOLLHUP always.
        self._hung_up = select.epoll()
        self._loop.add_reader(self._hung_up.fileno(), self._remove_those_gone)

    def attach(self, *, scrollback: bool = True) -> int:
        """Take a client on; return its descriptor, which the caller owns: a stream socket, both ways, raw bytes.

        What was printed before comes first if `scrollback`. At the guest's end the last byte, which is 0, comes with a
        descriptor of /dev/null, which no guest can print. Raises UsageError when there are too many, QemuFailed once
        the guest has ended.
        """
        if self._hung_up.closed:
            raise QemuFailed("the guest ended meanwhile")
        if len(self._clients) >= MAX_CLIENTS:
            raise UsageError(f"{MAX_CLIENTS} clients are at this console already", "let one of them leave first")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        client = _Client(ours, self._scrollback, from_start=scrollback)
        self._clients[ours.fileno()] = client
        self._hung_up.register(ours.fileno(), 0)
        self._loop.add_reader(ours.fileno(), self._typed, client)
        self._show(client)
        return theirs.detach()

    def feed(self, data: bytes | memoryview) -> None:
        """Show all clients what the guest printed."""
        self._scrollback.feed(data)
        for client in list(self._clients.values()):
            self._show(client)

    async def end(self) -> None:
        """Let the clients read the guest's last words, for a moment, tell them that it ended, and let them go."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while any(client.position < self._scrollback.end for client in self._clients.values()):
                    self._all_read.clear()
                    await self._all_read.wait()
        except TimeoutError:
            pass  # they do not read
        finally:
            self.close()

    def close(self) -> None:
        """Let all clients go, and overwrite what is kept."""
        for client in list(self._clients.values()):
            client.say_that_it_ended()
            self._remove(client)
        if self._hung_up.closed:
            return
        self._loop.remove_reader(self._hung_up.fileno())
        self._hung_up.close()
        self._scrollback.wipe()

    def _show(self, client: _Client) -> None:
        """Send a client what it has not got yet, now and, if its socket is full, once that has room."""
        number = client.number
        try:
            all_sent = client.show()
        except OSError:  # it is gone
            self._remove(client)
            return
        if all_sent:
            self._loop.remove_writer(number)
            self._all_read.set()
        else:
            self._loop.add_writer(number, self._show, client)

    def _typed(self, client: _Client) -> None:
        """Take what a client typed; from one whose last is not with the guest yet, nothing more is taken."""
        count = client.read()
        if count == 0:
            self._loop.remove_reader(client.number)  # its end of input, or its own end, of which epoll tells
        elif not self._passed_on(client):
            self._loop.remove_reader(client.number)
            self._waiting.append(client)
            self._loop.add_writer(self._guest.fileno(), self._guest_reads)

    def _guest_reads(self) -> None:
        """Pass on what clients typed, in turn, while the guest takes it."""
        while self._waiting:
            client = self._waiting[0]
            if not self._passed_on(client):
                return
            self._waiting.popleft()
            self._loop.add_reader(client.number, self._typed, client)
        self._loop.remove_writer(self._guest.fileno())

    def _passed_on(self, client: _Client) -> bool:
        """Tell whether all that a client typed is with the guest; what goes to one that has ended is lost."""
        self.bytes_typed += client.pass_on(self._guest)
        return not client.has_typed

    def _remove_those_gone(self) -> None:
        for number, _ in self._hung_up.poll(0):
            client = self._clients[number]
            # What it typed before it left still goes to the guest, as far as that takes it at once.
            while client not in self._waiting and client.read() and self._passed_on(client):
                pass
            self._remove(client)

    def _remove(self, client: _Client) -> None:
        number = client.number
        if self._clients.pop(number, None) is None:
            return
        self._loop.remove_reader(number)
        self._loop.remove_writer(number)
        self._hung_up.unregister(number)
        if client in self._waiting:
            self._waiting.remove(client)
            if not self._waiting:
                self._loop.remove_writer(self._guest.fileno())
        client.close()
        self._all_read.set()


class _Client:
    """One client: how far it has read, and what it typed that the guest has not read."""

    def __init__(self, connection: socket.socket, scrollback: Scrollback, *, from_start: bool) -> None:
        self.position = scrollback.start if from_start else scrollback.end
        self._connection = connection
        self._scrollback = scrollback
        self._left_out = 0
        self._note = b""  # the rest of one of ours that is sent in part
        self._typed = bytearray(TYPED_BYTES)
        self._first = self._last = 0

    @property
    def number(self) -> int:
        return self._connection.fileno()

    @property
    def has_typed(self) -> bool:
        return self._first < self._last

    def show(self) -> bool:
        """Send what is to be sent; False if the socket is full before. Raises OSError when the client is gone."""
        try:
            while True:
                if self._note:
                    self._note = self._note[self._connection.send(self._note) :]
                    continue
                missed = max(0, self._scrollback.start - self.position)
                self.position += missed
                self._left_out += missed
                if self._left_out:
                    note = b"\r\n[vmmback: %d bytes are left out: they were not read in time]\r\n" % self._left_out
                    self._note = note[self._connection.send(note) :]
                    self._left_out = 0
                    continue
                with self._scrollback.piece(self.position) as piece:
                    if not piece:
                        return True
                    self.position += self._connection.send(piece)
        except BlockingIOError:
            return False

    def read(self) -> int | None:
        """Take what the client typed, to be passed on; return how many bytes: 0 at its end, None if there are none."""
        try:
            count = self._connection.recv_into(self._typed)
        except BlockingIOError:
            return None
        except OSError:
            return 0
        self._first, self._last = 0, count
        return count

    def pass_on(self, guest: socket.socket) -> int:
        """Send the guest what was typed, as far as it takes it; return how many bytes it took."""
        first = self._first
        try:
            while self.has_typed:
                with memoryview(self._typed) as typed, typed[self._first : self._last] as rest:
                    self._first += guest.send(rest)
        except BlockingIOError:
            return self._first - first
        except OSError:  # it has ended
            self._last = self._first
        self._typed[:] = bytes(TYPED_BYTES)
        return self._first - first

    def say_that_it_ended(self) -> None:
        """Send the last byte, if there is room for it and nothing was left out before it."""
        if self.position < self._scrollback.end:
            return
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            socket.send_fds(self._connection, [b"\0"], [null])
        except OSError:
            pass  # it is gone, or does not read
        finally:
            os.close(null)

    def close(self) -> None:
        self._typed[:] = bytes(TYPED_BYTES)
        self._connection.close()
