"""What a probe is: one attempt, made on a guest's RAM and on ordinary memory alike.

A new probe is a subclass of `Probe` in a module of this folder, its entry in `catalogue.py` and its row in
docs/PROBES.md. Probes observe; `report.py` judges.
"""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import ClassVar, Generic, NamedTuple, TypeVar

from vmmback.report import Observation, Verdict

Place = TypeVar("Place")


class Target(NamedTuple):
    """A guest's RAM as the host sees it: QEMU's pid, and the RAM's descriptors: the size in bytes of each, by inode.

    `supervisor` is the pid of the process that holds the descriptors besides QEMU, 0 if none does.
    `partners` are the pids of processes that QEMU shares the RAM with, as the guest's file wants it.
    `auxiliary` are the inodes of the secret descriptors that QEMU got for its other RAM blocks.
    """

    pid: int
    ram: Mapping[int, int]
    supervisor: int = 0
    auxiliary: frozenset[int] = frozenset()
    partners: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        """Size in bytes of all of the RAM."""
        return sum(self.ram.values())


class Reading(NamedTuple):
    """What one attempt came to, in words, and the name of the errno that refused it ("" if none did)."""

    verdict: Verdict
    detail: str
    errno: str = ""


class Missing(Exception):
    """The host lacks what an attempt needs: a file, a device, a kernel feature. Its text says which."""


class Documented:
    """What a vector is: its name, what is tried, and on which ordinary memory the same is tried (the control).

    `source` is the man page or kernel file that makes secret RAM refuse it (or not); `live_safe` tells whether it
    leaves a live guest alone.
    """

    name: ClassVar[str]
    vector: ClassVar[str]
    control_is: ClassVar[str]
    source: ClassVar[str]
    live_safe: ClassVar[bool] = True
    holders: ClassVar[str] = ""
    """Who holds the key to a known hole that secret RAM does not close: an exposure, which never counts as blocked."""


class Probe(Documented, ABC, Generic[Place]):
    """One vector. `attempt` must not tell the target from the control: that is what gives the control its worth.

    What `target` and `control` make for the attempts enters `_resources`, which live while the probe observes.
    """

    @abstractmethod
    def target(self, target: Target) -> Place:
        """Return where the guest's RAM is, in the terms of this probe."""

    @abstractmethod
    def control(self, target: Target) -> Place:
        """Return where ordinary memory is that this probe must be able to read."""

    @abstractmethod
    def attempt(self, place: Place) -> Reading:
        """Try to read; an OSError that is no answer to the question, and Missing, count as `inconclusive`."""

    def observe(self, target: Target) -> Observation:
        """Attempt the control, then the guest's RAM."""
        started = time.perf_counter()
        try:
            with ExitStack() as self._resources:
                control = self._try(self.control, target)
                reading = self._try(self.target, target)
        except Missing as missing:
            seconds = time.perf_counter() - started
            detail = f"not tried: this host has no {missing}"
            return Observation(
                self.name, Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE, detail, seconds, missing=str(missing)
            )
        detail = reading.detail
        if control.verdict is not Verdict.READABLE:
            detail = f"{detail}; the control failed: {control.detail}"
        return Observation(
            self.name, reading.verdict, control.verdict, detail, time.perf_counter() - started, reading.errno
        )

    def _try(self, locate: Callable[[Target], Place], target: Target) -> Reading:
        try:
            return self.attempt(locate(target))
        except OSError as error:
            return Reading(Verdict.INCONCLUSIVE, str(error), errorcode(error))


def errorcode(error: OSError) -> str:
    """Return the name of an error's errno, such as `EFAULT`; "" where it has none."""
    return errno.errorcode.get(error.errno or 0, "")
