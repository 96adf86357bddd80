"""What a probe is: one attempt, made on a guest's RAM and on ordinary memory alike.

A new probe is a subclass of `Probe` in a module of this folder, its entry in `audit.py` and its row in the
README's table. Probes observe; `report.py` judges.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from vmmback.report import Observation, Verdict

Place = TypeVar("Place")


@dataclass(frozen=True)
class Target:
    """A guest's RAM as the host sees it: QEMU's pid, the inode of the RAM's descriptor, its size in bytes."""

    pid: int
    inode: int
    size: int


@dataclass(frozen=True)
class Reading:
    """What one attempt came to, with the errno's name or what was read in words."""

    verdict: Verdict
    detail: str


class Probe(ABC, Generic[Place]):
    """One vector. `attempt` must not tell the target from the control: that is what gives the control its worth."""

    name: ClassVar[str]

    @abstractmethod
    def target(self, target: Target) -> Place:
        """Return where the guest's RAM is, in the terms of this probe."""

    @abstractmethod
    def control(self, target: Target) -> Place:
        """Return where ordinary memory is that this probe must be able to read."""

    @abstractmethod
    def attempt(self, place: Place) -> Reading:
        """Try to read; an OSError that is no answer to the question counts as `inconclusive`."""

    def observe(self, target: Target) -> Observation:
        """Attempt the control, then the guest's RAM."""
        started = time.perf_counter()
        control = self._try(self.control, target)
        reading = self._try(self.target, target)
        detail = reading.detail
        if control.verdict is not Verdict.READABLE:
            detail = f"{detail}; the control failed: {control.detail}"
        return Observation(self.name, reading.verdict, control.verdict, detail, time.perf_counter() - started)

    def _try(self, locate: Callable[[Target], Place], target: Target) -> Reading:
        try:
            return self.attempt(locate(target))
        except OSError as error:
            return Reading(Verdict.INCONCLUSIVE, str(error))
