"""Pagemap entries as a file, to be passed to other processes: one native 64-bit word a page (pagemap.rst)."""

from __future__ import annotations

import fcntl
import os
from array import array


def sealed(entries: array[int]) -> int:
    """Return the descriptor of a new memfd with these words, which nobody can change any more. Raises OSError."""
    descriptor = os.memfd_create("vmmback-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(entries)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def entries_in(descriptor: int) -> array[int]:
    """Return the words of such a file. Raises OSError; ValueError where it is none."""
    entries = array("Q")
    with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # its own position, at the beginning
        entries.frombytes(file.read())
    return entries
