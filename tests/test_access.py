"""vma-flags on mappings as either kernel shows them: locked (Linux 6.18), or unevictable without `lo` (6.1)."""

from __future__ import annotations

from array import array

import pytest

from vmmback.isolation.access import VmaFlagsProbe
from vmmback.isolation.probe import Reading
from vmmback.linux import kpage, procfs
from vmmback.linux.kpage import Lists
from vmmback.linux.procfs import PAGE_SIZE, Mapping
from vmmback.report import Verdict

PRESENT = 1 << 63


def mapping(*flags: str) -> Mapping:
    return Mapping(0, 4 * PAGE_SIZE, "rw-s", 0, "00:0f", 7, procfs.SECRETMEM, {}, frozenset(flags))


def attempt(monkeypatch: pytest.MonkeyPatch, lists: Lists | OSError, *mappings: Mapping) -> Reading:
    """Attempt it where each mapping has three pages, and the kernel says `lists` of their frames."""
    asked = []

    def answer(frames: list[int]) -> Lists:
        asked.append(frames)
        if isinstance(lists, OSError):
            raise lists
        return lists if frames else Lists(0, 0)

    entries = array("Q", [PRESENT | 5, PRESENT | 6, 1 << 62 | 7, PRESENT | 8])
    monkeypatch.setattr(procfs, "pagemap", lambda *_: entries)
    monkeypatch.setattr(kpage, "lists", answer)
    reading = VmaFlagsProbe().attempt((1, mappings))
    assert asked == [[5, 6, 8] * sum("lo" not in each.flags for each in mappings)]
    return reading


def test_locked_memory_is_blocked_whatever_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attempt(monkeypatch, Lists(3, 0), mapping("lo", "dd"), mapping("lo", "dd"))
    assert seen == Reading(Verdict.BLOCKED, "locked (lo) and left out of dumps (dd): 2 mapping(s)")


def test_unevictable_memory_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attempt(monkeypatch, Lists(0, 2), mapping("lo", "dd"), mapping("dd"))
    assert seen == Reading(Verdict.BLOCKED, "unevictable, 3 frames, and left out of dumps (dd): 2 mapping(s)")


@pytest.mark.parametrize("flags", [("lo",), ()])
def test_memory_that_is_dumped_is_readable(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attempt(monkeypatch, Lists(0, 3), mapping("lo", "dd"), mapping(*flags))
    assert seen == Reading(Verdict.READABLE, "flags missing: dd")


def test_one_evictable_frame_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attempt(monkeypatch, Lists(1, 2), mapping("dd"))
    assert seen == Reading(Verdict.READABLE, "not locked (lo), and 1 of 3 frames can be swapped out")
    both = attempt(monkeypatch, Lists(3, 0), mapping())
    assert both.detail == "flags missing: dd; not locked (lo), and 3 of 3 frames can be swapped out"


def test_frames_on_no_list_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt(monkeypatch, Lists(0, 0), mapping("dd")).verdict is Verdict.INCONCLUSIVE


def test_what_the_kernel_hides_does_not_take_back_a_missing_dd(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = PermissionError()
    assert attempt(monkeypatch, hidden, mapping()) == Reading(Verdict.READABLE, "flags missing: dd")
    with pytest.raises(PermissionError):
        attempt(monkeypatch, hidden, mapping("dd"))


def test_hidden_frame_numbers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "pagemap", lambda *_: array("Q", [PRESENT]))
    with pytest.raises(PermissionError, match="CAP_SYS_ADMIN"):
        VmaFlagsProbe().attempt((1, [mapping("dd")]))
