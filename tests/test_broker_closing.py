"""What was lent is closed beside the event loop."""

from __future__ import annotations

import os
import threading
import time
from typing import NoReturn

import pytest

from vmmback.broker.closing import Closer, Lent


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


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
