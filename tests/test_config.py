from __future__ import annotations

import errno
import os
import re
import socket
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmmback import config, toml_errors
from vmmback.config import GuestConfig, load
from vmmback.config import values as config_values
from vmmback.config.guest import SMALLEST
from vmmback.config.refused import REFUSED_TABLES
from vmmback.config.schema import json_schema
from vmmback.config.values import parse_duration, parse_size
from vmmback.errors import ConfigError
from vmmback.toml_errors import key_lines

MINIMAL = SMALLEST

FULL = """\
# every table that is built
name = "demo"

[memory]
size = "512MiB"
max = "2GiB"
prefault = false
backing = "ordinary"

[cpu]
count = 4
model = "max,-avx"

[machine]
type = "q35"
accel = "tcg"

[boot]
kernel = "vmlinuz"
initrd = "images/initrd.img"
cmdline = "console=ttyS0"

[isolation]
validate = "boot"
on-exposed = "warn"
ready = "login:"
ready-timeout = "2min"
every = "60s"
after-validation = "powerdown"

[console]
log = "logs/console.log"

[qmp]
allow = ["device_del", "job-*"]

[[share]]
path = "images"
tag = "images"

[[share]]
path = "logs"
tag = "logs"
plaintext = "allowed"
read-only = false

[vsock]
cid = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that a guest file may name."""
    folder = tmp_path_factory.mktemp("guest")
    for name in ("images", "logs"):
        (folder / name).mkdir()
    for name in ("vmlinuz", "images/initrd.img", "OVMF.fd"):
        (folder / name).write_bytes(b"x")
    os.mkfifo(folder / "fifo")
    return folder


def load_text(folder: Path, text: str | bytes) -> GuestConfig:
    path = folder / "guest.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load(path)


def error_of(folder: Path, text: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        load_text(folder, text)
    return raised.value


def message_of(folder: Path, text: str | bytes) -> str:
    """The message as it reads when the folder is left out."""
    return error_of(folder, text).message.replace(f"{folder}/", "")


# Good files


def test_minimal_file_has_the_defaults(folder: Path) -> None:
    guest = load_text(folder, MINIMAL)

    assert guest.name == "demo"
    assert guest.memory.size == 256 << 20
    assert guest.memory.prefault is True
    assert guest.memory.backing == "secret"
    assert (guest.cpu.count, guest.cpu.model) == (1, "max")
    assert (guest.machine.type, guest.machine.accel) == ("q35", "auto")
    assert guest.boot.kernel == folder / "vmlinuz"
    assert (guest.boot.initrd, guest.boot.cmdline, guest.boot.firmware) == (None, "", None)
    assert (guest.isolation.validate_at, guest.isolation.on_exposed) == ("boot", "kill")
    assert (guest.isolation.ready, guest.isolation.ready_timeout_s) == (None, 120.0)
    assert guest.isolation.after_validation == "run"
    assert guest.console.log is None
    assert guest.qmp.allow == ()


def test_full_file(folder: Path) -> None:
    guest = load_text(folder, FULL)

    assert (guest.memory.size, guest.memory.max) == (512 << 20, 2 << 30)
    assert guest.memory.prefault is False
    assert guest.memory.backing == "ordinary"
    assert (guest.cpu.count, guest.cpu.model) == (4, "max,-avx")
    assert (guest.machine.type, guest.machine.accel) == ("q35", "tcg")
    assert guest.boot.kernel == folder / "vmlinuz"
    assert guest.boot.initrd == folder / "images/initrd.img"
    assert guest.boot.cmdline == "console=ttyS0"
    assert (guest.isolation.validate_at, guest.isolation.on_exposed) == ("boot", "warn")
    assert (guest.isolation.ready, guest.isolation.ready_timeout_s) == ("login:", 120.0)
    assert guest.isolation.after_validation == "powerdown"
    assert guest.console.log == folder / "logs/console.log"
    assert guest.qmp.allow == ("device_del", "job-*")


def test_firmware_alone(folder: Path) -> None:
    guest = load_text(folder, MINIMAL.replace('kernel = "vmlinuz"', 'firmware = "OVMF.fd"'))
    assert (guest.boot.kernel, guest.boot.firmware) == (None, folder / "OVMF.fd")


def test_paths_start_from_the_folder_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "guest.toml").write_text(FULL)
    monkeypatch.chdir(folder.parent)

    guest = load(Path(folder.name) / "guest.toml")

    assert guest.boot.kernel == folder / "vmlinuz"
    assert guest.console.log == folder / "logs/console.log"


def test_absolute_paths_stay(folder: Path, tmp_path: Path) -> None:
    guest = load_text(tmp_path, MINIMAL.replace("vmlinuz", str(folder / "vmlinuz")))
    assert guest.boot.kernel == folder / "vmlinuz"


def test_a_config_is_frozen(folder: Path) -> None:
    guest = load_text(folder, MINIMAL)
    with pytest.raises(AttributeError):
        guest.cpu.count = 2  # type: ignore[misc]


def test_without_a_folder_no_file_is_looked_at() -> None:
    guest = GuestConfig.of(tomllib.loads(FULL))
    assert guest.boot.kernel == Path("vmlinuz")
    assert guest.console.log == Path("logs/console.log")


@pytest.mark.parametrize("name", ["a", "0", "web-1.example", "a" * 63])
def test_good_names(folder: Path, name: str) -> None:
    assert load_text(folder, MINIMAL.replace("demo", name)).name == name


@pytest.mark.parametrize("model", ["max", "qemu64", "Skylake-Server-v1,+pdpe1gb", "max,hv-vendor-id=x_y"])
def test_good_cpu_models(folder: Path, model: str) -> None:
    assert load_text(folder, f'{MINIMAL}[cpu]\nmodel = "{model}"').cpu.model == model


# Sizes and durations


@pytest.mark.parametrize(
    ("memory", "largest", "slots"),
    [
        ({"size": "256MiB"}, 256 << 20, 0),
        ({"size": "256MiB", "max": "256MiB"}, 256 << 20, 0),
        ({"size": "256MiB", "max": "384MiB"}, 384 << 20, 1),
        ({"size": "1MiB", "max": "1025MiB"}, 1025 << 20, 8),
        ({"size": "1GiB", "max": "1TiB"}, 1 << 40, 256),
    ],
)
def test_how_far_a_guest_may_grow_and_how_often(memory: dict[str, str], largest: int, slots: int) -> None:
    found = GuestConfig.of({"name": "a", "memory": memory, "boot": {"kernel": "vmlinuz"}}).memory
    assert (found.largest, found.slots) == (largest, slots)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1MiB", 1 << 20), ("1032KiB", 1032 << 10), ("3GiB", 3 << 30), ("16TiB", 16 << 40)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "256MB", "256 MiB", "1.5GiB", "-1MiB", "+1MiB", "256mib", "1MiB\n", "\u0661MiB", "1" * 5000 + "MiB"),
        *("0MiB", "1020KiB", "17TiB", "1025KiB", "999999999999999TiB"),
    ],
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="; write "):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("60s", 60.0), ("2min", 120.0), ("24h", 86400.0)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "60", "60 s", "1m", "1.5s", "-1s", "1s\n", "0s", "0ms", "25h", "9" * 5000 + "s"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match="; write "):
        parse_duration(text)


# One wrong value each: the rest of the file is good, so exactly one error is due, at this line.

BOOT = '[boot]\nkernel = "vmlinuz"\n'
MEMORY = '[memory]\nsize = "256MiB"\n'
TABLES = (
    "[memory], [cpu], [machine], [boot], [[disk]], [[nic]], [isolation], [console], [qmp], "
    "[[share]], [vsock], [process]"
)
FILE_ADVICE = "write the path of a file that you may read, absolute or from the guest file's folder"
NAME_ADVICE = (
    'write 1 to 63 of a-z, 0-9, "." and "-", starting with a letter or a digit, without ".."'  # shared by the rows
)

WRONG: list[tuple[str, str]] = [
    # name
    (MEMORY + BOOT, 'guest.toml: name: missing; write name = "demo"'),
    (f"name = 7\n{MEMORY}{BOOT}", 'guest.toml:1: name: 7 is an integer; write a string in quotes, like "demo"'),
    (
        f"name = 1979-05-27\n{MEMORY}{BOOT}",
        'guest.toml:1: name: is a date or time; write a string in quotes, like "demo"',
    ),
    *(
        (f"name = '{name}'\n{MEMORY}{BOOT}", f'guest.toml:1: name: "{name}" is not a guest name; {NAME_ADVICE}')
        for name in ("", "Demo", "a/b", "..", "a..b", ".a", "-a", "a b", "a" * 64)
    ),
    (
        f'name = "d\\u001b[31m\\u00e9\\u007f\\n"\n{MEMORY}{BOOT}',
        f'guest.toml:1: name: "d\\u001b[31m\\u00e9\\u007f\\n" is not a guest name; {NAME_ADVICE}',
    ),
    (
        f'name = "{"A" * 500}"\n{MEMORY}{BOOT}',
        f'guest.toml:1: name: "{"A" * 77}..." is not a guest name; {NAME_ADVICE}',
    ),
    # memory
    (
        'name = "a"\n' + BOOT,
        'guest.toml: memory: the table is missing; write [memory] and under it size = "256MiB"',
    ),
    (
        f'name = "a"\nmemory = "256MiB"\n{BOOT}',
        'guest.toml:2: memory: "256MiB" is a string; write a table: [memory] and its keys under it',
    ),
    (
        f'name = "a"\n[[memory]]\nsize = "256MiB"\n{BOOT}',
        "guest.toml:2: memory: is an array; write a table: [memory] and its keys under it",
    ),
    (f'name = "a"\n\n[memory]\n{BOOT}', 'guest.toml:3: memory.size: missing; write size = "256MiB"'),
    (
        f'name = "a"\n[memory]\n\n# a comment\nsize = "256MB"\n{BOOT}',
        'guest.toml:5: memory.size: "256MB" is not a size; write it like "256MiB" (KiB, MiB, GiB or TiB)',
    ),
    (
        f'name = "a"\n[memory]\nsize = 268435456\n{BOOT}',
        'guest.toml:3: memory.size: 268435456 is an integer; write a size in quotes, like "256MiB"',
    ),
    (
        f'name = "a"\n[memory]\nsize = true\n{BOOT}',
        'guest.toml:3: memory.size: true is a boolean; write a size in quotes, like "256MiB"',
    ),
    (
        f'name = "a"\n[memory]\nsize = "1020KiB"\n{BOOT}',
        'guest.toml:3: memory.size: "1020KiB" is out of range; write "1MiB" to "16TiB"',
    ),
    (
        f'name = "a"\nmemory.size = "17TiB"\n{BOOT}',
        'guest.toml:2: memory.size: "17TiB" is out of range; write "1MiB" to "16TiB"',
    ),
    (
        f'name = "a"\n[ "memory" ]\n\'size\' = "1025KiB"\n{BOOT}',
        'guest.toml:3: memory.size: "1025KiB" is not a multiple of 8KiB, as QEMU rounds RAM sizes; write whole 8KiB',
    ),
    (
        f'name = "a"\n[memory]\nsize = "256MiB"\nmax = "128MiB"\n{BOOT}',
        "guest.toml:4: memory.max: is less than size; write at least 256MiB",
    ),
    (
        f'name = "a"\n[memory]\nsize = "1032KiB"\nmax = "512MiB"\n{BOOT}',
        "guest.toml:4: memory.max: is not size and a multiple of 128MiB, in which a guest grows; "
        "write 394248KiB or 525320KiB",
    ),
    (
        f'name = "a"\n[memory]\nsize = "16777208MiB"\nmax = "16TiB"\n{BOOT}',
        "guest.toml:4: memory.max: is not size and a multiple of 128MiB, in which a guest grows; write 16777208MiB",
    ),
    (
        f'name = "a"\n[memory]\nsize = "256MiB"\nmax = 512\n{BOOT}',
        'guest.toml:4: memory.max: 512 is an integer; write a size in quotes, like "256MiB"',
    ),
    (
        f'name = "a"\nmemory = {{ prefault = true, size = [] }}\n{BOOT}',
        'guest.toml:2: memory.size: is an array; write a size in quotes, like "256MiB"',
    ),
    (
        f'name = "a"\n{MEMORY}prefault = "yes"\n{BOOT}',
        'guest.toml:4: memory.prefault: "yes" is a string; write a boolean without quotes: true or false',
    ),
    (
        f'name = "a"\n{MEMORY}prefault = 1\n{BOOT}',
        "guest.toml:4: memory.prefault: 1 is an integer; write a boolean without quotes: true or false",
    ),
    (
        f'name = "a"\n{MEMORY}backing = "hugetlb"\n{BOOT}',
        'guest.toml:4: memory.backing: is "hugetlb"; write "secret" or "ordinary"',
    ),
    # cpu
    (
        f'{MINIMAL}[cpu]\ncount = "2"\n',
        'guest.toml:9: cpu.count: "2" is a string; write an integer without quotes, like 1',
    ),
    (
        f"{MINIMAL}[cpu]\ncount = true\n",
        "guest.toml:9: cpu.count: true is a boolean; write an integer without quotes, like 1",
    ),
    (
        f"{MINIMAL}[cpu]\ncount = 2.0\n",
        "guest.toml:9: cpu.count: 2.0 is a float; write an integer without quotes, like 1",
    ),
    (f"{MINIMAL}[cpu]\ncount = 0\n", "guest.toml:9: cpu.count: 0 is too small; write 1 or more"),
    (f"{MINIMAL}[cpu]\ncount = 256\n", "guest.toml:9: cpu.count: 256 is too large; write 255 or less"),
    (
        f"{MINIMAL}[cpu]\ncount = 0x{'f' * 9999}\n",
        "guest.toml:9: cpu.count: a huge number is too large; write 255 or less",
    ),
    *(
        (
            f"{MINIMAL}[cpu]\nmodel = '{model}'\n",
            f'guest.toml:9: cpu.model: "{model}" is not a CPU model; '
            'write it like "max", with features like "max,-avx"',
        )
        for model in ("", "-cpu", ",max", "max max", "max;id", "max/x")
    ),
    # machine
    (f'{MINIMAL}[machine]\ntype = "pc"\n', 'guest.toml:9: machine.type: is "pc"; write "q35"'),
    (f'{MINIMAL}[machine]\naccel = "xen"\n', 'guest.toml:9: machine.accel: is "xen"; write "auto", "tcg" or "kvm"'),
    (f"{MINIMAL}[machine]\naccel = {{}}\n", 'guest.toml:9: machine.accel: is a table; write "auto", "tcg" or "kvm"'),
    # boot
    (
        f'name = "a"\n{MEMORY}',
        'guest.toml: boot: the table is missing; write [boot] and under it kernel = "vmlinuz", or a [[disk]] to boot',
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\n',
        'guest.toml:4: boot: has neither kernel nor firmware; write one of them, like kernel = "vmlinuz"',
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\ninitrd = "images/initrd.img"\n',
        'guest.toml:4: boot: has neither kernel nor firmware; write one of them, like kernel = "vmlinuz"\n'
        "guest.toml:5: boot.initrd: goes with a kernel, not with firmware; remove it, or boot a kernel",
    ),
    (
        f'{MINIMAL}firmware = "OVMF.fd"\n',
        "guest.toml:8: boot.firmware: does not go with kernel; keep one of the two",
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\nfirmware = "OVMF.fd"\ninitrd = "images/initrd.img"\n',
        "guest.toml:6: boot.initrd: goes with a kernel, not with firmware; remove it, or boot a kernel",
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\nfirmware = "OVMF.fd"\ncmdline = ""\n',
        "guest.toml:6: boot.cmdline: goes with a kernel, not with firmware; remove it, or boot a kernel",
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\nkernel = "bzImage"\n',
        f"guest.toml:5: boot.kernel: bzImage: no such file or directory; {FILE_ADVICE}",
    ),
    (
        f'{MINIMAL}initrd = "images"\n',
        f"guest.toml:8: boot.initrd: images: is a folder, not a file; {FILE_ADVICE}",
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\nfirmware = "fifo"\n',
        f"guest.toml:5: boot.firmware: fifo: is not a regular file; {FILE_ADVICE}",
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\nkernel = "/dev/zero"\n',
        f"guest.toml:5: boot.kernel: /dev/zero: is not a regular file; {FILE_ADVICE}",
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\nkernel = ""\n',
        'guest.toml:5: boot.kernel: "" is not a path; write the path of a file',
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\nkernel = "a\\u0000b"\n',
        'guest.toml:5: boot.kernel: "a\\u0000b" is not a path; write the path of a file',
    ),
    (
        f'name = "a"\n{MEMORY}[boot]\nkernel = ["vmlinuz"]\n',
        'guest.toml:5: boot.kernel: is an array; write a path in quotes, like "vmlinuz"',
    ),
    (
        f'{MINIMAL}cmdline = "a\\nb"\n',
        'guest.toml:8: boot.cmdline: "a\\nb" has characters that are not printable; write it as one line of plain text',
    ),
    (
        f'{MINIMAL}cmdline = "{"x" * 2048}"\n',
        "guest.toml:8: boot.cmdline: is longer than 2047 bytes, of which Linux cuts the rest; write a shorter one",
    ),
    (
        f"{MINIMAL}cmdline = 1\n",
        'guest.toml:8: boot.cmdline: 1 is an integer; write a string in quotes, like "console=ttyS0"',
    ),
    # isolation
    (
        f'{MINIMAL}[isolation]\nvalidate = "always"\n',
        'guest.toml:9: isolation.validate: is "always"; write "boot" or "never"',
    ),
    (
        f"{MINIMAL}[isolation]\nvalidate = false\n",
        'guest.toml:9: isolation.validate: is false; write "boot" or "never"',
    ),
    (
        f'{MINIMAL}[isolation]\non-exposed = "ignore"\n',
        'guest.toml:9: isolation.on-exposed: is "ignore"; write "kill", "pause" or "warn"',
    ),
    (
        f'{MINIMAL}[isolation]\nevery = "500ms"\n',
        'guest.toml:9: isolation.every: is more often than every 1 s; write "1s" to "24h"',
    ),
    (
        f'{MINIMAL}[isolation]\nvalidate = "never"\nevery = "60s"\n',
        'guest.toml:10: isolation.every: does not go with validate = "never"; remove one of the two',
    ),
    (
        f'{MINIMAL}[isolation]\nevery = "60s"\nvalidate = "never"\n',
        'guest.toml:9: isolation.every: does not go with validate = "never"; remove one of the two',
    ),
    (
        f'{MINIMAL}[isolation]\nafter-validation = "reboot"\n',
        'guest.toml:9: isolation.after-validation: is "reboot"; write "run" or "powerdown"',
    ),
    (
        f"{MINIMAL}[isolation]\nready = 1\n",
        'guest.toml:9: isolation.ready: 1 is an integer; write a string in quotes, like "login:"',
    ),
    (
        f'{MINIMAL}[isolation]\nready = " "\n',
        "guest.toml:9: isolation.ready: is blank, which any output matches; "
        "write text that the guest prints once, or leave ready out",
    ),
    (
        f'{MINIMAL}[isolation]\nready = """a\nb"""\n',
        'guest.toml:9: isolation.ready: "a\\nb" has characters that are not printable; '
        "write it as one line of plain text",
    ),
    (
        f"{MINIMAL}[isolation]\nready-timeout = 60\n",
        'guest.toml:9: isolation.ready-timeout: 60 is an integer; write a duration in quotes, like "60s"',
    ),
    (
        f'{MINIMAL}[isolation]\nready-timeout = "60"\n',
        'guest.toml:9: isolation.ready-timeout: "60" is not a duration; write it like "60s" (ms, s, min or h)',
    ),
    (
        f'{MINIMAL}[isolation]\nready-timeout = "0s"\n',
        'guest.toml:9: isolation.ready-timeout: "0s" is out of range; write "1ms" to "24h"',
    ),
    # console
    (
        f'{MINIMAL}[console]\nlog = "nowhere/console.log"\n',
        "guest.toml:9: console.log: nowhere/console.log: its folder does not exist; "
        "make the folder, or write another path",
    ),
    (
        f'{MINIMAL}[console]\nlog = "logs"\n',
        "guest.toml:9: console.log: logs: is a folder; write the path of a file in it",
    ),
    (
        f'{MINIMAL}[console]\nlog = "logs/a\\u0000"\n',
        'guest.toml:9: console.log: "logs/a\\u0000" is not a path; write the path of a file',
    ),
    # qmp
    (
        f'{MINIMAL}[qmp]\nallow = "stop"\n',
        'guest.toml:9: qmp.allow: "stop" is a string; write a list of commands in quotes, like ["device_del", "job-*"]',
    ),
    (
        f"{MINIMAL}[qmp]\nallow = [1]\n",
        "guest.toml:9: qmp.allow: 1 is an integer; write its entries as commands in quotes",
    ),
    (
        f'{MINIMAL}[qmp]\nallow = ["job-*", "memsave"]\n',
        'guest.toml:9: qmp.allow: "memsave" is never allowed, as it copies guest memory into a file; remove it',
    ),
    (
        f'{MINIMAL}[qmp]\nallow = ["devicedel"]\n',
        'guest.toml:9: qmp.allow: "devicedel" matches no command that may be allowed; did you mean "device_del"?',
    ),
    (
        f'{MINIMAL}[qmp]\nallow = ["migrate*"]\n',
        'guest.toml:9: qmp.allow: "migrate*" matches no command that may be allowed; remove it',
    ),
    (
        f'{MINIMAL}[qmp]\nallow = ["*-add"]\n',
        'guest.toml:9: qmp.allow: "*-add" is no command; '
        'write a name like "device_del", or the start of names and a star like "job-*"',
    ),
    # unknown keys and tables
    (
        f'name = "a"\n{MEMORY}prefualt = true\n{BOOT}',
        'guest.toml:4: memory.prefualt: unknown key "prefualt"; did you mean "prefault"?',
    ),
    (f"{MINIMAL}[memory.sise]\n", 'guest.toml:8: memory.sise: unknown key "sise"; did you mean "size"?'),
    (
        f"{MINIMAL}[isolation]\non_exposed = 1\n",
        'guest.toml:9: isolation.on_exposed: unknown key "on_exposed"; did you mean "on-exposed"?',
    ),
    (
        f"{MINIMAL}[isolation]\nvalidate_at = 1\n",
        'guest.toml:9: isolation.validate_at: unknown key "validate_at"; did you mean "validate"?',
    ),
    (
        f"{MINIMAL}[cpu]\nzzz = 1\n",
        'guest.toml:9: cpu.zzz: unknown key "zzz"; known here are "count", "model"',
    ),
    (f"{MINIMAL}[CONSOLE]\n", "guest.toml:8: CONSOLE: unknown table [CONSOLE]; did you mean [console]?"),
    (
        f"{MINIMAL}[zzz]\n",
        f'guest.toml:8: zzz: unknown table [zzz]; known here are "name", {TABLES}',
    ),
    (
        f"accel = 1\n{MINIMAL}",
        'guest.toml:1: accel: unknown key "accel" here; "accel" belongs under [machine]',
    ),
    (
        f'name = "a"\n{MEMORY}name = "a"\n{BOOT}',
        'guest.toml:4: memory.name: unknown key "name" here; '
        '"name" belongs at the top of the file, before the first table',
    ),
    (
        f'"a\\nb" = 1\n{MINIMAL}',
        f'guest.toml:1: "a\\nb": unknown key "a\\nb"; known here are "name", {TABLES}',
    ),
    # refused
    (f"{MINIMAL}[balloon]\n", f"guest.toml:8: balloon: {REFUSED_TABLES['balloon']}"),
    (
        f'{MINIMAL}[[share]]\npath = "images"\ntag = "t"\nread-only = false\n',
        "guest.toml:11: share[0].read-only: is false, and what the guest writes there lies in the host's page cache "
        'and file system in the clear; write plaintext = "allowed" if it may, or remove read-only',
    ),
    (
        f'{MINIMAL}[[share]]\npath = "images"\ntag = "t"\n[[share]]\npath = "logs"\ntag = "t"\n',
        'guest.toml:13: share[1].tag: "t" is that of share[0] already; write another one',
    ),
    (
        f'{MINIMAL}[[share]]\npath = "vmlinuz"\ntag = "t"\n',
        "guest.toml:9: share[0].path: vmlinuz: is not a folder; write the path of a folder, absolute or from the guest "
        "file's",
    ),
    (
        f'{MINIMAL}[[share]]\npath = "nowhere"\ntag = "t"\n',
        "guest.toml:9: share[0].path: nowhere: no such file or directory; write the path of a folder, absolute or from "
        "the guest file's",
    ),
    (
        f'{MINIMAL}[[share]]\npath = "images"\ntag = "a,b"\n',
        'guest.toml:10: share[0].tag: "a,b" is not a tag; '
        'write 1 to 36 of A-Z, a-z, 0-9, "_", "." and "-", like "shared"',
    ),
    (
        f'{MINIMAL}[[share]]\npath = "images"\n',
        'guest.toml:8: share[0].tag: missing; write tag = "shared"',
    ),
    *(
        (
            f"{MINIMAL}[vsock]\ncid = {cid}\n",
            f"guest.toml:9: vsock.cid: {cid} is the hypervisor's, the loopback's or the host's address (vsock(7)); "
            "write 3 or more",
        )
        for cid in range(3)
    ),
    (
        f"{MINIMAL}[vsock]\ncid = 4294967295\n",
        "guest.toml:9: vsock.cid: 4294967295 is too large; write 4294967294 or less",
    ),
    (f"{MINIMAL}[vsock]\n", "guest.toml:8: vsock.cid: missing; write cid = 3"),
    # not built yet
    (
        f"{MINIMAL}[process]\nuids = 7\n",
        'guest.toml:9: process.uids: 7 is an integer; write a range in quotes, like "1900000000-1900065535"',
    ),
    (
        f'{MINIMAL}[process]\nuids = "7"\n',
        'guest.toml:9: process.uids: "7" is not a range of uids; write it like "1900000000-1900065535"',
    ),
    (
        f'{MINIMAL}[process]\nuids = "9-7"\n',
        'guest.toml:9: process.uids: "9-7" ends before it begins; write the lower uid first',
    ),
    (
        f'{MINIMAL}[process]\nuids = "0-7"\n',
        'guest.toml:9: process.uids: "0-7" has 0 in it, which is root\'s; QEMU never runs as root',
    ),
    (
        f'{MINIMAL}[process]\nuids = "7-4294967295"\n',
        'guest.toml:9: process.uids: "7-4294967295" goes beyond the highest uid, 4294967294',
    ),
    (
        f'{MINIMAL}[process]\nuids = "60000-70000"\n',
        'guest.toml:9: process.uids: "60000-70000" has nobody\'s uid in it, 65534 or 65535; write a range without them',
    ),
    (
        f'{MINIMAL}[process]\nuser = "no-such-account"\n',
        'guest.toml:9: process.user: there is no account "no-such-account"; make it, or leave user out',
    ),
    (
        f'{MINIMAL}[process]\nuser = "root"\n',
        'guest.toml:9: process.user: "root" is root; QEMU never runs as root: write another account, or leave user out',
    ),
    (
        f'{MINIMAL}[process]\nuser = "a b"\n',
        'guest.toml:9: process.user: "a b" is not the name of an account',
    ),
    *(
        (
            f'{MINIMAL}[process]\ncgroup = "{path}"\n',
            f'guest.toml:9: process.cgroup: "{path}" is not absolute, or no plain path; '
            'write the path of a memory cgroup as /proc/PID/cgroup shows it, like "/machine/demo"',
        )
        for path in ("", "/", "machine/demo", "/machine/", "/machine/../demo", "/./demo", "/..", "/a b", "/a//b")
    ),
    (
        f"{MINIMAL}[process]\ncgroup = 7\n",
        'guest.toml:9: process.cgroup: 7 is an integer; write a string in quotes, like "/machine/demo"',
    ),
    (
        f'{MINIMAL}[process]\nuser = "daemon"\nuids = "7-9"\n',
        "guest.toml:8: process: has both user and uids; keep one of the two",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message[:70] for _, message in WRONG])
def test_a_wrong_file_says_where_and_what_to_do(folder: Path, text: str, message: str) -> None:
    assert message_of(folder, text) == message


def refuse(path: Path) -> None:
    """Stands in for opening a file that we may not read: root may read any."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_an_unreadable_kernel_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_values, "open_regular", refuse)
    assert message_of(folder, MINIMAL) == f"guest.toml:7: boot.kernel: vmlinuz: permission denied; {FILE_ADVICE}"


def test_all_errors_are_shown_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = """\
[boot]
kernel = "gone"
firmware = "gone.fd"
kernle = 1

[memory]
size = "256MB"
prefault = "no"

[[disk]]
path = "root.luks"

[cpu]
count = 0
"""
    assert [line.split(";")[0] for line in message_of(folder, text).split("\n")] == [
        "guest.toml:2: boot.kernel: gone: no such file or directory",
        "guest.toml:3: boot.firmware: does not go with kernel",
        "guest.toml:3: boot.firmware: gone.fd: no such file or directory",
        'guest.toml:4: boot.kernle: unknown key "kernle"',
        'guest.toml:7: memory.size: "256MB" is not a size',
        'guest.toml:8: memory.prefault: "no" is a string',
        "guest.toml:10: disk[0].format: missing",
        "guest.toml:11: disk[0].path: root.luks: no such file or directory",
        "guest.toml:14: cpu.count: 0 is too small",
        "guest.toml: name: missing",
    ]


def test_every_error_has_a_hint(folder: Path) -> None:
    assert error_of(folder, "a = 1").hint == "`vmmback schema` describes every table and key"
    assert error_of(folder, "a = 1").exit_code == 2


# Files that are no guest files

NOT_TOML: list[tuple[str, str]] = [
    ("name = demo", "guest.toml:1:8: not TOML: Invalid value; text needs quotes"),
    ('\nname = "a" b', "guest.toml:2:12: not TOML: Expected newline or end of document after a statement"),
    ('name = "a"\nname = "b"\n', "guest.toml:2:11: not TOML: Cannot overwrite a value; a key is written twice"),
    ("[cpu]\n[cpu]\n", "guest.toml:2:5: not TOML: Cannot declare ('cpu',) twice; a table is written twice"),
    ("name", "guest.toml: not TOML, at the end of the file: Expected '=' after a key in a key/value pair; write a"),
    ('name = "a\n', "guest.toml:1:10: not TOML: Illegal character '\\n'; close the string"),
    ('name = """a\n', "guest.toml: not TOML, at the end of the file: Unterminated string; close it"),
    ("= 1", "guest.toml:1:1: not TOML: Invalid statement; write a key"),
    ("a = '\x1b'", "guest.toml:1:6: not TOML: Found invalid character '\\x1b'"),
    ("['é']\n['é']", "guest.toml:2:5: not TOML: Cannot declare ('\\xe9',) twice"),
    ("a = " + "[" * 5000, "guest.toml: is nested too deeply"),
    ("a = " + "{a=" * 5000, "guest.toml: is nested too deeply"),
    ("a = " + "9" * 5000, "guest.toml: has a number of too many digits"),
]


@pytest.mark.parametrize(("text", "message"), NOT_TOML, ids=[message[:60] for _, message in NOT_TOML])
def test_not_toml(folder: Path, text: str, message: str) -> None:
    error = error_of(folder, text)
    assert error.message.replace(f"{folder}/", "").startswith(message)
    assert error.hint


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_an_empty_file_is_shown_the_smallest_one(folder: Path, text: str) -> None:
    error = error_of(folder, text)
    assert error.message == f"{folder}/guest.toml: is empty"
    assert load_text(folder, error.hint.split(":\n", 1)[1]).name == "demo"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'name = "a"\n# \xff\n', "guest.toml:2: is not UTF-8 text"),
        (MINIMAL.encode("utf-16-le"), "guest.toml:1: has a NUL byte"),
        (b"\n\n\0", "guest.toml:3: has a NUL byte"),
        (b"\xef\xbb\xbf" + MINIMAL.encode(), "guest.toml: starts with a byte order mark (BOM)"),
        (b"#" * ((1 << 20) + 1), "guest.toml: is larger than 1 MiB"),
    ],
)
def test_bytes_that_are_no_guest_file(folder: Path, data: bytes, message: str) -> None:
    error = error_of(folder, data)
    assert error.message == f"{folder}/{message}"
    assert error.hint


def test_a_file_of_exactly_one_mebibyte_is_read(folder: Path) -> None:
    assert load_text(folder, MINIMAL + "#" * ((1 << 20) - len(MINIMAL))).name == "demo"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gone.toml", "no such file or directory"),
        ("images", "is a folder, not a file"),
        ("fifo", "is not a regular file"),
        ("vmlinuz/guest.toml", "not a directory"),
        ("a\0b", "is not a path that a file can have"),
        ("x" * 300, "file name too long"),
        ("/dev/zero", "is not a regular file"),
        ("\x1b[31m\udcff", "no such file or directory"),
    ],
)
def test_paths_that_are_no_guest_file(folder: Path, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f": {problem}$") as raised:
        load(folder / name)
    assert re.fullmatch(r"[ -~]+", raised.value.message)
    assert raised.value.hint


def test_a_socket_is_no_guest_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(ConfigError, match=r"^socket: is not a regular file$"):
            load(Path("socket"))


def test_an_unreadable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toml_errors, "open_regular", refuse)
    assert message_of(folder, MINIMAL) == "guest.toml: permission denied"


# Lines


def test_key_lines() -> None:
    text = '''\
top = 1
a.b = 2
"quo ted".'x' = 3
inline = { one = 1, two = { three = 3 } }
long = """
[not.a.table]
not_a_key = 1
"""
array = [
  # ] a comment
  "]", "x = 1",
]
  [ table ] # comment
key = 1
[table.sub]
key = 2
[[list]]
key = 3
[[list]]
key = 4
'''
    assert key_lines(text) == {
        ("top",): 1,
        ("a",): 2,
        ("a", "b"): 2,
        ("quo ted",): 3,
        ("quo ted", "x"): 3,
        ("inline",): 4,
        ("inline", "one"): 4,
        ("inline", "two"): 4,
        ("inline", "two", "three"): 4,
        ("long",): 5,
        ("array",): 9,
        ("table",): 13,
        ("table", "key"): 14,
        ("table", "sub"): 15,
        ("table", "sub", "key"): 16,
        ("list",): 17,
        ("list", "0"): 17,
        ("list", "0", "key"): 18,
        ("list", "1"): 19,
        ("list", "1", "key"): 20,
    }


def test_key_lines_with_windows_line_ends() -> None:
    assert key_lines("a = 1\r\n[b]\r\nc = '''\r\nx'''\r\nd = 1\r\n")["b", "d"] == 5


def test_an_error_behind_a_very_long_value_has_the_line_of_its_table(folder: Path) -> None:
    text = f"{MINIMAL}[cpu]\nmodel = [" + "\n" * 300 + "]\ncount = 0\n"
    assert "guest.toml:8: cpu.count: 0 is too small; write 1 or more" in message_of(folder, text).split("\n")


def test_a_key_of_very_many_parts(folder: Path) -> None:
    assert message_of(folder, MINIMAL + "a." * 2000 + "b = 1").startswith('guest.toml:8: boot.a: unknown key "a";')


# Schema


def tables_of(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schema of each table, by the table's name in TOML; the top of the file is ""."""
    found = {"": schema}
    for key, value in schema["properties"].items():
        if reference := value.get("$ref") or value.get("items", {}).get("$ref"):
            found[key] = schema["$defs"][reference.removeprefix("#/$defs/")]
    return found


def test_the_schema_has_the_tables_and_keys_of_toml() -> None:
    tables = tables_of(json_schema())

    assert {name: set(table["properties"]) for name, table in tables.items()} == {
        "": {
            *("name", "memory", "cpu", "machine", "boot", "disk", "isolation", "console", "qmp", "vsock", "process"),
            *("nic", "share"),
        },
        "memory": {"size", "max", "prefault", "backing"},
        "cpu": {"count", "model"},
        "machine": {"type", "accel"},
        "boot": {"kernel", "initrd", "cmdline", "firmware"},
        "disk": {
            "path",
            "format",
            "key-file",
            "cache",
            "plaintext",
            "read-only",
            "serial",
            "boot-order",
            "discard",
        },
        "isolation": {"validate", "every", "on-exposed", "ready", "ready-timeout", "after-validation"},
        "console": {"log"},
        "qmp": {"allow"},
        "share": {"path", "tag", "read-only", "plaintext"},
        "vsock": {"cid"},
        "process": {"user", "uids", "cgroup"},
        "nic": {"mode", "plaintext", "bridge", "create", "address", "mac", "mtu", "queues"},
    }
    assert tables[""]["required"] == ["name", "memory"]
    assert tables["memory"]["required"] == ["size"]


def test_the_schema_forbids_unknown_keys_and_describes_all() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for table in tables_of(schema).values():
        assert table["additionalProperties"] is False
        assert table["title"]
        assert table["description"]
        for value in table["properties"].values():
            assert "$ref" in value or (value["title"] and value["description"])
    assert "null" not in str(schema)  # TOML has none
    assert "None" not in str(schema)


def test_the_schema_writes_sizes_and_durations_as_text() -> None:
    tables = tables_of(json_schema())
    size, timeout = tables["memory"]["properties"]["size"], tables["isolation"]["properties"]["ready-timeout"]

    assert size["type"] == timeout["type"] == "string"
    assert re.search(size["pattern"], "256MiB")
    assert not re.search(size["pattern"], "256MB")
    assert timeout["default"] == "120s"
    assert re.search(timeout["pattern"], timeout["default"])


def test_the_schema_agrees_with_the_full_file() -> None:
    tables = tables_of(json_schema())
    types = {"string": str, "integer": int, "boolean": bool, "array": list}
    for name, values in tomllib.loads(FULL).items():
        fields = values if isinstance(values, dict) else {name: values}
        for key, value in fields.items():
            field = tables[name if isinstance(values, dict) else ""]["properties"][key]
            assert type(value) is types[field["type"]]
            assert re.search(field.get("pattern", ""), str(value))
            assert value in field.get("enum", [value])


def test_each_default_of_the_schema_is_what_a_file_without_the_key_means(folder: Path) -> None:
    lines = [MINIMAL]
    tables = tables_of(json_schema())
    for name, table in tables.items():
        if tables[""]["properties"].get(name, {}).get("type") == "array":  # of tables, of which there is none
            continue
        defaults = {key: value["default"] for key, value in table["properties"].items() if "default" in value}
        lines += [
            f"{name}.{key}".removeprefix(".") + f" = {str(value).lower() if isinstance(value, bool) else repr(value)}"
            for key, value in defaults.items()
        ]
    dotted = "\n".join(['name = "demo"', 'memory.size = "256MiB"', 'boot.kernel = "vmlinuz"', *lines[1:]])
    assert load_text(folder, dotted) == load_text(folder, MINIMAL)


# Properties: whatever a file holds, it is a GuestConfig or a ConfigError, never another exception.


def check_total(folder: Path, data: str | bytes) -> None:
    try:
        load_text(folder, data)
    except ConfigError as error:
        check_wording(folder, error)


def check_wording(folder: Path, error: ConfigError) -> None:
    """Plain lines of printable ASCII, that name the file and never speak msgspec."""
    assert error.hint
    for line in error.message.split("\n"):
        assert re.fullmatch(r"[ -~]+", line)
        assert line.startswith(f"{folder}/guest.toml:")
        assert "msgspec" not in line
        assert "Expected `" not in line


quick = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
no_surrogates = st.characters(exclude_categories=["Cs"])


@quick
@given(text=st.text(no_surrogates))
def test_any_text(folder: Path, text: str) -> None:
    check_total(folder, text)


@quick
@given(data=st.binary())
def test_any_bytes(folder: Path, data: bytes) -> None:
    check_total(folder, data)


@quick
@given(start=st.integers(0, len(FULL)), length=st.integers(0, 30), put=st.text(string.printable, max_size=10))
def test_any_edit_of_a_good_file(folder: Path, start: int, length: int, put: str) -> None:
    check_total(folder, FULL[:start] + put + FULL[start + length :])


def toml_string(text: str) -> str:
    return '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'


toml_values = st.recursive(
    st.one_of(
        st.text(no_surrogates, max_size=8).map(toml_string),
        st.sampled_from(['"256MiB"', '"1s"', '"vmlinuz"', '"/proc/self/mem"', '"/"', "07:32:00", "1979-05-27"]),
        st.integers().map(str),
        st.floats().map(lambda value: str(value).replace("e", ".0e") if "." not in str(value) else str(value)),
        st.booleans().map(lambda value: str(value).lower()),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(inner, max_size=3).map(
            lambda items: "{" + ", ".join(f"k{i} = {item}" for i, item in enumerate(items)) + "}"
        ),
    ),
    max_leaves=5,
)


@quick
@given(line=st.sampled_from([line for line in FULL.split("\n") if " = " in line]), value=toml_values)
def test_any_value_of_any_key(folder: Path, line: str, value: str) -> None:
    check_total(folder, FULL.replace(line, f"{line.split(' = ')[0]} = {value}"))


@quick
@given(header=st.sampled_from(["", "[memory]", "[boot]", "[x]"]), key=st.text(no_surrogates), value=toml_values)
def test_any_unknown_key(folder: Path, header: str, key: str, value: str) -> None:
    check_total(folder, f"{header}\n{toml_string(key)} = {value}\n")


@pytest.mark.parametrize("more", ["", '[[nic]]\nbridge = "br0"\n', "[vsock]\ncid = 3\n"])
def test_no_more_devices_than_the_board_has_room_for(tmp_path: Path, more: str) -> None:
    (tmp_path / "vmlinuz").touch()
    nic, share = '[[nic]]\nbridge = "br0"\n', '[[share]]\npath = "."\ntag = "t{}"\n'
    file = tmp_path / "guest.toml"
    file.write_text(MINIMAL + nic * 15 + "".join(share.format(number) for number in range(14)) + more)
    if not more:
        assert len(load(file).nic) == 15
        return
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert "nic: with it the guest has 30 disks, nics, shares and vsocks; 29 is the most" in raised.value.message


@pytest.mark.parametrize("log", ["guest.toml", "vmlinuz", "initrd.img", "./link"])
def test_a_console_log_may_not_be_a_file_that_the_guest_is_made_of(tmp_path: Path, log: str) -> None:
    for name in ("vmlinuz", "initrd.img"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("vmlinuz")
    file = tmp_path / "guest.toml"
    file.write_text(f'{MINIMAL}initrd = "initrd.img"\n[console]\nlog = "{log}"\n')
    with pytest.raises(ConfigError, match=r"console\.log: .* is a file that the guest is made of"):
        config.load(file)
