"""Who has a right to QEMU: processes without privileges try to take its descriptors, open its memory and trace it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmmback.isolation import access
from vmmback.isolation.probe import Missing, Probe, Reading, Target
from vmmback.linux import arch, procfs, stranger_worker
from vmmback.report import Verdict

NOBODY = 65534
"""A uid that no guest has: [process] refuses it."""

_CAP_SETGID, _CAP_SETUID = 6, 7  # include/uapi/linux/capability.h
_WAYS = ("pidfd_getfd", "/proc/PID/mem", "ptrace")
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_ONLY_ADMINS = 2
_ANSWERS_S = 10.0


class Attempt(NamedTuple):
    """Who tried, and what came of each of the ways: `done`, or the name of the error that refused it."""

    who: str
    outcomes: tuple[str, ...]


class UnprivilegedProbe(Probe[Sequence[Attempt]]):
    """Tries as nobody, and as QEMU's own uid, which a guest that broke out of its QEMU would have.

    A place is what came of the attempts on it: one helper makes them all, as its start takes longest.
    """

    name = "unprivileged"
    vector = (
        "pidfd_getfd(2) of the descriptor, open(2) of /proc/PID/mem, ptrace(2) PTRACE_SEIZE, each by a process "
        "without capabilities: as nobody, and as QEMU's own uid"
    )
    control_is = "the same by nobody on a process of nobody's: all three must succeed"
    source = (
        "kernel/ptrace.c, __ptrace_may_access: the same uids and dumpable, or CAP_SYS_PTRACE; fs/exec.c, would_dump"
    )

    _on_qemu: Sequence[Attempt] = ()

    def control(self, target: Target) -> Sequence[Attempt]:
        attempts = _attempts(target)
        self._on_qemu = attempts[1:]
        control = attempts[0]
        if any(outcome != stranger_worker.DONE for outcome in control.outcomes):
            if _yama_scope() >= _ONLY_ADMINS:
                raise Missing("ptrace(2) for others than administrators: kernel.yama.ptrace_scope")
            raise PermissionError(errno.EPERM, f"on a process of its own, {_told(control)}")
        return attempts[:1]

    def target(self, target: Target) -> Sequence[Attempt]:  # noqa: ARG002 (tried already, by the same helper)
        return self._on_qemu

    def attempt(self, place: Sequence[Attempt]) -> Reading:
        if not place:
            return Reading(Verdict.INCONCLUSIVE, "the helper said nothing of it")
        told = "; ".join(_told(attempt) for attempt in place)
        outcomes = [outcome for attempt in place for outcome in attempt.outcomes]
        if stranger_worker.DONE in outcomes:
            return Reading(Verdict.READABLE, told)
        if all(outcome in ("EPERM", "EACCES") for outcome in outcomes):
            return Reading(Verdict.BLOCKED, told, "EPERM")
        return Reading(Verdict.INCONCLUSIVE, told)


def _attempts(target: Target) -> list[Attempt]:
    """Let the helper try: first the control. Raises Missing without the right to take another uid, OSError."""
    if not (procfs.has_capability(_CAP_SETUID) and procfs.has_capability(_CAP_SETGID)):
        raise Missing("right to take another uid: CAP_SETUID and CAP_SETGID")
    status = procfs.status(target.pid)
    owner, group = (int(status[key].split()[0]) for key in ("Uid", "Gid"))
    if owner == os.geteuid():
        raise Missing("uid of QEMU's own: it runs as vmmback does")
    numbers = access.descriptors_of(target)
    if not numbers:
        raise OSError(errno.ENOENT, "QEMU does not hold the descriptor")
    names = [f"uid {NOBODY}", f"uid {NOBODY}", f"QEMU's own uid {owner}"]
    words = [arch.current().pidfd_getfd, NOBODY]
    for ids in ((NOBODY, NOBODY), (owner, group)):
        words += [target.pid, numbers[0], *ids]
    program = [sys.executable, "-I", "-S", stranger_worker.__file__, *(str(word) for word in words)]
    try:
        said = subprocess.run(
            program,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,  # a Ctrl-C on the terminal is for the supervisor to handle
            timeout=_ANSWERS_S,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(errno.ETIMEDOUT, f"the helper did not answer within {_ANSWERS_S:g} s") from error
    lines = [tuple(line.split()) for line in said.splitlines()]
    if len(lines) != len(names):
        raise ProcessLookupError(errno.ESRCH, "the helper ended before it had tried all")
    return [Attempt(who, outcomes) for who, outcomes in zip(names, lines, strict=True)]


def _told(attempt: Attempt) -> str:
    ways = ", ".join(f"{way} {outcome}" for way, outcome in zip(_WAYS, attempt.outcomes, strict=False))
    return f"{attempt.who}: {ways}"


def _yama_scope(file: Path = _YAMA) -> int:
    try:
        return int(file.read_text())
    except OSError:  # a kernel without it
        return 0
