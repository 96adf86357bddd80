"""kcmp(2): whether two threads share a part of what the kernel keeps for them."""

from __future__ import annotations

from vmmback.linux import arch
from vmmback.linux.syscall import syscall

_FILES = 2  # KCMP_FILES of include/uapi/linux/kcmp.h


def share_descriptors(one: int, other: int) -> bool:
    """Tell whether two threads have one table of descriptors; False also where the kernel does not tell."""
    try:
        return syscall(arch.current().kcmp, one, other, _FILES, 0, 0) == 0
    except OSError:
        return False
