"""Whether other processes of the same user may look into this one. Source: PR_SET_DUMPABLE of prctl(2), ptrace(2)."""

from __future__ import annotations

from vmmback.linux.syscall import libc

_PR_SET_DUMPABLE = 4


def forbid() -> None:
    """Keep this process out of core dumps, and from all who have not CAP_SYS_PTRACE. Raises OSError."""
    libc("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
