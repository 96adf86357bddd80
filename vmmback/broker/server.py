"""The broker's socket, which every user of the host can reach: whoever it is can keep nobody else from being served."""

from __future__ import annotations

import asyncio
import socket
from asyncio import Future, Task
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from os import close
from typing import Any

from asyncvarlink import (
    FileDescriptorArray,
    VarlinkInterfaceRegistry,
    VarlinkInterfaceServerProtocol,
    VarlinkMethodReply,
    VarlinkTransport,
)
from asyncvarlink.serviceinterface import VarlinkServiceInterface
from asyncvarlink.types import JSONObject

from vmmback import __version__
from vmmback.broker.ledger import Caller
from vmmback.broker.service import Broker, BrokerInterface
from vmmback.linux import peer

# Root is held to neither: its guests have a connection each, and others must not keep them from it.
_MOST_CLIENTS, _MOST_OF_A_USER = 512, 64
_MOST_CALL_BYTES = 1 << 16
_ACCEPT_AGAIN_S = 0.1


class _Connection(VarlinkInterfaceServerProtocol):
    """One caller's; nobody else is reached by it.

    asyncvarlink reads as long as there is something to read, and keeps what it has read and what it could not send yet,
    however much. Here a caller is not heard before his last call was answered, and the answer taken.
    """

    def __init__(self, broker: Broker, caller: Caller, pidfd: int) -> None:
        self._broker, self._pidfd = broker, pidfd
        registry = VarlinkInterfaceRegistry()
        registry.register_interface(BrokerInterface(broker, caller, pidfd))
        registry.register_interface(VarlinkServiceInterface("vmmback", "vmmback broker", __version__, "", registry))
        super().__init__(registry)
        self._taken: Future[None] | None = None
        """Done once the last answer was taken, or never will be."""

    def message_received(self, data: bytes, fds: FileDescriptorArray | None) -> None:
        try:
            super().message_received(data, fds)
        except (ValueError, RecursionError):  # it is not in UTF-8, has numbers too long, or is nested too deeply
            self._hang_up()
        if len(self._recv_buffer) > _MOST_CALL_BYTES:
            self._hang_up()
        if self._consumer_queue and self._transport:
            self._transport.pause_reading()  # until the queue is empty

    def error_received(self, *_: object) -> None:
        self._hang_up()

    def request_received(self, obj: JSONObject, fds: FileDescriptorArray | None) -> Future[None] | None:
        if obj.get("oneway"):  # the answer is what all methods are for
            self._hang_up()
            return None
        self._taken = None
        return super().request_received(obj, fds) or self._taken

    def send_reply(
        self, reply: VarlinkMethodReply, fds: list[int] | None = None, autoclose: bool = True
    ) -> Future[None]:
        self._taken = asyncio.get_running_loop().create_future()
        sent = super().send_reply(reply, fds, autoclose)
        sent.add_done_callback(partial(self._sent, self._taken, reply.parameters["lease"] if fds else None))
        return sent

    def _sent(self, taken: Future[None], lease: object, sent: Future[None]) -> None:
        if sent.exception():
            if isinstance(lease, int):  # nobody has its memory
                self._broker.end(lease)
            self._hang_up()
        taken.set_result(None)

    def _on_message_sent(self, _fut: Future[None]) -> None:
        """Leave to `_sent` what asyncvarlink would say with a traceback: that a caller is gone."""

    def _hang_up(self) -> None:
        self._forget_calls()
        if self._transport:
            self._transport.abort()

    def _forget_calls(self) -> None:
        while self._consumer_queue:
            _, consumed = self._consumer_queue.popleft()
            if consumed:
                consumed.set_result(None)  # which closes the descriptors that came with it

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_calls()
        super().connection_lost(exc)
        close(self._pidfd)


class _Clients:
    """All connections that there are."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._uids: dict[VarlinkTransport, int] = {}

    def add(self, connection: socket.socket) -> None:
        """Serve one more. Raises OSError, also where there are too many."""
        connection.setblocking(False)
        caller = Caller(*peer.of(connection))
        others = [uid for uid in self._uids.values() if uid]
        if caller.uid and (len(others) >= _MOST_CLIENTS or others.count(caller.uid) >= _MOST_OF_A_USER):
            raise BlockingIOError
        pidfd = peer.pidfd_of(connection)
        try:
            # Without a predictor it reads once when there is something to read, and not until there is nothing more.
            client = VarlinkTransport(
                asyncio.get_running_loop(), connection, connection, _Connection(self._broker, caller, pidfd),
                boundary_predictor=None,
            )  # fmt: skip
        except BaseException:
            close(pidfd)
            raise
        self._uids[client] = caller.uid
        client.closed_future.add_done_callback(lambda _: self._uids.pop(client))

    async def close(self) -> None:
        """Hang up, all of them."""
        for client in list(self._uids):
            client.abort()
            await client.closed_future


@asynccontextmanager
async def serve(listening: socket.socket, broker: Broker) -> AsyncIterator[list[Task[Any]]]:
    """Answer on a socket that listens until the exit; the pool is filled meanwhile.

    Yields the tasks that do it; should one of them end before, the exit raises its error.
    """
    listening.setblocking(False)
    clients = _Clients(broker)
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
            connection.close()
