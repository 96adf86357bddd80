"""QEMU's RAM blocks beside the guest's RAM: named as ordinary where QEMU cannot help it, and secret where it can."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TextIO

import pytest

from integration.conftest import (
    MIB,
    TINY_BYTES,
    LiveGuest,
    Recorder,
    eventually,
    guest_file,
    open_descriptors,
    prepared,
)
from integration.test_memlock import unprivileged
from integration.test_tiny_guest import plain_qemu
from vmmback import answers, command, config, handoff, launch
from vmmback.command import QemuCommand
from vmmback.errors import QemuFailed
from vmmback.host import qemu
from vmmback.isolation import exposures, qmp_proof
from vmmback.linux import procfs
from vmmback.linux.memfd_secret import memfd_secret
from vmmback.report import GuestVerdict, RamBlock, Verdict

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_direct_map")

FIRMWARE = {"pc.bios", "pc.rom"}
TABLES = {"/rom@etc/acpi/tables", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp"}
ROM = 0xFE000000


def blocks_of(proof: qmp_proof.Proof) -> dict[str, RamBlock]:
    return {block.name: block for block in proof.ram_blocks}


def take(live: LiveGuest) -> qmp_proof.Proof:
    proof: qmp_proof.Proof = live.run(qmp_proof.observe(live.guest.target, live.guest.monitor.hmp))
    return proof


@pytest.fixture
def graphics(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let QEMU have a graphics card, and its own firmware, which maps that."""

    def change() -> None:
        build = command.build

        def build_changed(*arguments: Any) -> QemuCommand:
            made = build(*arguments)
            argv = list(made.argv)
            argv[argv.index("-vga") + 1] = "std"
            at = argv.index("-bios")
            del argv[at : at + 2]
            return QemuCommand(tuple(argv), made.descriptors)

        monkeypatch.setattr(command, "build", build_changed)

    return change


@pytest.fixture
def without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a QEMU that cannot share its other RAM blocks, whatever is installed."""
    monkeypatch.setattr(launch, "can_share_aux_ram", lambda *_: False)


# --- A QEMU that cannot -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_sharing")
def test_without_sharing_they_are_named_as_ordinary(tmp_path: Path) -> None:
    with prepared(guest_file(tmp_path)) as live:
        live.start()
        report = live.run(live.guest.examine())
        evidence = live.guest.evidence
        assert evidence is not None
    assert live.guest.qemu.auxiliary_inodes == frozenset()
    assert "aux-ram-share" not in " ".join(live.guest.qemu.argv)
    blocks = blocks_of(evidence.proof)
    assert blocks.keys() == FIRMWARE | TABLES | {"ram0"}
    assert {name for name, block in blocks.items() if block.backing == "ordinary"} == FIRMWARE | TABLES
    (named,) = [exposure for exposure in evidence.exposures if exposure.name == "ordinary-ram-blocks"]
    assert all(name in named.detail for name in FIRMWARE | TABLES)
    assert report.verdict is GuestVerdict.ISOLATED  # the guest can write to none of them
    assert {one.backing for one in report.memory_map if one.block in FIRMWARE} == {"ordinary"}


def test_a_guest_on_ordinary_memory_has_no_secret_block(ordinary_guest_running: LiveGuest) -> None:
    """The twin, also where QEMU could."""
    proof = take(ordinary_guest_running)
    assert {block.backing for block in proof.ram_blocks} == {"ordinary"}
    assert ordinary_guest_running.guest.qemu.auxiliary_inodes == frozenset()
    assert {one.backing for one in proof.memory_map if one.block} == {"ordinary"}


def test_where_the_limit_has_no_room_for_them_qemu_is_not_asked(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\nfrom vmmback.host import qemu\n"
        f"qemu.AUX_RAM_BYTES = {4 * MIB}\n"  # a limit of 8 MiB is what any process may set
        f"print(qemu.can_share_aux_ram(Path(sys.argv[1]), 'q35', {4 * MIB}))\n"
    )
    could = qemu.can_share_aux_ram(qemu.find_qemu(), "q35", 0)
    for limit in (8 * MIB - 4096, 8 * MIB):
        result = unprivileged(program, limit, limit, str(qemu.find_qemu()))
        assert result.stdout.strip() == str(could and limit == 8 * MIB), result.stderr


# --- What the guest cannot write to -----------------------------------------------------------------------------------


class Bus:
    """What a guest's CPU would read and write, asked for by qtest (docs/devel/qtest.rst of QEMU)."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines

    def do(self, command: str) -> str:
        """Return the answer without its OK."""
        print(command, file=self._lines, flush=True)
        answer = self._lines.readline().split()
        assert answer[0] == "OK", answer
        return " ".join(answer[1:])

    def changed_by_writing(self, address: int) -> bool:
        before = int(self.do(f"readl {address:#x}"), 16)
        self.do(f"writel {address:#x} {before ^ 0xFFFFFFFF:#x}")
        return int(self.do(f"readl {address:#x}"), 16) != before


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    """A machine with firmware in flash and a nic in slot 2, whose option ROM is mapped at ROM."""
    flash, path = tmp_path / "flash", tmp_path / "qtest"
    flash.write_bytes(bytes(range(256)) * 1024)  # the option ROM, too
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(60)
        with plain_qemu(
            64 * MIB, "-S", "-drive", f"if=pflash,format=raw,readonly=on,file={flash}", "-netdev", "user,id=n",
            "-device", f"virtio-net-pci,addr=2,netdev=n,romfile={flash}",
            "-qtest", f"unix:{path}", "-qtest-log", "/dev/null",
        ) as qemu:  # fmt: skip
            connection, _ = listening.accept()
            connection.settimeout(60)
            with connection, connection.makefile("rw") as lines:
                bus = Bus(lines)
                for register, value in ((0x04, 2), (0x30, ROM | 1)):
                    bus.do(f"outl 0xcf8 {0x80001000 | register:#x}")
                    bus.do(f"outl 0xcfc {value:#x}")
                listed = qemu.execute("human-monitor-command", **{"command-line": "info ramblock"})
                assert {"isa-bios", "0000:00:02.0/virtio-net-pci.rom"} <= set(listed.split())
                yield bus


@pytest.mark.parametrize("address", [ROM, 0xE0000, 0xFFFFFFF0], ids=["option ROM", "isa-bios", "flash"])
def test_roms_do_not_change_when_the_guest_writes_to_them(bus: Bus, address: int) -> None:
    assert int(bus.do(f"readl {address:#x}"), 16) not in {0, 0xFFFFFFFF}
    assert not bus.changed_by_writing(address)


def test_ram_does(bus: Bus) -> None:
    """The twin."""
    assert bus.changed_by_writing(0x1000)


# --- A QEMU that can --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["paused", "running"])
def shared_guest(request: pytest.FixtureRequest, needs_aux_ram_share: None, tmp_path: Path) -> Iterator[LiveGuest]:
    """A tiny guest all of whose RAM blocks are secret, before its first instruction and once it is READY."""
    with prepared(guest_file(tmp_path)) as live:
        if request.param == "running":
            live.start()
        yield live


def test_all_blocks_are_secret(shared_guest: LiveGuest) -> None:
    proof = take(shared_guest)
    assert (proof.observation.target, proof.observation.control) == (Verdict.BLOCKED, Verdict.READABLE)
    blocks = blocks_of(proof)
    assert blocks.keys() == FIRMWARE | TABLES | {"ram0"}
    assert {block.backing for block in blocks.values()} == {"secretmem"}
    assert proof.secret == TINY_BYTES  # the guest's RAM alone
    assert list(proof.ours.values()) == [{"ram0": TINY_BYTES}]
    assert proof.auxiliary.keys() == FIRMWARE | TABLES
    assert sum(proof.auxiliary.values()) < qemu.AUX_RAM_BYTES
    assert exposures.ordinary_blocks_exposure(proof.ram_blocks) is None
    assert {one.backing for one in proof.memory_map if one.block} == {"secretmem"}


def test_the_kernel_cannot_read_them(shared_guest: LiveGuest) -> None:
    report = shared_guest.run(shared_guest.guest.examine())
    evidence = shared_guest.guest.evidence
    assert evidence is not None
    (direct_map,) = [seen for seen in evidence.observations if seen.probe == "direct-map"]
    assert (direct_map.target, direct_map.control) == (Verdict.BLOCKED, Verdict.READABLE)
    assert ", and 0 of " in direct_map.detail
    assert " of QEMU's other secret RAM blocks (EFAULT)" in direct_map.detail
    assert (evidence.pages.present, evidence.pages.readable) == (TINY_BYTES // procfs.PAGE_SIZE, 0)
    assert "ordinary-ram-blocks" not in {exposure.name for exposure in evidence.exposures}
    assert report.verdict is GuestVerdict.ISOLATED


def test_qemu_alone_holds_them(shared_guest: LiveGuest) -> None:
    ours = [link for link in open_descriptors().values() if link == procfs.SECRETMEM]
    assert len(ours) == 1  # the guest's RAM
    inodes = {m.inode for m in procfs.maps(shared_guest.pid) if m.path == procfs.SECRETMEM}
    assert inodes == shared_guest.guest.qemu.auxiliary_inodes | shared_guest.guest.target.ram.keys()


@pytest.mark.usefixtures("needs_aux_ram_share")
def test_video_memory_is_secret(tmp_path: Path, graphics: Callable[[], None]) -> None:
    """On ordinary memory it would expose the guest (test_qmp_proof.py)."""
    graphics()
    with prepared(guest_file(tmp_path)) as live:
        live.run(live.guest.monitor.cont())
        eventually(
            lambda: any(one.region == "vga.vram" for one in take(live).memory_map),
            "SeaBIOS has mapped the video memory",
        )
        proof = take(live)
        maps = procfs.maps(live.pid)
    assert proof.observation.target is Verdict.BLOCKED
    (video,) = [block for name, block in blocks_of(proof).items() if name.endswith("/vga.vram")]
    assert (video.backing, video.guest_writable) == ("secretmem", True)
    assert {block.backing for block in proof.ram_blocks} == {"secretmem"}
    assert proof.secret == TINY_BYTES
    assert not [mapping for mapping in maps if mapping.path.startswith("/memfd:")]  # nor is the picture of the screen


@pytest.mark.usefixtures("needs_aux_ram_share")
@pytest.mark.parametrize("seal", ["on", "off"])
def test_memory_that_is_plugged_in_later_is_secret_too(tmp_path: Path, seal: str) -> None:
    """Of a memfd backend, which QEMU makes long enough and seals; prealloc touches it all."""
    with prepared(guest_file(tmp_path)) as live:
        said = live.run(
            live.guest.monitor.hmp(f"object_add memory-backend-memfd,id=more,size=4M,seal={seal},prealloc=on")
        )
        assert said == ""
        mapped = [m for m in procfs.maps(live.pid) if m.path == procfs.SECRETMEM and m.size == 4 * MIB]
        assert {m.inode for m in mapped} <= live.guest.qemu.auxiliary_inodes
        assert len(mapped) == 1


@pytest.mark.usefixtures("needs_aux_ram_share")
def test_memory_longer_than_its_secret_stand_in_is_refused(tmp_path: Path) -> None:
    with prepared(guest_file(tmp_path)) as live:
        said = live.run(live.guest.monitor.hmp("object_add memory-backend-memfd,id=more,size=5G,reserve=off"))
        assert os.strerror(errno.EFBIG) in said


@pytest.mark.usefixtures("needs_aux_ram_share")
@pytest.mark.parametrize("nth", [1, 3, 5])
def test_without_a_descriptor_for_one_of_them_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """No block is ordinary by oversight: QEMU says which call failed, and ends."""
    made = 0

    def refuse_nth() -> int:
        nonlocal made
        made += 1
        if made == nth:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        return memfd_secret()

    monkeypatch.setattr(answers, "memfd_secret", refuse_nth)
    with pytest.raises(QemuFailed, match=os.strerror(errno.ENFILE)), prepared(guest_file(tmp_path)):
        pass
    assert made == nth


@pytest.mark.usefixtures("needs_aux_ram_share")
def test_a_block_that_became_ordinary_all_the_same_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evidence decides, and not that QEMU was told to share: here the handoff gives it ordinary memfds."""
    monkeypatch.setattr(answers, "memfd_secret", lambda: os.memfd_create("impostor", os.MFD_CLOEXEC))
    with prepared(guest_file(tmp_path)) as live:
        assert len(live.guest.qemu.auxiliary_inodes) == 5
        proof = take(live)
    assert {block.name for block in proof.ram_blocks if block.backing == "ordinary"} == FIRMWARE | TABLES
    assert exposures.ordinary_blocks_exposure(proof.ram_blocks) is not None
    assert proof.auxiliary == {}


@pytest.mark.usefixtures("needs_aux_ram_share")
def test_a_launch_that_is_stopped_while_qemu_starts_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled right after each of the first answers to QEMU; conftest.py looks for what is left."""
    answer_next = handoff.Qemu._answer_next
    left = 0
    preparing: asyncio.Task[None]

    def answer_and_stop(qemu: handoff.Qemu) -> None:
        nonlocal left
        answer_next(qemu)
        left -= 1
        if left == 0:
            preparing.cancel()

    async def prepare() -> None:
        async with AsyncExitStack() as stack:
            await launch.prepare(config.load(guest_file(tmp_path)), Recorder(), stack)

    async def stopped_after(answers: int) -> bool:
        nonlocal left, preparing
        left = answers
        preparing = asyncio.create_task(prepare())
        await asyncio.wait({preparing})
        return preparing.cancelled()

    monkeypatch.setattr(handoff.Qemu, "_answer_next", answer_and_stop)
    assert [asyncio.run(stopped_after(answers)) for answers in range(1, 14, 2)] == [True] * 7
