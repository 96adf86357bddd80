"""Signals that end a command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from vmmback.errors import Interrupted


@contextmanager
def stopped(when: str) -> Iterator[None]:
    """Turn the signals that end a program into an error, so that all that is open is closed on the way."""
    stopped_by = [signal.SIGINT]

    def stop(signum: int, _: object) -> None:
        stopped_by.append(signal.Signals(signum))
        # As Ctrl-C does: an event loop keeps any other exception from whoever runs it, as the outcome of some task.
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(stopped_by[-1], when) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
