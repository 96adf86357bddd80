"""Closes what was lent, or was to be, beside the event loop.

Who has borrowed may have closed it, or have ended, before the broker closes its own descriptor. Then this is the last
one, and whoever closes it waits until the kernel has zeroed and freed all of the memory (mm/secretmem.c,
secretmem_free_folio): 0.3 s for 1 GiB, in which nobody else would be served.
"""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue


class Closer:
    """A thread that closes descriptors, one after the other; it ends with the process."""

    def __init__(self) -> None:
        self._waiting = SimpleQueue[int]()
        self._works = False

    def close(self, descriptor: int) -> None:
        """Have a descriptor closed; out of threads, at once."""
        if not self._works:
            try:
                threading.Thread(target=self._work, name="closer", daemon=True).start()
            except RuntimeError:
                os.close(descriptor)
                return
            self._works = True
        self._waiting.put(descriptor)

    def _work(self) -> None:
        while True:
            os.close(self._waiting.get())


class Lent:
    """A descriptor that goes to a borrower, and is closed here by a Closer."""

    def __init__(self, descriptor: int, closer: Closer) -> None:
        """Take over the descriptor."""
        self._descriptor, self._closer = descriptor, closer

    def fileno(self) -> int:
        """Return it, still this object's own."""
        return self._descriptor

    def close(self) -> None:
        """Have it closed; call it once."""
        self._closer.close(self._descriptor)
