"""What is left of a guest's RAM once it has ended: its former frames, read through the kernel's direct map.

A frame that is not zero may rightly hold the bytes of its next owner. So canaries are searched for: that of a guest
which prints its fingerprint (console.py; no host process ever holds it, so what hashes to the fingerprint can only be
the guest's), and one of ours, in a sample of RAM of the same kind that is freed and read at once.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

from vmmback.isolation.direct_map import FrameProbe, ordinary_memory, pagemap_entries
from vmmback.isolation.probe import Reading, Target
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.ram import Ram, allocate
from vmmback.report import Verdict

CANARY_BYTES = 64
"""Length of a canary. It repeats from the start of a page on, so it lies at multiples of its length."""

_SAMPLE_BYTES = 1 << 20
_SAMPLES = 10
_ZERO_FRAME = bytes(PAGE_SIZE)


class Frames(NamedTuple):
    """Former frames by their raw pagemap entries, the SHA-256 (hex) of the canary they may hold, what backed them."""

    entries: array[int]
    fingerprint: str | None
    backing: Literal["secret", "ordinary"]


class FreedFramesProbe(FrameProbe[Frames]):
    """Reads, after the guest's end, every frame that was its own when it was validated.

    The kernel zeroes freed secret RAM (mm/secretmem.c).

    The control is a canary of our own, in ordinary memory that is still in use.
    """

    name = "freed-frames"
    live_safe = False  # the guest is gone
    vector = "after the end, all frames that were the guest's are searched for its canary, a freed sample for ours"
    control_is = "a canary of our own in ordinary memory"
    source = "mm/secretmem.c, secretmem_free_folio: zeroed"

    def __init__(self, guest_ram: Sequence[Ram], entries: array[int], fingerprint: str | None) -> None:
        """`guest_ram` is closed right before its frames, `entries`, are read, so that few of them are in use again.

        It is empty where others held the RAM, which was secret.
        """
        self._ram = guest_ram
        self._entries = entries
        self._fingerprint = fingerprint

    def target(self, target: Target) -> Frames:  # noqa: ARG002 (the guest is gone: all that is left are its frames)
        for memory in self._ram:
            memory.close()
        backing = self._ram[0].backing if self._ram else "secret"
        return Frames(self._entries, self._fingerprint, backing)

    def control(self, target: Target) -> Frames:  # noqa: ARG002
        canary = os.urandom(CANARY_BYTES)
        _, inode = self._resources.enter_context(ordinary_memory(canary * (_SAMPLE_BYTES // CANARY_BYTES)))
        return Frames(pagemap_entries(os.getpid(), inode), fingerprint_of(canary), "ordinary")

    def attempt(self, place: Frames) -> Reading:
        zeroness = self._direct_map.zeroness(place.entries)
        if not zeroness.checked or zeroness.checked != zeroness.present:
            detail = f"{zeroness.checked} of {zeroness.present} former frames could be tried"
            return Reading(Verdict.INCONCLUSIVE, detail)
        if not zeroness.readable:  # of what is out of the direct map nobody can tell whether it was freed
            detail = (
                f"none of {zeroness.present} former frames is free: who holds them, or has them as secret RAM again?"
            )
            return Reading(Verdict.INCONCLUSIVE, detail)
        detail = f"{zeroness.readable - zeroness.nonzero} of {zeroness.present} former frames are zero"
        if zeroness.readable < zeroness.present:  # out of the direct map: somebody's secret RAM again
            detail += f", {zeroness.present - zeroness.readable} are secret again"
        if place.fingerprint is None:
            detail += ", no canary of the guest's is known"
        elif with_canary := self._count_canaries(place.entries, place.fingerprint):
            return Reading(Verdict.READABLE, f"{detail}, {with_canary} hold the canary")
        else:
            detail += ", none holds the guest's canary"
        return self._try_samples(place.backing, detail)

    def _try_samples(self, backing: Literal["secret", "ordinary"], detail: str) -> Reading:
        """Free memory with a canary of our own and read it at once; again where too much of it is in use already."""
        for _ in range(_SAMPLES):
            canary = os.urandom(CANARY_BYTES)
            with allocate(backing, _SAMPLE_BYTES) as sample, mmap.mmap(sample.fileno(), sample.size) as memory:
                memory[:] = canary * (sample.size // CANARY_BYTES)
                entries = pagemap_entries(os.getpid(), sample.inode)
            zeroness = self._direct_map.zeroness(entries)
            if with_canary := self._count_canaries(entries, fingerprint_of(canary)):
                return Reading(Verdict.READABLE, f"{detail}; {with_canary} frames of a freed sample hold its canary")
            zero = zeroness.readable - zeroness.nonzero
            if 2 * zero > zeroness.present:
                cleared = f"of a freed sample {zero} of {zeroness.present} are zero, none holds its canary"
                return Reading(Verdict.BLOCKED, f"{detail}; {cleared}")
        return Reading(Verdict.INCONCLUSIVE, f"{detail}; most frames of a freed sample were in use again at once")

    def _count_canaries(self, entries: array[int], fingerprint: str) -> int:
        return sum(
            holds_canary(frame, fingerprint)
            for _, frame in self._direct_map.read_frames(entries)
            if frame is not None and frame != _ZERO_FRAME
        )


@cache
def clears_freed_memory() -> bool | None:
    """Tell whether the kernel clears ordinary memory that is freed (init_on_free=1): free a sample, and read it.

    None when most of the sample was in use again at once. Measured once: the kernel decides it at boot (mm/mm_init.c).
    Raises HostUnfit, OSError where frames cannot be read.
    """
    with DirectMap.open() as direct_map:
        for _ in range(_SAMPLES):
            canary = os.urandom(CANARY_BYTES)
            with allocate("ordinary", _SAMPLE_BYTES) as sample, mmap.mmap(sample.fileno(), sample.size) as memory:
                memory[:] = canary * (sample.size // CANARY_BYTES)
                entries = pagemap_entries(os.getpid(), sample.inode)
            frames = [frame for _, frame in direct_map.read_frames(entries)]
            if any(frame is not None and frame.startswith(canary) for frame in frames):
                return False
            if 2 * frames.count(_ZERO_FRAME) > len(frames):
                return True
    return None


def holds_canary(frame: bytes, fingerprint: str) -> bool:
    """Tell whether a frame holds, at a multiple of CANARY_BYTES, bytes with this SHA-256 (hex)."""
    # A frame that a canary fills holds one line only; each is hashed once.
    lines = {frame[start : start + CANARY_BYTES] for start in range(0, len(frame), CANARY_BYTES)}
    return any(fingerprint_of(line) == fingerprint for line in lines)


def fingerprint_of(canary: bytes) -> str:
    """Return the SHA-256 of a canary in hex."""
    return hashlib.sha256(canary).hexdigest()
