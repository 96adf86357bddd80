"""What is lent, and to whom: pure bookkeeping, and the judgement on who may have more."""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vmmback.broker.config import Allow, BrokerConfig
from vmmback.errors import AdmissionRefused

_MINUTE_S = 60.0


class NotAllowed(AdmissionRefused):
    """The broker's file does not let this user have it."""


class Caller(NamedTuple):
    """A process that asks, by what the kernel says of it (SO_PEERCRED, unix(7)); `started` in ticks since boot."""

    pid: int
    uid: int
    gid: int
    started: int


@dataclass(frozen=True)
class Lease:
    """Secret RAM that was lent to a Caller; `inode` is its file's, `purpose` what he said, `since` in UTC, ISO 8601."""

    number: int
    size: int
    inode: int
    pid: int
    uid: int
    gid: int
    started: int
    purpose: str
    since: str


class Ledger:
    """All leases that have not ended."""

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self._leases: dict[int, Lease] = {}
        self._held = Counter[int]()
        self._recent: dict[int, deque[float]] = defaultdict(deque)
        self.lent = 0
        """How many leases there were since the start."""

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def of(self, caller: Caller) -> list[Lease]:
        """Return those that a caller may see: root all of them, others their user's own."""
        return [lease for lease in self._leases.values() if caller.uid in (0, lease.uid)]

    def check(self, caller: Caller, size: int, now_s: float) -> None:
        """Raise NotAllowed unless `caller` may borrow `size` bytes more. `now_s` is a monotonic time."""
        rule = self.rule(caller)
        if rule is None:
            return
        own = [lease for lease in self._leases.values() if lease.uid == caller.uid]
        held = sum(lease.size for lease in own)
        recent = within_a_minute(self._recent[caller.uid], now_s)
        if held + size > rule.total:
            problem = f"it has {held >> 20} of at most {rule.total >> 20} MiB, and wants {size >> 20} MiB"
        elif len(own) >= rule.count:
            problem = f"it has {len(own)} leases, and may have no more"
        elif len(recent) >= rule.per_minute:
            problem = f"it had {len(recent)} new leases within a minute, and may have no more"
        else:
            return
        raise NotAllowed(
            f"uid {caller.uid} may not borrow more secret RAM: {problem}",
            "end a guest, or ask for a larger [[allow]] in the broker's file",
        )

    def add(self, lease: Lease, now_s: float) -> None:
        """Write a lease down."""
        self.recover(lease)
        if lease.uid:  # root's are not looked at, and would only grow
            self._recent[lease.uid].append(now_s)
        self.lent += 1

    def recover(self, lease: Lease) -> None:
        """Write down a lease of the broker before this one."""
        self._leases[lease.number] = lease
        self._held[lease.pid] += lease.size

    def held_by(self, pid: int) -> int:
        """Return how many bytes a process has; it is asked at each lease, however many there are."""
        return self._held[pid]

    def end(self, number: int, caller: Caller | None = None) -> Lease | None:
        """Strike a lease out and return it; None where there is none that `caller` may end, whoever for None."""
        lease = self._leases.get(number)
        if lease is None or (caller is not None and caller.uid not in (0, lease.uid)):
            return None
        self._held[lease.pid] -= lease.size
        if not self._held[lease.pid]:
            del self._held[lease.pid]
        return self._leases.pop(number)

    def rule(self, caller: Caller) -> Allow | None:
        """Return the rule for a caller, None for root, who needs none. Raises NotAllowed where there is none."""
        if caller.uid == 0:
            return None
        rule = self._rule(caller)
        if rule is None:
            raise NotAllowed(
                f"uid {caller.uid} may not borrow secret RAM", "ask for an [[allow]] of this user in the broker's file"
            )
        return rule

    def next_number(self) -> int:
        """Return a number that no lease had: it cannot be guessed, so that it tells nobody how many there were."""
        while (number := int.from_bytes(os.urandom(6), "little")) in self._leases:
            pass
        return number

    def _rule(self, caller: Caller) -> Allow | None:
        fits = (
            rule for rule in self._config.allow if rule.user in (None, caller.uid) and rule.group in (None, caller.gid)
        )
        return next(fits, None)


def within_a_minute(times: deque[float], now_s: float) -> deque[float]:
    """Forget the monotonic times that are past by more than a minute; return the others."""
    while times and times[0] <= now_s - _MINUTE_S:
        times.popleft()
    return times
