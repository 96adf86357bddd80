"""What holds for all tests, tests/ and integration/ alike: several workers run them (pytest-xdist)."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def share_of_the_machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let tests of several workers run beside each other, and one that is marked `alone` without them.

    All pass a gate to their share of the machine (flock(2)). Who wants all of it stays in the gate, so that no test
    begins meanwhile.
    """
    workers = tmp_path_factory.getbasetemp().parent  # of one run: each has its base below
    alone = request.node.get_closest_marker("alone") is not None
    with (workers / "gate.lock").open("w") as gate, (workers / "machine.lock").open("w") as machine:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield
