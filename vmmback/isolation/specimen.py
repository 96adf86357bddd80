"""Throwaway memory for the vectors that would disturb a guest: a piece of RAM of either kind, full of a canary."""

from __future__ import annotations

import mmap
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Literal, NamedTuple

from vmmback.isolation.probe import Missing, Probe, Reading, Target, errorcode
from vmmback.linux.memory import address_of
from vmmback.ram import Ram, allocate
from vmmback.report import Verdict

SPECIMEN_BYTES = 1 << 20
_CANARY_BYTES = 64


class Specimen(NamedTuple):
    """RAM of one kind that this process maps: `memory` at the virtual address `address`, filled with `canary`.

    The canary is 64 random bytes, repeated, so that each page begins with it.
    """

    ram: Ram
    memory: mmap.mmap
    address: int
    canary: bytes

    def holds(self, data: bytes) -> bool:
        """Tell whether `data` is what the specimen begins with: not empty, and the canary all over."""
        return bool(data) and data == self.canary_at(0, len(data))

    def canary_at(self, start: int, end: int) -> bytes:
        """Return what a specimen is filled with from the byte `start` up to `end`."""
        return (self.canary * (end // _CANARY_BYTES + 1))[start:end]


@contextmanager
def specimen(
    backing: Literal["secret", "ordinary"], size: int = SPECIMEN_BYTES, filled: int | None = None
) -> Iterator[Specimen]:
    """Make a specimen of `size` bytes; only the first `filled` are (all by default). Both are multiples of the page.

    Pages that are not filled are absent. Raises HostUnfit, AdmissionRefused.
    """
    canary = os.urandom(_CANARY_BYTES)
    filled = size if filled is None else filled
    with allocate(backing, size) as ram, mmap.mmap(ram.fileno(), size) as memory:
        memory[:filled] = canary * (filled // _CANARY_BYTES)
        yield Specimen(ram, memory, address_of(memory), canary)


def require(attempt: Callable[[], AbstractContextManager[object]], what: str) -> None:
    """Try what a probe needs of the host, and raise Missing(what) where that is refused."""
    try:
        with attempt():
            pass
    except OSError as error:
        raise Missing(f"{what}: {error.strerror}") from error


class SpecimenProbe(Probe[Specimen]):
    """Disturbs what it tries, so it never sees a guest: it tries a secret and an ordinary specimen.

    Only the first `filled` of their `size` bytes are present (None: all).
    """

    live_safe = False
    control_is = "the same on a memfd"
    size: ClassVar[int] = SPECIMEN_BYTES
    filled: ClassVar[int | None] = None

    def target(self, target: Target) -> Specimen:  # noqa: ARG002 (a guest must not be disturbed)
        return self._resources.enter_context(specimen("secret", self.size, self.filled))

    def control(self, target: Target) -> Specimen:  # noqa: ARG002
        return self._resources.enter_context(specimen("ordinary", self.size, self.filled))

    @abstractmethod
    def attempt(self, place: Specimen) -> Reading: ...


class CallProbe(SpecimenProbe):
    """One call on a specimen, which the kernel refuses on secret memory with one of the errnos in `refusals`.

    `idle` is what it means that it takes the call, and then does nothing.
    """

    refusals: ClassVar[frozenset[int]] = frozenset()
    idle: ClassVar[Verdict] = Verdict.INCONCLUSIVE

    def control(self, target: Target) -> Specimen:
        self.require()
        return super().control(target)

    def require(self) -> None:
        """Raise Missing where this host lacks what the call needs, found by trying it without a specimen."""

    @abstractmethod
    def reach(self, place: Specimen) -> str:
        """Make the call, look at what came of it; return that in words, "" if it reached nothing. Raises OSError."""

    def attempt(self, place: Specimen) -> Reading:
        try:
            reached = self.reach(place)
        except OSError as error:
            if error.errno not in self.refusals:
                raise
            name = errorcode(error)
            return Reading(Verdict.BLOCKED, f"refused, {name}", name)
        if reached:
            return Reading(Verdict.READABLE, reached)
        return Reading(self.idle, "the kernel took the call, but reached nothing with it")
