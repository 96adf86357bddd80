"""What was lent is closed beside the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from array import array
from typing import ClassVar, NoReturn, cast

import pytest

from vmmback.admission import Promise
from vmmback.broker import pool
from vmmback.broker.closing import Closer, Lent
from vmmback.broker.config import BrokerConfig
from vmmback.broker.pool import Pool


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class Promised:
    """A promise that is always kept."""

    def beside(self, _: int) -> Promised:
        return self

    async def extend(self, _: int) -> None:
        pass

    def backed_by(self, _: int) -> None:
        pass

    def touched(self, _: int) -> None:
        pass

    async def anew(self) -> None:
        pass

    def forget(self) -> None:
        pass


class Memory:
    """SecretRam that is a pipe's end, and becomes ready when it is told to."""

    made: ClassVar[list[int]] = []

    def __init__(self, size: int) -> None:
        self.size, self.inode, self.frames = size, 1, array("Q", [1])
        self._descriptor = os.dup(0)
        self.made.append(self._descriptor)

    async def prefault(self, *_: object, anew: object) -> None:
        if self.size == 1:
            await asyncio.Event().wait()

    def detach(self) -> int:
        return self._descriptor


@pytest.mark.parametrize("size", [1, 2], ids=["while it is made", "once it is made"])
def test_what_was_made_for_nobody_is_closed_beside_the_loop(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by = dict[int, str]()
    real = os.close

    def close(descriptor: int) -> None:
        by[descriptor] = threading.current_thread().name
        real(descriptor)

    async def made_and_given_up() -> None:
        given_up = Pool(BrokerConfig(), cast("Promise", Promised()), print).reserve(size, 7)
        await given_up.admitted()
        await asyncio.sleep(0)
        await given_up.give_up()

    monkeypatch.setattr(pool, "SecretRam", Memory)
    with monkeypatch.context() as watched:
        watched.setattr(os, "close", close)
        asyncio.run(made_and_given_up())
        deadline = time.monotonic() + 30
        while Memory.made[-1] not in by:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert by[Memory.made[-1]] == "closer"


def test_who_has_it_closed_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    freed, closed = threading.Event(), list[int]()

    def close(descriptor: int) -> None:
        assert freed.wait(30)  # so long as the kernel needs to free all of the memory
        closed.append(descriptor)

    closer = Closer()
    descriptors = [os.dup(0), os.dup(0)]
    with monkeypatch.context() as slow:
        slow.setattr(os, "close", close)
        for descriptor in descriptors:
            lent = Lent(descriptor, closer)
            assert lent.fileno() == descriptor
            lent.close()
        assert closed == []
        freed.set()
        deadline = time.monotonic() + 30
        while closed != descriptors:
            assert time.monotonic() < deadline, closed
    for descriptor in descriptors:
        os.close(descriptor)


def test_out_of_threads_it_is_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    descriptor = os.dup(0)
    Closer().close(descriptor)
    assert not is_open(descriptor)
