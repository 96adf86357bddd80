"""The states of a guest's life, and the wish that it ends."""

from __future__ import annotations

import asyncio
import signal
from enum import StrEnum


class State(StrEnum):
    """Where a guest is in its life; the order is that of the lines."""

    STARTING = "starting"
    """Its name is held; RAM and QEMU are prepared. No instruction of it has run."""
    BOOTING = "booting"
    """It runs, and is to be validated."""
    RUNNING = "running"
    """It runs, and was validated, if it was to be."""
    PAUSED = "paused"
    """It is as far as booting or running, and stands still."""
    STOPPING = "stopping"
    """It was asked to end, or is ended."""
    ENDED = "ended"
    """It is gone; its last report is made."""


class Stop:
    """The wish that a launch ends: the signal that brought it, how often it came, and how patient it is."""

    def __init__(self) -> None:
        self.signum = 0
        self.patience_s: float | None = None
        """How long the guest may take after its power button was pressed; None for the usual time."""
        self._times = 0
        self._changed = asyncio.Event()

    def request(self, signum: int) -> None:
        """Ask, or ask again: each time the launch has less patience with the guest."""
        self.signum = signum
        self._times += 1
        self._changed.set()

    def insist(self, times: int) -> None:
        """Ask as often as it takes to have asked so many times; once there, again is nothing new."""
        while self._times < times:
            self.request(signal.SIGTERM)

    @property
    def times(self) -> int:
        """How often it was asked."""
        return self._times

    async def asked(self, times: int) -> None:
        """Wait until it was asked so many times."""
        while self._times < times:
            self._changed.clear()
            await self._changed.wait()
