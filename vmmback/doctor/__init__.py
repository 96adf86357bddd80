"""Can this host run guests on secret RAM, what is missing, and how to get it. docs/DOCTOR.md has every check.

Nothing here imports msgspec or asyncio: neither an operator nor a monitoring system should have to wait for it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from vmmback.doctor.finding import Check, Finding, checked
from vmmback.errors import HostUnfit
from vmmback.linux.own_thread import begin

__all__ = ["Check", "examination", "examine", "would_fail"]


@contextmanager
def examination() -> Iterator[Callable[[], tuple[Check, ...]]]:
    """Make every check (see `examine`) while the block runs, and yield what makes the last of them and returns all.

    A process of its own makes those that wait for others, so that two processors have work: the threads of one Python
    take turns. Where this one has threads already, which a fork would stop in the midst of anything, it makes them all
    itself when they are awaited. Raises HostUnfit when the process was killed; it is gone after the block.
    """
    if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208 (pathlib has no use here but for this)
        yield examine
        return
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _wait_in_child(writing)
    os.close(writing)
    done = False

    def result() -> tuple[Check, ...]:
        nonlocal done
        here, host = _alone()
        with open(reading, "rb", closefd=False) as pipe:
            text = pipe.read()
        if not text:
            raise HostUnfit("the process that makes the checks was ended", "memory or descriptors may be short")
        done = True
        return (*here, *(Check(**fields) for fields in json.loads(text)), *host)

    try:
        yield result
    finally:
        os.close(reading)
        if not done:
            os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


def _wait_in_child(pipe: int) -> None:
    """Write the checks that wait into a pipe, and end this process; its parent tells the user all that there is."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        checks = [result()._asdict() for result in _waiting()]
        with open(pipe, "wb") as file:
            file.write(json.dumps(checks).encode())
    finally:
        os._exit(0)


def examine() -> tuple[Check, ...]:
    """Make every check; blocks for some 0.1 s, and for 7 s where KVM hangs.

    It never raises, changes nothing, and leaves no process, thread or descriptor.
    """
    waiting = _waiting()
    here, host = _alone()
    return (*here, *(result() for result in waiting), *host)


def _waiting() -> list[Callable[[], Check]]:
    """Begin the checks that wait for processes or for the kernel; return what waits for the end of each.

    They are made at the same time, and begin before what others need is even imported.
    """

    def later(name: str, find: Callable[[], Finding]) -> Callable[[], Check]:
        return begin(lambda: checked(name, find))

    from vmmback.doctor import kvm

    begun = [later("kvm", kvm.experiment)]
    from vmmback.doctor import places

    begun += [later("taps", places.taps), later("jail", places.walls)]
    from vmmback.doctor import programs

    begun += [later("qemu", programs.emulator), later("qemu-secret-blocks", programs.secret_blocks)]
    from vmmback.doctor import kernel

    return [*begun, later("direct-map", kernel.direct_map)]


def _alone() -> tuple[list[Check], tuple[Check, ...]]:
    """Make the checks that wait for nobody; the second ones are those of settings, which are told last."""
    from vmmback.doctor import kernel, places, programs, settings

    return [checked(name, find) for name, find in {
        "secret-memory": kernel.secret_memory,
        "locked-memory": kernel.locked_memory,
        "seccomp-notification": kernel.seccomp_notification,
        "descriptors": places.descriptors,
        "runtime-folder": places.runtime_folder,
        "uids": places.uid_range,
        "programs": programs.helpers,
        "shares": programs.shares,
        "bridges": places.bridges,
        "vsock": places.vsock,
        "overcommit": kernel.overcommit,
    }.items()], settings.checks()  # fmt: skip


def would_fail(checks: Iterable[Check]) -> bool:
    """Tell whether a launch would fail."""
    return any(check.state == "missing" for check in checks)
