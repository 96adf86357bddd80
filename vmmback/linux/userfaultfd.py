"""userfaultfd(2): a process handles the page faults of a range. Source: ioctl_userfaultfd(2), linux/userfaultfd.h."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from typing import Self

from vmmback.linux import arch
from vmmback.linux.syscall import syscall

_API = 0xAA
_USER_MODE_ONLY = 1
_IOWR, _IOR = 3 << 30, 2 << 30


class Mode(IntFlag):
    """Which faults: of absent pages, of writes to protected ones, of pages that are only in the page cache."""

    MISSING = 1
    WRITE_PROTECTED = 2
    MINOR = 4


# The features that a mode needs for memory of files such as a memfd's.
_FEATURES = {Mode.MISSING: 1 << 5, Mode.WRITE_PROTECTED: 1 << 0 | 1 << 12, Mode.MINOR: 1 << 10}


class UserFault:
    """One userfaultfd. `with UserFault.open(mode) as faults`."""

    def __init__(self, descriptor: int, mode: Mode) -> None:
        self._descriptor, self._mode = descriptor, mode

    @classmethod
    @contextmanager
    def open(cls, mode: Mode) -> Iterator[Self]:
        """Make one. Raises OSError: ENOSYS, EPERM, EINVAL where the kernel lacks the mode for files' memory."""
        # Only faults of programs, not the kernel's own: so anybody may have it (vm.unprivileged_userfaultfd).
        descriptor = syscall(arch.current().userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
        try:
            faults = cls(descriptor, mode)
            faults._call(_IOWR, 0x3F, struct.pack("=QQQ", _API, _FEATURES[mode], 0))
            yield faults
        finally:
            os.close(descriptor)

    @contextmanager
    def registered(self, address: int, size: int) -> Iterator[None]:
        """Handle the faults of [address, address + size) bytes. Raises OSError.

        Who touches a page there that must be handled waits for ever, unless it was handled before.
        """
        self._call(_IOWR, 0x00, struct.pack("=QQQQ", address, size, self._mode, 0))
        try:
            yield
        finally:
            self._call(_IOR, 0x01, struct.pack("=QQ", address, size))

    def copy(self, address: int, source: int, size: int) -> None:
        """Fill absent pages at `address` with what is at `source`. Raises OSError."""
        self._call(_IOWR, 0x03, struct.pack("=QQQQq", address, source, size, 0, 0))

    def write_protect(self, address: int, size: int, *, on: bool) -> None:
        """Protect pages from writes, or let them be written again. Raises OSError."""
        self._call(_IOWR, 0x06, struct.pack("=QQQ", address, size, int(on)))

    def map_cached(self, address: int, size: int) -> None:
        """Map pages at `address` that the page cache has. Raises OSError."""
        self._call(_IOWR, 0x07, struct.pack("=QQQq", address, size, 0, 0))

    def _call(self, direction: int, number: int, argument: bytes) -> None:
        request = direction | len(argument) << 16 | _API << 8 | number
        fcntl.ioctl(self._descriptor, request, bytearray(argument))
