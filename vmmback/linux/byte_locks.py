"""Locks on single bytes of a file: fcntl(2), "Open file description locks". They belong to the open file, not to us.

So whoever inherits the descriptor has them, and they end with its last holder. All raise OSError.
"""

from __future__ import annotations

import fcntl
import os
import struct

_FLOCK = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, pid


def set_lock(descriptor: int, kind: int, byte: int) -> None:
    """Lock the byte at that offset (F_RDLCK, F_WRLCK), or unlock it; EAGAIN or EACCES where another forbids it."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(kind, byte))


def is_locked(descriptor: int, byte: int) -> bool:
    """Tell whether another open file has a lock of any kind on the byte."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
