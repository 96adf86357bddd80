"""What is done about RLIMIT_MEMLOCK for who has CAP_IPC_LOCK. Without it: integration/test_memlock.py."""

from __future__ import annotations

import resource

import pytest

from vmmback.linux import memlock, procfs

MIB = 1 << 20
INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(("may_raise", "left"), [(True, (INFINITY, INFINITY)), (False, (64 * MIB, 64 * MIB))])
def test_the_capability_takes_the_limit_away_as_far_as_that_goes(
    may_raise: bool, left: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = 8 * MIB, 64 * MIB

    def prlimit(_pid: int, _which: int, new: tuple[int, int] | None = None) -> tuple[int, int]:
        nonlocal limits
        before = limits
        if new is not None:
            if new[1] == INFINITY and not may_raise:
                raise ValueError("not allowed to raise maximum limit")
            limits = new
        return before

    monkeypatch.setattr(resource, "prlimit", prlimit)
    monkeypatch.setattr(procfs, "has_capability", lambda _: True)
    assert memlock.allows(256 * MIB)
    assert limits == left
    assert memlock.falls_short(256 * MIB) is not may_raise
