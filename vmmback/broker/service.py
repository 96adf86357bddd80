"""What callers may ask of the broker: Varlink (varlink.org). lending.py does it, server.py has the socket.

varlinkctl call /run/vmmback-broker/socket org.vmmback.Broker.List {}
"""

# The annotations of the methods are the interface: asyncvarlink reads them, so they must not all be strings.
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from asyncvarlink import (
    FileDescriptor,
    TypedVarlinkErrorReply,
    VarlinkInterface,
    varlinkmethod,
)

from vmmback.errors import VmmbackError

if TYPE_CHECKING:  # clients, who would wait for it, have no use for how it is done
    from vmmback.broker.closing import Lent as Descriptor
    from vmmback.broker.ledger import Caller, Lease
    from vmmback.broker.lending import Broker

_MIB = 1 << 20
_MOST_PURPOSE_CHARS = 200


class Refused(TypedVarlinkErrorReply, interface="org.vmmback.Broker", paramprefix=""):
    """It cannot be had; `exit_code` tells the kind of the error (errors.py)."""

    class Parameters:  # noqa: D106
        message: str
        hint: str
        exit_code: int


class NotReady(TypedVarlinkErrorReply, interface="org.vmmback.Broker", paramprefix=""):
    """No file of this size is ready in the pool."""

    class Parameters:  # noqa: D106
        size: int


class Lent(TypedDict):
    """What `Acquire` returns."""

    lease: int
    descriptor: FileDescriptor
    frames: FileDescriptor


@dataclass(frozen=True)
class LeaseEntry:
    """A lease, as `List` tells it."""

    lease: int
    size: int
    inode: int
    pid: int
    uid: int
    purpose: str
    since: str


@dataclass(frozen=True)
class PoolEntry:
    """How many files of a size are ready, of how many that are wanted."""

    size: int
    ready: int
    wanted: int


class Statistics(TypedDict):
    """What `Stats` returns."""

    pool: list[PoolEntry]
    leases: int
    lent: int
    denied: int
    filled_bytes: int
    fill_seconds: float


class BrokerInterface(VarlinkInterface, name="org.vmmback.Broker"):
    """What one caller may ask of the broker."""

    errors = (Refused, NotReady)

    def __init__(self, broker: "Broker", caller: "Caller", pidfd: int) -> None:
        self._broker, self._caller, self._pidfd = broker, caller, pidfd

    @varlinkmethod
    def Acquire(self, size: int, purpose: str) -> Lent:  # noqa: N802 (Varlink's spelling)
        """Lend secret RAM of `size` bytes, prefaulted, that nobody ever had.

        `descriptor` is its file; `frames` a file of one native 64-bit word a page: its entry in /proc/PID/pagemap,
        without the frame's number for callers who may not know it. The lease ends when the caller ends, or by Release.
        """
        with refusing("nothing can be lent"):
            return _lent(self._broker.lend(self._caller, self._pidfd, _checked(size), shown(purpose)))

    @varlinkmethod
    async def Make(self, size: int, purpose: str) -> Lent:  # noqa: N802
        """Lend as Acquire does; what is not ready is made, by the same admission, while the caller waits. Root's."""
        with refusing("nothing can be made"), held(self._pidfd) as pidfd:
            return _lent(await self._broker.make(self._caller, pidfd, _checked(size), shown(purpose)))

    @varlinkmethod(return_parameter="channel")
    def Serve(self) -> FileDescriptor:  # noqa: N802
        """Return a socket at which a process of its own awaits one call of org.vmmback.Handoff from the caller."""
        broker, caller = self._broker, self._caller
        with refusing("no process can answer"):
            try:
                channel = broker.handoffs.begin(caller, self._pidfd, broker.ledger.rule(caller), time.monotonic())
            except VmmbackError:
                broker.denials += 1
                raise
            return FileDescriptor(channel, should_close=True)

    @varlinkmethod(return_parameter="ended")
    def Release(self, lease: int) -> bool:  # noqa: N802
        """End a lease of the caller's user; tell whether there was one. Its memory stays as long as it is open."""
        return self._broker.end(lease, self._caller)

    @varlinkmethod(return_parameter="leases")
    def List(self) -> list[LeaseEntry]:  # noqa: N802
        """Return the leases of the caller's user; root gets all."""
        return [
            LeaseEntry(lease.number, lease.size, lease.inode, lease.pid, lease.uid, lease.purpose, lease.since)
            for lease in self._broker.ledger.of(self._caller)
        ]

    @varlinkmethod
    def Stats(self) -> Statistics:  # noqa: N802
        """Return how the pool is, and what was done since the start; times in seconds."""
        pool, ledger = self._broker.pool, self._broker.ledger
        ready = pool.ready
        return {
            "pool": [PoolEntry(size, ready[size], wanted) for size, wanted in sorted(pool.wanted.items())],
            "leases": len(list(ledger)),
            "lent": ledger.lent,
            "denied": self._broker.denials,
            "filled_bytes": pool.filled_bytes,
            "fill_seconds": round(pool.fill_seconds, 3),
        }


def _checked(size: int) -> int:
    if size <= 0 or size % _MIB:
        raise Refused(message=f"{size} bytes are no whole MiB", hint="ask for a multiple of 1048576", exit_code=2)
    return size


def shown(purpose: str) -> str:
    """Return what is kept of a purpose."""
    return "".join(char for char in purpose[:_MOST_PURPOSE_CHARS] if char.isprintable())


@contextmanager
def held(pidfd: int) -> Iterator[int]:
    """Hold a descriptor of a caller's process, whose own is closed when he hangs up. Raises OSError."""
    own = os.dup(pidfd)
    try:
        yield own
    finally:
        os.close(own)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Tell a caller what was wrong; `what` could not be done where it is the kernel's refusal."""
    try:
        yield
    except VmmbackError as error:
        raise Refused(message=error.message, hint=error.hint, exit_code=error.exit_code) from error
    except OSError as error:  # out of descriptors or processes
        raise Refused(message=f"{what}: {error.strerror}", hint="try it again", exit_code=4) from error


def _lent(lent: "tuple[Lease, Descriptor, int]") -> Lent:
    lease, descriptor, frames = lent
    return {
        "lease": lease.number,
        "descriptor": FileDescriptor(descriptor, should_close=True),
        "frames": FileDescriptor(frames, should_close=True),
    }
