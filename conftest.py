"""What holds for all tests, tests/ and integration/ alike: several workers run them (pytest-xdist)."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@pytest.fixture(autouse=True)
def share_of_the_machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Let tests of several workers run beside each other, and one that is marked `alone` without them.

    All pass a gate to their share of the machine (flock(2)). Who wants all of it stays in the gate, so that no test
    begins meanwhile. A test that wants it for a part of its time only is not marked, and calls what it is given here.
    """
    workers = tmp_path_factory.getbasetemp().parent  # of one run: each has its base below
    with (workers / "gate.lock").open("w") as gate, (workers / "machine.lock").open("w") as machine:

        @contextmanager
        def alone() -> Iterator[None]:
            fcntl.flock(machine, fcntl.LOCK_UN)  # or two who want all of it would wait for each other
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(machine, fcntl.LOCK_EX)
            yield
            fcntl.flock(machine, fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)

        if request.node.get_closest_marker("alone"):
            with alone():
                yield alone
        else:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(machine, fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield alone
