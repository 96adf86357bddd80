"""Needles: how they come, what is refused, and what the kernel keeps of them."""

from __future__ import annotations

import mmap
import os
import secrets
import signal
import socket
import termios
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from integration.conftest import eventually, open_descriptors
from integration.planting import Halves
from vmmback.errors import UsageError
from vmmback.isolation.hunt import hunt
from vmmback.isolation.needle import Needle
from vmmback.linux.procfs import PAGE_SIZE


@pytest.fixture(autouse=True)
def needs(needs_secretmem: None) -> None:
    """All of these tests need it."""


def piped(data: bytes) -> Needle:
    reader, writer = os.pipe()
    try:
        os.write(writer, data)
        os.close(writer)
        return Needle.read(reader)
    finally:
        os.close(reader)


def whole(needle: Needle, data: bytes) -> bool:
    """Tell whether a needle consists of these bytes."""
    with mmap.mmap(-1, 2 * PAGE_SIZE) as memory, needle.anchored():
        memory[5 : 5 + len(data)] = data
        anchor = needle._buffer.memory[:][needle.anchor_address - needle._buffer.address :][: needle.anchor_size]
        found = memory.find(anchor) - needle.anchor_offset
        return needle.size == len(data) and found == 5 and needle.is_at(memory, 5)


@pytest.mark.parametrize("size", [16, 17, 20, 63, 64, 65, 1000, 4096])
def test_a_needle_is_what_was_given_less_one_newline(size: int) -> None:
    data = bytes(n % 251 + 1 for n in range(size - 1)) + b"x"
    for given, wanted in ((data, data), (data + b"\n", data), (data[:-1] + b"\n\n", data[:-1] + b"\n")):
        with piped(given) as needle:
            assert whole(needle, wanted)
            assert not whole(needle, wanted[:-1] + b"y")
    half = secrets.token_bytes(size)
    with Needle.xor(half, bytes(a ^ b for a, b in zip(half, data, strict=True))) as needle:
        assert whole(needle, data)


@pytest.mark.parametrize("size", [0, 1, 15, 4097, 4098, 5000, 60_000])
def test_a_length_that_is_wrong_is_refused(size: int) -> None:
    before = open_descriptors()
    for given in (b"x" * size, b"x" * size + b"\n"):
        with pytest.raises(UsageError, match="a needle has 16 to 4096 bytes, this one"):
            piped(given)
    with pytest.raises(UsageError, match="a needle has 16 to 4096 bytes, this one"):
        Needle.xor(bytes(size), bytes(size))
    assert open_descriptors() == before


def test_halves_of_two_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="differ in length"):
        Needle.xor(bytes(64), bytes(63))


@pytest.mark.parametrize("data", [bytes(64), b"a" * 4096, b"abc" * 20])
def test_what_would_be_found_by_chance_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="by chance"):
        piped(data)


def test_the_anchor_is_where_it_tells_most() -> None:
    data = bytes(2000) + secrets.token_bytes(60) + bytes(2000)
    with piped(data) as needle:
        assert needle.anchor_offset >= 1995
        assert needle.anchor_offset + needle.anchor_size <= 2065
        assert whole(needle, data)


@pytest.mark.parametrize("size", [16, 64, 4096])
def test_not_even_secret_memory_has_it_as_a_whole(size: int) -> None:
    data = secrets.token_bytes(size)
    with piped(data) as needle:
        assert needle.anchor_size < size
        resting = needle._buffer.memory[:]
        assert data[:8] not in resting
        with needle.anchored():
            shown = needle._buffer.memory[:]
            anchor = data[needle.anchor_offset : needle.anchor_offset + needle.anchor_size]
            assert anchor in shown
            before, after = max(needle.anchor_offset - 1, 0), needle.anchor_offset + needle.anchor_size + 1
            assert data[before : after - 1] not in shown or before == needle.anchor_offset
            assert data[before + 1 : after] not in shown or after > size
        assert needle._buffer.memory[:] == resting


def test_it_is_read_from_sockets_and_in_pieces() -> None:
    data = secrets.token_bytes(100)
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(Needle.read, ours.fileno())
        for byte in data:
            theirs.send(bytes([byte]))
        theirs.close()
        with reading.result(10) as needle:
            assert whole(needle, data)


@pytest.mark.parametrize("typed", [b"\n", b"too short\n", b"\x04"])
def test_a_terminal_echoes_again_whatever_was_typed(typed: bytes) -> None:
    with terminal() as (master, slave), ThreadPoolExecutor(1) as pool:
        reading = pool.submit(Needle.from_terminal, Path(os.ttyname(slave)))
        eventually(lambda: not echoes(slave), "the terminal does not echo")
        os.write(master, typed)
        with pytest.raises(UsageError, match="16 to 4096 bytes"):
            reading.result(10)
        assert echoes(slave)


def test_a_terminal_echoes_again_after_control_c() -> None:
    with terminal() as (_, slave):

        def press() -> None:
            eventually(lambda: not echoes(slave), "the terminal does not echo")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            Needle.from_terminal(Path(os.ttyname(slave)))
        presser.join()
        assert echoes(slave)


def test_the_kernel_keeps_nothing_of_a_needle_from_a_pipe_or_a_terminal(
    needs_direct_map: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin is a pipe that is not wiped: its page still has the needle."""
    letters = Halves(bytes(secrets.randbelow(16) for _ in range(64)), bytes(0x40 | n % 16 for n in range(64)))
    with needle_from_a_pipe(letters) as wiped, needle_from_a_terminal(letters) as typed:
        monkeypatch.setattr("vmmback.isolation.needle._wipe_pipe", lambda _: None)
        with needle_from_a_pipe(letters) as left:
            found = hunt(typed, {}, lambda *_: None)
    assert wiped.size == typed.size == left.size == 64
    assert [(entry.place, entry.hits) for entry in found.places] == [("kernel", 1)], found.places


@contextmanager
def needle_from_a_pipe(halves: Halves) -> Iterator[Needle]:
    reader, writer = os.pipe()
    try:
        halves.write(writer)
        os.write(writer, b"\n")
        os.close(writer)
        with Needle.read(reader) as needle:
            yield needle
    finally:
        os.close(reader)


@contextmanager
def needle_from_a_terminal(halves: Halves) -> Iterator[Needle]:
    with terminal() as (master, slave):
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(Needle.from_terminal, Path(os.ttyname(slave)))
            eventually(lambda: not echoes(slave), "the terminal does not echo")
            halves.write(master)
            os.write(master, b"\n")
            needle = reading.result(10)
        with needle:
            assert echoes(slave)
            assert os.read(master, 100) == b"\r\n"  # nothing else was shown
            yield needle


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = os.openpty()
    with ExitStack() as stack:
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        yield master, slave


def echoes(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)
