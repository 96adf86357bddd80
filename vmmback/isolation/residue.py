"""What is left of a guest's RAM once it has ended: its former frames, read through the kernel's direct map.

A guest that prints its canary's fingerprint (console.py) is searched for it: no host process ever holds the canary, so
bytes that hash to the fingerprint can only be the guest's. Without one, a frame that is not zero counts only where it
is in use again; one that is free leaves the question open, since another owner may have freed it meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from vmmback.errors import HostUnfit
from vmmback.isolation.direct_map import ordinary_memory, pagemap_entries
from vmmback.isolation.probe import Probe, Reading, Target
from vmmback.linux import procfs
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Observation, Verdict

CANARY_BYTES = 64
"""Length of a canary. It repeats from the start of a page on, so it lies at multiples of its length."""

_PFN = (1 << 55) - 1
_CONTROL_PAGES = 16
_ZERO_FRAME = bytes(PAGE_SIZE)


@dataclass(frozen=True)
class Frames:
    """Frames by their raw pagemap entries, and the SHA-256 (hex) of the canary that they may hold, if one is known."""

    entries: array[int]
    fingerprint: str | None


class FreedFramesProbe(Probe[Frames]):
    """Reads every frame that was the guest's, after its end. The kernel zeroes freed secret RAM (mm/secretmem.c).

    The control is a canary of our own, in ordinary memory that is still in use.
    """

    name = "freed-frames"

    def __init__(self, entries: array[int], fingerprint: str | None, release: Callable[[], None]) -> None:
        """`release` gives the guest's RAM back: right before it is read, so that little of it is in use again."""
        self._frames = Frames(entries, fingerprint)
        self._release = release

    def observe(self, target: Target) -> Observation:
        started = time.perf_counter()
        try:
            with ExitStack() as self._resources:
                self._direct_map = self._resources.enter_context(DirectMap.open())
                return super().observe(target)
        except (HostUnfit, OSError) as error:
            inconclusive = Verdict.INCONCLUSIVE
            return Observation(self.name, inconclusive, inconclusive, str(error), time.perf_counter() - started)

    def target(self, target: Target) -> Frames:  # noqa: ARG002 (the guest is gone: all that is left are its frames)
        self._release()
        return self._frames

    def control(self, target: Target) -> Frames:  # noqa: ARG002
        canary = os.urandom(CANARY_BYTES)
        pages = canary * (_CONTROL_PAGES * PAGE_SIZE // CANARY_BYTES)
        _, inode = self._resources.enter_context(ordinary_memory(pages))
        return Frames(pagemap_entries(os.getpid(), inode), hashlib.sha256(canary).hexdigest())

    def attempt(self, place: Frames) -> Reading:
        zeroness = self._direct_map.zeroness(place.entries)
        if not zeroness.checked or zeroness.checked != zeroness.present:
            detail = f"{zeroness.checked} of {zeroness.present} former frames could be tried"
            return Reading(Verdict.INCONCLUSIVE, detail)
        detail = f"{zeroness.readable - zeroness.nonzero} of {zeroness.present} former frames are zero"
        if zeroness.readable < zeroness.present:  # back out of the direct map: somebody's secret RAM again
            detail += f", {zeroness.present - zeroness.readable} secret again"
        if zeroness.nonzero:
            return self._judge_nonzero(place, detail)
        return Reading(Verdict.BLOCKED, detail)

    def _judge_nonzero(self, place: Frames, detail: str) -> Reading:
        with_canary = free = 0
        for index, frame in self._direct_map.read_frames(place.entries):
            if frame is None or frame == _ZERO_FRAME:
                continue
            if place.fingerprint is not None:
                with_canary += holds_canary(frame, place.fingerprint)
            else:
                free += procfs.is_free(place.entries[index] & _PFN)
        if with_canary:
            return Reading(Verdict.READABLE, f"{detail}, {with_canary} hold the guest's canary")
        if free:
            return Reading(Verdict.INCONCLUSIVE, f"{detail}, {free} are free and hold bytes that nobody can be told by")
        canary = "none of the others holds the guest's canary" if place.fingerprint else "the others are in use again"
        return Reading(Verdict.BLOCKED, f"{detail}, {canary}")


def holds_canary(frame: bytes, fingerprint: str) -> bool:
    """Tell whether a frame holds, at a multiple of CANARY_BYTES, bytes with this SHA-256 (hex)."""
    # A frame of the guest's holds few different lines; each is hashed once.
    lines = {frame[start : start + CANARY_BYTES] for start in range(0, len(frame), CANARY_BYTES)}
    return any(hashlib.sha256(line).hexdigest() == fingerprint for line in lines)
