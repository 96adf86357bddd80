"""memfd_secret(2): memory that only the processes mapping it can reach, since it is not in the kernel's direct map."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vmmback.errors import HostUnfit
from vmmback.linux import arch
from vmmback.linux.syscall import syscall

# The module parameter exists wherever CONFIG_SECRETMEM is built in (mm/secretmem.c).
ENABLE = Path("/sys/module/secretmem/parameters/enable")


def memfd_secret(enable_parameter: Path = ENABLE) -> int:
    """Return a new close-on-exec memfd_secret descriptor of size 0; set its size once by ftruncate(2).

    Raises HostUnfit when the kernel lacks it or has it switched off, OSError for anything else (EMFILE, ENFILE, …).
    """
    try:
        # The only flag that mm/secretmem.c takes is O_CLOEXEC under the name FD_CLOEXEC, with O_CLOEXEC's value.
        return syscall(arch.current().memfd_secret, os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise _missing(enable_parameter) from error


def _missing(enable_parameter: Path) -> HostUnfit:
    """Tell apart the three reasons that the kernel all answers with ENOSYS."""
    try:
        enabled = enable_parameter.read_text().strip()
    except OSError:
        return HostUnfit(
            "this kernel has no memfd_secret(2)",
            "boot Linux 5.14 or later built with CONFIG_SECRETMEM (Debian 12 and 13 have it); "
            "where a seccomp filter or a container runtime denies system call 447, allow it",
        )
    if enabled == "N":
        return HostUnfit(
            "memfd_secret(2) is switched off on this host (secretmem.enable=0)",
            "add secretmem.enable=1 to the kernel command line and boot again",
        )
    return HostUnfit(
        "memfd_secret(2) answers ENOSYS though secretmem.enable is set",
        "the kernel cannot change its direct map (arm64 wants rodata=full), or a seccomp filter denies the call",
    )
