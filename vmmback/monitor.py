"""QEMU's monitor, typed: the one full QMP connection of a guest, over a socket pair that no path leads to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from qemu.qmp import QMPClient, QMPError
from qemu.qmp.qmp_client import ExecuteError

from vmmback.errors import QemuFailed

# Longer than any command used here takes on a loaded host; a QEMU that is silent for so long does not come back.
_COMMAND_TIMEOUT_S = 30.0


class Monitor:
    """Commands that a launch needs. Made by `connect`; each raises QemuFailed when QEMU refuses or does not answer."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def version(self) -> str:
        """Return QEMU's version with its packager's suffix, such as `7.2.22 (Debian 1:7.2+dfsg-7)`."""
        answer = await self._execute("query-version")
        assert isinstance(answer, dict)
        numbers = "{major}.{minor}.{micro}".format(**answer["qemu"])
        return f"{numbers} ({answer['package']})" if answer.get("package") else numbers

    async def cont(self) -> None:
        """Let the guest run."""
        await self._execute("cont")

    async def stop(self) -> None:
        """Let the guest stand still."""
        await self._execute("stop")

    async def powerdown(self) -> None:
        """Press the guest's power button."""
        await self._execute("system_powerdown")

    async def quit(self) -> None:
        """Ask QEMU to end at once; it may go before it answers."""
        with suppress(QemuFailed):
            await self._execute("quit")

    async def hmp(self, line: str) -> str:
        """Return what QEMU's human monitor prints for a command line that has no QMP twin."""
        answer = await self._execute("human-monitor-command", {"command-line": line})
        return str(answer).replace("\r\n", "\n")  # some of its commands end lines like a terminal

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        try:
            async with asyncio.timeout(_COMMAND_TIMEOUT_S):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise QemuFailed(f"QEMU did not answer {command} within {_COMMAND_TIMEOUT_S} s") from None
        except ExecuteError as error:
            raise QemuFailed(f"QEMU refused {command}: {error}") from error
        except QMPError as error:
            raise QemuFailed(f"QEMU went away during {command}") from error


@asynccontextmanager
async def connect(connection: socket.socket, timeout_s: float) -> AsyncIterator[Monitor]:
    """Speak QMP over a connected socket, which this takes over; disconnect on exit.

    Raises QemuFailed when there is no greeting within `timeout_s` seconds.
    """
    client = QMPClient("guest")
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
