"""The other side of control.py, for commands that have an event loop: what another process asks of a supervisor."""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from asyncvarlink import VarlinkClientProtocol, VarlinkErrorReply, connect_unix_varlink
from asyncvarlink.conversion import ConversionError

from vmmback.control import SOCKET, Failed, GuestInterface, Refused
from vmmback.errors import AdmissionRefused, HostUnfit, NoSuchGuest, QemuFailed, UsageError, VmmbackError
from vmmback.linux import page_file
from vmmback.report import IsolationReport
from vmmback.runtime import socket_address
from vmmback.varlink import Client

_KINDS: dict[int, type[VmmbackError]] = {kind.exit_code: kind for kind in (UsageError, HostUnfit, AdmissionRefused)}

_ANSWER_TIMEOUT_S = 60.0
_AUDIT_TIMEOUT_S = 600.0  # it looks at every page of a guest of any size, and lets others have the processor first


class Supervisor:
    """The supervisor of a live guest, as another process sees it. Made by `connect`."""

    def __init__(self, protocol: VarlinkClientProtocol) -> None:
        self._guest = protocol.make_proxy(GuestInterface)

    async def audit(self) -> IsolationReport:
        """Have the guest audited. Raises QemuFailed, also when the guest ends meanwhile."""
        async with _answer_to("Audit", _AUDIT_TIMEOUT_S):
            return IsolationReport.of((await self._guest.Audit())["report"])

    async def frames(self) -> array[int]:
        """Return the pagemap entry of each page of the guest's RAM. Raises QemuFailed as above."""
        async with _answer_to("Frames", _ANSWER_TIMEOUT_S):
            with await self._guest.Frames() as answer:
                return page_file.entries_in(answer["frames"].fileno())

    async def canary_halves(self) -> tuple[bytes, bytes] | None:
        """Return two halves whose XOR is the guest's canary, None if it printed none. Raises QemuFailed as above."""
        async with _answer_to("CanaryHalves", _ANSWER_TIMEOUT_S):
            halves = [bytes.fromhex(half) for half in (await self._guest.CanaryHalves())["halves"]]
            if not halves:
                return None
            first, second = halves
            return first, second

    async def console(self, *, scrollback: bool) -> int:
        """Return the descriptor, the caller's, of a socket at the guest's console. Raises QemuFailed as above."""
        async with _answer_to("Console", _ANSWER_TIMEOUT_S):
            with await self._guest.Console(scrollback=scrollback) as answer:
                return os.dup(answer["console"].fileno())

    async def grow(self, size: int, progress: Callable[[int, int], None]) -> IsolationReport:
        """Have `size` bytes of RAM added, and the guest audited. Raises VmmbackError of the kind that it was there."""
        steps = aiter(self._guest.Grow(size=size))
        no_more: dict[str, Any] = {}
        while True:
            async with _answer_to("Grow", _AUDIT_TIMEOUT_S):
                step = (await anext(steps, no_more))["step"]
                if "report" in step:
                    return IsolationReport.of(step["report"])
                progress(step["done"], step["total"])


@asynccontextmanager
async def connect(folder: Path) -> AsyncIterator[Supervisor]:
    """Reach the supervisor of the guest with this folder. Raises NoSuchGuest when there is none, and QemuFailed."""
    try:
        async with _answer_to("the connection", _ANSWER_TIMEOUT_S):
            with socket_address(folder / SOCKET) as address:
                transport, protocol = await connect_unix_varlink(Client, address)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
        live = ", ".join(_live_guests(folder.parent)) or "none"
        raise NoSuchGuest(f"no guest named {folder.name} is running", f"running in {folder.parent}: {live}") from error
    try:
        yield Supervisor(protocol)
    finally:
        transport.close()
        await transport.closed_future


@asynccontextmanager
async def _answer_to(what: str, timeout_s: float) -> AsyncIterator[None]:
    """Turn what a supervisor answers, its silence or its end into an error for the user."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise QemuFailed(
            f"the guest's supervisor did not answer within {timeout_s:g} s: {what}", "look whether it is stopped"
        ) from error
    except Failed as failed:
        raise QemuFailed(failed.message, failed.hint) from failed
    except Refused as refused:
        raise _KINDS.get(refused.exit_code, QemuFailed)(refused.message, refused.hint) from refused
    except VarlinkErrorReply as reply:
        raise QemuFailed(f"the guest's supervisor refused: {reply}", "it may be another version of vmmback") from reply
    except ConnectionRefusedError:
        raise
    except ConnectionError as error:
        raise QemuFailed("the guest ended meanwhile") from error
    except (ConversionError, LookupError, TypeError, ValueError) as error:  # msgspec.s and json.s are ValueErrors
        raise QemuFailed(
            "the guest's supervisor answered in a way not known here", "it may be another version of vmmback"
        ) from error


def _live_guests(runtime: Path) -> list[str]:
    try:
        return sorted(entry.parent.name for entry in runtime.glob(f"*/{SOCKET}"))
    except OSError:
        return []
