"""`vmmback grow`: more secret RAM for a guest that runs. Every test of secret RAM has its twin on ordinary memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import secrets
import signal
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from integration.capabilities import INITRD, KERNEL
from integration.conftest import (
    GONE_S,
    MIB,
    ROOT,
    TINY_BYTES,
    Backing,
    LiveGuest,
    Start,
    Supervisor,
    eventually,
    frames_with,
    guest_file,
    prepared,
    processes_of,
    qemu_of,
    worker_of,
)
from integration.debian_kernel import cpio
from vmmback import grow, ram
from vmmback.errors import AdmissionRefused, CommandRefused, HandoffFailed, QemuFailed, UsageError
from vmmback.host.memory import HostMemory
from vmmback.isolation import qmp_proof
from vmmback.linux import procfs
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.linux.zones import Node, Zone
from vmmback.report import GuestVerdict

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_direct_map")

DIMM = 128 * MIB
ROOM = 'max = "272MiB"'  # of two DIMMs beside 16 MiB


def silent(done: int, total: int) -> None:
    """Show nothing."""


def grown(live: LiveGuest, size: int = DIMM) -> Any:
    return live.run(grow.grow(live.guest, size, silent))


def blocks_of(live: LiveGuest) -> set[str]:
    listed = live.run(live.guest.monitor.hmp("info ramblock"))
    return {name for name in qmp_proof.parse_ram_blocks(listed) if re.fullmatch(r"ram\d+", name)}


def mapped_by(pid: int) -> set[int]:
    return {mapping.inode for mapping in procfs.maps(pid) if mapping.path == procfs.SECRETMEM}


def held_by(pid: int | Literal["self"]) -> set[int]:
    return {held.inode for held in procfs.descriptors(pid) if held.path == procfs.SECRETMEM}


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[LiveGuest]:
    """A tiny guest on secret RAM that runs, and may grow twice. Unprefaulted, so that growing takes no time."""
    with prepared(guest_file(tmp_path, memory=f"{ROOM}\nprefault = false")) as live:
        live.start()
        yield live


@pytest.fixture
def growing_prefaulted(tmp_path: Path) -> Iterator[LiveGuest]:
    """The same, prefaulted."""
    with prepared(guest_file(tmp_path, memory=ROOM)) as live:
        live.start()
        yield live


def assert_as_before(live: LiveGuest) -> None:
    """Nothing of an attempt is left: no backend, no mapping, no descriptor in either process; the guest goes on."""
    assert blocks_of(live) == {"ram0"}
    assert len(live.guest.ram) == 1
    ours = {live.guest.ram[0].inode}
    assert held_by("self") == ours
    # QEMU unmaps and closes what object-del removed when no thread can use it any more (call_rcu, physmem.c).
    eventually(lambda: mapped_by(live.pid) == held_by(live.pid) == ours, "QEMU has nothing else")
    assert live.run(live.guest.monitor.execute("query-status"))["status"] == "running"
    assert live.run(live.guest.examine()).verdict is GuestVerdict.ISOLATED


# --- It grows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefault", ["true", "false"])
def test_a_guest_grows_twice_and_all_of_it_is_isolated(tmp_path: Path, prefault: str) -> None:
    with prepared(guest_file(tmp_path, memory=f"{ROOM}\nprefault = {prefault}")) as live:
        live.start()
        assert live.run(live.guest.examine()).memory.size == TINY_BYTES
        for times in (1, 2):
            report = grown(live)
            size = TINY_BYTES + times * DIMM
            assert (report.verdict, report.reasons) == (GuestVerdict.ISOLATED, ())
            assert report.memory.size == report.memory.secret == size
            present = report.memory.present_pages
            assert present == report.memory.checked_pages
            assert present == size // PAGE_SIZE if prefault == "true" else 0 < present <= TINY_BYTES // PAGE_SIZE
            assert len(live.run(live.guest.frames())) == size // PAGE_SIZE
        assert {block.name for block in report.ram_blocks if block.guest_writable} == {"ram0", "ram1", "ram2"}
        (exposure,) = [one for one in report.exposures if one.name == "pidfd-getfd"]
        assert "3 descriptor(s) copied" in exposure.detail
        with pytest.raises(UsageError, match="cannot grow any more: 272MiB is all that it may have"):
            grown(live)
        live.run(live.guest.qemu.kill())
        freed = live.guest.observe_freed_frames()
        assert freed
        assert freed.target.value == "blocked", freed
        assert f"of {present} former frames are zero" in freed.detail


def test_the_twin_on_ordinary_memory_grows_and_is_readable(tmp_path: Path) -> None:
    with prepared(guest_file(tmp_path, backing="ordinary", memory=ROOM)) as live:
        live.start()
        report = grown(live)
        assert report.verdict is GuestVerdict.EXPOSED
        assert (report.memory.size, report.memory.secret) == (TINY_BYTES + DIMM, 0)
        assert report.memory.readable_pages == report.memory.checked_pages == report.memory.size // PAGE_SIZE
        assert "RAM block ram1 is ordinary memory that the guest can write to" in report.reasons


def test_a_guest_grows_before_its_first_instruction_and_unvalidated(tmp_path: Path) -> None:
    """As with --no-validate: growing examines it for the first time."""
    with prepared(guest_file(tmp_path, memory=ROOM)) as live:
        assert live.guest.evidence is None
        assert grown(live).memory.checked_pages == (TINY_BYTES + DIMM) // PAGE_SIZE


# --- What cannot be is refused, and what fails leaves the guest as it was ---------------------------------------------


def test_sizes_that_cannot_be_are_refused_and_say_what_fits(growing: LiveGuest) -> None:
    for size, message, hint in (
        (MIB, "cannot grow by 1048576 bytes", "write a multiple of 128MiB, at most 256MiB"),
        (0, "cannot grow by 0 bytes", "write a multiple of 128MiB, at most 256MiB"),
        (3 * DIMM, "cannot grow by 384MiB: it has 16MiB, and [memory] max is 272MiB", "grow by at most 256MiB"),
    ):
        with pytest.raises(UsageError) as caught:
            grown(growing, size)
        assert message in caught.value.message
        assert caught.value.hint == hint
    assert_as_before(growing)


def test_a_guest_without_max_cannot_grow(guest_running: LiveGuest) -> None:
    with pytest.raises(UsageError, match=r"its file does not say how far") as caught:
        grown(guest_running)
    assert 'write for example max = "1040MiB"' in caught.value.hint


def test_admission_refuses_what_the_host_has_not(growing: LiveGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 MiB of it stay for the kernel; the rest has room for a DIMM, its page tables and little more.
    little = HostMemory((Node(0, (Zone("Normal", managed=1 << 30, free=DIMM + (106 << 20) + (64 << 20)),)),))
    monkeypatch.setattr(HostMemory, "read", lambda *_: little)
    with pytest.raises(AdmissionRefused, match=r"256 MiB of secret RAM do not fit: \d+ MiB do") as caught:
        grown(growing, 2 * DIMM)
    assert caught.value.hint == "grow by at most 128MiB, or free memory on the host"
    monkeypatch.undo()
    assert_as_before(growing)


@pytest.mark.parametrize("step", ["object-add", "handed_over", "mapped", "device_add"])
def test_an_attempt_that_fails_at_any_step_is_undone(
    growing: LiveGuest, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """That QEMU refuses is real: an open that is denied, slots that are taken."""
    expected: type[Exception] = CommandRefused
    if step == "object-add":  # QEMU's open is denied, as the offer is of another path
        monkeypatch.setattr(type(growing.guest.qemu), "_offer", lambda *_: None)
    elif step == "handed_over":

        async def never(*_: object) -> None:
            raise HandoffFailed("not taken")

        monkeypatch.setattr(type(growing.guest.qemu), "handed_over", never)
        expected = HandoffFailed
    elif step == "mapped":
        monkeypatch.setattr(procfs, "secret_mappings", lambda *_: [])
        expected = HandoffFailed
    else:  # both slots are taken by DIMMs that are not ours
        for number in (7, 8):
            backend = {"qom-type": "memory-backend-ram", "id": f"other{number}", "size": DIMM}
            growing.run(growing.guest.monitor.execute("object-add", backend))
            dimm = {"driver": "pc-dimm", "id": f"other-dimm{number}", "memdev": f"other{number}"}
            growing.run(growing.guest.monitor.execute("device_add", dimm))
    with pytest.raises(expected):
        grown(growing)
    monkeypatch.undo()
    if step == "device_add":
        assert blocks_of(growing) == {"ram0"}
        assert len(growing.guest.ram) == 1
        assert held_by("self") == {growing.guest.ram[0].inode}
    else:
        assert_as_before(growing)


@pytest.mark.parametrize("step", ["object-add", "device_add", "human-monitor-command"])
def test_qemu_that_is_killed_amid_it(growing: LiveGuest, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The last is the proof after the plugging. The descriptors go with the launch, or at once."""
    execute = type(growing.guest.monitor).execute

    async def killed(self: Any, name: str, arguments: Any = None) -> object:
        if name == step:
            os.kill(growing.pid, signal.SIGKILL)
        return await execute(self, name, arguments)

    monkeypatch.setattr(type(growing.guest.monitor), "execute", killed)
    with pytest.raises(QemuFailed):
        grown(growing)
    assert growing.guest.qemu.status == -signal.SIGKILL or growing.run(growing.guest.qemu.ended(30)) == -signal.SIGKILL
    assert not growing.guest.exposed.is_set()
    assert held_by("self") == {memory.inode for memory in growing.guest.ram}


def test_a_backend_of_any_other_path_is_denied_and_lands_on_no_file(growing: LiveGuest, runtime_dir: Path) -> None:
    """Through the full monitor, which clients do not have: QEMU would make an ordinary file."""
    folder = growing.guest.folder / "ram"
    folder.mkdir()  # so that QEMU could
    for name in ("ram1", "other"):
        backend = {"qom-type": "memory-backend-file", "id": name, "size": DIMM, "mem-path": str(folder / name)}
        with pytest.raises(CommandRefused, match="Permission denied"):
            growing.run(growing.guest.monitor.execute("object-add", backend))
    assert list(folder.iterdir()) == []
    folder.rmdir()
    assert_as_before(growing)


def test_new_ram_that_is_not_confirmed_ends_the_guest(growing: LiveGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside ours another DIMM of ordinary memory appears at the very moment."""
    execute = type(growing.guest.monitor).execute

    async def with_a_stranger(self: Any, name: str, arguments: Any = None) -> object:
        if name == "device_add":
            await execute(self, "object-add", {"qom-type": "memory-backend-ram", "id": "stranger", "size": DIMM})
            await execute(self, "device_add", {"driver": "pc-dimm", "memdev": "stranger"})
        return await execute(self, name, arguments)

    assert growing.run(growing.guest.examine()).verdict is GuestVerdict.ISOLATED
    monkeypatch.setattr(type(growing.guest.monitor), "execute", with_a_stranger)
    with pytest.raises(HandoffFailed, match="the guest could write to memory that is not ours: stranger"):
        grown(growing)
    assert growing.guest.qemu.status == -signal.SIGKILL
    assert growing.guest.exposed.is_set()
    report = growing.guest.report()
    assert report.verdict is GuestVerdict.EXPOSED
    assert "RAM block stranger is ordinary memory that the guest can write to" in report.reasons


def test_two_at_once_come_one_after_the_other(growing: LiveGuest) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(*(grow.grow(growing.guest, DIMM, silent) for _ in range(2)))

    first, second = growing.run(both())
    assert [r.memory.size for r in (first, second)] == [TINY_BYTES + DIMM, TINY_BYTES + 2 * DIMM]
    assert second.verdict is GuestVerdict.ISOLATED


def test_cancelled_during_the_prefault_nothing_is_left_and_later_it_is_finished(
    growing_prefaulted: LiveGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = growing_prefaulted

    async def cancelled_at(reached: asyncio.Event) -> None:
        work = asyncio.ensure_future(grow.grow(growing.guest, DIMM, lambda *_: reached.set()))
        await reached.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    growing.run(cancelled_at(asyncio.Event()))
    assert_as_before(growing)
    plugging = asyncio.Event()
    confirm = grow._confirm_mapped

    def confirm_and_tell(*each: Any) -> None:
        plugging.set()
        confirm(*each)

    monkeypatch.setattr(grow, "_confirm_mapped", confirm_and_tell)
    monkeypatch.setattr(ram.Ram, "prefault", _nothing)
    growing.run(cancelled_at(plugging))
    assert blocks_of(growing) == {"ram0", "ram1"}
    assert growing.run(growing.guest.examine()).memory.secret == TINY_BYTES + DIMM


async def _nothing(*_: object, **__: object) -> None:
    return None


# --- Linux uses it ----------------------------------------------------------------------------------------------------

# Put into the demo guest's init before it fills its RAM: what it fills is old memory and new.
WAITS = """
total() { while read -r key value _; do [ "$key" != MemTotal: ] || echo "$value"; done </proc/meminfo; }
before=$(total)
echo "WAITS TO GROW"
while [ "$(total)" = "$before" ]; do usleep 10000; done
echo "GREW BY $(($(total) - before)) KiB"
"""
FILLS = "# MemAvailable is in KiB."


def linux_file(folder: Path, backing: Backing) -> Path:
    """Write the file of a Linux guest that says so when it waits to grow by a DIMM, and then fills its RAM."""
    init = (ROOT / "configs/guest/init").read_text()
    assert FILLS in init
    archive = cpio({"init": init.replace(FILLS, WAITS + FILLS, 1).encode()})
    initrd = folder / "waits.img"
    initrd.write_bytes(INITRD.read_bytes() + gzip.compress(archive, 1))
    path = folder / "linux.toml"
    path.write_text(
        f'name = "linux-{secrets.token_hex(4)}"\n'
        f'[memory]\nsize = "160MiB"\nmax = "288MiB"\nbacking = "{backing}"\n'
        f'[cpu]\nmodel = "max,-erms,-fsrm"\n[machine]\naccel = "tcg"\n'
        f'[boot]\nkernel = "{KERNEL}"\ninitrd = "{initrd}"\n'
        'cmdline = "console=ttyS0 panic=-1 no_timer_check memhp_default_state=online"\n'
        '[isolation]\nready = "WAITS TO GROW"\n'
    )
    return path


@pytest.mark.usefixtures("needs_guest_kernel")
def test_linux_fills_its_new_ram_with_a_canary_that_only_the_twins_host_can_read(
    tmp_path: Path, backing: Backing
) -> None:
    with prepared(linux_file(tmp_path, backing)) as live:
        live.start()

        def filled() -> bool:
            live.run(asyncio.sleep(0.02))  # the console is read meanwhile
            return b"GUEST READY" in live.watcher.printed

        grown(live)
        eventually(filled, "the guest has filled its RAM", 60)
        report = live.run(live.guest.examine())
        printed = live.watcher.printed.decode()
        assert "GREW BY 131072 KiB" in printed
        (fingerprint,) = re.findall(r"vmmback-canary sha256:([0-9a-f]{64})", printed)
        frames = live.run(live.guest.frames())
        dimm = frames[160 * MIB // PAGE_SIZE :]
        assert len(dimm) == DIMM // PAGE_SIZE
        memory = report.memory
        assert memory.size == 288 * MIB
        assert memory.checked_pages == memory.present_pages == memory.size // PAGE_SIZE
        if backing == "secret":
            assert (report.verdict, report.reasons) == (GuestVerdict.ISOLATED, ())
            assert frames_with(fingerprint, dimm) == 0
        else:
            assert report.verdict is GuestVerdict.EXPOSED
            assert memory.readable_pages == memory.checked_pages
            assert frames_with(fingerprint, dimm) > len(dimm) // 2  # so the guest wrote into the DIMM
        live.run(live.guest.qemu.kill())
        freed = live.guest.observe_freed_frames()
        assert freed
        assert freed.target.value == ("blocked" if backing == "secret" else "readable"), freed
        if backing == "secret":
            assert frames_with(fingerprint, dimm) == 0
            assert zero_frames(dimm) > len(dimm) // 8  # the rest is in use again


def zero_frames(entries: array[int]) -> int:
    with DirectMap.open() as direct_map:
        zeroness = direct_map.zeroness(entries)
    return zeroness.readable - zeroness.nonzero


# --- `vmmback grow` from outside --------------------------------------------------------------------------------------


@dataclass
class Launched:
    """A guest that `vmmback launch` runs, validated, and may grow by 1 GiB."""

    name: str
    supervisor: Supervisor
    qemu: int


@pytest.fixture
def launched(tmp_path: Path, runtime_dir: Path, vmmback: Start) -> Launched:
    file = guest_file(tmp_path, memory='max = "1040MiB"')
    supervisor = vmmback("launch", file, "--json")
    supervisor.wait_for("is isolated while it runs")
    (qemu,) = qemu_of(runtime_dir)
    return Launched(file.stem, supervisor, qemu)


def end(launched: Launched) -> Any:
    """End the guest, whose ROM ignores its power button, and return its report."""
    for signum in (signal.SIGTERM, signal.SIGINT):  # two of a kind may be delivered as one
        launched.supervisor.process.send_signal(signum)
    ended = launched.supervisor.ended()
    assert ended.code == 0, ended.stderr
    return json.loads(ended.stdout)


def test_grow_as_a_command(launched: Launched, vmmback: Start) -> None:
    ended = vmmback("grow", launched.name, "128MiB", "--json").ended()
    assert ended.code == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["verdict"] == "isolated"
    assert report["memory"]["size"] == report["memory"]["secret"] == TINY_BYTES + DIMM
    assert f"guest {launched.name} has 144 MiB of RAM now" in ended.stderr
    ended = vmmback("grow", launched.name, "1GiB").ended()
    assert (ended.code, ended.stdout, ended.has_one_error()) == (2, "", True), ended
    assert "grow by at most 896MiB" in ended.stderr
    report = end(launched)
    assert (report["verdict"], report["memory"]["size"]) == ("isolated", TINY_BYTES + DIMM)
    assert "the guest has grown by 128MiB to 144MiB" in launched.supervisor.stderr


def test_ctrl_c_amid_the_prefault_takes_it_back(launched: Launched, vmmback: Start, runtime_dir: Path) -> None:
    client = vmmback("grow", launched.name, "1GiB")
    client.wait_until(lambda: bool(worker_of(runtime_dir)), "the new RAM is prefaulted")
    client.signal(signal.SIGINT)
    ended = client.ended()
    assert (ended.code, ended.has_one_error()) == (130, True), ended.stderr
    eventually(lambda: not worker_of(runtime_dir), "the prefault is given up")
    eventually(lambda: len(held_by(launched.supervisor.process.pid)) == 1, "the new RAM is given back")
    assert len(mapped_by(launched.qemu)) == 1
    assert vmmback("grow", launched.name, "128MiB", "--json").ended().code == 0
    assert end(launched)["memory"]["size"] == TINY_BYTES + DIMM
    assert "Traceback" not in launched.supervisor.stderr


@pytest.mark.parametrize("victim", ["QEMU", "the supervisor"])
def test_sigkill_amid_a_grow_leaves_nothing(launched: Launched, vmmback: Start, runtime_dir: Path, victim: str) -> None:
    inodes = mapped_by(launched.qemu)
    client = vmmback("grow", launched.name, "1GiB")
    client.wait_until(lambda: bool(worker_of(runtime_dir)), "the new RAM is prefaulted")
    inodes |= held_by(launched.supervisor.process.pid)
    assert len(inodes) == 2
    os.kill(launched.qemu if victim == "QEMU" else launched.supervisor.process.pid, signal.SIGKILL)
    ended = client.ended()
    assert (ended.code, ended.has_one_error()) == (6, True), ended.stderr
    assert "the guest ended meanwhile" in ended.stderr
    of_launch = launched.supervisor.ended()
    assert of_launch.code == (6 if victim == "QEMU" else -signal.SIGKILL)
    assert "Traceback" not in of_launch.stderr
    eventually(lambda: not processes_of(runtime_dir), "all processes are gone", GONE_S)


# `vmmback` beside whose DIMM another of ordinary memory appears.
WITH_A_STRANGER = """
from vmmback import cli
from vmmback.monitor import Monitor

execute = Monitor.execute

async def with_a_stranger(self, name, arguments=None):
    if name == "device_add":
        await execute(self, "object-add", {"qom-type": "memory-backend-ram", "id": "stranger", "size": 128 << 20})
        await execute(self, "device_add", {"driver": "pc-dimm", "memdev": "stranger"})
    return await execute(self, name, arguments)

Monitor.execute = with_a_stranger
cli.main()
"""


@pytest.mark.parametrize("options", [(), ("--no-validate",)], ids=["validated", "never validated"])
def test_ram_that_is_not_confirmed_ends_the_guest_whatever_its_file_says(
    tmp_path: Path, start: Start, vmmback: Start, options: tuple[str, ...]
) -> None:
    file = guest_file(tmp_path, memory=f"{ROOM}\nprefault = false", isolation='on-exposed = "warn"')
    launch = start(sys.executable, "-c", WITH_A_STRANGER, "launch", str(file), "--json", *options)
    launch.wait_for("READY" if options else "is isolated while it runs")
    client = vmmback("grow", file.stem, "128MiB").ended()
    assert (client.code, client.stdout, client.has_one_error()) == (6, "", True), client
    assert "the guest could write to memory that is not ours: stranger" in client.stderr
    ended = launch.ended()
    assert (ended.code, "Traceback" in ended.stderr) == (5, False), ended.stderr
    assert "the guest is ended, as its new RAM was not confirmed" in ended.stderr
    report = json.loads(ended.stdout)
    assert report["verdict"] == "exposed"
    assert "RAM block stranger is ordinary memory that the guest can write to" in report["reasons"]
