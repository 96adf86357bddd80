"""Touches every page of a descriptor's memory, in a process of its own that the OOM killer takes first.

Run as `python -I -S prefault_worker.py DESCRIPTOR SIZE THREADS PROCS [CALL FIRST END]`: size in bytes, standard library
only, few imports. PROCS is the cgroup.procs of the group that is to pay for the pages, or empty: whoever touches a page
first does, so it joins before. With the number of memfd_secret(2) and a range of frames, it first takes those of them
that are free, and keeps them while it lives, so that none of them is given to DESCRIPTOR; its own group pays for these.
It writes a dot to standard output for each CHUNK touched, then END and the pagemap entries of all pages, 8 bytes each:
this process is the only one whose page tables have them all, QEMU's fill as the guest touches its RAM. Exit code 0: all
is present. 3: the kernel refused the mapping, 4: it had no page to give, 5: it may not join the group; standard error
then holds the errno.

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
REFUSED, EXHAUSTED, NOT_JOINED = 3, 4, 5

_PIECE = 256 << 10
_IN_VAIN = 32 << 20  # bytes taken without one of the frames, after which it is asked whether any is free
_MOST_PIECES = 1 << 14  # mappings of one process, of 65,530 (Documentation/admin-guide/sysctl/vm.rst, max_map_count)
_PFN_MASK = (1 << 55) - 1
_BUDDY = 1 << 10  # a free frame (Documentation/admin-guide/mm/pagemap.rst)


def main() -> None:
    """Map, touch and report."""
    descriptor, size, threads = (int(argument) for argument in sys.argv[1:4])
    group, *rest = sys.argv[4:]
    set_aside = [int(argument) for argument in rest]
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    try:
        memory = memoryview(mmap.mmap(descriptor, size))
    except OSError as error:
        _give_up(REFUSED, error)
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    held = _set_aside(size, zero, *set_aside) if set_aside else []
    _join(group)
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
    for unwanted in held:
        unwanted.close()


def _join(group: str) -> None:
    if not group:
        return
    try:
        procs = os.open(group, os.O_WRONLY | os.O_CLOEXEC)
        os.write(procs, b"0")  # this process, with all its threads
        os.close(procs)
    except OSError as error:
        _give_up(NOT_JOINED, error)


def _set_aside(size: int, zero: int, call: int, first: int, end: int) -> list[mmap.mmap]:
    """Take secret memory, as much as `size` or 64 MiB, in pieces; keep those with frames from `first` to before `end`.

    Secret memory, since the kernel takes other memory from other lists of free frames; and on each processor in turn,
    since each has a list of its own, whose frames no flag shows as free. Ends early once none of these frames is free
    and none came for a while, and without an error where there is no more memory: what it is for is looked at in the
    end.
    """
    import ctypes

    system_call = ctypes.CDLL(None).syscall
    size = max(size, 2 * _IN_VAIN)
    piece = max(_PIECE, -(-size // _MOST_PIECES) // _PIECE * _PIECE)
    unwanted: list[mmap.mmap] = []
    others: list[mmap.mmap] = []
    in_vain = 0
    processors = os.sched_getaffinity(0)
    turns = sorted(processors)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap, open("/proc/kpageflags", "rb", buffering=0) as flags:
        while (taken := len(unwanted) + len(others)) * piece < size:
            if in_vain and in_vain * piece % _IN_VAIN == 0 and not _any_free(flags.fileno(), first, end):
                break
            os.sched_setaffinity(0, {turns[taken % len(turns)]})
            descriptor = system_call(call, os.O_CLOEXEC)
            try:
                os.ftruncate(descriptor, piece)
                memory = mmap.mmap(descriptor, piece)
                os.readv(zero, [memory])
            except OSError:
                break
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            entries = os.pread(pagemap.fileno(), piece // mmap.PAGESIZE * 8, address // mmap.PAGESIZE * 8)
            frames = [entry & _PFN_MASK for entry in memoryview(entries).cast("Q")]
            if any(first <= frame < end for frame in frames):
                unwanted.append(memory)
                in_vain = 0
            else:
                others.append(memory)
                in_vain += 1
    os.sched_setaffinity(0, processors)
    for memory in others:
        memory.close()
    return unwanted


def _any_free(flags: int, first: int, end: int) -> bool:
    return any(word & _BUDDY for word in memoryview(os.pread(flags, (end - first) * 8, first * 8)).cast("Q"))


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
