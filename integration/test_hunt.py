"""The hunt on the real kernel: what is planted in any ordinary memory is found, with its owner; in secret RAM, not."""

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
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from integration.conftest import ROOT, LiveGuest
from integration.planting import MIB, PFN_MASK, Halves, frames_of, other_process, private_memory
from vmmback.errors import HostUnfit
from vmmback.isolation.direct_map import pagemap_entries
from vmmback.isolation.frame_owners import FrameOwners
from vmmback.isolation.hunt import hunt
from vmmback.isolation.needle import Needle
from vmmback.linux import kpage, procfs
from vmmback.linux.direct_map_scan import WINDOW, Cancelled, Scan, Scanner, _Lane
from vmmback.linux.memfd_secret import SecretBuffer, address_of
from vmmback.linux.page_records import PageRecords
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Hunt, HuntPlace

PRESENT = 1 << 63

# The first of all to read the whole of RAM may take a minute (docs/HUNT.md).
pytestmark = pytest.mark.timeout_s(300)


@pytest.fixture
def halves() -> Halves:
    return Halves.new()


@pytest.fixture(autouse=True)
def needs(needs_direct_map: None, needs_secretmem: None) -> None:
    """All of these tests need both."""


def search(halves: Halves, **guests: array[int]) -> Hunt:
    with halves.needle() as needle:
        return hunt(needle, guests, lambda *_: None)


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
    # Some wait for a while in lists of each processor (mm/swap.c).
    assert {entry.owner for entry in places(found, "process")} <= {"no process maps it any more"}


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
    entries = pagemap_entries(live.pid, live.guest.ram[0].inode)
    return search(Halves(*halves), guest=entries)


def test_the_canary_of_a_guest_on_ordinary_memory_is_found_in_its_frames(ordinary_guest_running: LiveGuest) -> None:
    found = hunt_for_canary_of(ordinary_guest_running)
    (guest,) = places(found, "guest")
    filled = (16 * MIB - 384 * 1024) // PAGE_SIZE
    assert (guest.owner, guest.hits, found.guest_hits) == ("guest", filled, filled)


def test_the_canary_of_a_guest_on_secret_ram_is_not_found_in_its_frames(guest_running: LiveGuest) -> None:
    found = hunt_for_canary_of(guest_running)
    assert (found.guest_hits, places(found, "guest")) == (0, [])


# --- Conduct ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def much_is_left(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Return what tells whether scans have left a good part of all RAM unread: where they went on, it is nothing."""
    searched = list[int]()
    search = _Lane.search

    def counted(lane: _Lane, pattern: Any, start: int, size: int, ahead: int) -> tuple[int, list[int]]:
        searched.append(size)
        return search(lane, pattern, start, size, ahead)

    monkeypatch.setattr(_Lane, "search", counted)
    return lambda: sum(searched) < 0.9 * sum(end - start for start, end in procfs.ram_ranges())


def test_progress_is_told_and_a_stop_is_heard_at_once(halves: Halves, much_is_left: Callable[[], bool]) -> None:
    told: list[tuple[int, int, float]] = []
    stop = threading.Event()

    def progress(done: int, total: int, speed: float) -> None:
        told.append((done, total, speed))
        stop.set()

    with halves.needle() as needle, pytest.raises(Cancelled):
        hunt(needle, {}, progress, stop)
    assert much_is_left()
    assert 0 < told[0][0] < told[0][1] == sum(end - start for start, end in procfs.ram_ranges())
    assert told[0][2] > 0


def test_control_c_ends_it_at_once_and_leaves_no_thread(halves: Halves, much_is_left: Callable[[], bool]) -> None:
    def progress(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with halves.needle() as needle, pytest.raises(KeyboardInterrupt):
        hunt(needle, {}, progress)
    assert much_is_left()
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


# --- Who uses a frame -------------------------------------------------------------------------------------------------


def test_without_the_kernels_records_files_are_not_known_but_found(
    halves: Halves, only: Only, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(_: object) -> PageRecords:
        raise HostUnfit("this kernel has no BTF")

    descriptor = os.memfd_create("unmapped", os.MFD_CLOEXEC)
    try:
        halves.write(descriptor)
        with mmap.mmap(descriptor, len(halves.a)) as memory:
            memory[0] = memory[0]
            only(procfs.pagemap("self", address_of(memory), PAGE_SIZE))
        known = search(halves)
        monkeypatch.setattr("vmmback.isolation.frame_owners.PageRecords", unfit)
        unknown = search(halves)
    finally:
        os.close(descriptor)
    assert [(entry.place, entry.owner.split(" (")[0]) for entry in known.places] == [
        ("shared memory", "memfd:unmapped")
    ]
    assert [(entry.place, entry.owner) for entry in unknown.places] == [("shared memory", "file not known")]


def test_users_are_found_in_a_mapping_of_a_terabyte_with_many_holes() -> None:
    reserve = 0x4000  # MAP_NORESERVE of mman.h
    with mmap.mmap(-1, 1 << 40, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve) as memory:
        pages = [*range(0, 2000, 2), (1 << 28) - 1]
        for page in pages:
            memory[page * PAGE_SIZE] = 1
        address = address_of(memory)
        frames = {procfs.pagemap("self", address + page * PAGE_SIZE, PAGE_SIZE)[0] & PFN_MASK for page in pages}
        started = time.monotonic()
        found = kpage.users(frames, lambda: True)
        seconds = time.monotonic() - started
    assert found.keys() == frames
    assert {user.pid for users in found.values() for user in users} == {os.getpid()}
    assert seconds < 30
