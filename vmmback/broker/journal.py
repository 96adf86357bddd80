"""The leases as a file, from which the broker that comes after this one learns what is lent. docs/BROKER.md.

It lies beside the broker's folder, which goes when the broker is killed. A process is known by its pid and the time of
its start; a lease whose process has ended is none.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from vmmback.broker.ledger import Lease
from vmmback.linux import procfs


class Journal:
    """Reads and writes the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries: dict[int, str] = {}
        """What is in the file, by lease: nothing of it is made twice, as callers wait meanwhile."""

    def read(self) -> Iterator[tuple[Lease, int]]:
        """Yield each lease whose process lives, with a new descriptor of that process (pidfd_open(2)), the caller's."""
        try:
            entries = list(json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError, RecursionError):  # there is none, or it is no file of ours
            return
        for entry in entries:
            with ExitStack() as failed, suppress(OSError, ValueError, TypeError, AttributeError, LookupError):
                started = entry.pop("started")
                lease = Lease(**entry)
                pidfd = os.pidfd_open(lease.pid)
                failed.callback(os.close, pidfd)
                if _start_of(lease.pid, pidfd) == started:
                    failed.pop_all()
                    yield lease, pidfd

    def write(self, leases: Iterable[tuple[Lease, int]]) -> None:
        """Put a file with these leases, and the descriptors of their processes, in the place of the old one.

        Without any there is no file. On a full disk, and out of descriptors, the old one stays until the next time.
        """
        entries: dict[int, str] = {}
        started: dict[int, int] = {}
        for lease, pidfd in leases:
            try:
                entries[lease.number] = self._entries.get(lease.number) or _entry(lease, pidfd, started)
            except (FileNotFoundError, ProcessLookupError):  # it has ended: so does the lease
                continue
            except OSError:  # out of descriptors
                return
        self._entries = entries
        with suppress(OSError):
            if entries:
                new = self._file.with_suffix(".new")
                new.write_text(f"[{','.join(entries.values())}]")
                new.replace(self._file)
            else:
                self._file.unlink(missing_ok=True)


def _entry(lease: Lease, pidfd: int, started: dict[int, int]) -> str:
    """Return a lease as JSON; `started` is what is known of processes by pid. Raises OSError where it has ended."""
    if lease.pid not in started:
        started[lease.pid] = _start_of(lease.pid, pidfd)
    return json.dumps(vars(lease) | {"started": started[lease.pid]})


def _start_of(pid: int, pidfd: int) -> int:
    """Return when a process was started, in ticks since boot. Raises OSError where it has ended."""
    started = procfs.start_time(pid)
    # As long as it takes signals, nobody else has its number: what was read was of this process.
    with suppress(PermissionError):  # it is there
        signal.pidfd_send_signal(pidfd, 0)
    return started
