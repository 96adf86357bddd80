"""The handoffs that the broker answers for others, each by a process of its own (handoff_worker.py has the why)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import socket
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import vmmback
from vmmback.broker import handoff_worker
from vmmback.broker.config import Allow
from vmmback.broker.ledger import Caller, NotAllowed, within_a_minute

_PACKAGES = Path(vmmback.__file__).parents[1]


class Handoffs:
    """All workers that live."""

    def __init__(self) -> None:
        self._workers: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
        """By a pidfd of the worker: the process, and the uid that it is for."""
        self._recent: dict[int, deque[float]] = defaultdict(deque)

    def begin(self, caller: Caller, pidfd: int, rule: Allow | None, now_s: float) -> int:
        """Start a worker for the caller; return his end of its channel.

        A user may have as many at a time, and new ones within a minute, as leases. `now_s` is a monotonic time. Raises
        NotAllowed, OSError.
        """
        if rule:
            self._check(caller.uid, rule, now_s)
        channel = self.start(caller.uid)
        try:
            tell(channel, caller.pid, pidfd)
        except OSError:
            os.close(channel)
            raise
        return channel

    def start(self, uid: int) -> int:
        """Start a worker for a process of a user's; return its channel, for `tell`. Raises OSError."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", handoff_worker.START, _PACKAGES, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
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
            self._workers[watched] = process, uid
            asyncio.get_running_loop().add_reader(watched, self._ended, watched)
            return ours.detach()

    def _check(self, uid: int, rule: Allow, now_s: float) -> None:
        living = sum(owner == uid for _, owner in self._workers.values())
        recent = within_a_minute(self._recent[uid], now_s)
        if living >= rule.count:
            problem = f"those of {living} of its programs are"
        elif len(recent) >= rule.per_minute:
            problem = f"within a minute it asked for {len(recent)} programs"
        else:
            recent.append(now_s)
            return
        raise NotAllowed(
            f"uid {uid} may not have more calls answered: {problem}",
            "end a guest, or ask for more in the [[allow]] of the broker's file",
        )

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


class Offer(NamedTuple):
    """What one call is to be answered with (handoff_interface.py)."""

    call: str
    name: str
    descriptor: int


def tell(
    channel: int, pid: int, pidfd: int, offers: Sequence[Offer] = (), more: Mapping[str, object] | None = None
) -> None:
    """Tell a worker by its channel who its caller is: a pid, and a descriptor of that process. Raises OSError.

    `offers`, at most 252, come beside the caller's own. `more` says what may be plugged in later (more_ram.py).
    """
    descriptors = [pidfd, *(offer.descriptor for offer in offers)]
    told = {"pid": pid, "offers": [(offer.call, offer.name) for offer in offers], "more": more}
    text = json.dumps(told).encode() + b"\0"
    with socket.socket(fileno=os.dup(channel)) as connection:
        if socket.send_fds(connection, [text], descriptors, socket.MSG_DONTWAIT) != len(text):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def has_ended(channel: int) -> bool:
    """Tell whether the worker of a channel, which was told nothing yet, is gone."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(0))
