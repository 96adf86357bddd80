"""The QMP proof on a real QEMU, and a launch that refuses to start a guest whose memory is not where it must be."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import (
    TINY_BYTES,
    Backing,
    LiveGuest,
    eventually,
    guest_file,
    prepared,
)
from vmmback import command, launch, ram
from vmmback.command import QemuCommand
from vmmback.errors import HandoffFailed
from vmmback.isolation import qmp_proof
from vmmback.isolation.probe import Target
from vmmback.report import RamBlock, Verdict

Change = Callable[[list[str]], None]


def take(live: LiveGuest, target: Target | None = None) -> qmp_proof.Proof:
    proof: qmp_proof.Proof = live.run(qmp_proof.observe(target or live.guest.target, live.guest.monitor.hmp))
    return proof


@pytest.mark.parametrize("state", ["paused", "running"])
def test_all_guest_writable_memory_is_the_one_secret_block(
    state: str, guest_paused: LiveGuest, other_blocks: str
) -> None:
    if state == "running":
        guest_paused.start()
    proof = take(guest_paused)
    assert (proof.observation.target, proof.observation.control) == (Verdict.BLOCKED, Verdict.READABLE)
    assert (
        f"all {TINY_BYTES >> 10} KiB lie in secretmem inode {guest_paused.guest.ram[0].inode}"
        in proof.observation.detail
    )
    told_apart = r"pc\.\w+" if other_blocks == "ordinary" else "QEMU's heap"
    assert re.search(rf"; {told_apart} was told apart as ordinary$", proof.observation.detail)
    writable = [block for block in proof.ram_blocks if block.guest_writable]
    assert writable == [RamBlock(name="ram0", size=TINY_BYTES, backing="secretmem", guest_writable=True)]
    assert {block.backing for block in proof.ram_blocks if not block.guest_writable} == {other_blocks}
    assert proof.secret == TINY_BYTES
    assert list(proof.ours.values()) == [{"ram0": TINY_BYTES}]


def test_its_twin_is_readable(ordinary_guest_running: LiveGuest) -> None:
    proof = take(ordinary_guest_running)
    assert (proof.observation.target, proof.observation.control) == (Verdict.READABLE, Verdict.READABLE)
    assert proof.observation.detail.startswith("the guest can write to ordinary memory: ram0")
    assert proof.secret == 0
    assert list(proof.ours.values()) == [{"ram0": TINY_BYTES}]


def test_another_inode_is_not_ours(guest_paused: LiveGuest) -> None:
    """Secret RAM, but of somebody else: the kernel's list of mappings decides, not QEMU's word."""
    target = guest_paused.guest.target
    proof = take(guest_paused, Target(target.pid, {inode + 1_000_000: size for inode, size in target.ram.items()}))
    assert proof.observation.target is Verdict.READABLE
    assert (proof.secret, list(proof.ours.values())) == (0, [{}])


def test_another_size_is_no_proof(guest_paused: LiveGuest) -> None:
    target = guest_paused.guest.target
    proof = take(guest_paused, Target(target.pid, {inode: 2 * size for inode, size in target.ram.items()}))
    assert proof.observation.target is Verdict.INCONCLUSIVE
    assert f"{TINY_BYTES} of {2 * TINY_BYTES} bytes" in proof.observation.detail


# --- A guest that must not start --------------------------------------------------------------------------------------


def change_command(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let QEMU be started with another command line than the one that the product builds."""
    build = command.build

    def build_changed(*arguments: Any) -> QemuCommand:
        made = build(*arguments)
        argv = list(made.argv)
        change(argv)
        return QemuCommand(tuple(argv), made.descriptors)

    monkeypatch.setattr(command, "build", build_changed)


def refused(file: Path) -> str:
    """Try to bring a guest up; return why it was refused. It must not have run."""
    serial_log = file.with_suffix(".serial.log")
    with pytest.raises(HandoffFailed) as caught, prepared(file):
        pass
    assert caught.value.exit_code == 6
    assert serial_log.read_bytes() == b""
    return caught.value.message


def test_the_same_steps_run_a_guest_that_is_as_it_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_qemu: None
) -> None:
    """The twin of all that is refused below: nothing that these tests do to the command stands in the way by itself."""
    change_command(monkeypatch, lambda argv: None)
    file = guest_file(tmp_path)
    with prepared(file) as live:
        live.start()
    assert b"READY" in file.with_suffix(".serial.log").read_bytes()


def test_ordinary_ram_that_is_said_to_be_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_qemu: None
) -> None:
    """The mistake that must never go unnoticed: config, code and QEMU all say secret, and the memory is ordinary."""

    class Impostor(ram.Ram):
        backing = "secret"

        def _create(self) -> int:
            descriptor = os.memfd_create("vmmback-impostor", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, self.size)
            return descriptor

    def allocate(_: Backing, size: int) -> ram.Ram:
        return Impostor(size)

    monkeypatch.setattr(ram, "allocate", allocate)
    assert f"0 of {TINY_BYTES} bytes of its RAM are secret" in refused(guest_file(tmp_path))


def test_ram_that_is_not_from_the_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_qemu: None) -> None:
    """QEMU takes the descriptor for one backend, and gives the guest another."""

    def change(argv: list[str]) -> None:
        argv[argv.index("-machine") + 1] = argv[argv.index("-machine") + 1].replace("=ram0,", "=other,")
        argv += ["-object", f"memory-backend-ram,id=other,size={TINY_BYTES}"]

    change_command(monkeypatch, change)
    assert "the guest could write to memory that is not ours: other" in refused(guest_file(tmp_path))


def test_a_device_with_memory_of_its_own_that_is_mapped_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_qemu: None
) -> None:
    """A DIMM of ordinary memory beside the guest's RAM."""

    def change(argv: list[str]) -> None:
        argv[argv.index("-m") + 1] += ",slots=1,maxmem=1G"
        argv += ["-object", "memory-backend-ram,id=more,size=128M", "-device", "pc-dimm,memdev=more"]

    change_command(monkeypatch, change)
    assert "the guest could write to memory that is not ours: more" in refused(guest_file(tmp_path))


@pytest.fixture
def ordinary_blocks(monkeypatch: pytest.MonkeyPatch, needs_qemu: None) -> None:
    """Let QEMU's other RAM blocks be ordinary memory, as those of any QEMU were before 10.0."""
    monkeypatch.setattr(launch, "can_share_aux_ram", lambda *_: False)


@pytest.mark.usefixtures("ordinary_blocks")
def test_video_memory_which_only_firmware_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No flat view shows it before the guest's firmware sets the card's address: it is refused all the same."""

    def change(argv: list[str]) -> None:
        argv[argv.index("-vga") + 1] = "std"

    change_command(monkeypatch, change)
    assert "vga.vram" in refused(guest_file(tmp_path))


@pytest.mark.usefixtures("ordinary_blocks")
def test_video_memory_once_it_is_mapped_is_named_as_ordinary_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With -vga std and QEMU's own firmware, which maps the card: past confirm(), the proof is what sees it."""

    def change(argv: list[str]) -> None:
        argv[argv.index("-vga") + 1] = "std"
        at = argv.index("-bios")
        del argv[at : at + 2]  # SeaBIOS

    change_command(monkeypatch, change)
    monkeypatch.setattr("vmmback.guest.confirm", lambda *_: None)
    with prepared(guest_file(tmp_path)) as live:
        live.run(live.guest.monitor.cont())
        eventually(lambda: take(live).observation.target is Verdict.READABLE, "SeaBIOS has mapped the video memory")
        proof = take(live)
    assert "the guest can write to ordinary memory: " in proof.observation.detail
    (video,) = [block for block in proof.ram_blocks if block.name.endswith("vga.vram")]
    assert (video.backing, video.guest_writable) == ("ordinary", True)
    assert proof.secret == TINY_BYTES  # and the guest's RAM is what it was
