"""The leases as a file, from which the broker that comes after this one learns what is lent. docs/BROKER.md.

It lies beside the broker's folder, which goes when the broker is killed. Each line is JSON: a lease that began, or the
number of one that has ended. A process is known by its pid and the time of its start; a lease whose process has ended
is none.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from vmmback.broker.ledger import Lease
from vmmback.linux import procfs

_ENDED = "ended"
_MOST_DEAD = 256
"""So many lines more than there are leases may be about leases that have ended, until all is written anew."""


class Journal:
    """Reads and writes the file. A lease is in it before its borrower has it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: dict[int, bytes] = {}
        """By lease: what is in the file, or is to be."""
        self._dead = 0
        self._output: int | None = None
        """The file, to which lines are added; None where what it holds is not all that it is to hold."""

    def read(self) -> Iterator[tuple[Lease, int]]:
        """Yield each lease whose process lives, with a new descriptor of that process (pidfd_open(2)), the caller's.

        They are in the file until `end`.
        """
        for entry in _entries(self._file):
            with ExitStack() as failed, suppress(OSError, ValueError, TypeError, LookupError):
                lease = Lease(**entry)
                pidfd = os.pidfd_open(lease.pid)
                failed.callback(os.close, pidfd)
                if start_of(lease.pid, pidfd) == lease.started:
                    failed.pop_all()
                    self._lines[lease.number] = _line(entry)
                    yield lease, pidfd

    def add(self, lease: Lease) -> None:
        """Write a lease down; on a full disk, as soon as there is room."""
        self._lines[lease.number] = line = _line(vars(lease))
        self._append(line)

    def end(self, number: int) -> None:
        """Write down that a lease has ended."""
        if self._lines.pop(number, None):
            self._dead += 2
            self._append(_line({_ENDED: number}))

    def close(self) -> None:
        """Leave the file to the next broker; without a lease there is none."""
        if not self._lines:
            self._file.unlink(missing_ok=True)
        self._stop()

    def _append(self, line: bytes) -> None:
        if self._output is None or self._dead > len(self._lines) + _MOST_DEAD:
            self._write_anew()
            return
        try:
            whole = os.write(self._output, line) == len(line)
        except OSError:
            whole = False
        if not whole:
            self._stop()

    def _write_anew(self) -> None:
        """Put a file with all leases in the place of the old one, which stays where that cannot be done."""
        new = self._file.with_suffix(".new")
        with suppress(OSError), ExitStack() as failed:
            failed.callback(new.unlink, missing_ok=True)
            output = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            failed.callback(os.close, output)
            text = b"".join(self._lines.values())
            if os.write(output, text) == len(text):
                new.replace(self._file)
                failed.pop_all()
                self._stop()
                self._output, self._dead = output, 0

    def _stop(self) -> None:
        if self._output is not None:
            os.close(self._output)
            self._output = None


def _entries(file: Path) -> list[dict[str, Any]]:
    """Return the leases that have not ended, as they are in the file; lines that are none of ours do not count."""
    leases: dict[Any, dict[str, Any]] = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError:  # there is none
        return []
    for line in lines:
        with suppress(ValueError, TypeError, AttributeError, LookupError, RecursionError):
            entry = json.loads(line)
            if _ENDED in entry:
                del leases[entry[_ENDED]]
            else:
                leases[entry["number"]] = entry
    return list(leases.values())


def _line(entry: dict[str, object]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def start_of(pid: int, pidfd: int) -> int:
    """Return when a process was started, in ticks since boot. Raises OSError where it has ended."""
    started = procfs.start_time(pid)
    # As long as it takes signals, nobody else has its number: what was read was of this process.
    with suppress(PermissionError):  # it is there
        signal.pidfd_send_signal(pidfd, 0)
    return started
