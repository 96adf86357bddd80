"""The search itself on the real kernel: the edges of windows, pages and RAM, what cannot be read, what it leaves."""

from __future__ import annotations

import mmap
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from integration.planting import MIB, PFN_MASK, Halves, frames_of, private_memory
from vmmback.linux import procfs
from vmmback.linux.bpf import SharedValue
from vmmback.linux.direct_map_scan import WINDOW, Scanner, _Lane
from vmmback.linux.memfd_secret import SecretBuffer
from vmmback.linux.procfs import PAGE_SIZE


@pytest.fixture
def halves() -> Halves:
    return Halves.new()


@pytest.fixture(autouse=True)
def needs(needs_direct_map: None, needs_secretmem: None) -> None:
    """All of these tests need both."""


@dataclass(frozen=True)
class TwoFrames:
    """Two pages of ours whose frames follow each other: in which memory and where each is, and the first frame."""

    pages: tuple[tuple[mmap.mmap, int], tuple[mmap.mmap, int]]
    frame: int

    def put(self, halves: Halves, at: int) -> None:
        for index, value in enumerate(halves, at):
            memory, page = self.pages[index // PAGE_SIZE]
            memory[page * PAGE_SIZE + index % PAGE_SIZE] = value


@contextmanager
def two_frames(*, at_a_window: bool) -> Iterator[TwoFrames]:
    """Look for them in 64 MiB, and in more where there are none.

    At a window they lie in two blocks of 2 MiB. Where free memory is in small pieces, huge pages bring whole blocks.
    """
    pages: dict[int, tuple[mmap.mmap, int]] = {}
    with ExitStack() as stack:
        for _ in range(16):
            memory = stack.enter_context(mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            if at_a_window:
                with suppress(OSError):  # a kernel without transparent huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
            memory[:] = bytes(len(memory))
            pages |= {frame: (memory, page) for page, frame in enumerate(frames_of(memory))}
            for frame in pages:
                if frame + 1 in pages and ((frame + 1) % (WINDOW // PAGE_SIZE) == 0) == at_a_window:
                    yield TwoFrames((pages[frame], pages[frame + 1]), frame)
                    return
    pytest.fail("no two frames of 1 GiB lie so")


@pytest.mark.parametrize("at_a_window", [False, True])
@pytest.mark.parametrize("size", [16, 64, 4096])
def test_a_needle_across_two_frames_that_follow_each_other_is_found(at_a_window: bool, size: int) -> None:
    with two_frames(at_a_window=at_a_window) as two, Scanner.open() as scanner:
        start = two.frame * PAGE_SIZE // WINDOW * WINDOW
        scanner.ranges = [(start, start + 2 * WINDOW)]
        for in_the_first in (1, size // 2, size - 1):
            halves = Halves.new(size)
            two.put(halves, PAGE_SIZE - in_the_first)
            with halves.needle() as needle, needle.anchored():
                scan = scanner.scan(needle, lambda *_: None, threading.Event())
            assert list(scan.frames) == [two.frame]
    assert scan.scanned + scan.unreadable == 2 * WINDOW


def test_nothing_is_found_across_the_end_of_ram_nor_in_the_second_frame(halves: Halves) -> None:
    with two_frames(at_a_window=False) as two, halves.needle() as needle, Scanner.open() as scanner:
        two.put(halves, PAGE_SIZE - 10)
        with needle.anchored():
            assert scanner.holds(needle, two.frame)
            assert not scanner.holds(needle, two.frame + 1)
            scanner.ranges = [(0, (two.frame + 1) * PAGE_SIZE)]  # as if RAM ended between the two
            assert not scanner.holds(needle, two.frame)
            assert not scanner.holds(needle, two.frame + 1)


def test_only_the_whole_needle_is_a_hit() -> None:
    """The anchor alone is not: each byte beside it counts."""
    halves = Halves.new(100)
    with private_memory(PAGE_SIZE) as memory, halves.needle() as needle, Scanner.open() as scanner, needle.anchored():
        (frame,) = frames_of(memory)
        halves.put(memory, 7)
        assert scanner.holds(needle, frame)
        for index in range(100):
            memory[7 + index] ^= 0x20
            assert not scanner.holds(needle, frame), index
            memory[7 + index] ^= 0x20
        assert scanner.holds(needle, frame)


def test_unreadable_pages_are_counted(halves: Halves) -> None:
    with SecretBuffer(64 * PAGE_SIZE) as buffer, halves.needle() as needle, Scanner.open() as scanner:
        buffer.memory[:] = b"x" * len(buffer.memory)
        frames = [entry & PFN_MASK for entry in procfs.pagemap("self", buffer.address, len(buffer.memory))]
        start = frames[0] * PAGE_SIZE // WINDOW * WINDOW
        with needle.anchored():
            scanner.ranges = [(frame * PAGE_SIZE, (frame + 1) * PAGE_SIZE) for frame in frames]
            alone = scanner.scan(needle, lambda *_: None, threading.Event())
            scanner.ranges = [(start, start + WINDOW)]
            among_others = scanner.scan(needle, lambda *_: None, threading.Event())
    assert (alone.scanned, alone.unreadable) == (0, 64 * PAGE_SIZE)
    inside = sum(start <= frame * PAGE_SIZE < start + WINDOW for frame in frames)
    assert inside * PAGE_SIZE <= among_others.unreadable < WINDOW
    assert among_others.scanned + among_others.unreadable == WINDOW


def test_what_reaches_into_an_unreadable_page_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """That page is zero in our copy: a needle that ends in zeroes would be found at its edge."""
    half = secrets.token_bytes(40)
    halves = Halves(half, bytes(20) + half[20:])
    load = _Lane._load

    def second_fails(lane: _Lane, start: int, size: int, ahead: int) -> set[int]:
        return load(lane, start, size, ahead) | {1}

    with two_frames(at_a_window=False) as two, halves.needle() as needle, Scanner.open() as scanner:
        two.put(halves, PAGE_SIZE - 20)
        with needle.anchored():
            assert scanner.holds(needle, two.frame)
            monkeypatch.setattr(_Lane, "_load", second_fails)
            assert not scanner.holds(needle, two.frame)


def test_the_copies_are_scrubbed(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    class Watched(SharedValue):
        def __exit__(self, *arguments: Any) -> None:
            left.append(len(self.memory) - self.memory[:].count(0))
            super().__exit__(*arguments)

    monkeypatch.setattr("vmmback.linux.direct_map_scan.SharedValue", Watched)
    with halves.needle() as needle, needle.anchored(), Scanner.open() as scanner:
        scanner.ranges = [(1 * MIB, 65 * MIB)]
        scanner.scan(needle, lambda *_: None, threading.Event())
    assert left == [0]


def test_the_copy_of_a_hit_is_no_hit_itself(halves: Halves) -> None:
    with private_memory(PAGE_SIZE) as memory, halves.needle() as needle, Scanner.open() as scanner, needle.anchored():
        halves.put(memory)
        lane = scanner._lanes[0]
        copy = procfs.pagemap("self", lane._address + lane._copy, PAGE_SIZE)[0] & PFN_MASK
        scanner.ranges = procfs.ram_ranges()

        def look_at_the_copy() -> list[int]:
            assert scanner.holds(needle, frames_of(memory)[0])
            scanner.ranges = [(copy * PAGE_SIZE, (copy + 1) * PAGE_SIZE)]
            found = scanner.scan(needle, lambda *_: None, threading.Event())
            scanner.ranges = procfs.ram_ranges()
            return list(found.frames)

        assert look_at_the_copy() == []
        scanner._own = frozenset()
        assert look_at_the_copy() == [copy]
