"""memfd_secret(2): memory that only the processes mapping it can reach, since it is not in the kernel's direct map."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

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


class SecretBuffer:
    """Secret memory of our own, whole pages, zero at first: mapped here as `memory`, at `address`.

    It counts as locked memory. Raises as memfd_secret() does; OSError: EAGAIN where RLIMIT_MEMLOCK is too low.
    """

    def __init__(self, size: int) -> None:
        descriptor = memfd_secret()
        try:
            os.ftruncate(descriptor, size)
            self.memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self.address = address_of(self.memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.memory.close()


def address_of(memory: mmap.mmap) -> int:
    """Return where a mapping starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


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
