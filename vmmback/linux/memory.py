"""Addresses of memory that this process has mapped."""

from __future__ import annotations

import ctypes
import mmap


def address_of(memory: mmap.mmap) -> int:
    """Return the virtual address of a writable mapping."""
    # The view is gone at once: an mmap cannot be closed while a view of it lives.
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
