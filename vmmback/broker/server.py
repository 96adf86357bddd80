"""The broker's socket, which every user of the host can reach: whoever it is can keep nobody else from being served."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from asyncio import Future, Task
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from os import close, dup
from typing import Any

from asyncvarlink import (
    FileDescriptorArray,
    VarlinkInterface,
    VarlinkInterfaceRegistry,
    VarlinkInterfaceServerProtocol,
    VarlinkMethodReply,
    VarlinkTransport,
)
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from vmmback import __version__
from vmmback.broker.journal import start_of
from vmmback.broker.ledger import Caller
from vmmback.broker.lending import Broker
from vmmback.broker.service import BrokerInterface
from vmmback.linux import peer

# Root is held to neither: its guests have a connection each, and others must not keep them from it.
_MOST_CLIENTS, _MOST_OF_A_USER = 512, 64
_MOST_CALL_BYTES, _MOST_OF_ROOT_BYTES = 1 << 16, 1 << 19  # libvirt's hook sends a domain's XML
_ACCEPT_AGAIN_S = 0.1
_ENCODER = json.JSONEncoder(separators=(",", ":"))

# Of a socket that has it off the kernel takes no descriptors, and who accepts inherits that: Linux 6.16
# (include/uapi/asm-generic/socket.h, net/unix/af_unix.c).
_SO_PASSRIGHTS = 83


Interfaces = Callable[[Caller, int], VarlinkInterface]
"""Makes what a caller may ask, of himself and a descriptor of his process, which is open as long as he is connected."""


class _Transport(VarlinkTransport):
    """Takes no descriptor, no call has any.

    To close one could take for ever: that of a file of FUSE waits for its server (fs/fuse/file.c, fuse_flush), that of
    a socket for its peer, with SO_LINGER (socket(7)). So on a kernel that lets callers send some, what is there is
    looked at before it is read, and a connection with descriptors in it is read no more, and closed by a thread.
    """

    MAX_RECV_FDS = 0

    def _handle_read_socket(self) -> None:
        size = self.RECV_BUFFER_SIZE
        assert isinstance(self._recvfd, socket.socket)
        if _passes_descriptors(self._recvfd):
            with suppress(OSError):  # the same comes of reading
                data, _, flags, _ = self._recvfd.recvmsg(size, 0, socket.MSG_PEEK)
                if flags & socket.MSG_CTRUNC:
                    return self.abort()
                size = len(data) or size
        self._sock_receive_fds(size)
        return None


def _passes_descriptors(connection: socket.socket) -> bool:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS) != 0
    except OSError:
        return True


def _close_elsewhere(descriptor: int, closed: Callable[[], object]) -> None:
    """Close a descriptor, and what may have been sent to it, in a thread that ends with this process; then tell."""
    loop = asyncio.get_running_loop()

    def work() -> None:
        close(descriptor)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(closed)

    with suppress(RuntimeError):  # out of threads: it stays open, and counts as one of its user's
        threading.Thread(target=work, name="close", daemon=True).start()


class _Connection(VarlinkInterfaceServerProtocol):
    """One caller's; nobody else is reached by it.

    asyncvarlink keeps what it has read and what it could not send yet, however much, and waits for the event loop
    between the steps of a call. Here a call is answered as soon as it was read, and a caller is not heard before his
    last call was answered, and the answer taken.
    """

    def __init__(
        self, connection: socket.socket, broker: Broker, caller: Caller, pidfd: int, more: Interfaces | None
    ) -> None:
        self._socket, self._broker, self._pidfd = connection, broker, pidfd
        registry = VarlinkInterfaceRegistry()
        registry.register_interface(BrokerInterface(broker, caller, pidfd))
        if more:
            registry.register_interface(more(caller, pidfd))
        registry.register_interface(VarlinkServiceInterface("vmmback", "vmmback broker", __version__, "", registry))
        super().__init__(registry)
        self._calls = deque[tuple[bytes, FileDescriptorArray | None, Future[None]]]()
        self._unfinished = 0
        """Calls that are not answered yet, and answers that are not taken; no other call is heard meanwhile."""
        self._arrived_s = 0.0
        self._most_bytes = _MOST_CALL_BYTES if caller.uid else _MOST_OF_ROOT_BYTES

    def message_received(self, data: bytes, fds: FileDescriptorArray | None) -> None:
        self._arrived_s = time.monotonic()
        *calls, self._recv_buffer = (self._recv_buffer + data).split(b"\0")
        if len(self._recv_buffer) > self._most_bytes:
            return self._hang_up()
        for call in calls:
            used = asyncio.get_running_loop().create_future()
            if fds:
                fds.reference_until_done(used)
            self._calls.append((call, fds, used))
            fds = None
        return self._hear()

    def _hear(self, done: Future[None] | None = None) -> None:
        if done:
            self._unfinished -= 1
        while self._calls and not self._unfinished:
            text, fds, used = self._calls.popleft()
            try:
                call = json.loads(text)
            except (ValueError, RecursionError):  # no JSON, not in UTF-8, a number too long, or nested too deeply
                call = None
            unfinished = None
            if isinstance(call, dict) and not call.get("oneway"):  # the answer is what all methods are for
                unfinished = self.request_received(call, fds)
            else:
                self._hang_up()
            used.set_result(None)  # which closes the descriptors that came with it, and that nobody took
            if unfinished:
                self._unfinished += 1
                unfinished.add_done_callback(self._hear)
        if self._transport:
            (self._transport.pause_reading if self._unfinished else self._transport.resume_reading)()

    def send_reply(
        self, reply: VarlinkMethodReply, fds: list[int] | None = None, autoclose: bool = True
    ) -> Future[None]:
        assert not (fds and autoclose)
        data, sent = _ENCODER.encode(reply.tojson()).encode() + b"\0", asyncio.get_running_loop().create_future()
        lease = reply.parameters.get("lease") if fds else None
        try:
            count = socket.send_fds(self._socket, [data], fds or [])
        except BlockingIOError:
            count = 0
        except OSError:
            self._not_sent(lease)
            count, lease = len(data), None
        if isinstance(lease, int):
            self._broker.waits.add(time.monotonic() - self._arrived_s)
        if count == len(data):
            sent.set_result(None)
            return sent
        assert self._transport is not None
        left = self._transport.send_message(data[count:], [] if count else fds)
        self._unfinished += 1
        left.add_done_callback(lambda left: self._not_sent(lease) if left.exception() else None)
        left.add_done_callback(self._hear)
        self._add_transfer(left)
        return left

    def _not_sent(self, lease: object) -> None:
        if isinstance(lease, int):  # nobody has its memory
            self._broker.end(lease)
        self._hang_up()

    def _hang_up(self) -> None:
        self._forget_calls()
        if self._transport:
            self._transport.abort()

    def _forget_calls(self) -> None:
        while self._calls:
            self._calls.popleft()[2].set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_calls()
        super().connection_lost(exc)
        close(self._pidfd)


class _Clients:
    """All connections that there are."""

    def __init__(self, broker: Broker, more: Interfaces | None) -> None:
        self._broker, self._more = broker, more
        self._uids: dict[VarlinkTransport, int] = {}

    def add(self, connection: socket.socket) -> None:
        """Serve one more. Raises OSError, also where there are too many."""
        connection.setblocking(False)
        who = peer.of(connection)
        others = [uid for uid in self._uids.values() if uid]
        if who.uid and (len(others) >= _MOST_CLIENTS or others.count(who.uid) >= _MOST_OF_A_USER):
            raise BlockingIOError
        pidfd = peer.pidfd_of(connection)
        kept = None
        try:
            caller = Caller(*who, start_of(who.pid, pidfd))
            kept = dup(connection.fileno()) if _passes_descriptors(connection) else None
            # Without a predictor it reads once when there is something to read, and not until there is nothing more.
            client = _Transport(
                asyncio.get_running_loop(), connection, connection,
                _Connection(connection, self._broker, caller, pidfd, self._more), boundary_predictor=None,
            )  # fmt: skip
        except BaseException:
            close(pidfd)
            if kept is not None:
                close(kept)
            raise
        self._uids[client] = who.uid
        client.closed_future.add_done_callback(lambda _: self._closed(client, kept))

    def _closed(self, client: VarlinkTransport, kept: int | None) -> None:
        if kept is None:
            del self._uids[client]
        else:
            _close_elsewhere(kept, lambda: self._uids.pop(client))

    async def close(self) -> None:
        """Hang up, all of them."""
        for client in list(self._uids):
            if not client.closed_future.done():
                client.abort()
                await client.closed_future


@asynccontextmanager
async def serve(
    listening: socket.socket, broker: Broker, more: Interfaces | None = None
) -> AsyncIterator[list[Task[Any]]]:
    """Answer on a socket that listens until the exit; the pool is filled meanwhile.

    `more` makes one more interface for each caller, beside the broker's own. Yields the tasks that do it; should one of
    them end before, the exit raises its error.
    """
    listening.setblocking(False)
    with suppress(OSError):  # an older kernel: see _Transport
        listening.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    clients = _Clients(broker, more)
    async with AsyncExitStack() as stack:
        stack.callback(broker.close)
        filling = await stack.enter_async_context(broker.pool.filled())
        stack.push_async_callback(clients.close)
        accepting = asyncio.create_task(_accept(listening, clients))
        try:
            yield [filling, accepting]
        finally:
            accepting.cancel()
            with suppress(asyncio.CancelledError):
                await accepting


async def _accept(listening: socket.socket, clients: _Clients) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = await loop.sock_accept(listening)
        except OSError:  # out of descriptors, or the caller is gone: nobody else must suffer for that
            await asyncio.sleep(_ACCEPT_AGAIN_S)
            continue
        try:
            clients.add(connection)
        except OSError:
            if _passes_descriptors(connection):
                _close_elsewhere(connection.detach(), lambda: None)
            else:
                connection.close()
