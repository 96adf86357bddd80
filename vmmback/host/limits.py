"""Limits on this process that a launch would meet halfway."""

from __future__ import annotations

import os
import resource

from vmmback.errors import HostUnfit

# About 30 are open at a time: Python's own, sockets and pipes of QEMU and helpers, BPF objects, RAM and logs.
_DESCRIPTORS, _SPARE_DESCRIPTORS = 64, 40


def check_descriptors() -> None:
    """Raise HostUnfit unless this process may have as many descriptors as a launch needs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < _DESCRIPTORS or not _can_open(_SPARE_DESCRIPTORS):
        raise HostUnfit(
            f"RLIMIT_NOFILE is {limit}, and a launch needs {_DESCRIPTORS} descriptors",
            f"raise it: `ulimit -n {_DESCRIPTORS}`, or LimitNOFILE={_DESCRIPTORS} in a systemd unit; or close some",
        )


def _can_open(count: int) -> bool:
    opened: list[int] = []
    try:
        while len(opened) < count:
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return True
