"""inotify(7): waits until one file changes or loses its last name, without looking again and again."""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmmback.linux.syscall import libc

_MODIFY, _ATTRIB = 0x2, 0x4  # include/uapi/linux/inotify.h; a link that goes is a change of attributes
_EVENT_BYTES = 4096


class Watch:
    """A file that is watched. Made by `watch`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def changed(self, timeout_s: float | None = None) -> bool:
        """Wait for a change since the last call, or the making of the watch; False if there is none in time."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return False
        os.read(self._descriptor, _EVENT_BYTES)  # all at once: it is enough to know that there was one
        return True


@contextmanager
def watch(path: Path) -> Iterator[Watch]:
    """Watch a file for what is written to it and for its removal. Raises OSError, ENOSPC at the user's limit."""
    descriptor = libc("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK)  # IN_CLOEXEC and IN_NONBLOCK are the same
    try:
        libc("inotify_add_watch", descriptor, ctypes.create_string_buffer(os.fsencode(path)), _MODIFY | _ATTRIB)
        yield Watch(descriptor)
    finally:
        os.close(descriptor)
