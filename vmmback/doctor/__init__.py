"""Can this host run guests on secret RAM, what is missing, and how to get it. docs/DOCTOR.md has every check.

Nothing here imports pydantic: neither an operator nor a monitoring system should have to wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from vmmback.doctor.finding import Check, Finding, checked

__all__ = ["Check", "examine", "would_fail"]

_AT_ONCE = 6


def examine() -> tuple[Check, ...]:
    """Make every check; blocks for some 0.1 s, and for 7 s where KVM hangs.

    It never raises, changes nothing, and leaves no process, thread or descriptor. What waits for processes or for the
    kernel is done at the same time, and begins before what else is needed is even imported.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        from vmmback.doctor import kvm

        waiting = [threads.submit(checked, "kvm", kvm.experiment)]
        from vmmback.doctor import programs

        waiting += _submitted(threads, {"qemu": programs.emulator, "qemu-secret-blocks": programs.secret_blocks})
        from vmmback.doctor import kernel, places, settings

        waiting += _submitted(threads, {"direct-map": kernel.direct_map, "taps": places.taps, "jail": places.walls})
        done = [checked(name, find) for name, find in {
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
        }.items()]  # fmt: skip
        host = settings.checks()
    return (*done, *(future.result() for future in waiting), *host)


def would_fail(checks: Iterable[Check]) -> bool:
    """Tell whether a launch would fail."""
    return any(check.state == "missing" for check in checks)


def _submitted(threads: Executor, checks: Mapping[str, Callable[[], Finding]]) -> list[Future[Check]]:
    return [threads.submit(checked, name, find) for name, find in checks.items()]
