"""Throwaway children: processes that map a specimen as QEMU maps a guest's RAM, for vectors that would disturb QEMU."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from vmmback.errors import HostUnfit
from vmmback.isolation import throwaway_worker
from vmmback.isolation.probe import Missing, Probe, Reading, Target
from vmmback.isolation.specimen import Specimen, specimen
from vmmback.linux import procfs

# Much more than any attempt takes. A child that is killed ends whatever waits for it.
_DEADLINE_S = 10.0


class Throwaway(NamedTuple):
    """A child that maps `specimen`, full of its canary, at the virtual address `address`, and waits in read(2).

    `folder`, if any, is its working directory.
    """

    specimen: Specimen
    process: subprocess.Popen[bytes]
    address: int
    folder: Path | None

    @property
    def pid(self) -> int:
        """The child's pid."""
        return self.process.pid

    def command(self, command: bytes) -> None:
        """Let the child carry out a command of throwaway_worker.py. Raises OSError (ESRCH) if it ended instead."""
        assert self.process.stdin is not None
        self.process.stdin.write(command)
        _expect(self.process, throwaway_worker.DONE)


@contextmanager
def throwaway(backing: Literal["secret", "ordinary"], folder: Path | None = None) -> Iterator[Throwaway]:
    """Start a child on memory of this kind; it is killed and reaped in the end, and after 10 s at the latest.

    Raises HostUnfit, AdmissionRefused, OSError.
    """
    with ExitStack() as stack:
        memory = stack.enter_context(specimen(backing))
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-I", "-S", throwaway_worker.__file__, str(memory.ram.fileno()), str(memory.ram.size)],
                pass_fds=[memory.ram.fileno()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                cwd=folder,
                start_new_session=True,  # a Ctrl-C on the terminal is for the supervisor to handle
            )
        )  # fmt: skip
        stack.callback(process.kill)
        deadline = threading.Timer(_DEADLINE_S, process.kill)
        stack.callback(deadline.join)
        stack.callback(deadline.cancel)
        deadline.start()
        _expect(process, throwaway_worker.READY)
        (mapping,) = procfs.memory_mappings(procfs.maps(process.pid), memory.ram.inode)
        yield Throwaway(memory, process, mapping.start, folder)


def _expect(process: subprocess.Popen[bytes], answer: bytes) -> None:
    assert process.stdout is not None
    if process.stdout.read(1) != answer:
        raise ProcessLookupError(errno.ESRCH, f"the throwaway child ended: it did not answer within {_DEADLINE_S:g} s")


class ChildProbe(Probe[Throwaway]):
    """A probe that disturbs the process it tries: it never sees a guest, only a secret and an ordinary child."""

    live_safe = False
    control_is = "a child that maps a memfd"

    def target(self, target: Target) -> Throwaway:  # noqa: ARG002 (a guest must not be disturbed)
        return self._child("secret")

    def control(self, target: Target) -> Throwaway:  # noqa: ARG002
        return self._child("ordinary")

    def _child(self, backing: Literal["secret", "ordinary"]) -> Throwaway:
        return self._resources.enter_context(throwaway(backing))

    @abstractmethod
    def attempt(self, place: Throwaway) -> Reading: ...

    def _try(self, locate: Callable[[Target], Throwaway], target: Target) -> Reading:
        with naming_what_is_missing():
            return super()._try(locate, target)


@contextmanager
def naming_what_is_missing() -> Iterator[None]:
    """Turn HostUnfit of an attempt into Missing."""
    try:
        yield
    except HostUnfit as unfit:
        raise Missing(f"way to try it: {unfit.message}") from unfit
