"""QEMU's command line, compared as text, and what no configuration can do to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.command import Device, QemuCommand, build
from vmmback.config import GuestConfig
from vmmback.toml_tables import WrongTables

QEMU = Path("/usr/bin/qemu-system-x86_64")
MEM_PATH = Path("/run/vmmback/demo/ram/ram0")

KERNEL_GUEST: dict[str, Any] = {
    "name": "demo",
    "memory": {"size": "256MiB"},
    "cpu": {"count": 2, "model": "max,-erms,-fsrm"},
    "boot": {"kernel": "/g/vmlinuz", "initrd": "/g/initrd.img", "cmdline": "console=ttyS0 panic=-1"},
}
FIRMWARE_GUEST: dict[str, Any] = {
    "name": "a.b-c",
    "memory": {"size": "1032KiB"},
    "boot": {"firmware": "/g/OVMF.fd"},
}

# One argument a line.
KERNEL_ARGV = """\
/usr/bin/qemu-system-x86_64
-name
guest=demo
-S
-no-user-config
-nodefaults
-no-reboot
-sandbox
on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine
q35,memory-backend=ram0,mem-merge=off,dump-guest-core=off
-accel
tcg
-cpu
max,-erms,-fsrm
-smp
2
-m
268435456B
-object
{"qom-type": "memory-backend-file", "id": "ram0", "size": 268435456, "mem-path": "/run/vmmback/demo/ram/ram0", \
"share": true, "merge": false, "dump": false}
-display
none
-vga
none
-chardev
socket,id=qmp,fd=7
-mon
chardev=qmp,mode=control
-chardev
socket,id=serial,fd=9
-serial
chardev:serial
-object
rng-random,id=rng0,filename=/dev/urandom
-device
virtio-rng-pci,rng=rng0
-kernel
/g/vmlinuz
-append
console=ttyS0 panic=-1
-initrd
/g/initrd.img"""

FIRMWARE_ARGV = """\
/usr/bin/qemu-system-x86_64
-name
guest=a.b-c
-S
-no-user-config
-nodefaults
-no-reboot
-sandbox
on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine
q35,memory-backend=ram0,mem-merge=off,dump-guest-core=off
-accel
kvm
-cpu
max
-smp
1
-m
1056768B
-object
{"qom-type": "memory-backend-file", "id": "ram0", "size": 1056768, "mem-path": "/run/vmmback/demo/ram/ram0", \
"share": true, "merge": false, "dump": false}
-display
none
-vga
none
-chardev
socket,id=qmp,fd=7
-mon
chardev=qmp,mode=control
-chardev
socket,id=serial,fd=9
-serial
chardev:serial
-object
rng-random,id=rng0,filename=/dev/urandom
-device
virtio-rng-pci,rng=rng0
-bios
/g/OVMF.fd"""


def command(tables: dict[str, Any], accel: str = "tcg", mem_path: Path = MEM_PATH) -> QemuCommand:
    return build(GuestConfig.of(tables), QEMU, accel, mem_path, 7, 9)


def value(argv: tuple[str, ...], option: str) -> str:
    """Return the argument behind an option that comes once."""
    assert argv.count(option) == 1
    return argv[argv.index(option) + 1]


@pytest.mark.parametrize(
    ("tables", "accel", "expected"),
    [(KERNEL_GUEST, "tcg", KERNEL_ARGV), (FIRMWARE_GUEST, "kvm", FIRMWARE_ARGV)],
    ids=["kernel", "firmware"],
)
def test_the_whole_command(tables: dict[str, Any], accel: str, expected: str) -> None:
    built = command(tables, accel)
    assert "\n".join(built.argv) == expected
    assert built.descriptors == (7, 9)


def test_a_guest_that_may_grow_has_slots_for_it() -> None:
    argv = command({**KERNEL_GUEST, "memory": {"size": "256MiB", "max": "1GiB"}}).argv
    grows = "\n".join(argv).replace("\nsize=268435456B,slots=6,maxmem=1073741824B\n", "\n268435456B\n")
    assert grows == KERNEL_ARGV
    assert "\nsize=268435456B," in "\n".join(argv)


def test_where_qemu_can_share_its_other_ram_blocks_it_is_told_to() -> None:
    built = build(GuestConfig.of(KERNEL_GUEST), QEMU, "tcg", MEM_PATH, 7, 9, share_aux_ram=True)
    machine = "q35,memory-backend=ram0,mem-merge=off,dump-guest-core=off"
    assert "\n".join(built.argv) == KERNEL_ARGV.replace(machine, f"{machine},aux-ram-share=on")
    assert built.descriptors == (7, 9)


def test_what_is_not_configured_is_not_on_the_command_line() -> None:
    argv = command({**KERNEL_GUEST, "boot": {"kernel": "/g/vmlinuz"}}).argv
    assert value(argv, "-append") == ""
    assert not {"-initrd", "-bios"} & set(argv)
    assert not {"-kernel", "-append", "-initrd"} & set(command(FIRMWARE_GUEST).argv)


# What could end a value, or start another option, in one of QEMU's own notations or in JSON.
nasty = st.text(st.sampled_from(" ,=\"'\\{}[]:;-\t\n/.é€\u2028abcS"), min_size=1, max_size=20)
plain_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
paths = (nasty | plain_text).map(lambda text: f"/g/{text}")


def differences(argv: tuple[str, ...], plain: tuple[str, ...]) -> dict[str, str]:
    """Return those arguments that are not what they are in `plain`, by the option that each belongs to."""
    assert len(argv) == len(plain)
    return {argv[n - 1]: argv[n] for n in range(1, len(argv)) if argv[n] != plain[n]}


@pytest.mark.parametrize(
    ("tables", "key", "option"),
    [
        (KERNEL_GUEST, "kernel", "-kernel"),
        (KERNEL_GUEST, "initrd", "-initrd"),
        (FIRMWARE_GUEST, "firmware", "-bios"),
    ],
)
@given(path=paths)
def test_a_path_is_one_argument_whatever_it_is_called(tables: dict[str, Any], key: str, option: str, path: str) -> None:
    argv = command({**tables, "boot": {**tables["boot"], key: path}}).argv
    expected = str(Path(path))
    assert value(argv, option) == expected
    assert set(differences(argv, command(tables).argv)) <= {option}


@given(text=(nasty | plain_text).filter(str.isprintable))
def test_a_kernel_command_line_is_one_argument(text: str) -> None:
    argv = command({**KERNEL_GUEST, "boot": {**KERNEL_GUEST["boot"], "cmdline": text}}).argv
    assert value(argv, "-append") == text
    assert set(differences(argv, command(KERNEL_GUEST).argv)) <= {"-append"}


@given(path=paths)
def test_the_memory_backend_is_json_that_reads_back_whatever_the_folder_is_called(path: str) -> None:
    argv = command(KERNEL_GUEST, mem_path=Path(path)).argv
    backend = argv[argv.index("-object") + 1]
    assert json.loads(backend) == {
        "qom-type": "memory-backend-file",
        "id": "ram0",
        "size": 256 << 20,
        "mem-path": str(Path(path)),
        "share": True,
        "merge": False,
        "dump": False,
    }
    assert backend.isascii()  # and so on one line, in any locale
    assert set(differences(argv, command(KERNEL_GUEST).argv)) <= {"-object"}


@given(name=nasty | plain_text | st.from_regex(r"[a-z0-9.,=-]{1,64}", fullmatch=True))
def test_a_name_with_a_comma_or_an_equals_sign_never_comes_so_far(name: str) -> None:
    try:
        argv = command({**KERNEL_GUEST, "name": name}).argv
    except WrongTables:
        return
    assert value(argv, "-name") == f"guest={name}"
    assert not set(name) & set(", =\"'\\")


@given(model=nasty | st.from_regex(r"[A-Za-z0-9_.,+=-]{1,40}", fullmatch=True))
def test_a_cpu_model_may_have_commas_but_stays_the_one_argument_of_cpu(model: str) -> None:
    # -cpu MODEL,FEATURE,FEATURE=VALUE: what is behind a comma is a property of the CPU and of nothing else.
    try:
        argv = command({**KERNEL_GUEST, "cpu": {"count": 2, "model": model}}).argv
    except WrongTables:
        return
    assert value(argv, "-cpu") == model
    assert set(differences(argv, command(KERNEL_GUEST).argv)) <= {"-cpu"}
    assert not model.startswith(("-", ","))


def test_devices_add_their_arguments_and_descriptors_in_their_order() -> None:
    devices = [
        Device(("-object", "rng-builtin,id=rng0"), (11,)),
        Device(("-device", "virtio-rng-pci,rng=rng0"), (12, 13)),
    ]
    built = build(GuestConfig.of(FIRMWARE_GUEST), QEMU, "tcg", MEM_PATH, 7, 9, devices)
    assert built.argv[-4:] == ("-object", "rng-builtin,id=rng0", "-device", "virtio-rng-pci,rng=rng0")
    assert built.descriptors == (7, 9, 11, 12, 13)
