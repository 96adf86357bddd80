"""What is lent, and what follows: the pool has less, the ledger one more, and whoever borrowed is watched."""

from __future__ import annotations

import asyncio
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime

from vmmback.admission import Promise
from vmmback.broker.closing import Lent
from vmmback.broker.config import BrokerConfig
from vmmback.broker.handoffs import Handoffs
from vmmback.broker.journal import Journal
from vmmback.broker.ledger import Caller, Lease, Ledger, NotAllowed
from vmmback.broker.pool import Pool, Ready
from vmmback.broker.service import NotReady
from vmmback.errors import VmmbackError
from vmmback.linux import memlock


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
        self._watched: dict[tuple[int, int], tuple[int, set[int]]] = {}
        """By pid and start of a borrower: a descriptor of it, and the numbers of its leases."""
        self._journal: Journal | None = None

    def recover(self, journal: Journal, kept: Iterable[Ready]) -> None:
        """Go on where the broker before this one was, by its journal and the files that it kept and never lent."""
        for lease, pidfd in journal.read():
            self._watch(lease.pid, lease.started, pidfd, lease.number)
            os.close(pidfd)
            self.ledger.recover(lease)
        self.pool.recover(kept, [lease.inode for lease in self.ledger])
        self._journal = journal

    def lend(self, caller: Caller, pidfd: int, size: int, purpose: str) -> tuple[Lease, Lent, int]:
        """Lend a file out of the pool: its lease, itself, and the descriptor of its frames, both the caller's to close.

        Raises VmmbackError, NotReady, OSError.
        """
        try:
            self.ledger.check(caller, size, time.monotonic())
        except VmmbackError:
            self.denials += 1
            raise
        number = self.ledger.next_number()
        self._watch(caller.pid, caller.started, pidfd, number)
        try:
            ready = self.pool.take(size)
        except BaseException:
            self._unwatch(caller.pid, caller.started, number)
            raise
        if ready is None:
            self._unwatch(caller.pid, caller.started, number)
            self.not_ready += 1
            raise NotReady(size=size)
        return self._lent(number, ready, caller, pidfd, purpose, numbers=caller.uid == 0)

    def hand_over(self, ready: Ready, caller: Caller, pidfd: int, purpose: str) -> tuple[Lease, Lent, int]:
        """Lend what was reserved for a caller, whom another rule lets have it; as `lend`, with numbers of frames."""
        number = self.ledger.next_number()
        try:
            self._watch(caller.pid, caller.started, pidfd, number)
        except OSError:
            self.pool.not_lent(ready)
            raise
        return self._lent(number, ready, caller, pidfd, purpose, numbers=True)

    def _lent(
        self, number: int, ready: Ready, caller: Caller, pidfd: int, purpose: str, *, numbers: bool
    ) -> tuple[Lease, Lent, int]:
        lease = Lease(number, ready.size, ready.inode, *caller, purpose, datetime.now(UTC).isoformat(" ", "seconds"))
        self.ledger.add(lease, time.monotonic())
        if self._journal:
            self._journal.add(lease)
        self._let_lock(caller, pidfd)
        memory, frames = ready.give(numbers=numbers)
        return lease, Lent(memory, self.pool.closer), frames

    async def make(self, caller: Caller, pidfd: int, size: int, purpose: str) -> tuple[Lease, Lent, int]:
        """Lend a file, which is made where none is ready: for root alone. Raises VmmbackError, OSError."""
        if caller.uid != 0:
            raise NotAllowed(f"uid {caller.uid} may not have RAM made", "take what is ready: Acquire")
        reserved = self.pool.reserve(size, self.ledger.next_number())
        try:
            await reserved.admitted()
            return self.hand_over(await reserved.given(), caller, pidfd, purpose)
        finally:
            await reserved.give_up()

    def _let_lock(self, caller: Caller, pidfd: int) -> None:
        """Let a process, and what it starts, map all that it has borrowed; it will say itself if it may not."""
        with suppress(OSError):
            memlock.let_lock(caller.pid, pidfd, self.ledger.held_by(caller.pid))

    def end(self, number: int, caller: Caller | None = None) -> bool:
        """End a lease that `caller` may end, whoever for None; tell whether there was one."""
        lease = self.ledger.end(number, caller)
        if lease is None:
            return False
        self.pool.ended(lease.size, lease.inode)
        if self._journal:
            self._journal.end(number)
        self._unwatch(lease.pid, lease.started, number)
        return True

    def close(self) -> None:
        """End all leases: they are the borrowers' own affair from now on, and the next broker's."""
        if self._journal:
            self._journal.close()
            self._journal = None
        for lease in list(self.ledger):
            self.end(lease.number)
        self.handoffs.close()

    def _watch(self, pid: int, started: int, pidfd: int, number: int) -> None:
        """End a lease when its process has ended. Raises OSError."""
        if (pid, started) not in self._watched:
            own = os.dup(pidfd)
            asyncio.get_running_loop().add_reader(own, self._borrower_ended, pid, started)
            self._watched[pid, started] = own, set()
        self._watched[pid, started][1].add(number)

    def _borrower_ended(self, pid: int, started: int) -> None:
        for number in list(self._watched[pid, started][1]):
            self.end(number)

    def _unwatch(self, pid: int, started: int, number: int) -> None:
        own, numbers = self._watched[pid, started]
        numbers.remove(number)
        if not numbers:
            del self._watched[pid, started]
            asyncio.get_running_loop().remove_reader(own)
            os.close(own)
