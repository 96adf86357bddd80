"""What a domain of libvirt's may hand through to QEMU, by QEMU itself: it brings no RAM block, and others do."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.test_tiny_guest import MIB, plain_qemu
from vmmback.isolation.qmp_proof import parse_ram_blocks
from vmmback.libvirt.domain_arguments import KNOWN, refused_arguments

pytestmark = pytest.mark.usefixtures("needs_qemu")

FILE = "opt/file"
PASS = [
    ("-acpitable", f"sig=SSDT,data={FILE}"),
    ("-fw_cfg", "name=opt/org.example/role,string=web"),
    ("-fw_cfg", f"name=genroms/one.rom,file={FILE}"),  # what firmware takes for an option ROM
    ("-smbios", "type=11,value=one"),
    ("-device", f"isa-applesmc,iobase=0x300,id=one,osk={'x' * 64}"),
    ("-device", "isa-debug-exit"),
    ("-device", "iobase=0xf4,iosize=0x04,driver=isa-debug-exit,id=one"),
    ("-device", '{"iobase": 244, "driver": "isa-debug-exit"}'),
]
REFUSED = [
    ("-device", "VGA"),
    ("-device", "isa-debug-exit,driver=VGA"),
    ("-device", "id=one,driver=VGA"),
    ("-device", "{'driver': 'VGA'}"),
    ("--vga", "std"),
    ("-device", f"virtio-rng-pci,romfile={FILE}"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(b"\x55\xaa" + bytes(510))


def ram_blocks(*arguments: str) -> set[tuple[str, int]]:
    """Return name and size in bytes of each RAM block of a QEMU with these arguments."""
    with plain_qemu(64 * MIB, "-S", *arguments) as qemu:
        listed = str(qemu.execute("human-monitor-command", **{"command-line": "info ramblock"}))
    return set(parse_ram_blocks(listed).items())


def test_all_that_may_pass_is_tried() -> None:
    tried = [" ".join(each) for each in PASS]
    assert [known for known in KNOWN if not any(each.startswith(known) for each in tried)] == []


@pytest.mark.parametrize("arguments", PASS, ids=" ".join)
def test_what_may_pass_brings_no_ram_block(arguments: tuple[str, str]) -> None:
    assert list(refused_arguments(arguments)) == []
    assert ram_blocks(*arguments) == ram_blocks()


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_is_refused_can_bring_one(arguments: tuple[str, str]) -> None:
    """The twin: QEMU understands it."""
    assert list(refused_arguments(arguments)) == [(0, " ".join(arguments))]
    assert ram_blocks(*arguments) > ram_blocks()


def test_what_pstore_of_libvirts_would_bring() -> None:
    """It is refused as a device that is not known (docs/LIBVIRT.md)."""
    pstore = ram_blocks("-object", "memory-backend-ram,id=kept,size=64K", "-device", "acpi-erst,memdev=kept")
    assert {name.rpartition("/")[2] for name, _ in pstore - ram_blocks()} == {"kept", "erst.exchange"}
