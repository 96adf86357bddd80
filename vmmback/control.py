"""The supervisor's own socket: Varlink (varlink.org) in the guest's folder, for the other commands and other tools.

It is served as long as the guest's name is held: docs/LIFECYCLE.md has the interface.

varlinkctl call /run/vmmback/demo/control org.vmmback.Guest.Status {}
"""

# The annotations of the methods are the interface: asyncvarlink reads them, so they must not all be strings.
import asyncio
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from asyncvarlink import (
    FileDescriptor,
    FileDescriptorArray,
    LastResult,
    TypedVarlinkErrorReply,
    VarlinkInterface,
    VarlinkInterfaceRegistry,
    VarlinkInterfaceServerProtocol,
    create_unix_server,
    varlinkmethod,
)
from asyncvarlink.serviceinterface import VarlinkServiceInterface
from asyncvarlink.types import JSONObject

from vmmback import __version__
from vmmback.errors import VmmbackError
from vmmback.linux import page_file
from vmmback.report import IsolationReport
from vmmback.runtime import CONTROL_SOCKET, listening_socket

T = TypeVar("T")

SOCKET = CONTROL_SOCKET

MAX_PATIENCE_S = 24 * 3600

_BACKLOG = 128

# What was answered at the end must reach who asked: a client that takes nothing for so long does without.
_LAST_ANSWERS_S = 2.0


class Failed(TypedVarlinkErrorReply, interface="org.vmmback.Guest", paramprefix=""):
    """It could not be done: what was wrong, and what to do."""

    class Parameters:  # noqa: D106
        message: str
        hint: str


class Refused(TypedVarlinkErrorReply, interface="org.vmmback.Guest", paramprefix=""):
    """It could not be done; `exit_code` tells the kind of the error (errors.py)."""

    class Parameters:  # noqa: D106
        message: str
        hint: str
        exit_code: int


@dataclass(frozen=True)
class GuestStatus:
    """How a guest is; what may be missing is null."""

    name: str
    state: str
    """One of `lifecycle.State`."""
    pid: int
    """The supervisor's."""
    qemu_pid: int | None
    started_at: str
    """UTC, ISO 8601."""
    uptime_s: float
    ram_bytes: int
    prefaulted_bytes: int
    secret_bytes: int
    verdict: str | None
    """Of the last examination, with its reasons."""
    reasons: list[str]
    validated_after: str | None
    unexamined: str | None
    config_file: str | None
    folder: str
    console_logs: list[str]


class Life(Protocol):
    """What others may ask of a guest; `supervisor.Life` says what each does."""

    async def examine(self) -> IsolationReport:
        """Audit it."""

    async def frames(self) -> "array[int]":
        """Return its frames."""

    def canary_halves(self) -> tuple[bytes, bytes] | None:
        """Return the halves of its canary."""

    async def grow(self, size: int, progress: Callable[[int, int], None]) -> IsolationReport:
        """Add so many bytes of RAM, and audit it."""

    def attach_console(self, *, scrollback: bool) -> int:
        """Return the descriptor of a stream socket at its console."""

    def status(self) -> GuestStatus:
        """Return how it is."""

    async def stop(self, timeout_s: float | None, *, kill: bool) -> IsolationReport:
        """End it, and return the last word on it."""


class GuestInterface(VarlinkInterface, name="org.vmmback.Guest"):
    """One guest, from the moment that its name is held until it is gone."""

    errors = (Failed, Refused)

    def __init__(self, life: Life) -> None:
        self._life = life
        self._under_way: set[asyncio.Future[Any]] = set()

    async def end(self) -> None:
        """End what is under way: nothing may look at a guest after its end."""
        for work in self._under_way:
            work.cancel()
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def _until_the_end(self, work: Awaitable[T]) -> T:
        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        await asyncio.wait({task})
        if task.cancelled():  # asyncvarlink takes no cancelled call for an answer, and would say so with a traceback
            raise Failed(message="the guest ended meanwhile", hint="")
        return task.result()

    @varlinkmethod(return_parameter="report", allow_foreign=True)
    async def Audit(self) -> Any:  # noqa: N802 (Varlink's spelling; an object)
        """Run every probe that is safe on a live guest, and return the report."""
        try:
            report = await self._until_the_end(self._life.examine())
        except VmmbackError as error:
            raise Failed(message=error.message, hint=error.hint) from error
        except (OSError, MemoryError, RuntimeError) as error:  # out of descriptors, memory or threads, say
            raise Failed(message=f"the guest could not be examined: {error}", hint="") from error
        return report.as_tables()

    @varlinkmethod(return_parameter="frames")
    async def Frames(self) -> FileDescriptor:  # noqa: N802
        """Return a file of one native 64-bit word a page of the RAM: its entry in /proc/PID/pagemap."""
        try:
            entries = await self._until_the_end(self._life.frames())
        except VmmbackError as error:
            raise Failed(message=error.message, hint=error.hint) from error
        except OSError as error:
            raise Failed(message=f"the guest's page tables cannot be read: {error.strerror}", hint="") from error
        return FileDescriptor(page_file.sealed(entries), should_close=True)

    @varlinkmethod(return_parameter="halves")
    async def CanaryHalves(self) -> list[str]:  # noqa: N802
        """Return two halves, in hex, whose XOR is the canary that fills the guest; none if it printed none."""
        try:
            return [half.hex() for half in self._life.canary_halves() or ()]
        except VmmbackError as error:
            raise Failed(message=error.message, hint=error.hint) from error

    @varlinkmethod(return_parameter="status")
    async def Status(self) -> GuestStatus:  # noqa: N802
        """Return how the guest is; nothing is measured for that."""
        return self._life.status()

    @varlinkmethod(return_parameter="report", allow_foreign=True)
    async def Stop(self, timeout_s: float | None, kill: bool | None) -> Any:  # noqa: N802
        """End the guest; return the last report (an object) once it is gone."""
        if timeout_s is not None and not 0 <= timeout_s <= MAX_PATIENCE_S:
            raise Failed(message=f"timeout_s is not from 0 to {MAX_PATIENCE_S}", hint="it is in seconds")
        try:
            report = await self._life.stop(timeout_s, kill=bool(kill))
        except VmmbackError as error:
            raise Failed(message=error.message, hint=error.hint) from error
        return report.as_tables()

    @varlinkmethod(return_parameter="console")
    async def Console(self, scrollback: bool) -> FileDescriptor:  # noqa: N802
        """Return a stream socket at the guest's serial console: raw bytes, both ways; docs/CONSOLE.md."""
        try:
            return FileDescriptor(self._life.attach_console(scrollback=scrollback), should_close=True)
        except VmmbackError as error:
            raise Failed(message=error.message, hint=error.hint) from error
        except OSError as error:  # out of descriptors
            raise Failed(message=f"the console cannot be attached to: {error.strerror}", hint="") from error

    @varlinkmethod(return_parameter="step", delay_generator=False, allow_foreign=True)
    async def Grow(self, size: int) -> AsyncIterator[Any]:  # noqa: N802 (objects)
        """Add `size` bytes of RAM: tell how many are present (`done`, of `total`), at last the `report` of the guest.

        If the caller goes away before QEMU was asked, nothing of it is done.
        """
        steps: asyncio.Queue[dict[str, int] | None] = asyncio.Queue()
        work = asyncio.ensure_future(
            self._life.grow(size, lambda done, total: steps.put_nowait({"done": done, "total": total}))
        )

        def done(_: object) -> None:
            self._under_way.discard(work)
            steps.put_nowait(None)
            if not work.cancelled():
                work.exception()  # is taken here, for a caller who is gone will not

        self._under_way.add(work)
        work.add_done_callback(done)
        # Once a reply cannot be sent, asyncvarlink ends the call, and forgets to close this generator.
        call = asyncio.current_task()
        assert call is not None
        call.add_done_callback(lambda _: work.cancel())
        while (step := await steps.get()) is not None:
            yield step
        if work.cancelled():
            raise Failed(message="the guest ended meanwhile", hint="")
        try:
            report = work.result()
        except VmmbackError as error:
            raise Refused(message=error.message, hint=error.hint, exit_code=error.exit_code) from error
        except (OSError, MemoryError, RuntimeError) as error:  # out of descriptors, memory or threads, say
            raise Failed(message=f"the guest could not grow, or not be examined: {error}", hint="") from error
        raise LastResult({"report": report.as_tables()})


@asynccontextmanager
async def serve(folder: Path, interface: GuestInterface) -> AsyncIterator[None]:
    """Answer on the socket in a guest's folder until the exit, which ends what is under way. Raises HostUnfit."""
    registry = VarlinkInterfaceRegistry()
    registry.register_interface(interface)
    registry.register_interface(VarlinkServiceInterface("vmmback", "vmmback supervisor", __version__, "", registry))
    answers: set[asyncio.Future[None]] = set()
    with listening_socket(folder / SOCKET) as listening:
        server = await create_unix_server(lambda: _Connection(registry, answers), sock=listening)
        # asyncvarlink lets one wait. Where more come, connect(2) of a nonblocking socket fails with EAGAIN (unix(7)),
        # which asyncio takes for a connection.
        listening.listen(_BACKLOG)
        try:
            yield
        finally:
            server.close()
            await interface.end()
            await _all_done(answers, _LAST_ANSWERS_S)
            server.abort_clients()
            await server.wait_closed()


class _Connection(VarlinkInterfaceServerProtocol):
    """Adds to `answers` whatever is to be answered or sent, until that is done."""

    def __init__(self, registry: VarlinkInterfaceRegistry, answers: "set[asyncio.Future[None]]") -> None:
        super().__init__(registry)
        self._answers = answers

    def request_received(self, obj: JSONObject, fds: FileDescriptorArray | None) -> "asyncio.Future[None] | None":
        answered: asyncio.Future[None] | None = super().request_received(obj, fds)
        if answered is not None:
            self._answers.add(answered)
            answered.add_done_callback(self._answers.discard)
        return answered

    def send_message(
        self, obj: JSONObject, fds: list[int] | None = None, autoclose: bool = True
    ) -> asyncio.Future[None]:
        sent = super().send_message(obj, fds, autoclose)
        self._answers.add(sent)
        sent.add_done_callback(self._answers.discard)
        return sent


async def _all_done(futures: "set[asyncio.Future[None]]", timeout_s: float) -> None:
    """Wait for all of a set that still changes."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while futures and (left_s := deadline - loop.time()) > 0:
        await asyncio.wait(list(futures), timeout=left_s)
