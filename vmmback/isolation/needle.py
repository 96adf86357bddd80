"""What a hunt searches for, kept so that the hunt cannot find it here.

A needle lives in secret memory alone, which the kernel's direct map lacks, and is XORed there with a random pad. It
comes by read(2) straight into that memory, or is made there byte by byte; Python never holds a copy, and neither does
the command line or the environment. While a scan runs a part of it (the anchor) is plain, in secret memory too: a
scan loads it into registers, which the kernel saves in ordinary memory, so it must never be the whole.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from vmmback.errors import UsageError
from vmmback.linux.memfd_secret import SecretBuffer
from vmmback.linux.procfs import PAGE_SIZE

SHORTEST, LONGEST = 16, 4096
"""Bytes of a needle. Shorter ones would be found by chance."""

_NEWLINE = ord("\n")
_TERMINAL = Path("/dev/tty")

# Where things are in the secret memory: what is read (with room to notice that it is too long), then the anchor.
_ANCHOR_AT = 2 * PAGE_SIZE + 64
_BYTES = 3 * PAGE_SIZE

# An anchor is so much shorter than the needle, but not so short that it is found by chance.
_HELD_BACK, _SHORTEST_ANCHOR, _LONGEST_ANCHOR = 4, 8, 60
_FEWEST_VALUES, _ENOUGH_VALUES = 4, 8
# What most of a host's idle memory is filled with, and how much it counts.
_FILLS = {0x00: 8, 0xFF: 1}
# A step of memmem() that depends on what it saw takes so many times one that does not: measured, 4 ns to 0.8 ns.
_SLOWER = 5
# anon_pipe_put_page() of fs/pipe.c keeps up to two pages of a pipe for its next writes.
_PIPE_PAGES = 2


class Needle:
    """16 to 4096 bytes to search for; a `Pattern` of linux/direct_map_scan.py. A context manager, which wipes it."""

    def __init__(self, buffer: SecretBuffer, size: int) -> None:
        """Take over a buffer that starts with the plain needle; use `read`, `from_terminal` or `xor` instead."""
        memory = buffer.memory
        if not SHORTEST <= size <= LONGEST:
            long = f"{size} bytes" if size <= LONGEST else f"more than {LONGEST} bytes"
            raise UsageError(f"a needle has {SHORTEST} to {LONGEST} bytes, this one {long}", _HINT)
        self.size = size
        self.anchor_address = buffer.address + _ANCHOR_AT
        self.anchor_offset, self.anchor_size = choose_anchor(memory, size)
        if (values := _values(memory, self.anchor_offset, self.anchor_size)) < _FEWEST_VALUES:
            raise UsageError(f"a needle of {values} different bytes would be found by chance", _HINT)
        self._buffer = buffer
        self._pad = os.urandom(size)
        for index, pad in enumerate(self._pad):
            memory[index] ^= pad

    @classmethod
    def read(cls, descriptor: int) -> Self:
        """Read a needle to the end of the file, less one newline at its end. The descriptor stays open.

        A pipe is wiped: the kernel keeps its pages. A regular file stays in the page cache, where a hunt finds it.
        Raises UsageError for a wrong length, HostUnfit without secret memory, OSError.
        """
        with _filling() as buffer:
            size = 0
            while size <= LONGEST + 1 and (count := _read(descriptor, buffer.memory, size, LONGEST + 2)):
                size += count
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                _wipe_pipe(descriptor)
            return cls(buffer, _without_newline(buffer.memory, size))

    @classmethod
    def from_terminal(cls, path: Path = _TERMINAL) -> Self:
        """Read a line of at most 4095 bytes from the terminal, which shows none of it. Raises as `read` does.

        With ECHO off the kernel clears its own copies (zero_buffer() of drivers/tty/n_tty.c).
        """
        descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            with _filling() as buffer, _without_echo(descriptor):
                size = 0
                # The end of the line, or that of the file (Ctrl-D), ends it: read(2) of a terminal returns by lines.
                while size <= LONGEST and (count := _read(descriptor, buffer.memory, size, LONGEST + 1)):
                    size += count
                    if buffer.memory[size - 1] == _NEWLINE:
                        break
                return cls(buffer, _without_newline(buffer.memory, size))
        finally:
            os.close(descriptor)

    @classmethod
    def xor(cls, half_a: bytes, half_b: bytes) -> Self:
        """Make the needle that is the XOR of two halves, byte by byte. Raises as `read` does."""
        if len(half_a) != len(half_b):
            raise UsageError("the two halves of a needle differ in length", _HINT)
        with _filling() as buffer:
            for index, (a, b) in enumerate(zip(half_a[:LONGEST], half_b, strict=False)):
                buffer.memory[index] = a ^ b
            return cls(buffer, len(half_a))

    @contextmanager
    def anchored(self) -> Iterator[Self]:
        """Show the anchor at `anchor_address` while a scan runs."""
        memory, first, end = self._buffer.memory, self.anchor_offset, self.anchor_offset + self.anchor_size
        # Its neighbours are made wrong, for a register that is wider than the anchor takes them along.
        for index in range(max(first - 1, 0), min(end + 1, self.size)):
            wrong = 0 if first <= index < end else 0xFF
            memory[_ANCHOR_AT + index - first] = memory[index] ^ self._pad[index] ^ wrong
        try:
            yield self
        finally:
            memory[2 * PAGE_SIZE :] = bytes(PAGE_SIZE)

    def is_at(self, memory: mmap.mmap, offset: int) -> bool:
        """Tell whether the needle is at this offset of `memory`, where its anchor is."""
        masked, pad = self._buffer.memory, self._pad
        end = self.anchor_offset + self.anchor_size
        return all(
            memory[offset + index] == masked[index] ^ pad[index]
            for part in (range(self.anchor_offset), range(end, self.size))
            for index in part
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._buffer.__exit__(kind, error, traceback)  # the kernel zeroes secret memory that is freed


def choose_anchor(memory: mmap.mmap | bytes, size: int) -> tuple[int, int]:
    """Return offset and length of the part of a needle, at the start of `memory`, that memmem() finds fastest.

    memmem() of glibc (string/memmem.c) looks at a pair of bytes where the anchor would end. If no pair of the anchor
    has the same hash, it goes on by the anchor's length, else up to the last that has: where one near the end hashes
    like the fill of idle memory, it crawls through that. But what is itself like a fill would be found too often:
    only parts with 8 different bytes are looked at, or where none has so many, those with the most.
    """
    longest = min(size - _HELD_BACK, _LONGEST_ANCHOR)
    most = max(_values(memory, start, longest) for start in range(size - longest + 1))
    enough = min(most, _ENOUGH_VALUES)
    chosen, lowest = (0, longest), (float("inf"), 0)
    last = dict.fromkeys(_FILLS, 0)  # where the last pair that hashes like a fill ends
    for end in range(2, size + 1):
        pair = _hash(memory[end - 2], memory[end - 1])
        last.update((fill, end - 1) for fill in _FILLS if pair == _hash(fill, fill))
        # The longest goes on by most; one that begins with the second byte of the last such pair has none of them.
        for start in {max(0, end - longest), *last.values()}:
            if not _SHORTEST_ANCHOR <= end - start <= longest:
                continue
            if (values := _values(memory, start, end - start)) < enough:
                continue
            cost = sum(weight * _cost(start, end, last[fill]) for fill, weight in _FILLS.items())
            if (cost, -values) < lowest:
                chosen, lowest = (start, end - start), (cost, -values)
    return chosen


def _cost(start: int, end: int, last: int) -> float:
    """Return about the time for a byte of a fill, where the anchor's last pair with the fill's hash ends at `last`."""
    if last <= start:
        return 1 / (end - 1 - start)
    return _SLOWER / max(1, end - 1 - last)  # memmem() compares a pair at the very end each time, which is slow too


def _hash(first: int, second: int) -> int:
    """Hash a pair of bytes as hash2() of memmem.c does."""
    return second - (first << 3) & 0xFF


_HINT = "take what the guest made for this: 64 random bytes are a good needle"


@contextmanager
def _filling() -> Iterator[SecretBuffer]:
    """Release the buffer where no needle comes of it."""
    buffer = SecretBuffer(_BYTES)
    try:
        yield buffer
    except BaseException:
        buffer.__exit__(None, None, None)
        raise


def _values(memory: mmap.mmap | bytes, start: int, size: int) -> int:
    return len({memory[index] for index in range(start, start + size)})


def _read(descriptor: int, memory: mmap.mmap, start: int, end: int) -> int:
    with memoryview(memory) as whole, whole[start:end] as part:
        return os.readv(descriptor, [part])


def _without_newline(memory: mmap.mmap, size: int) -> int:
    return size - 1 if size and memory[size - 1] == _NEWLINE else size


def _wipe_pipe(descriptor: int) -> None:
    """Overwrite the pages that the kernel keeps for a pipe: push zeroes through it, and read them again."""
    zeroes = bytes(_PIPE_PAGES * PAGE_SIZE)
    with contextlib.suppress(OSError):  # its owner may forbid it (proc_pid_fd(5)), or others write to it still
        writer = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            written = os.write(writer, zeroes)
            while written > 0:
                written -= len(os.read(descriptor, written))
        finally:
            os.close(writer)


@contextmanager
def _without_echo(descriptor: int) -> Iterator[None]:
    before = termios.tcgetattr(descriptor)
    silent = termios.tcgetattr(descriptor)
    silent[3] = silent[3] & ~termios.ECHO | termios.ICANON | termios.ECHONL
    try:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, silent)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
