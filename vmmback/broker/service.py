"""What the broker does for its callers: Varlink (varlink.org). docs/BROKER.md has the interface, server.py the socket.

varlinkctl call /run/vmmback-broker/socket org.vmmback.Broker.List {}
"""

# The annotations of the methods are the interface: asyncvarlink reads them, so they must not all be strings.
import asyncio
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypedDict

from asyncvarlink import (
    FileDescriptor,
    TypedVarlinkErrorReply,
    VarlinkInterface,
    varlinkmethod,
)

from vmmback.admission import Promise
from vmmback.broker.config import MIB, BrokerConfig
from vmmback.broker.handoffs import Handoffs
from vmmback.broker.journal import Journal
from vmmback.broker.ledger import Caller, Lease, Ledger
from vmmback.broker.pool import Pool, Ready
from vmmback.errors import VmmbackError
from vmmback.linux import memlock

_MOST_PURPOSE_CHARS = 200
_WRITE_S = 0.05


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


class Waits:
    """How long something took, counted by upper bounds in seconds; the last one is infinity."""

    BOUNDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0, math.inf)

    def __init__(self) -> None:
        self.counts = [0] * len(self.BOUNDS)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1
        self.total_s += seconds


class Broker:
    """What the pool has, and what is lent; leases end with the process that borrowed, at the latest."""

    def __init__(self, config: BrokerConfig, promise: Promise, note: Callable[[str], None]) -> None:
        self.pool = Pool(config, promise, note)
        self.ledger = Ledger(config)
        self.handoffs = Handoffs()
        self.denials = self.not_ready = 0
        self.waits = Waits()
        """From the arrival of a call to the answer with a lease."""
        self._watched: dict[int, int] = {}
        self._journal: Journal | None = None
        self._later: asyncio.TimerHandle | None = None

    def recover(self, journal: Journal, kept: Iterable[Ready]) -> None:
        """Go on where the broker before this one was, by its journal and the files that it kept and never lent."""
        for lease, watched in journal.read():
            self._watch(watched, lease.number)
            self.ledger.recover(lease)
        self.pool.recover(kept, [lease.inode for lease in self.ledger])
        self._journal = journal
        self._write()

    def lend(self, caller: Caller, pidfd: int, size: int, purpose: str) -> tuple[Lease, Ready]:
        """Lend a file out of the pool; it is the caller's to close. Raises VmmbackError, NotReady, OSError."""
        try:
            self.ledger.check(caller, size, time.monotonic())
        except VmmbackError:
            self.denials += 1
            raise
        number = self.ledger.next_number()
        watched = os.dup(pidfd)
        try:
            self._watch(watched, number)
            ready = self.pool.take(size)
        except BaseException:
            self._unwatch(number)
            raise
        if ready is None:
            self._unwatch(number)
            self.not_ready += 1
            raise NotReady(size=size)
        lease = Lease(number, size, ready.inode, *caller, purpose, datetime.now(UTC).isoformat(" ", "seconds"))
        self.ledger.add(lease, time.monotonic())
        self._write_later()
        self._let_lock(caller, pidfd)
        return lease, ready

    def _let_lock(self, caller: Caller, pidfd: int) -> None:
        """Let a process, and what it starts, map all that it has borrowed; it will say itself if it may not."""
        with suppress(OSError):
            memlock.let_lock(caller.pid, pidfd, sum(lease.size for lease in self.ledger if lease.pid == caller.pid))

    def end(self, number: int, caller: Caller | None = None) -> bool:
        """End a lease that `caller` may end, whoever for None; tell whether there was one."""
        lease = self.ledger.end(number, caller)
        if lease is None:
            return False
        self.pool.ended(lease.size, lease.inode)
        self._unwatch(number)
        self._write_later()
        return True

    def close(self) -> None:
        """End all leases: they are the borrowers' own affair from now on, and the next broker's."""
        self._write()
        self._journal = None
        for lease in list(self.ledger):
            self.end(lease.number)
        self.handoffs.close()

    def _watch(self, pidfd: int, number: int) -> None:
        self._watched[number] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self.end, number)

    def _unwatch(self, number: int) -> None:
        pidfd = self._watched.pop(number)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)

    def _write_later(self) -> None:
        """Write the journal once for all that ask at the same time, who do not wait for it."""
        if self._journal and self._later is None:
            self._later = asyncio.get_running_loop().call_later(_WRITE_S, self._write)

    def _write(self) -> None:
        if self._later:
            self._later.cancel()
            self._later = None
        if self._journal:
            self._journal.write((lease, self._watched[lease.number]) for lease in self.ledger)


class BrokerInterface(VarlinkInterface, name="org.vmmback.Broker"):
    """What one caller may ask of the broker."""

    errors = (Refused, NotReady)

    def __init__(self, broker: Broker, caller: Caller, pidfd: int) -> None:
        self._broker, self._caller, self._pidfd = broker, caller, pidfd

    @varlinkmethod
    def Acquire(self, size: int, purpose: str) -> Lent:  # noqa: N802 (Varlink's spelling)
        """Lend secret RAM of `size` bytes, prefaulted, that nobody ever had.

        `descriptor` is its file; `frames` a file of one native 64-bit word a page: its entry in /proc/PID/pagemap,
        without the frame's number for callers who may not know it. The lease ends when the caller ends, or by Release.
        """
        if size <= 0 or size % MIB:
            raise Refused(message=f"{size} bytes are no whole MiB", hint="ask for a multiple of 1048576", exit_code=2)
        purpose = "".join(char for char in purpose[:_MOST_PURPOSE_CHARS] if char.isprintable())
        try:
            lease, ready = self._broker.lend(self._caller, self._pidfd, size, purpose)
        except VmmbackError as error:
            raise Refused(message=error.message, hint=error.hint, exit_code=error.exit_code) from error
        except OSError as error:  # out of descriptors
            raise Refused(message=f"nothing can be lent: {error.strerror}", hint="try it again", exit_code=4) from error
        descriptor, frames = ready.give(numbers=self._caller.uid == 0)
        return {
            "lease": lease.number,
            "descriptor": FileDescriptor(descriptor, should_close=True),
            "frames": FileDescriptor(frames, should_close=True),
        }

    @varlinkmethod(return_parameter="channel")
    def Serve(self) -> FileDescriptor:  # noqa: N802
        """Return a socket at which a process of its own awaits one call of org.vmmback.Handoff from the caller."""
        broker, caller = self._broker, self._caller
        try:
            channel = broker.handoffs.begin(caller, self._pidfd, broker.ledger.rule(caller), time.monotonic())
        except VmmbackError as error:
            broker.denials += 1
            raise Refused(message=error.message, hint=error.hint, exit_code=error.exit_code) from error
        except OSError as error:  # out of descriptors or processes
            raise Refused(
                message=f"no process can answer: {error.strerror}", hint="try it again", exit_code=4
            ) from error
        return FileDescriptor(channel, should_close=True)

    @varlinkmethod(return_parameter="ended")
    def Release(self, lease: int) -> bool:  # noqa: N802
        """End a lease of the caller's user; tell whether there was one. Its memory stays as long as it is open."""
        return self._broker.end(lease, self._caller)

    @varlinkmethod(return_parameter="leases")
    def List(self) -> list[LeaseEntry]:  # noqa: N802
        """Return the leases of the caller's user; root gets all."""
        return [
            LeaseEntry(lease.number, lease.size, lease.pid, lease.uid, lease.purpose, lease.since)
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
