"""Touches every page of a descriptor's memory, in a process of its own that the OOM killer takes first.

Run as `python -I -S prefault_worker.py DESCRIPTOR SIZE THREADS`: size in bytes, standard library only, few imports.
It writes a dot to standard output for each CHUNK touched, then END and the pagemap entries of all pages, 8 bytes each:
this process is the only one whose page tables have them all, QEMU's fill as the guest touches its RAM. Exit code 0: all
is present. 3: the kernel refused the mapping, 4: it had no page to give; standard error then holds the errno.

Why a process: while its pages are mapped they count as this process's memory, which makes it the one that the OOM
killer chooses; with its end the page tables are gone too, while the pages stay with the descriptor.
Why read(2) from /dev/zero rather than stores: a page that cannot be had is EFAULT to a read and SIGBUS to a store
(arch/x86/mm/fault.c); and the interpreter is not in the way of other threads meanwhile.
"""

from __future__ import annotations

import _thread
import mmap
import os
import sys

TYPE_CHECKING = False  # typing itself would cost more to import than the rest together
if TYPE_CHECKING:
    from typing import NoReturn

CHUNK = 2 << 20
END = b"\n"
REFUSED, EXHAUSTED = 3, 4


def main() -> None:
    """Map, touch and report."""
    descriptor, size, threads = (int(argument) for argument in sys.argv[1:])
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    try:
        memory = memoryview(mmap.mmap(descriptor, size))
    except OSError as error:
        _give_up(REFUSED, error)
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    chunks = iter(range(0, size, CHUNK))  # next() on it is atomic: the threads share the work without a lock

    def touch(finished: _thread.LockType) -> None:
        for start in chunks:
            position, end = start, min(start + CHUNK, size)
            while position < end:
                try:
                    position += os.readv(zero, [memory[position:end]])
                except OSError as error:
                    _give_up(EXHAUSTED, error)
            try:
                os.write(sys.stdout.fileno(), b".")
            except OSError as error:  # the supervisor is gone: nobody wants these pages
                _give_up(REFUSED, error)
        finished.release()

    threads_finished = [_thread.allocate_lock() for _ in range(threads)]
    for finished in threads_finished:
        finished.acquire()
        _thread.start_new_thread(touch, (finished,))
    for finished in threads_finished:
        finished.acquire()
    _report_frames(descriptor, size)


def _report_frames(descriptor: int, size: int) -> None:
    inode = str(os.fstat(descriptor).st_ino)
    with open("/proc/self/maps", "rb") as maps:
        fields = next(line.split() for line in maps if line.split()[4].decode() == inode and b"rw-s" in line)
    position = int(fields[0].partition(b"-")[0], 16) // mmap.PAGESIZE * 8
    end = position + size // mmap.PAGESIZE * 8
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    with open(sys.stdout.fileno(), "wb", closefd=False) as output:
        output.write(END)
        while position < end and (entries := os.pread(pagemap, min(end - position, 1 << 20), position)):
            output.write(entries)
            position += len(entries)


def _give_up(code: int, error: OSError) -> NoReturn:
    try:
        os.write(sys.stderr.fileno(), str(error.errno).encode())
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
