"""A process that maps memory and does as it is told, for vectors that would disturb QEMU.

Run as `python -I -S throwaway_worker.py DESCRIPTOR SIZE`: size in bytes, standard library only, few imports. It touches
every page, says READY, and answers each command on standard input with DONE. It ends when its standard input does.
It makes no copy of what is in the memory: whoever finds a copy in this process found the memory itself.
"""

from __future__ import annotations

import mmap
import os
import sys

READY = DONE = b"."
TOUCH, DUMP, NOTHING = b"t", b"d", b"n"
"""Commands: read the first byte; MADV_DODUMP the memory; return from read(2) and come back."""


def main() -> None:
    """Map, touch, and obey."""
    descriptor, size = (int(argument) for argument in sys.argv[1:])
    memory = mmap.mmap(descriptor, size)
    for start in range(0, size, mmap.PAGESIZE):
        memory[start]  # present in the page tables of this process from now on
    os.write(sys.stdout.fileno(), READY)
    while command := os.read(sys.stdin.fileno(), 1):
        if command == TOUCH:
            memory[0]
        elif command == DUMP:
            memory.madvise(mmap.MADV_DODUMP)
        os.write(sys.stdout.fileno(), DONE)


if __name__ == "__main__":
    main()
