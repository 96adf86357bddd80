"""Can this host run guests on secret RAM, what is missing, and how to get it. docs/DOCTOR.md has every check.

Nothing here imports pydantic: neither an operator nor a monitoring system should have to wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from vmmback.doctor import kernel, places, programs, settings
from vmmback.doctor.finding import Check, Finding, checked

__all__ = ["Check", "examine", "would_fail"]

# Those that wait for processes or for the kernel, the longest first, at the same time.
_WAITING: dict[str, Callable[[], Finding]] = {
    "kvm": kernel.kvm,
    "qemu": programs.emulator,
    "qemu-secret-blocks": programs.secret_blocks,
    "taps": places.taps,
    "jail": places.walls,
    "direct-map": kernel.direct_map,
}
_QUICK: dict[str, Callable[[], Finding]] = {
    "secret-memory": kernel.secret_memory,
    "locked-memory": kernel.locked_memory,
    "seccomp-notification": kernel.seccomp_notification,
    "overcommit": kernel.overcommit,
    "programs": programs.helpers,
    "shares": programs.shares,
    "vsock": places.vsock,
    "runtime-folder": places.runtime_folder,
    "uids": places.uid_range,
}


def examine() -> tuple[Check, ...]:
    """Make every check; blocks for 0.1 s or so, and for 7 s where KVM hangs.

    It never raises, changes nothing, and leaves no process, thread or descriptor.
    """
    first = checked("descriptors", places.descriptors)  # while the others have not opened theirs
    with ThreadPoolExecutor(len(_WAITING)) as threads:
        waiting = [threads.submit(checked, name, find) for name, find in _WAITING.items()]
        quick = [checked(name, find) for name, find in _QUICK.items()]
        host = settings.checks()
    return (*quick, first, *(future.result() for future in waiting), *host)


def would_fail(checks: Iterable[Check]) -> bool:
    """Tell whether a launch would fail."""
    return any(check.state == "missing" for check in checks)
