"""qmp.sock: QMP for other processes, under a policy, over the supervisor's one connection to QEMU.

Each client has its own negotiation, ids and order of answers; all get QEMU's events. A message is parsed, judged and
written anew before QEMU gets it, so that both see the same. No client can hold up another, the supervisor or the guest:
there are limits on what is read, kept and written for each, all commands of clients take turns, and QEMU is left alone
after each for as long as it took.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

from vmmback.errors import CommandRefused, QemuFailed
from vmmback.qmp_commands import NEGOTIATION
from vmmback.qmp_json import Malformed, Stream
from vmmback.qmp_policy import MAX_NAME_CHARS, Denial, Policy, is_known
from vmmback.runtime import listening_socket

MAX_CLIENTS = 32
# A client that has not negotiated by then gives its place to others.
NEGOTIATION_TIMEOUT_S = 10.0
# A client that takes nothing of an answer for so long is cut off; so is one for which so much has piled up.
WRITE_TIMEOUT_S = 30.0
MAX_UNREAD_BYTES = 1 << 20
# Of each client; the burst is for tools that ask all they want to know at once.
MESSAGES_PER_S = 200.0
MESSAGES_AT_ONCE = 200.0
# For each second in which QEMU worked for a client, that client waits so long: it has a tenth of QEMU's time, no more.
REST_FACTOR = 9.0
# How long a client's last answers may take once the socket is closed.
_CLOSE_TIMEOUT_S = 1.0
_PACKET_BYTES = 64 * 1024
_REST_LIMIT_S = 1.0
_UNKNOWN = "(unknown)"

Answer = dict[str, object]


class Monitor(Protocol):
    """What is needed of `monitor.Monitor`."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Send a command. Raises CommandRefused, QemuFailed."""

    def listen(self, receive: Callable[[Mapping[str, object]], None]) -> AbstractContextManager[None]:
        """Call `receive` with each event."""

    async def gone(self) -> None:
        """Wait for QEMU's end."""


@asynccontextmanager
async def serve(path: Path, monitor: Monitor, policy: Policy, note: Callable[[str], None]) -> AsyncIterator[QmpSocket]:
    """Serve QMP at `path` (mode 0600, in a folder that is the user's alone) until QEMU's end, or that of the block.

    `note` is called with what the user should know of it. A client may send `cont` from the first moment: begin this
    once the guest may run, or deny `cont` first. Raises QemuFailed, HostUnfit.
    """
    greeting = {"QMP": {"version": await monitor.execute("query-version"), "capabilities": []}}
    served = QmpSocket(monitor, policy, note, _line(greeting))
    with listening_socket(path) as listening, monitor.listen(served.broadcast):
        server = await asyncio.start_unix_server(
            served.accept, sock=listening, limit=_PACKET_BYTES, backlog=MAX_CLIENTS
        )
        ending = asyncio.create_task(served.end_with_qemu(server))
        try:
            yield served
        finally:
            ending.cancel()
            server.close()
            await served.close()
            await asyncio.wait({ending})


class QmpSocket:
    """The socket while it is served. `denials` counts what the policy denied, by command."""

    def __init__(self, monitor: Monitor, policy: Policy, note: Callable[[str], None], greeting: bytes) -> None:
        self.denials: Counter[str] = Counter()
        self._monitor, self._policy, self._note = monitor, policy, note
        self._greeting = greeting
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        # Of all clients: QEMU's main loop does one command at a time, and the supervisor's own waits for one at most.
        self._turn = asyncio.Lock()

    def broadcast(self, event: Mapping[str, object]) -> None:
        """Send an event to all clients that have negotiated; it gets the time, if it has none."""
        if "timestamp" not in event:
            microseconds = time.time_ns() // 1000
            stamp = {"seconds": microseconds // 1_000_000, "microseconds": microseconds % 1_000_000}
            event = {**event, "timestamp": stamp}
        line = _line(event)
        for client in self._clients:
            if client.negotiated:
                client.write(line)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a client on."""
        if self._closed or len(self._clients) >= MAX_CLIENTS:
            writer.transport.abort()
            return
        client = _Client(reader, writer)
        self._clients.add(client)
        task = asyncio.create_task(self._converse(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end_with_qemu(self, server: asyncio.Server) -> None:
        """Close once QEMU has closed its end; its last event is with the clients then."""
        await self._monitor.gone()
        server.close()
        await self.close()

    async def close(self) -> None:
        """Let each client have the answer that it waits for, for a moment, then end all."""
        self._closed = True
        for client in self._clients:
            client.finish()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _converse(self, client: _Client) -> None:
        try:
            with suppress(OSError):  # it hung up, or was too slow: TimeoutError
                async with asyncio.timeout(NEGOTIATION_TIMEOUT_S) as client.deadline:
                    client.write(self._greeting)
                    await self._answer_all(client)
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    client.writer.close()
                    await client.writer.wait_closed()
        finally:
            client.writer.transport.abort()  # does nothing if it is closed
            self._clients.discard(client)

    async def _answer_all(self, client: _Client) -> None:
        stream = Stream()
        while packet := await client.read():
            for message in stream.feed(packet):
                await client.paced()
                client.write(await self._answer(client, message))
                await client.written()
                if client.ends:
                    return
            client.busy = False

    async def _answer(self, client: _Client, message: object) -> bytes:
        """Return the one answer to a message, with its id if it has one."""
        if isinstance(message, Malformed):
            return _line(_error("GenericError", str(message)))
        if not isinstance(message, dict):
            return _line(_error("GenericError", "QMP input must be a JSON object"))
        answer = await self._answer_object(client, message)
        if "id" in message:
            answer["id"] = message["id"]
        return _line(answer)

    async def _answer_object(self, client: _Client, message: dict[str, object]) -> Answer:
        if problem := _malformed(message):
            return _error("GenericError", problem)
        command, arguments = str(message["execute"]), message.get("arguments", {})
        assert isinstance(arguments, dict)
        if not client.negotiated:
            return client.negotiate(command, arguments)
        if command == NEGOTIATION:
            return _error("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
        return await self._execute(client, command, arguments)

    async def _execute(self, client: _Client, command: str, arguments: dict[str, object]) -> Answer:
        if denial := self._policy.check(command, arguments):  # before its turn: a denial needs none
            return self._denied(command, denial)
        await self._turn.acquire()
        started = time.monotonic()
        try:
            # Once more: the supervisor may have denied it while it waited. From here on nothing comes between: what
            # the supervisor sends next (such as stop) comes after this in QEMU too.
            if denial := self._policy.check(command, arguments):
                return self._denied(command, denial)
            return {"return": await self._monitor.execute(command, arguments)}
        except CommandRefused as error:
            return _error(error.error_class, error.desc)
        except QemuFailed as error:
            return _error("GenericError", error.message)
        finally:
            # The answer goes out now, the next turn comes later: the guest's devices need QEMU's main loop too.
            took = time.monotonic() - started
            client.rest(took)
            asyncio.get_running_loop().call_later(min(took, _REST_LIMIT_S), self._turn.release)

    def _denied(self, command: str, denial: Denial) -> Answer:
        name = command if is_known(command) else _UNKNOWN  # clients can make up names without number
        if not self.denials[name]:
            self._note(f"qmp.sock: {denial.desc}")
        self.denials[name] += 1
        return _error(denial.error_class, denial.desc)


class _Client:
    """One connection: its two directions, and what it may still do."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.deadline: asyncio.Timeout | None = None
        self.negotiated = False
        self.busy = False
        self.ends = False
        self._reader = reader
        self._free_at = 0.0

    async def read(self) -> bytes:
        """Return what came, b"" at the end."""
        await self.paced()
        packet = b"" if self.ends else await self._reader.read(_PACKET_BYTES)
        self.busy = True
        return packet

    async def paced(self) -> None:
        """Wait for this client's next moment; others run meanwhile."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now - MESSAGES_AT_ONCE / MESSAGES_PER_S) + 1 / MESSAGES_PER_S
        await asyncio.sleep(self._free_at - now)

    def rest(self, took_s: float) -> None:
        """Put the next moment off, as QEMU worked so long for this client."""
        self._free_at += REST_FACTOR * took_s

    def write(self, line: bytes) -> None:
        """Send a line, or cut off a client that has not read what was sent before."""
        transport = self.writer.transport
        if transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            transport.abort()
        if not transport.is_closing():
            transport.write(line)

    async def written(self) -> None:
        """Wait until the client has read most of what was sent. Raises ConnectionError, TimeoutError."""
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await self.writer.drain()

    def negotiate(self, command: str, arguments: Mapping[str, object]) -> Answer:
        """Answer a command that comes before the negotiation is done."""
        if command != NEGOTIATION:
            return _error("CommandNotFound", f"Expecting capabilities negotiation with '{NEGOTIATION}'")
        if set(arguments) - {"enable"} or arguments.get("enable", []) != []:
            return _error("GenericError", "This socket offers no capabilities: enable none")
        self.negotiated = True
        if self.deadline:
            self.deadline.reschedule(None)
        return {"return": {}}

    def finish(self) -> None:
        """End after the answer that is under way, or at once."""
        self.ends = True
        if not self.busy:
            self.writer.close()  # what was written still goes out; reading ends


def _malformed(message: Mapping[str, object]) -> str:
    """Return what is wrong with the form of a request, in QEMU's words (qapi/qmp-dispatch.c), "" if nothing is."""
    for member, value in message.items():
        if member == "execute":
            if not isinstance(value, str):
                return "QMP input member 'execute' must be a string"
        elif member == "arguments":
            if not isinstance(value, dict):
                return "QMP input member 'arguments' must be an object"
        elif member != "id":  # exec-oob is one of them, as the capability is not offered
            return f"QMP input member '{member[:MAX_NAME_CHARS]}' is unexpected"
    return "" if "execute" in message else "QMP input lacks member 'execute'"


def _error(error_class: str, desc: str) -> Answer:
    return {"error": {"class": error_class, "desc": desc}}


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"  # as QEMU ends its lines; ASCII, whatever is in it
