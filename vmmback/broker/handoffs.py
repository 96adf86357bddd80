"""The handoffs that the broker answers for others, each by a process of its own (handoff_worker.py has the why)."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import vmmback
from vmmback.broker import handoff_worker
from vmmback.broker.ledger import Caller, NotAllowed

_PACKAGES = Path(vmmback.__file__).parents[1]


class Handoffs:
    """All workers that live."""

    def __init__(self) -> None:
        self._workers: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
        """By a pidfd of the worker: the process, and the uid that it is for."""

    def begin(self, caller: Caller, pidfd: int, most: int | None) -> int:
        """Start a worker for the caller, of whom no more than `most` may live; return his end of its channel.

        Raises NotAllowed, OSError.
        """
        if most == 0:
            raise NotAllowed(
                f"uid {caller.uid} may borrow no secret RAM, and has nothing to hand over",
                "ask for an [[allow]] of this user in the broker's file",
            )
        own = sum(uid == caller.uid for _, uid in self._workers.values())
        if most is not None and own >= most:
            raise NotAllowed(
                f"the calls of {own} programs of uid {caller.uid} are answered, and may be of no more",
                "end a guest, or ask for a larger count in the [[allow]] of the broker's file",
            )
        ours, theirs = socket.socketpair()
        with ours, theirs:
            descriptors = theirs.fileno(), pidfd
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", handoff_worker.START, _PACKAGES, *map(str, descriptors),
                 str(caller.pid)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env={},
                start_new_session=True,  # it outlives the broker, and a Ctrl-C on its terminal
            )  # fmt: skip
            try:
                watched = os.pidfd_open(process.pid)
            except OSError:
                process.kill()
                process.wait()
                raise
            self._workers[watched] = process, caller.uid
            asyncio.get_running_loop().add_reader(watched, self._ended, watched)
            return ours.detach()

    def close(self) -> None:
        """Leave them to themselves."""
        for watched in self._workers:
            asyncio.get_running_loop().remove_reader(watched)
            os.close(watched)
        self._workers.clear()

    def _ended(self, watched: int) -> None:
        process, _ = self._workers.pop(watched)
        process.wait()
        asyncio.get_running_loop().remove_reader(watched)
        os.close(watched)
