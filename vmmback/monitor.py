"""QEMU's monitor, typed: the one full QMP connection of a guest, over a socket pair that no path leads to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress

from qemu.qmp import EventListener, Message, QMPClient, QMPError, Runstate
from qemu.qmp.qmp_client import ExecuteError

from vmmback.errors import CommandRefused, QemuFailed

# Longer than any command used here takes on a loaded host; a QEMU that is silent for so long does not come back.
_COMMAND_TIMEOUT_S = 30.0

Event = Mapping[str, object]


class Monitor:
    """Commands that a launch needs. Made by `connect`; each raises QemuFailed when QEMU refuses or does not answer."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def version(self) -> str:
        """Return QEMU's version with its packager's suffix, such as `7.2.22 (Debian 1:7.2+dfsg-7)`."""
        answer = await self.execute("query-version")
        assert isinstance(answer, dict)
        numbers = "{major}.{minor}.{micro}".format(**answer["qemu"])
        return f"{numbers} ({answer['package']})" if answer.get("package") else numbers

    async def cont(self) -> None:
        """Let the guest run."""
        await self.execute("cont")

    async def stop(self) -> None:
        """Let the guest stand still."""
        await self.execute("stop")

    async def powerdown(self) -> None:
        """Press the guest's power button."""
        await self.execute("system_powerdown")

    async def quit(self) -> None:
        """Ask QEMU to end at once; it may go before it answers."""
        with suppress(QemuFailed):
            await self.execute("quit")

    async def hmp(self, line: str) -> str:
        """Return what QEMU's human monitor prints for a command line that has no QMP twin."""
        answer = await self.execute("human-monitor-command", {"command-line": line})
        return str(answer).replace("\r\n", "\n")  # some of its commands end lines like a terminal

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Send any command; return what QEMU answers. QEMU takes commands in the order in which this is called.

        Raises CommandRefused with QEMU's error class and description, QemuFailed when it is gone or silent.
        """
        try:
            async with asyncio.timeout(_COMMAND_TIMEOUT_S):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise QemuFailed(f"QEMU did not answer {command} within {_COMMAND_TIMEOUT_S} s") from None
        except ExecuteError as error:
            refused = CommandRefused(f"QEMU refused {command}: {error}")
            refused.error_class, refused.desc = error.error.error.class_, error.error.error.desc
            raise refused from error
        except QMPError as error:
            raise QemuFailed(f"QEMU went away during {command}") from error

    @contextmanager
    def listen(self, receive: Callable[[Event], None]) -> Iterator[None]:
        """Have `receive` called with each event, in the order of events and answers; it must not block or raise."""

        class Tap(EventListener):
            def accept(self, event: Message) -> bool:
                receive(dict(event))
                return False  # kept nowhere: a listener's history has no limit

        with self._client.listen(Tap()):
            yield

    async def gone(self) -> None:
        """Wait until QEMU has closed its end; `receive` has been called with its last event then."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()


@asynccontextmanager
async def connect(connection: socket.socket, timeout_s: float) -> AsyncIterator[Monitor]:
    """Speak QMP over a connected socket, which this takes over; disconnect on exit.

    Raises QemuFailed when there is no greeting within `timeout_s` seconds.
    """
    client = QMPClient("guest")
    client.events.event_filter = lambda _: False  # the listener that every client has keeps all that it accepts
    try:
        async with asyncio.timeout(timeout_s):
            await client.connect(connection)
    except TimeoutError:
        raise QemuFailed(f"QEMU did not greet over QMP within {timeout_s} s") from None
    except QMPError as error:
        raise QemuFailed(f"QEMU did not greet over QMP: {' '.join(str(error).split())}") from error
    try:
        yield Monitor(client)
    finally:
        with suppress(EOFError, QMPError, OSError):  # QEMU's end closes the connection before we do
            await client.disconnect()
