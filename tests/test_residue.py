"""What is made of a guest's former frames, as the direct map shows them; the direct map is made up."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from typing import Any, cast

import pytest

from vmmback.isolation import residue
from vmmback.isolation.probe import Reading
from vmmback.isolation.residue import CANARY_BYTES, Frames, FreedFramesProbe, fingerprint_of
from vmmback.linux.direct_map import Zeroness
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Verdict

CANARY = os.urandom(CANARY_BYTES)
ZERO, OTHERS, CANARIES = bytes(PAGE_SIZE), b"x" * PAGE_SIZE, CANARY * (PAGE_SIZE // CANARY_BYTES)


class Shown:
    """A direct map in which frame n is `frames[n]`, None for one that it lacks; no more than `checked` can be tried."""

    def __init__(self, frames: list[bytes | None], checked: int) -> None:
        self.frames, self.checked = frames, checked

    def zeroness(self, entries: array[int]) -> Zeroness:
        readable = [self.frames[entry] for entry in entries if self.frames[entry] is not None]
        return Zeroness(len(entries), self.checked, len(readable), sum(frame != ZERO for frame in readable), ())

    def read_frames(self, entries: array[int]) -> Iterator[tuple[int, bytes | None]]:
        return enumerate(self.frames[entry] for entry in entries)


@pytest.fixture(autouse=True)
def samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are freed come back zeroed."""
    sampled = lambda _, backing, detail: Reading(Verdict.BLOCKED, f"{detail}; {backing} sample")  # noqa: E731
    monkeypatch.setattr(FreedFramesProbe, "_try_samples", sampled)


def seen(frames: list[bytes | None], fingerprint: str | None = None, checked: int | None = None) -> Reading:
    probe = FreedFramesProbe([], array("Q"), None)
    probe._direct_map = cast("Any", Shown(frames, len(frames) if checked is None else checked))
    return probe.attempt(Frames(array("Q", range(len(frames))), fingerprint, "secret"))


def test_zeroed_frames_say_nothing_against_it() -> None:
    said = "2 of 2 former frames are zero, no canary of the guest's is known; secret sample"
    assert seen([ZERO, ZERO]) == Reading(Verdict.BLOCKED, said)


def test_frames_that_others_have_by_now_are_counted() -> None:
    assert seen([ZERO, OTHERS, None]).detail.startswith("1 of 3 former frames are zero, 1 are secret again")


@pytest.mark.parametrize(("frames", "checked"), [([], 0), ([ZERO, ZERO], 1)], ids=["none", "not all"])
def test_what_could_not_all_be_tried_proves_nothing(frames: list[bytes | None], checked: int) -> None:
    assert seen(frames, checked=checked).verdict is Verdict.INCONCLUSIVE


def test_frames_that_nobody_has_freed_prove_nothing() -> None:
    found = seen([None, None])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "none of 2 former frames is free" in found.detail


@pytest.mark.parametrize("where", [0, PAGE_SIZE - CANARY_BYTES])
def test_a_canary_of_the_guests_is_found_wherever_it_lies(where: int) -> None:
    frame = bytes(where) + CANARY + bytes(PAGE_SIZE - where - CANARY_BYTES)
    found = seen([ZERO, frame, CANARIES, None], fingerprint_of(CANARY))
    assert found.verdict is Verdict.READABLE
    assert found.detail.endswith("2 hold the canary")
    assert seen([ZERO, OTHERS], fingerprint_of(CANARY)).verdict is Verdict.BLOCKED


class Sample:
    """A sample of RAM, whose frames are what the test says."""

    size = PAGE_SIZE

    def __enter__(self) -> Sample:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def __init__(self, *_: object) -> None:
        self.file = os.memfd_create("sample")
        os.ftruncate(self.file, self.size)
        self.inode = 1

    def fileno(self) -> int:
        return self.file


@pytest.mark.parametrize(
    ("frame", "verdict"),
    [(ZERO, Verdict.BLOCKED), (CANARIES, Verdict.READABLE), (OTHERS, Verdict.INCONCLUSIVE)],
    ids=["zeroed", "left", "in use again"],
)
def test_a_sample_that_is_freed_tells_whether_frames_are_cleared(
    monkeypatch: pytest.MonkeyPatch, frame: bytes, verdict: Verdict
) -> None:
    monkeypatch.undo()  # samples are tried here
    monkeypatch.setattr(residue, "allocate", Sample)
    monkeypatch.setattr(residue, "pagemap_entries", lambda *_: array("Q", [1]))
    monkeypatch.setattr(os, "urandom", lambda _: CANARY)
    probe = FreedFramesProbe([], array("Q"), None)
    probe._direct_map = cast("Any", Shown([ZERO, frame], 1))
    assert probe.attempt(Frames(array("Q", [0]), None, "secret")).verdict is verdict
