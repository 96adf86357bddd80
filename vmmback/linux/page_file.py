"""Pagemap entries as a file, to be passed to other processes: one native 64-bit word a page (pagemap.rst)."""

from __future__ import annotations

import fcntl
import os
import sys
from array import array

from vmmback.linux import procfs


def sealed(entries: array[int]) -> int:
    """Return the descriptor of a new memfd with these words, which nobody can change any more. Raises OSError."""
    descriptor = os.memfd_create("vmmback-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        words = memoryview(entries).cast("B")
        while words:
            words = words[os.write(descriptor, words) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def without_numbers(entries: array[int]) -> array[int]:
    """Return pagemap entries as a process without CAP_SYS_ADMIN sees them (fs/proc/task_mmu.c)."""
    seen = ~procfs.PFN_MASK & (1 << 64) - 1
    # As one number: a word at a time takes long enough that others would wait for it.
    mask = array("Q", [seen]) * len(entries)
    words = int.from_bytes(entries.tobytes(), sys.byteorder) & int.from_bytes(mask.tobytes(), sys.byteorder)
    return array("Q", words.to_bytes(len(entries) * entries.itemsize, sys.byteorder))


def entries_in(descriptor: int) -> array[int]:
    """Return the words of such a file. Raises OSError; ValueError where it is none."""
    entries = array("Q")
    with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # its own position, at the beginning
        entries.frombytes(file.read())
    return entries
