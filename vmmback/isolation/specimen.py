"""Throwaway memory for the vectors that would disturb a guest: a piece of RAM of either kind, full of a canary."""

from __future__ import annotations

import mmap
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from vmmback.isolation.probe import Probe, Reading, Target
from vmmback.linux.memory import address_of
from vmmback.ram import Ram, allocate
from vmmback.report import Observation

SPECIMEN_BYTES = 1 << 20
_CANARY_BYTES = 64


@dataclass(frozen=True)
class Specimen:
    """RAM of one kind that this process maps: `memory` at the virtual address `address`, filled with `canary`.

    The canary is 64 random bytes, repeated, so that each page begins with it.
    """

    ram: Ram
    memory: mmap.mmap
    address: int
    canary: bytes


@contextmanager
def specimen(backing: Literal["secret", "ordinary"], size: int = SPECIMEN_BYTES) -> Iterator[Specimen]:
    """Make a specimen of `size` bytes, a multiple of the page. Raises HostUnfit, AdmissionRefused."""
    canary = os.urandom(_CANARY_BYTES)
    with allocate(backing, size) as ram, mmap.mmap(ram.fileno(), size) as memory:
        memory[:] = canary * (size // _CANARY_BYTES)
        yield Specimen(ram, memory, address_of(memory), canary)


class SpecimenProbe(Probe[Specimen]):
    """A probe that disturbs what it tries: it never sees a guest, only a secret and an ordinary specimen.

    `_resources` lives while it observes.
    """

    live_safe = False
    control_is = "the same on a memfd"

    def observe(self, target: Target) -> Observation:
        with ExitStack() as self._resources:
            return super().observe(target)

    def target(self, target: Target) -> Specimen:  # noqa: ARG002 (a guest must not be disturbed)
        return self._resources.enter_context(specimen("secret"))

    def control(self, target: Target) -> Specimen:  # noqa: ARG002
        return self._resources.enter_context(specimen("ordinary"))

    @abstractmethod
    def attempt(self, place: Specimen) -> Reading: ...
