"""The hunt on the real kernel: what is planted in any ordinary memory is found, with its owner; in secret RAM, not.

No test ever holds a needle in ordinary memory but where it plants it: it is a true hit anywhere. So needles are the XOR
of two halves, which is made byte by byte.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from integration.conftest import ROOT, LiveGuest, eventually
from vmmback.errors import HostUnfit
from vmmback.isolation.direct_map import pagemap_entries
from vmmback.isolation.frame_owners import FrameOwners
from vmmback.isolation.hunt import hunt
from vmmback.isolation.needle import Needle
from vmmback.linux import procfs
from vmmback.linux.bpf import SharedValue
from vmmback.linux.direct_map_scan import WINDOW, Cancelled, Scan, Scanner, _Lane
from vmmback.linux.memfd_secret import SecretBuffer, address_of
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Hunt, HuntPlace

PRESENT = 1 << 63
PFN_MASK = (1 << 55) - 1
MIB = 1 << 20

# What another process does: it makes the needle in memory of its own, tells so, and waits. argv: the halves, MiB.
CHILD = """
import mmap, sys
halves = bytes.fromhex(sys.argv[1]), bytes.fromhex(sys.argv[2])
memory = mmap.mmap(-1, int(sys.argv[3]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for start in range(0, len(memory), mmap.PAGESIZE):
    for index, (a, b) in enumerate(zip(*halves)):
        memory[start + index] = a ^ b
    if start == 16 * mmap.PAGESIZE:
        break
size = min(len(memory), 16 * mmap.PAGESIZE)
for start in range(size, len(memory), size):
    memory[start : start + size] = memory[:size]
print(flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Halves:
    """What a needle is the XOR of."""

    a: bytes
    b: bytes

    @classmethod
    def new(cls, size: int = 64) -> Halves:
        return cls(secrets.token_bytes(size), secrets.token_bytes(size))

    def __iter__(self) -> Iterator[int]:
        return (a ^ b for a, b in zip(self.a, self.b, strict=True))

    def needle(self) -> Needle:
        return Needle.xor(self.a, self.b)

    def put(self, memory: mmap.mmap, at: int = 0) -> None:
        for index, value in enumerate(self, at):
            memory[index] = value

    def write(self, descriptor: int) -> None:
        """Write it byte by byte: a buffer that has it as a whole would be found."""
        for value in self:
            os.write(descriptor, bytes([value]))


@pytest.fixture
def halves() -> Halves:
    return Halves.new()


@pytest.fixture(autouse=True)
def needs(needs_direct_map: None, needs_secretmem: None) -> None:
    """All of these tests need both."""


def search(halves: Halves, **guests: array[int]) -> Hunt:
    with halves.needle() as needle:
        return hunt(needle, guests, lambda *_: None)


def frames_of(memory: mmap.mmap) -> list[int]:
    return [entry & PFN_MASK for entry in procfs.pagemap("self", address_of(memory), len(memory))]


@contextmanager
def private_memory(size: int) -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(size)
        yield memory


@contextmanager
def other_process(halves: Halves, size: int) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", CHILD, halves.a.hex(), halves.b.hex(), str(size)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()


Only: TypeAlias = Callable[[Iterable[int]], None]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Only:
    """Let a hunt look at no RAM but the windows with these frames: it is a matter of milliseconds."""
    opened = Scanner.__init__

    def limit(entries: Iterable[int]) -> None:
        windows = sorted({(entry & PFN_MASK) * PAGE_SIZE // WINDOW * WINDOW for entry in entries})
        ranges = procfs.ram_ranges()

        def limited(self: Scanner, *arguments: Any) -> None:
            opened(self, *arguments)
            # The control of a hunt is somewhere else: it is looked up in `ranges` before the scan.
            self.ranges = ranges
            self.scan = partial(scan, self)  # type: ignore[method-assign]

        def scan(self: Scanner, *arguments: Any) -> Scan:
            self.ranges = [(start, start + WINDOW) for start in windows]
            try:
                return Scanner.scan(self, *arguments)
            finally:
                self.ranges = ranges

        monkeypatch.setattr(Scanner, "__init__", limited)

    return limit


def places(found: Hunt, place: str) -> list[HuntPlace]:
    return [entry for entry in found.places if entry.place == place]


# --- Where a needle is found ------------------------------------------------------------------------------------------


def test_every_place_is_found_and_named(halves: Halves) -> None:
    name = f"hunt-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        child = stack.enter_context(other_process(halves, PAGE_SIZE))
        on_disk = stack.enter_context(tempfile.NamedTemporaryFile(dir=ROOT / "build", buffering=0))
        in_tmpfs = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm", buffering=0))
        unlinked = os.memfd_create(name)
        stack.callback(os.close, unlinked)
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        for descriptor in (on_disk.fileno(), in_tmpfs.fileno(), unlinked, writer):
            halves.write(descriptor)
        one, other = socket.socketpair()
        stack.enter_context(one)
        stack.enter_context(other)
        buffer = stack.enter_context(SecretBuffer(PAGE_SIZE))
        halves.put(buffer.memory)
        with memoryview(buffer.memory) as whole, whole[: len(halves.a)] as message:
            one.send(message)  # goes to slab memory
        on_disk.seek(0)
        needle = stack.enter_context(Needle.read(on_disk.fileno()))  # which stays in the page cache
        found = hunt(needle, {}, lambda *_: None)

    (process,) = places(found, "process")
    assert process.owner == f"{child.pid} ({Path(sys.executable).name}): anonymous"
    (cached,) = places(found, "page cache")
    assert cached.owner == on_disk.name
    assert {entry.owner.split(" (")[0] for entry in places(found, "shared memory")} == {in_tmpfs.name, f"memfd:{name}"}
    (slab,) = places(found, "slab")
    assert slab.owner
    (pipe,) = places(found, "kernel")
    assert "pipe" in pipe.owner
    assert [entry.hits for entry in found.places] == [1] * 6
    assert (found.hits, found.guest_hits, found.needle_bytes) == (6, 0, 64)
    assert found.scanned_bytes + found.unreadable_bytes == sum(end - start for start, end in procfs.ram_ranges())


def test_what_a_process_leaves_in_the_frames_it_frees_is_found(only: Only) -> None:
    """Others may want these frames at once, and clear them: that is tried again."""
    for _ in range(5):
        halves = Halves.new()
        with other_process(halves, 32 * MIB) as child:
            mappings = [mapping for mapping in procfs.maps(child.pid) if mapping.size == 32 * MIB]
            only(procfs.pagemap(child.pid, mappings[0].start, 32 * MIB))
            child.kill()
            child.wait()
            found = search(halves)
        if free := places(found, "free"):
            break
    assert free, found.places
    assert not places(found, "process")


@pytest.mark.parametrize("size", [16, 100, 4096])
def test_nothing_is_found_in_secret_ram_nor_in_the_hunter_itself(size: int) -> None:
    """A needle that is in secret RAM alone: also no copy of it that the search itself makes."""
    halves = Halves.new(size)
    with SecretBuffer(16 * PAGE_SIZE) as buffer:
        for page in range(16):
            halves.put(buffer.memory, page * PAGE_SIZE)
        found = search(halves)
    assert (found.hits, found.places) == (0, ())
    assert found.unreadable_bytes >= 16 * PAGE_SIZE


def test_a_hit_is_a_frame_and_the_same_memory_when_secret_has_none(halves: Halves, only: Only) -> None:
    with private_memory(16 * PAGE_SIZE) as memory, SecretBuffer(16 * PAGE_SIZE) as buffer:
        for page in range(0, 16, 2):
            for at in (0, 1000, PAGE_SIZE - 64):
                halves.put(memory, page * PAGE_SIZE + at)
                halves.put(buffer.memory, page * PAGE_SIZE + at)
        entries = procfs.pagemap("self", address_of(memory), len(memory))
        only([*entries, *procfs.pagemap("self", buffer.address, len(buffer.memory))])
        found = search(halves, other=array("Q", [PRESENT | 1]), mine=entries, secret=array("Q"))
        (place,) = found.places
    assert (found.hits, found.guest_hits) == (8, 8)
    wanted = sorted(entry & PFN_MASK for entry in entries[::2])
    assert place == HuntPlace(place="guest", owner="mine", hits=8, examples=tuple(wanted[:4]))


# --- Guests -----------------------------------------------------------------------------------------------------------


def hunt_for_canary_of(live: LiveGuest) -> Hunt:
    halves = live.guest.console.canary_halves
    assert halves is not None
    entries = pagemap_entries(live.pid, live.guest.ram.inode)
    return search(Halves(*halves), guest=entries)


def test_the_canary_of_a_guest_on_ordinary_memory_is_found_in_its_frames(ordinary_guest_running: LiveGuest) -> None:
    found = hunt_for_canary_of(ordinary_guest_running)
    (guest,) = places(found, "guest")
    filled = (16 * MIB - 384 * 1024) // PAGE_SIZE
    assert (guest.owner, guest.hits, found.guest_hits) == ("guest", filled, filled)


def test_the_canary_of_a_guest_on_secret_ram_is_not_found_in_its_frames(guest_running: LiveGuest) -> None:
    found = hunt_for_canary_of(guest_running)
    assert (found.guest_hits, places(found, "guest")) == (0, [])


# --- Edges ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoFrames:
    """Two pages of ours whose frames follow each other: where they are in `memory`, and the first frame."""

    memory: mmap.mmap
    pages: tuple[int, int]
    frame: int

    def put(self, halves: Halves, at: int) -> None:
        for index, value in enumerate(halves, at):
            self.memory[self.pages[index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE] = value


@contextmanager
def two_frames(*, at_a_window: bool) -> Iterator[TwoFrames]:
    """Look for them in 64 MiB, and in more where there are none."""
    with ExitStack() as stack:
        for _ in range(16):
            memory = stack.enter_context(private_memory(64 * MIB))
            pages = {frame: page for page, frame in enumerate(frames_of(memory))}
            for frame, page in pages.items():
                if frame + 1 in pages and ((frame + 1) % (WINDOW // PAGE_SIZE) == 0) == at_a_window:
                    yield TwoFrames(memory, (page, pages[frame + 1]), frame)
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


# --- Conduct ----------------------------------------------------------------------------------------------------------


def test_progress_is_told_and_a_stop_is_heard_at_once(halves: Halves) -> None:
    told: list[tuple[int, int, float]] = []
    stop = threading.Event()
    stopped = 0.0

    def progress(done: int, total: int, speed: float) -> None:
        nonlocal stopped
        told.append((done, total, speed))
        stopped = stopped or time.monotonic()
        stop.set()

    with halves.needle() as needle, pytest.raises(Cancelled):
        hunt(needle, {}, progress, stop)
    assert time.monotonic() - stopped < 0.2
    assert 0 < told[0][0] < told[0][1] == sum(end - start for start, end in procfs.ram_ranges())
    assert told[0][2] > 0


def test_control_c_ends_it_at_once_and_leaves_no_thread(halves: Halves) -> None:
    pressed = 0.0

    def progress(*_: object) -> None:
        nonlocal pressed
        pressed = pressed or time.monotonic()
        signal.raise_signal(signal.SIGINT)

    with halves.needle() as needle, pytest.raises(KeyboardInterrupt):
        hunt(needle, {}, progress)
    assert time.monotonic() - pressed < 0.2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vmmback-scan")]


def test_it_runs_beside_an_event_loop(halves: Halves) -> None:
    async def run() -> int:
        stop = threading.Event()
        with halves.needle() as needle:
            task = asyncio.create_task(asyncio.to_thread(hunt, needle, {}, lambda *_: stop.set(), stop))
            turns = 0
            while not task.done():
                await asyncio.sleep(0)
                turns += 1
            with pytest.raises(Cancelled):
                await task
        return turns

    assert asyncio.run(run()) > 10


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


def test_a_search_that_finds_nothing_of_ours_proves_nothing(monkeypatch: pytest.MonkeyPatch, halves: Halves) -> None:
    monkeypatch.setattr(Scanner, "holds", lambda *_: False)
    with pytest.raises(HostUnfit, match="canary of our own"):
        search(halves)


def test_a_hit_that_is_gone_when_its_owner_is_looked_up_is_said_to_be(
    halves: Halves, only: Only, monkeypatch: pytest.MonkeyPatch
) -> None:
    with private_memory(PAGE_SIZE) as memory:
        halves.put(memory)
        only(frames_of(memory))

        def overwrite(*arguments: object) -> object:
            memory[:] = bytes(PAGE_SIZE)
            return FrameOwners(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr("vmmback.isolation.hunt.FrameOwners", overwrite)
        (frame,) = frames_of(memory)
        found = search(halves)
    assert found.places == (HuntPlace(place="gone", owner="", hits=1, examples=(frame,)),)


@pytest.mark.parametrize("dropped", ["-sys_admin", "-all"])
def test_without_capabilities_it_says_which(dropped: str) -> None:
    program = (
        "import os\n"
        "from vmmback.errors import HostUnfit\n"
        "from vmmback.isolation.hunt import hunt\n"
        "from vmmback.isolation.needle import Needle\n"
        "try:\n"
        "    with Needle.xor(os.urandom(64), os.urandom(64)) as needle:\n"
        "        hunt(needle, {}, lambda *_: None)\n"
        "except HostUnfit as error:\n"
        "    print(error.message)\n"
    )
    argv = ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", sys.executable, "-c", program]
    said = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=30).stdout
    assert "CAP_SYS_ADMIN is missing" in said


# --- Needles and what the kernel keeps of them ------------------------------------------------------------------------


def test_the_kernel_keeps_nothing_of_a_needle_from_a_pipe_or_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
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
    master, slave = os.openpty()
    with ExitStack() as stack:
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(Needle.from_terminal, Path(os.ttyname(slave)))
            eventually(lambda: not echoes(slave), "the terminal does not echo")
            halves.write(master)
            os.write(master, b"\n")
            needle = stack.enter_context(reading.result(10))
        assert echoes(slave)
        assert os.read(master, 100) == b"\r\n"  # nothing else was shown
        yield needle


def echoes(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)
