"""Promises of memory: no sequence of launches, grows, releases and crashes promises more than the host has."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vmmback import admission
from vmmback.admission import Promise, outstanding
from vmmback.errors import AdmissionRefused, HostUnfit
from vmmback.host.budget import Budget, NodeBudget, with_page_tables
from vmmback.host.memory import HostMemory
from vmmback.linux import cgroups, procfs, secret_use
from vmmback.linux.secret_use import SecretFile
from vmmback.linux.zones import Node, Zone

MIB, GIB = 1 << 20, 1 << 30


@dataclass
class Running:
    """A guest of the made-up host: its supervisor's pid, its RAM, how much of that is present, whose promise it is."""

    name: str
    pid: int
    size: int
    promise: Promise
    present: int = 0
    processes: int = 0
    alive: bool = True
    before: int = 0
    """Of its RAM, what was promised before the last time."""


class Host:
    """A made-up host: the kernel's view of its guests, behind the interfaces that admission reads."""

    def __init__(self, folder: Path, zones: tuple[Zone, ...]) -> None:
        self.folder, self.zones = folder, zones
        self.guests: list[Running] = []
        self.next_pid = 100
        self.group_limit: int | None = None

    @property
    def taken(self) -> int:
        """Bytes that guests have really taken of the first zone."""
        return sum(with_page_tables(guest.present) + guest.processes for guest in self.guests)

    @property
    def free(self) -> int:
        return self.zones[0].free - self.taken

    def read(self, promised: int, group_room: int | None) -> HostMemory:
        zones = (self.zones[0]._replace(free=self.free), *self.zones[1:])
        return HostMemory((Node(0, zones),), promised, group_room)

    def room(self, path: str | None) -> int | None:
        return None if self.group_limit is None else self.group_limit - self.taken

    def live(self) -> list[str]:
        return [guest.name for guest in self.guests]

    def secret_files(self, known: Collection[int]) -> dict[int, SecretFile]:
        return {
            guest.pid: SecretFile(guest.size, 0 if guest.pid in known else guest.present, frozenset({guest.pid + 1}))
            for guest in self.guests
            if guest.present
        }

    def children(self, pid: int) -> list[int]:
        return [pid + 1]

    def faked(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(mock.patch.object(admission, "HostMemory", SimpleNamespace(read=self.read)))
        stack.enter_context(mock.patch.object(admission, "live_guests", self.live))
        stack.enter_context(mock.patch.object(admission, "runtime_folder", return_value=self.folder))
        stack.enter_context(mock.patch.object(secret_use, "secret_files", self.secret_files))
        stack.enter_context(mock.patch.object(procfs, "children", self.children))
        stack.enter_context(mock.patch.object(cgroups, "room", self.room))
        return stack


class AnyOrder(RuleBasedStateMachine):
    """Guests come, touch their RAM sooner or later, grow, end and crash, in any order."""

    guests = Bundle("guests")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.host = Host(folder, (Zone("Normal", managed=4 * GIB, free=3 * GIB, high=20 * MIB), Zone("Movable")))
        self.stack.enter_context(self.host.faked())
        node = NodeBudget.of(self.host.read(0, None).nodes[0])
        self.floor = node.held + node.reserve

    def teardown(self) -> None:
        self.stack.close()

    @rule(target=guests, size=st.integers(1, 3000))
    def launch(self, size: int) -> Running | None:
        self.host.next_pid += 10
        pid, name = self.host.next_pid, f"g{self.host.next_pid}"
        folder = self.host.folder / name
        folder.mkdir()
        largest = Budget.of(self.host.read(admission.promised(), None)).largest_guest()
        with mock.patch.object(os, "getpid", return_value=pid):
            try:
                promise = asyncio.run(admission.admit(folder, size * MIB, "secret"))
            except AdmissionRefused:
                assert largest < size * MIB
                return None
        assert size * MIB <= largest
        guest = Running(name, pid, size * MIB, promise)
        self.host.guests.append(guest)
        return guest

    @rule(guest=guests, share=st.floats(0, 1), told=st.booleans())
    def touch(self, guest: Running | None, share: float, told: bool) -> None:
        """Of what is touched, its supervisor tells, or only the kernel knows it."""
        if guest and guest.alive:
            guest.present = max(guest.present, int(guest.size * share) // 4096 * 4096)
            if told:
                guest.promise.touched(guest.present - guest.before)

    @rule(guest=guests)
    def settle(self, guest: Running | None) -> None:
        if guest and guest.alive and not guest.processes:
            guest.processes = 104 * MIB
            guest.promise.settle([guest.pid])

    @rule(guest=guests, size=st.integers(1, 10))
    def grow(self, guest: Running | None, size: int) -> None:
        if guest and guest.alive and guest.present == guest.size:
            guest.promise.touched(guest.present - guest.before)
            try:
                asyncio.run(guest.promise.extend(size * 128 * MIB))
            except AdmissionRefused:
                return
            guest.before = guest.size
            guest.size += size * 128 * MIB

    @rule(guest=consumes(guests))
    def end(self, guest: Running | None) -> None:
        """A crash is no different: the folder is nobody's any more, and its memory is free."""
        if guest:
            guest.alive = False
            self.host.guests.remove(guest)

    @invariant()
    def what_was_promised_can_be_had(self) -> None:
        """If all guests touched all of their RAM now, watermarks and reserve would still be free."""
        rest = sum(
            with_page_tables(guest.size) - with_page_tables(guest.present) + 104 * MIB - guest.processes
            for guest in self.host.guests
        )
        assert self.host.free - rest >= self.floor - MIB


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor 1 has a child 2."""
    monkeypatch.setattr(procfs, "children", lambda pid: [2] if pid == 1 else [])


def record(pid: int, size: int, touched: int = 0, overhead: int = 0) -> admission.Record:
    return admission.Record(pid, size, touched, overhead, [])


@pytest.mark.usefixtures("qemu")
def test_what_a_guest_has_touched_counts_by_the_supervisor_s_word_or_the_kernel_s_whichever_is_more() -> None:
    mapped = {7: SecretFile(256 * MIB, 100 * MIB, frozenset({2}))}
    settled = replace(record(1, 256 * MIB), inodes=[7])
    assert outstanding([settled], {}) == 257 * MIB
    assert outstanding([settled], mapped) == with_page_tables(156 * MIB)
    assert outstanding([replace(settled, touched=256 * MIB)], mapped) == 0
    assert outstanding([record(1, 256 * MIB, 256 * MIB, overhead=9)], {}) == 9


@pytest.mark.usefixtures("qemu")
def test_other_secret_memory_of_a_guest_s_processes_keeps_no_promise() -> None:
    """Other RAM blocks are no RAM that was promised, and what a prefault sets aside is given back."""
    mapped = {7: SecretFile(256 * MIB, 0, frozenset({2})), 8: SecretFile(64 * MIB, 64 * MIB, frozenset({2}))}
    assert outstanding([record(1, 256 * MIB)], mapped) == 257 * MIB
    assert outstanding([replace(record(1, 256 * MIB), inodes=[7])], mapped) == 257 * MIB


@pytest.mark.usefixtures("qemu")
def test_what_another_process_of_a_guest_maps_is_the_guest_s_also_when_its_qemu_is_left_out() -> None:
    """virtiofsd maps the RAM, and has touched next to nothing of it."""
    settled = admission.Record(1, 256 * MIB, 256 * MIB, 0, [7])
    mapped = {7: SecretFile(256 * MIB, 0, frozenset({99}))}
    assert outstanding([settled], mapped) == 0
    assert outstanding([replace(settled, inodes=[])], mapped) == 257 * MIB


@pytest.mark.usefixtures("qemu")
def test_what_the_broker_has_lent_is_there_whoever_maps_it_until_the_lease_ends() -> None:
    """A borrower of another user has no record here, and his QEMU has touched next to nothing of it."""
    mapped = {7: SecretFile(256 * MIB, 0, frozenset({99}))}
    pool = replace(record(1, 64 * MIB, 16 * MIB), inodes=[8], lent=[7])
    assert outstanding([pool], mapped) == with_page_tables(48 * MIB)  # what it fills
    assert admission.settled([pool]) == {7}
    assert outstanding([replace(pool, lent=[])], mapped) == with_page_tables(48 * MIB) + 257 * MIB


@pytest.mark.usefixtures("qemu")
def test_secret_ram_of_others_counts_as_far_as_it_is_mapped_and_not_present() -> None:
    mapped = {7: SecretFile(256 * MIB, 0, frozenset({50}))}
    assert outstanding([record(1, 16 * MIB, 16 * MIB)], mapped) == 257 * MIB


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, (Zone("Normal", managed=4 * GIB, free=3 * GIB),))


def test_a_promise_is_a_file_of_the_guest_s_folder_and_tells_how_much_is_touched(host: Host) -> None:
    folder = host.folder / "demo"
    folder.mkdir()

    def told() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "promise.json").read_text())
        return found

    with host.faked():
        promise = asyncio.run(admission.admit(folder, 256 * MIB, "secret"))
        first = {"pid": os.getpid(), "size": 256 * MIB, "touched": 0, "overhead": 104 * MIB, "inodes": []}
        first["group"] = cgroups.path_of("self")
        assert told() == first | {"backing": "secret", "lent": []}
        promise.touched(2 * MIB)  # so little is not worth a file
        assert told()["touched"] == 0
        promise.touched(64 * MIB)
        assert told()["touched"] == 64 * MIB
        promise.touched(256 * MIB)
        asyncio.run(promise.anew())
        assert told()["touched"] == 0
        promise.touched(256 * MIB)
        promise.settle([7])
        assert (told()["touched"], told()["overhead"]) == (256 * MIB, 0)
        asyncio.run(promise.extend(128 * MIB))
        assert (told()["size"], told()["touched"], told()["overhead"]) == (384 * MIB, 256 * MIB, 0)
        promise.touched(100 * MIB)
        assert told()["touched"] == 356 * MIB
        asyncio.run(promise.anew())
        assert told()["touched"] == 256 * MIB
        promise.touched(128 * MIB)
        promise.withdraw(128 * MIB)
        assert (told()["size"], told()["touched"]) == (256 * MIB, 256 * MIB)


def test_a_promise_that_cannot_be_written_is_none_and_what_is_touched_may_be_told_later(host: Host) -> None:
    folder = host.folder / "demo"
    folder.mkdir()
    full = mock.patch.object(Path, "write_text", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with host.faked():
        with full, pytest.raises(HostUnfit, match=r"promise\.json: No space left"):
            asyncio.run(admission.admit(folder, 256 * MIB, "secret"))
        promise = asyncio.run(admission.admit(folder, 256 * MIB, "secret"))
        with full:
            promise.touched(256 * MIB)
            promise.settle([7])
            with pytest.raises(HostUnfit, match=r"promise\.json: No space left"):
                asyncio.run(promise.extend(128 * MIB))
            with pytest.raises(HostUnfit, match=r"promise\.json: No space left"):  # that less is touched must be told
                asyncio.run(promise.anew())
        told = json.loads((folder / "promise.json").read_text())
        assert (told["size"], told["touched"], told["overhead"]) == (256 * MIB, 0, 104 * MIB)
        promise.touched(256 * MIB)
        told = json.loads((folder / "promise.json").read_text())
        assert (told["size"], told["touched"], told["inodes"]) == (256 * MIB, 256 * MIB, [7])


def test_the_lock_is_free_though_a_child_that_was_forked_meanwhile_lives(host: Host) -> None:
    (host.folder / "demo").mkdir()
    with host.faked(), ExitStack() as copies:

        def read(promised: int, group_room: int | None) -> HostMemory:
            for number in Path("/proc/self/fd").iterdir():
                with suppress(OSError):
                    copies.callback(os.close, os.dup(int(number.name)))  # as fork(2) would
            return host.read(promised, group_room)

        with mock.patch.object(admission, "HostMemory", SimpleNamespace(read=read)):
            asyncio.run(admission.admit(host.folder / "demo", MIB, "secret"))
        held = os.open(host.folder, os.O_RDONLY)
        copies.callback(os.close, held)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("group", "left"),
    [("/machine/b", 500), ("/machine/a/deeper", 500), ("/machine", 500), ("/other", 600), ("/", 600)],
)
def test_of_a_group_s_room_goes_what_guests_below_the_same_group_were_promised(
    host: Host, group: str, left: int
) -> None:
    untouched = replace(record(1, 100 * MIB, overhead=0), group="/machine/a")
    elsewhere = replace(untouched, group="/elsewhere")
    with host.faked(), mock.patch.object(cgroups, "room", return_value=600 * MIB):
        found = admission.reckon([untouched, elsewhere], {}, group)
    assert found.group_room is not None
    assert found.group_room == 600 * MIB - (with_page_tables(100 * MIB) if left == 500 else 0)
    assert found.promised == 2 * with_page_tables(100 * MIB)


def test_two_launches_at_once_do_not_both_take_the_last_of_it(host: Host) -> None:
    async def both() -> list[object]:
        return await asyncio.gather(
            *(admission.admit(host.folder / name, 1500 * MIB, "secret") for name in "ab"), return_exceptions=True
        )

    host.guests = [Running(name, os.getpid(), 0, Promise(host.folder / name, "secret")) for name in "ab"]
    for guest in host.guests:
        (host.folder / guest.name).mkdir()
    with host.faked():
        taken = asyncio.run(both())
    assert {type(each) for each in taken} == {AdmissionRefused, Promise}


def test_what_a_group_has_room_for_is_asked_once_it_is_this_launch_s_turn(host: Host) -> None:
    """What another guest touches while a launch waits is gone from the group's room, and no promise any more."""
    host.group_limit = 1000 * MIB
    other = Running("other", 1, 700 * MIB, Promise(host.folder / "other", "secret"))
    (host.folder / "demo").mkdir()
    held = os.open(host.folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    async def admitted_late() -> None:
        task = asyncio.create_task(admission.admit(host.folder / "demo", 500 * MIB, "secret"))
        await asyncio.sleep(0.05)
        other.present = other.size
        host.guests.append(other)
        os.close(held)
        await task

    with host.faked(), pytest.raises(AdmissionRefused, match="The memory cgroup has room for 297 MiB"):
        asyncio.run(admitted_late())


def test_a_prefault_starts_anew_only_when_nobody_reckons_with_what_it_had_touched(host: Host) -> None:
    (host.folder / "demo").mkdir()

    async def anew() -> None:
        promise = await admission.admit(host.folder / "demo", 256 * MIB, "secret")
        promise.touched(256 * MIB)
        held = os.open(host.folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        task = asyncio.create_task(promise.anew())
        await asyncio.sleep(0.05)
        assert not task.done()
        os.close(held)
        await task

    with host.faked():
        asyncio.run(anew())


def test_a_launch_waits_for_the_lock_and_says_in_time_that_it_is_not_to_be_had(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host.folder / "demo").mkdir()
    held = os.open(host.folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    async def admitted_once_it_is_free() -> None:
        task = asyncio.create_task(admission.admit(host.folder / "demo", MIB, "secret"))
        await asyncio.sleep(0.05)
        assert not task.done()
        os.close(held)
        await task

    with host.faked():
        with monkeypatch.context() as short:
            short.setattr(admission, "_LOCK_TIMEOUT_S", 0.02)
            with pytest.raises(HostUnfit, match="another launch has held the lock on"):
                asyncio.run(admission.admit(host.folder / "demo", MIB, "secret"))
        asyncio.run(admitted_once_it_is_free())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_file_that_is_no_promise_promises_nothing(host: Host, text: str) -> None:
    folder = host.folder / "demo"
    folder.mkdir()
    (folder / "promise.json").write_text(text)
    host.guests = [Running("demo", 1, 0, Promise(folder, "secret"))]
    with host.faked():
        assert admission.promised() == 0
