"""Borrows secret RAM from the broker, where one runs. service.py is the other side."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from asyncvarlink import FileDescriptor, VarlinkErrorReply, VarlinkTransport
from asyncvarlink.conversion import ConversionError

from vmmback.broker.service import BrokerInterface, NotReady, Refused
from vmmback.config import GuestConfig
from vmmback.errors import AdmissionRefused, HostUnfit, UsageError, VmmbackError
from vmmback.linux import memlock, page_file, peer
from vmmback.ram import LentRam
from vmmback.runtime import socket_address
from vmmback.varlink import Client

SOCKET = Path("/run/vmmback-broker/socket")
_ANSWER_TIMEOUT_S = 10.0


def socket_path() -> Path:
    """Return the path of the broker's socket: $VMMBACK_BROKER, or the one that every user of a host knows."""
    return Path(os.environ.get("VMMBACK_BROKER") or SOCKET)


class Lender:
    """The broker, as another process sees it. Made by `connected`."""

    def __init__(self, protocol: Client) -> None:
        self._broker = protocol.make_proxy(BrokerInterface)

    @asynccontextmanager
    async def borrowed(self, size: int, purpose: str) -> AsyncIterator[LentRam | None]:
        """Borrow RAM of `size` bytes while the block runs, which owns it; None where none of this size is ready.

        Raises AdmissionRefused where this user may not have it, HostUnfit as `connected`.
        """
        try:
            async with _answered("Acquire"):
                with await self._broker.Acquire(size=size, purpose=purpose) as answer:
                    lease: int = answer["lease"]
                    frames = page_file.entries_in(answer["frames"].fileno())
                    if len(frames) * mmap.PAGESIZE != size:
                        raise ValueError("the frames are not those of all pages")
                    memory = LentRam(os.dup(answer["descriptor"].fileno()), size, frames)
        except NotReady:
            yield None
            return
        try:
            with memory:
                yield memory
        finally:
            with suppress(VmmbackError):  # the lease ends with this process at the latest
                await self._release(lease)

    async def _release(self, lease: int, *, again: bool = True) -> None:
        """End a lease, where the broker has ended meanwhile with the next one. Raises HostUnfit."""
        try:
            async with _answered("Release"):
                await self._broker.Release(lease=lease)
        except HostUnfit:
            if again:
                async with connected() as lender:
                    if lender:
                        await lender._release(lease, again=False)

    async def serve(
        self,
        listener: int,
        paths: Mapping[Path, int],
        memfds: Sequence[tuple[str, int]] = (),
        *,
        secret_memfds: bool = False,
    ) -> None:
        """Have the calls that this process's filter stops answered from now on; descriptors stay the caller's to close.

        An open of each of `paths` is answered with its descriptor, and each memfd_create(2) of a name of `memfds` with
        the next one of that name; with `secret_memfds` all other memfds are secret, too. docs/BROKER.md has the rules.

        Call it right after seccomp.install_listener: until it returns, whatever the filter stops waits. The answers go
        on until this process ends, whatever it executes meanwhile. Raises UsageError, AdmissionRefused, HostUnfit.
        """
        from vmmback.broker.handoff_interface import HandoffInterface, Offer

        offers = [Offer("open", str(path), FileDescriptor(descriptor)) for path, descriptor in paths.items()]
        offers += [Offer("memfd_create", name, FileDescriptor(descriptor)) for name, descriptor in memfds]
        async with _answered("Serve"):
            with await self._broker.Serve() as answer:
                channel = socket.socket(fileno=os.dup(answer["channel"].fileno()))
            async with _varlink(channel) as protocol:
                await protocol.make_proxy(HandoffInterface).Answer(
                    listener=FileDescriptor(listener), offers=offers, secret_memfds=secret_memfds
                )

    async def leases(self) -> list[Any]:
        """Return the leases of this user, all of them for root. Raises HostUnfit."""
        async with _answered("List"):
            return list((await self._broker.List())["leases"])

    async def statistics(self) -> dict[str, Any]:
        """Return how the pool is. Raises HostUnfit."""
        async with _answered("Stats"):
            return dict(await self._broker.Stats())


async def borrow(config: GuestConfig, note: Callable[[str], None], stack: AsyncExitStack) -> LentRam | None:
    """Borrow a guest's RAM as long as `stack` lasts; None where no broker runs, or has none ready, or may lend none.

    Nor where its file speaks against it: RAM that is there was paid for by the broker's memory cgroup, not by one that
    the file names. `note` is told why the broker lends nothing, or that it does not answer. Raises LimitTooLow where
    this process may not map what it has borrowed.
    """
    memory = config.memory
    if memory.backing != "secret" or not memory.prefault or config.process.cgroup is not None:
        return None
    try:
        lender = await stack.enter_async_context(connected())
        if lender is None:
            return None
        return await stack.enter_async_context(lender.borrowed(memory.size, f"guest {config.name}"))
    except memlock.LimitTooLow:  # nor could it map as much RAM of its own
        raise
    except (AdmissionRefused, HostUnfit) as error:
        note(f"the broker lends nothing: {error.message}")
        return None


@asynccontextmanager
async def connected() -> AsyncIterator[Lender | None]:
    """Reach the broker; None where none runs that this user may call.

    Raises HostUnfit when it does not answer, or is not to be trusted.
    """
    path = socket_path()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        try:
            with socket_address(path) as address:
                await _connect(connection, address)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError, PermissionError):
            connection.close()
            yield None
            return
        except OSError as error:  # TimeoutError is one
            raise HostUnfit(
                f"the broker at {path} cannot be reached: {error.strerror or error!r}", "is it stopped?"
            ) from error
        _check_owner(path, peer.of(connection).uid)
    except BaseException:
        connection.close()
        raise
    async with _varlink(connection) as protocol:
        yield Lender(protocol)


@asynccontextmanager
async def _varlink(connection: socket.socket) -> AsyncIterator[Client]:
    """Speak Varlink on a connected socket, which is closed on exit."""
    protocol = Client()
    try:
        transport = VarlinkTransport(asyncio.get_running_loop(), connection, connection, protocol)
    except BaseException:
        connection.close()
        raise
    await asyncio.sleep(0)  # until the protocol has its transport
    try:
        yield protocol
    finally:
        transport.close()
        await transport.closed_future


async def _connect(connection: socket.socket, address: str) -> None:
    """Connect; where many others wait, that is EAGAIN (unix(7)), which asyncio takes for a connection."""
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        while True:
            with suppress(BlockingIOError):
                return connection.connect(address)
            await asyncio.sleep(0.01)


def _check_owner(path: Path, uid: int) -> None:
    """Raise HostUnfit for another user's broker: who lends RAM can keep it, and read what the guest puts there."""
    if uid not in (0, os.geteuid()):
        raise HostUnfit(
            f"the broker at {path} is a process of uid {uid}, who could read the guest",
            "set VMMBACK_BROKER to the socket of a broker that root runs",
        )


@asynccontextmanager
async def _answered(what: str) -> AsyncIterator[None]:
    """Turn what the broker answers, its silence or its end into an error for the user."""
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise HostUnfit(
            f"the broker did not answer within {_ANSWER_TIMEOUT_S:g} s: {what}", "look whether it is stopped"
        ) from error
    except Refused as refused:
        kind = UsageError if refused.exit_code == UsageError.exit_code else AdmissionRefused
        raise kind(refused.message, refused.hint) from refused
    except NotReady:
        raise
    except VarlinkErrorReply as reply:
        raise HostUnfit(f"the broker refused: {reply}", "it may be another version of vmmback") from reply
    except OSError as error:
        raise HostUnfit(f"the broker ended meanwhile: {what}", "start it again") from error
    except (ConversionError, LookupError, TypeError, ValueError) as error:
        raise HostUnfit(
            "the broker answered in a way not known here", "it may be another version of vmmback"
        ) from error
