"""What a specimen's canary is compared with, and how a call's outcome becomes a reading."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.isolation.catalogue import CATALOGUE
from vmmback.isolation.probe import Reading
from vmmback.isolation.specimen import CallProbe, Specimen, specimen
from vmmback.linux.memory import PAGE_SIZE
from vmmback.report import Verdict


@pytest.fixture
def ordinary() -> Any:
    with specimen("ordinary", 2 * PAGE_SIZE, PAGE_SIZE) as place:
        yield place


def test_only_what_is_filled_holds_the_canary(ordinary: Specimen) -> None:
    assert ordinary.holds(ordinary.memory[:PAGE_SIZE])
    assert ordinary.holds(ordinary.memory[:1])
    assert not ordinary.holds(ordinary.memory[PAGE_SIZE:])
    assert ordinary.memory[PAGE_SIZE:] == bytes(PAGE_SIZE)
    assert not ordinary.holds(b"")
    assert not ordinary.holds(ordinary.memory[1:PAGE_SIZE])
    assert not ordinary.holds(ordinary.memory[: PAGE_SIZE - 1] + b"?" * 2)


@given(start=st.integers(0, 500), length=st.integers(0, 500))
def test_a_part_of_the_canary_is_what_is_there(start: int, length: int) -> None:
    with specimen("ordinary", PAGE_SIZE) as place:
        assert place.canary_at(start, start + length) == place.memory[start : start + length]


ROOT = Path(__file__).parents[1]


class Fake(CallProbe):
    name = "fake"
    refusals = frozenset({errno.EFAULT, errno.EINVAL})

    def __init__(self, outcome: str | int) -> None:
        self.outcome = outcome

    def reach(self, place: Specimen) -> str:
        if isinstance(self.outcome, int):
            raise OSError(self.outcome, os.strerror(self.outcome))
        return self.outcome


def test_the_outcome_of_a_call_becomes_a_reading(ordinary: Specimen) -> None:
    assert Fake("it came").attempt(ordinary) == Reading(Verdict.READABLE, "it came")
    assert Fake(errno.EFAULT).attempt(ordinary) == Reading(Verdict.BLOCKED, "refused, EFAULT", "EFAULT")
    assert Fake(errno.EINVAL).attempt(ordinary).errno == "EINVAL"
    assert Fake("").attempt(ordinary).verdict is Verdict.INCONCLUSIVE
    with pytest.raises(OSError, match="Bad file descriptor"):
        Fake(errno.EBADF).attempt(ordinary)


def test_each_probe_has_a_name_of_its_own_and_its_row() -> None:
    names = [probe.name for probe in CATALOGUE]
    assert len(names) == len(set(names))
    rows = (ROOT / "docs/PROBES.md").read_text().splitlines()
    for probe in CATALOGUE:
        (row,) = (row for row in rows if row.startswith(f"| `{probe.name}` |"))
        assert probe.vector in row
        assert probe.source in row
        assert ("(holders:" in row) == bool(probe.holders)
