"""What is done about RLIMIT_MEMLOCK for who has CAP_IPC_LOCK, and for others. Without: integration/test_memlock.py."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(
    ("limits", "size", "left"),
    [
        ((8, 8), 4, (8, 8)),
        ((8, 8), 8, (8, 8)),
        ((1, 8), 4, (4, 8)),
        ((1, 2), 4, (4, 4)),
        ((1, INFINITY), 4, (4, INFINITY)),
        ((INFINITY, INFINITY), 4, (INFINITY, INFINITY)),
        ((0, 0), 4, (4, 4)),
    ],
)
def test_limits_are_raised_as_far_as_needed_and_never_lowered(
    limits: tuple[int, int], size: int, left: tuple[int, int]
) -> None:
    assert memlock.raised(limits, size) == left


def test_of_a_process_that_has_ended_no_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pid, here this process's, may be another's by now."""
    child = os.fork()
    if not child:
        os._exit(0)
    pidfd = os.pidfd_open(child)
    os.waitpid(child, 0)
    monkeypatch.setattr(resource, "prlimit", lambda *_: pytest.fail("a limit is looked at"))
    try:
        assert memlock.let_lock(os.getpid(), pidfd, 4) is False
    finally:
        os.close(pidfd)


def test_a_limit_that_may_not_be_raised_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def prlimit(_pid: int, _which: int, new: tuple[int, int] | None = None) -> tuple[int, int]:
        if new:
            raise ValueError("not allowed to raise maximum limit")
        return 1, 1

    pidfd = os.pidfd_open(os.getpid())
    monkeypatch.setattr(resource, "prlimit", prlimit)
    try:
        with pytest.raises(PermissionError):
            memlock.let_lock(os.getpid(), pidfd, 4)
    finally:
        os.close(pidfd)
