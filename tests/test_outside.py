"""What an attempt from outside counts as; on real memory it is tried in integration/test_selftest_process.py."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmmback.errors import HostUnfit
from vmmback.isolation import holes, outside
from vmmback.isolation.catalogue import CATALOGUE, PROCESS_PROBES
from vmmback.isolation.probe import Missing, Target
from vmmback.isolation.throwaway import ChildProbe, Throwaway, naming_what_is_missing
from vmmback.report import Verdict

CANARY = bytes(range(64))
CHILD = cast("Throwaway", SimpleNamespace(specimen=SimpleNamespace(canary=CANARY, memory=CANARY * 64)))


class Attempt(outside._RefusedProbe):
    name, vector, source = "attempt", "", ""
    refusal = errno.EFAULT

    def __init__(self, outcome: str | int) -> None:
        self.outcome = outcome

    def reach(self, child: Throwaway) -> str:
        if isinstance(self.outcome, int):
            raise OSError(self.outcome, os.strerror(self.outcome))
        return self.outcome


def test_data_is_readable_nothing_is_blocked_and_so_is_the_one_errno() -> None:
    assert Attempt("the canary").attempt(CHILD).verdict is Verdict.READABLE
    assert Attempt("").attempt(CHILD).verdict is Verdict.BLOCKED
    refused = Attempt(errno.EFAULT).attempt(CHILD)
    assert (refused.verdict, refused.errno) == (Verdict.BLOCKED, "EFAULT")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ESRCH, errno.EIO])
def test_any_other_errno_is_no_answer(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Attempt(number)
    monkeypatch.setattr(probe, "_child", lambda _: CHILD)
    seen = probe.observe(Target(0, {}))
    assert (seen.target, seen.control) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE)
    assert seen.errno == errno.errorcode[number]


def test_what_the_host_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(*_: object) -> Throwaway:
        raise HostUnfit("this kernel has no such thing")

    probe = Attempt("")
    monkeypatch.setattr(probe, "_child", unfit)
    assert "this kernel has no such thing" in probe.observe(Target(0, {})).missing
    with pytest.raises(Missing, match="no such thing"), naming_what_is_missing():
        unfit()


@pytest.mark.parametrize("data", [b"", bytes(8), CANARY[1:9], CANARY + b"x"])
def test_other_bytes_than_the_canary_are_no_leak(data: bytes) -> None:
    assert outside._read(CHILD, data) == ""
    assert holes._compare(CHILD, data).verdict is Verdict.BLOCKED
    assert outside._read(CHILD, CANARY[:8]) == "the canary was read"
    assert holes._compare(CHILD, CANARY).verdict is Verdict.READABLE


def test_a_marker_differs_from_what_is_there() -> None:
    marker = outside._marker(CHILD)
    assert marker != CANARY[:8]
    assert outside._written(CHILD, marker) == ""
    assert outside._written(CHILD, CANARY[:8]) == "the memory was changed"


@pytest.mark.parametrize("probe", CATALOGUE, ids=lambda probe: probe.name)
def test_each_vector_is_documented(probe: Any) -> None:
    for text in (probe.name, probe.vector, probe.control_is, probe.source):
        assert text
    assert probe.__doc__


def test_names_are_unique_and_who_disturbs_says_so() -> None:
    names = [probe.name for probe in CATALOGUE]
    assert len(set(names)) == len(names)
    for probe in PROCESS_PROBES:
        assert not probe.live_safe
        if issubclass(probe, ChildProbe):
            assert bool(probe.holders) == (probe.__module__ == holes.__name__)
