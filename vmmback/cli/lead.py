"""Leads a guest through its life in this process: the event loop, and the signals that ask it to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vmmback import launch
from vmmback.config import GuestConfig
from vmmback.lifecycle import Stop
from vmmback.report import IsolationReport

if TYPE_CHECKING:
    from vmmback.guest import Watcher

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_signals() -> list[signal.Signals]:
    """Return the signals that end a guest: not SIGHUP where it is ignored, which nohup(1) asks for."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signum for signum in STOP_SIGNALS if signum != signal.SIGHUP or hangs_up]


def lead(
    guest: GuestConfig, watcher: Watcher, *, validate: bool, file: Path, begun: Callable[[Stop], None] | None = None
) -> IsolationReport:
    """Run a guest to its end; call `begun` once the loop runs. Raises VmmbackError. Signals are ignored after it."""

    async def supervise() -> IsolationReport:
        stop = Stop()
        loop = asyncio.get_running_loop()
        for signum in stop_signals():
            loop.add_signal_handler(signum, stop.request, signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a process that was forked has them blocked
        if begun:
            begun(stop)
        try:
            return await launch.launch(guest, watcher, stop, validate=validate, file=file)
        finally:  # closing the loop gives the signals their default action back, which would end the report
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    try:
        return asyncio.run(supervise())
    finally:
        for signum in STOP_SIGNALS:  # the guest has ended: there is nothing left to stop, in whichever thread
            signal.signal(signum, signal.SIG_IGN)
