"""[[disk]] of guest files: what is refused before anything is made, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmback import config
from vmmback.config import GuestConfig
from vmmback.config.disk import MAX_DISKS, header_problem
from vmmback.errors import ConfigError

LUKS1 = b"LUKS\xba\xbe\x00\x01"
KERNEL = '[boot]\nkernel = "vmlinuz"\n'
ENCRYPTED = '[[disk]]\npath = "root.luks"\nformat = "luks"\nkey-file = "root.key"\n'
PLAIN = '[[disk]]\npath = "a.raw"\nformat = "raw"\nplaintext = "allowed"\n'


def qcow2(*, version: int = 3, backing_file: int = 0, method: int = 0, features: int = 0) -> bytes:
    """The start of a qcow2 image (docs/interop/qcow2.txt)."""
    header = bytearray(104)
    header[0:4], header[4:8] = b"QFI\xfb", version.to_bytes(4, "big")
    header[8:16], header[32:36] = backing_file.to_bytes(8, "big"), method.to_bytes(4, "big")
    header[72:80] = features.to_bytes(8, "big")
    return bytes(header)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, contents in {
        "vmlinuz": b"kernel",
        "root.luks": LUKS1,
        "luks2": b"LUKS\xba\xbe\x00\x02",
        "a.raw": bytes(512),
        "b.raw": bytes(512),
        "plain.qcow2": qcow2(),
        "luks.qcow2": qcow2(method=2),
        "aes.qcow2": qcow2(method=1),
        "child.qcow2": qcow2(backing_file=4096),
        "data.qcow2": qcow2(features=4),
        "root.key": b"secret",
        "open.key": b"secret",
        "empty.key": b"",
        "long.key": bytes(4097),
    }.items():
        (tmp_path / name).write_bytes(contents)
        (tmp_path / name).chmod(0o644 if name == "open.key" else 0o600)
    (tmp_path / "link").symlink_to("a.raw")
    return tmp_path


def load(folder: Path, tables: str, boot: str = KERNEL) -> GuestConfig:
    file = folder / "guest.toml"
    file.write_text(f'name = "demo"\n[memory]\nsize = "256MiB"\n{boot}{tables}')
    return config.load(file)


def problems(folder: Path, tables: str, boot: str = KERNEL) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, tables, boot)
    return [line.replace(f"{folder}/", "") for line in caught.value.message.split("\n")]


def disk(name: str, kind: str, more: str = "") -> str:
    return f'[[disk]]\npath = "{name}"\nformat = "{kind}"\n{more}'


KEY = 'key-file = "root.key"\n'
ALLOWED = 'plaintext = "allowed"\n'


@pytest.mark.parametrize("key", ["root", "luks"])
def test_an_encrypted_disk_has_no_page_cache_unless_it_is_asked_for(folder: Path, key: str) -> None:
    tables = {"root": ENCRYPTED, "luks": disk("luks.qcow2", "qcow2", KEY)}[key]
    (made,) = load(folder, tables).disk
    assert made.encrypted
    assert made.direct
    assert not made.flushes
    assert load(folder, f'{tables}cache = "writeback"\n').disk[0].direct is False


def test_a_plain_disk_is_in_the_page_cache(folder: Path) -> None:
    (made,) = load(folder, PLAIN).disk
    assert (made.encrypted, made.direct, made.flushes) == (False, False, False)
    assert load(folder, f'{PLAIN}cache = "writethrough"\n').disk[0].flushes


def test_the_example_of_the_design(folder: Path) -> None:
    (made,) = load(folder, f'{ENCRYPTED}cache = "none"\n').disk
    assert (made.path, made.format, made.key_file) == (folder / "root.luks", "luks", folder / "root.key")


def test_a_guest_with_a_disk_needs_no_boot_table(folder: Path) -> None:
    assert load(folder, ENCRYPTED, boot="").boot.kernel is None
    assert load(folder, f"{ENCRYPTED}boot-order = 1\n", boot="[boot]\n").disk[0].boot_order == 1
    assert load(folder, PLAIN, boot='[boot]\nfirmware = "vmlinuz"\n').boot.firmware
    (problem,) = problems(folder, PLAIN, boot='[boot]\ncmdline = "quiet"\n')
    assert problem.startswith("guest.toml:5: boot.cmdline: goes with a kernel")


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        # What secret RAM cannot, and what would leave the guest's data on the host.
        (f'{PLAIN}cache = "none"\n', "10: disk[0].cache: none opens the image with O_DIRECT, which the kernel refuses"),
        (f'{PLAIN}cache = "directsync"\n', "10: disk[0].cache: directsync opens the image with O_DIRECT, which"),
        (disk("a.raw", "raw"), "6: disk[0].plaintext: the disk is not encrypted, so that the host's page cache"),
        (disk("plain.qcow2", "qcow2"), "6: disk[0].plaintext: the disk is not encrypted"),
        (disk("a.raw", "raw", 'plaintext = "refused"\n'), "9: disk[0].plaintext: the disk is not encrypted"),
        (disk("luks.qcow2", "qcow2", ALLOWED), "7: disk[0].path: luks.qcow2: is encrypted; write its key-file"),
        (f"{ENCRYPTED}discard = true\n", '10: disk[0].discard: does not go with format = "luks": QEMU\'s LUKS'),
        # Keys that do not go together.
        (
            disk("root.luks", "luks"),
            '6: disk[0].key-file: is missing, and LUKS needs a key; write key-file = "root.key"',
        ),
        (disk("a.raw", "raw", KEY), '9: disk[0].key-file: does not go with format = "raw", which is not encrypted'),
        (f"{ENCRYPTED}{ALLOWED}", "10: disk[0].plaintext: does not go with key-file: the disk is encrypted"),
        (f"{PLAIN}read-only = true\ndiscard = true\n", "11: disk[0].discard: does not go with read-only"),
        (f"{PLAIN}boot-order = 1\n", "10: disk[0].boot-order: does not go with [boot] kernel"),
        # The image is not what its format says.
        (disk("root.luks", "raw", ALLOWED), '7: disk[0].path: root.luks: is LUKS, not raw; write format = "luks"'),
        (disk("plain.qcow2", "raw", ALLOWED), "7: disk[0].path: plain.qcow2: is qcow2, not raw"),
        (disk("a.raw", "luks", KEY), "7: disk[0].path: a.raw: is not LUKS; `vmmback disk create` makes"),
        (disk("luks2", "luks", KEY), "7: disk[0].path: luks2: is LUKS2, and QEMU knows LUKS1 only"),
        (disk("a.raw", "qcow2", ALLOWED), "7: disk[0].path: a.raw: is not qcow2"),
        (disk("plain.qcow2", "qcow2", KEY), "7: disk[0].path: plain.qcow2: is not encrypted, but has a key-file"),
        (disk("aes.qcow2", "qcow2", KEY), "7: disk[0].path: aes.qcow2: is encrypted by qcow2's old AES"),
        (disk("child.qcow2", "qcow2", ALLOWED), "7: disk[0].path: child.qcow2: has a backing file"),
        (disk("data.qcow2", "qcow2", ALLOWED), "7: disk[0].path: data.qcow2: has an external data file"),
        # Files.
        (disk("gone", "raw", ALLOWED), "7: disk[0].path: gone: no such file or directory; `vmmback disk create`"),
        (disk("/usr", "raw", ALLOWED), "7: disk[0].path: /usr: is a folder"),
        (disk("/dev/null", "raw", ALLOWED), "7: disk[0].path: /dev/null: is neither a regular file nor a block device"),
        (disk("vmlinuz", "raw", ALLOWED), "7: disk[0].path: vmlinuz: is [boot] kernel as well"),
        (
            f"{PLAIN}{PLAIN}",
            "11: disk[1].path: a.raw: is the image of disk[0] as well, and one of them may write to it",
        ),
        (f"{PLAIN}read-only = true\n{disk('link', 'raw', ALLOWED)}", "12: disk[1].path: link: is the image of disk[0]"),
        (disk("root.luks", "luks", 'key-file = "gone"\n'), "9: disk[0].key-file: gone: no such file or directory"),
        (
            disk("root.luks", "luks", 'key-file = "open.key"\n'),
            "9: disk[0].key-file: open.key: others may use it (mode",
        ),
        (disk("root.luks", "luks", 'key-file = "empty.key"\n'), "9: disk[0].key-file: empty.key: is empty"),
        (disk("root.luks", "luks", 'key-file = "long.key"\n'), "9: disk[0].key-file: long.key: is larger than 4096"),
        # Values.
        (f'{PLAIN}serial = ""\n', '10: disk[0].serial: "" is not a serial number; write 1 to 20 of'),
        (f'{PLAIN}serial = "{21 * "a"}"\n', f'10: disk[0].serial: "{21 * "a"}" is not a serial number'),
        (f'{PLAIN}serial = "a,b"\n', '10: disk[0].serial: "a,b" is not a serial number'),
        (f"{PLAIN}boot-order = 0\n", "10: disk[0].boot-order: 0 is too small; write 1 or more"),
        (disk("a.raw", "vmdk", ALLOWED), '8: disk[0].format: is "vmdk"; write "raw", "qcow2" or "luks"'),
        (f'{PLAIN}cache = "unsafe"\n', '10: disk[0].cache: is "unsafe"; write "none", "directsync"'),
        (PLAIN * (MAX_DISKS + 1), "6: disk: there are 17 disks; 16 is the most that a guest can have"),
    ],
)
def test_a_disk_that_cannot_work_is_refused(folder: Path, tables: str, problem: str) -> None:
    found = problems(folder, tables)
    assert found[0].startswith(f"guest.toml:{problem}"), found
    assert len(found) == 1 or tables == PLAIN * (MAX_DISKS + 1)
    assert "; " in found[0]  # it says what to do


def test_a_console_log_is_no_disk(folder: Path) -> None:
    (problem,) = problems(folder, f'[console]\nlog = "link"\n{PLAIN}')
    assert problem.startswith("guest.toml:9: disk[0].path: a.raw: is [console] log as well")


def test_a_boot_order_is_a_disks_own(folder: Path) -> None:
    second = disk("b.raw", "raw", f"{ALLOWED}boot-order = 2\n")
    (problem,) = problems(folder, f"{PLAIN}boot-order = 2\n{second}", boot="")
    assert problem.startswith("guest.toml:13: disk[1].boot-order: 2 is that of disk[0] already")
    load(folder, f"{PLAIN}boot-order = 1\n{second}", boot="")


def test_two_disks_that_nobody_writes_to_may_be_one_image(folder: Path) -> None:
    assert len(load(folder, f"{PLAIN}read-only = true\n" * 2).disk) == 2


def test_errors_of_several_disks_show_at_once(folder: Path) -> None:
    found = problems(folder, f"{disk('a.raw', 'raw')}serial = 1\n{disk('root.luks', 'luks')}")
    assert [line.split(": ")[1] for line in found] == ["disk[0].plaintext", "disk[0].serial", "disk[1].key-file"]


@pytest.mark.parametrize("kind", ["luks", "qcow2"])
def test_a_short_header_is_no_image(kind: str) -> None:
    for length in range(6):
        assert header_problem(LUKS1[:length], kind, encrypted=True)
    assert header_problem(b"", "raw", encrypted=False) == ""
