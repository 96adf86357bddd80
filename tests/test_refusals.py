"""docs/REFUSALS.md and the code say the same of what a guest file may not say: row by row, refusal by refusal."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

from tests.markdown import tables
from vmmback.config import GuestConfig, load
from vmmback.errors import ConfigError
from vmmback.toml_tables import keys_of

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "vmmback/config"


class Row(NamedTuple):
    """A row of the table, without its reason."""

    table: str
    key: str
    refused: str


def all_rows() -> list[Row]:
    (table,) = tables((ROOT / "docs/REFUSALS.md").read_text())
    return [Row(*row[:3]) for row in table]


# What only a launch can tell is tried in integration/test_process.py, test_devices.py and tests/test_vsock.py.
ROWS = [row for row in all_rows() if not row.refused.endswith("(at launch)")]

BASE = {"name": 'name = "demo"\n', "[memory]": '[memory]\nsize = "256MiB"\n', "[boot]": '[boot]\nkernel = "vmlinuz"\n'}
DISK_BOOT = "[boot]\n"  # of a guest that boots its disk
NIC, SHARE = '[[nic]]\nbridge = "br0"\n', '[[share]]\npath = "folder"\n'
CREATED = NIC + 'create = true\naddress = "10.0.0.1/24"\n'
PLAIN = 'plaintext = "allowed"\n'


def disk(path: str, kind: str, more: str = "") -> str:
    return f'[[disk]]\npath = "{path}"\nformat = "{kind}"\n{more}'


KEY = 'key-file = "key"\n'
RAW, LUKS = disk("raw", "raw", PLAIN), disk("luks", "luks", KEY)

# For each row: its table, its key and a word of what is refused; then files that say it, each added to BASE, whose
# tables it replaces; and the key that the error names.
TRIES: dict[tuple[str, str, str], list[tuple[str, str]]] = {
    ("all", "all", "not known"): [
        ("[foo]\n", "foo"),
        ("[cpu]\ncuont = 1\n", "cpu.cuont"),
        ("[memory]\n", "memory.size"),
        ("[memory]\nsize = 1\n", "memory.size"),
        ("[process]\nuser = 1\n", "process.user"),
        ("[process]\nuids = 1\n", "process.uids"),
        ("[qmp]\nallow = 1\n", "qmp.allow"),
        ('[boot]\nkernel = ""\n', "boot.kernel"),
    ],
    ("the top", "`name`", "1 to 63"): [('name = "A"\n', "name")],
    ("[memory]", "`size`, `max`", "8KiB"): [
        ('[memory]\nsize = "1"\n', "memory.size"),
        ('[memory]\nsize = "1KiB"\n', "memory.size"),
        ('[memory]\nsize = "1025KiB"\n', "memory.size"),
    ],
    ("[memory]", "`max`", "less than"): [('[memory]\nsize = "2MiB"\nmax = "1MiB"\n', "memory.max")],
    ("[memory]", "`max`", "128MiB"): [('[memory]\nsize = "2MiB"\nmax = "3MiB"\n', "memory.max")],
    ("[cpu]", "`count`", "255"): [("[cpu]\ncount = 0\n", "cpu.count"), ("[cpu]\ncount = 256\n", "cpu.count")],
    ("[cpu]", "`model`", "letters"): [('[cpu]\nmodel = "max avx"\n', "cpu.model")],
    ("[boot]", "the table", "neither"): [(DISK_BOOT, "boot"), ("#[boot]\n", "boot")],
    ("[boot]", "`firmware`", "with `kernel`"): [
        ('[boot]\nkernel = "vmlinuz"\nfirmware = "vmlinuz"\n', "boot.firmware")
    ],
    ("[boot]", "`initrd`, `cmdline`", "without"): [
        ('[boot]\nfirmware = "vmlinuz"\ninitrd = "vmlinuz"\n', "boot.initrd"),
        ('[boot]\nfirmware = "vmlinuz"\ncmdline = "quiet"\n', "boot.cmdline"),
    ],
    ("[boot]", "`cmdline`", "2047"): [
        (f'[boot]\nkernel = "vmlinuz"\ncmdline = "{"x" * 2048}"\n', "boot.cmdline"),
        ('[boot]\nkernel = "vmlinuz"\ncmdline = "a\\nb"\n', "boot.cmdline"),
    ],
    ("[boot]", "`kernel`, `initrd`, `firmware`", "not there"): [
        ('[boot]\nkernel = "none"\n', "boot.kernel"),
        ('[boot]\nkernel = "vmlinuz"\ninitrd = "folder"\n', "boot.initrd"),
        ('[boot]\nfirmware = "none"\n', "boot.firmware"),
    ],
    ("[isolation]", "`every`", "never"): [('[isolation]\nvalidate = "never"\nevery = "1s"\n', "isolation.every")],
    ("[isolation]", "`every`", "1s"): [('[isolation]\nevery = "999ms"\n', "isolation.every")],
    ("[isolation]", "`every`, `ready-timeout`", "duration"): [
        ('[isolation]\nready-timeout = "1"\n', "isolation.ready-timeout"),
        ('[isolation]\nevery = "25h"\n', "isolation.every"),
    ],
    ("[isolation]", "`ready`", "blank"): [
        ('[isolation]\nready = " "\n', "isolation.ready"),
        ('[isolation]\nready = "a\\tb"\n', "isolation.ready"),
    ],
    ("[console]", "`log`", "a folder;"): [
        ('[console]\nlog = "folder"\n', "console.log"),
        ('[console]\nlog = "none/log"\n', "console.log"),
        (f'[console]\nlog = "{"x" * 256}"\n', "console.log"),
    ],
    ("[console]", "`log`", "boots"): [('[console]\nlog = "vmlinuz"\n', "console.log")],
    ("[qmp]", "`allow`", "export"): [
        ('[qmp]\nallow = ["pmemsave"]\n', "qmp.allow"),
        ('[qmp]\nallow = ["no-such-command"]\n', "qmp.allow"),
    ],
    ("[[disk]]", "`cache`", '"directsync"'): [
        (disk("raw", "raw", PLAIN + f'cache = "{cache}"\n'), "disk[0].cache") for cache in ("none", "directsync")
    ],
    ("[[disk]]", "`plaintext`", "missing"): [
        (disk("raw", "raw"), "disk[0].plaintext"),
        (disk("qcow2", "qcow2", 'plaintext = "refused"\n'), "disk[0].plaintext"),
    ],
    ("[[disk]]", "`plaintext`", "key-file"): [(disk("luks", "luks", KEY + PLAIN), "disk[0].plaintext")],
    ("[[disk]]", "`key-file`", "missing"): [
        (disk("luks", "luks"), "disk[0].key-file"),
        (disk("qcow2-luks", "qcow2", PLAIN), "disk[0].path"),
    ],
    ("[[disk]]", "`key-file`", '"raw"'): [
        (disk("raw", "raw", KEY), "disk[0].key-file"),
        (disk("qcow2", "qcow2", KEY), "disk[0].path"),
    ],
    ("[[disk]]", "`key-file`", "4096"): [
        (disk("luks", "luks", f'key-file = "{key}"\n'), "disk[0].key-file")
        for key in ("key-empty", "key-large", "key-open", "none")
    ],
    ("[[disk]]", "`discard`", '"luks"'): [(disk("luks", "luks", KEY + "discard = true\n"), "disk[0].discard")],
    ("[[disk]]", "`discard`", "read-only"): [
        (disk("raw", "raw", PLAIN + "discard = true\nread-only = true\n"), "disk[0].discard")
    ],
    ("[[disk]]", "`path`", "block device"): [
        (disk("none", "raw", PLAIN), "disk[0].path"),
        (disk("folder", "raw", PLAIN), "disk[0].path"),
    ],
    ("[[disk]]", "`path`", "LUKS2"): [
        (disk("luks", "raw", PLAIN), "disk[0].path"),
        (disk("qcow2", "raw", PLAIN), "disk[0].path"),
        (disk("raw", "luks", KEY), "disk[0].path"),
        (disk("raw", "qcow2", PLAIN), "disk[0].path"),
        (disk("luks2", "luks", KEY), "disk[0].path"),
    ],
    ("[[disk]]", "`path`", "backing"): [
        (disk("qcow2-backing", "qcow2", PLAIN), "disk[0].path"),
        (disk("qcow2-data", "qcow2", PLAIN), "disk[0].path"),
    ],
    ("[[disk]]", "`path`", "AES"): [(disk("qcow2-aes", "qcow2", PLAIN), "disk[0].path")],
    ("[[disk]]", "`path`", "another disk"): [
        (RAW + RAW, "disk[1].path"),
        (disk("vmlinuz", "raw", PLAIN), "disk[0].path"),
        ('[console]\nlog = "raw"\n' + RAW, "disk[0].path"),
    ],
    ("[[disk]]", "`serial`", "1 to 20"): [(LUKS + 'serial = "a b"\n', "disk[0].serial")],
    ("[[disk]]", "`boot-order`", "another"): [
        (LUKS + "boot-order = 1\n", "disk[0].boot-order"),
        (DISK_BOOT + LUKS + "boot-order = 1\n" + RAW + "boot-order = 1\n", "disk[1].boot-order"),
        (DISK_BOOT + LUKS + "boot-order = 0\n", "disk[0].boot-order"),
        (DISK_BOOT + LUKS + "boot-order = 1001\n", "disk[0].boot-order"),
    ],
    ("[[disk]]", "all together", "16"): [((RAW + "read-only = true\n") * 17, "disk")],
    ("[[nic]]", "`mode`", '"user"'): [('[[nic]]\nmode = "user"\n', "nic[0].mode")],
    ("[[nic]]", "`bridge`, `create`, `address`, `mtu`, `queues`", "user"): [
        (f'[[nic]]\nmode = "user"\n{PLAIN}{key} = {value}\n', f"nic[0].{key}")
        for key, value in (("bridge", '"br0"'), ("create", "true"), ("address", '"10.0.0.1/8"'), ("mtu", 1400))
    ],
    ("[[nic]]", "`bridge`", "missing"): [("[[nic]]\n", "nic[0].bridge")],
    ("[[nic]]", "`bridge`", "15"): [
        ('[[nic]]\nbridge = "a/b"\n', "nic[0].bridge"),
        ('[[nic]]\nbridge = "default"\n', "nic[0].bridge"),
    ],
    ("[[nic]]", "`bridge`", "with `plaintext`"): [(NIC + PLAIN, "nic[0].bridge")],
    ("[[nic]]", "`create`", "without"): [
        (NIC + "create = true\n", "nic[0].create"),
        (NIC + 'address = "10.0.0.1/8"\n', "nic[0].create"),
    ],
    ("[[nic]]", "`address`", "prefix"): [
        (NIC + f'create = true\naddress = "{address}"\n', "nic[0].address")
        for address in (
            "x",
            "10.0.0.1",
            "10.0.0.0/8",
            "10.255.255.255/8",
            "224.0.0.1/8",
            "::1/64",
            "fe80::1%a/64",
            "255.255.255.255/32",
            "10.0.0.1/0",
            "fd00::1/0",
        )
    ],
    ("[[nic]]", "`address`", "another one"): [(CREATED + NIC, "nic[1].address")],
    ("[[nic]]", "`mac`", "group"): [
        (NIC + f'mac = "{mac}"\n', "nic[0].mac") for mac in ("x", "01:00:5e:00:00:01", "00:00:00:00:00:00")
    ],
    ("[[nic]]", "`mac`", "another nic"): [(2 * (NIC + 'mac = "52:54:00:00:00:01"\n'), "nic[1].mac")],
    ("[[nic]]", "`mtu`", "68"): [(NIC + "mtu = 67\n", "nic[0].mtu"), (NIC + "mtu = 65522\n", "nic[0].mtu")],
    ("[[nic]]", "`mtu`", "1280"): [
        (NIC + 'create = true\naddress = "fd00::1/64"\nmtu = 1279\n', "nic[0].mtu"),
    ],
    ("[[nic]]", "`queues`", "count"): [(NIC + f"queues = {queues}\n", "nic[0].queues") for queues in (0, 2, 256)],
    ("[[nic]]", "all together", "16"): [(NIC * 17, "nic")],
    ("[[share]]", "`path`", "folder"): [
        ('[[share]]\npath = "none"\ntag = "t"\n', "share[0].path"),
        ('[[share]]\npath = "vmlinuz"\ntag = "t"\n', "share[0].path"),
    ],
    ("[[share]]", "`tag`", "36"): [(SHARE + 'tag = "a,b"\n', "share[0].tag")],
    ("[[share]]", "`tag`", "twice"): [(2 * (SHARE + 'tag = "t"\n'), "share[1].tag")],
    ("[[share]]", "`read-only`", "false"): [(SHARE + 'tag = "t"\nread-only = false\n', "share[0].read-only")],
    ("[vsock]", "`cid`", "4294967295"): [(f"[vsock]\ncid = {cid}\n", "vsock.cid") for cid in (-1, 0, 1, 2, 4294967295)],
    ("[[disk]], [[nic]], [[share]], [vsock]", "all together", "29"): [
        (NIC * 15 + (RAW + "read-only = true\n") * 14 + "[vsock]\ncid = 3\n", "nic")
    ],
    ("[balloon]", "the table", "always"): [("[balloon]\n", "balloon")],
    ("[process]", "`user`", "root"): [('[process]\nuser = "root"\n', "process.user")],
    ("[process]", "`user`", "nobody"): [('[process]\nuser = "nobody"\n', "process.user")],
    ("[process]", "`user`", "name"): [
        ('[process]\nuser = "A b"\n', "process.user"),
        ('[process]\nuser = "no-such-account"\n', "process.user"),
    ],
    ("[process]", "the table", "both"): [('[process]\nuser = "daemon"\nuids = "5-6"\n', "process")],
    ("[process]", "`uids`", "65534"): [
        ('[process]\nuids = "0-9"\n', "process.uids"),
        ('[process]\nuids = "9-65534"\n', "process.uids"),
    ],
    ("[process]", "`cgroup`", "absolute"): [
        ('[process]\ncgroup = "demo"\n', "process.cgroup"),
        ('[process]\ncgroup = "/machine/../demo"\n', "process.cgroup"),
        ('[process]\ncgroup = "/"\n', "process.cgroup"),
    ],
    ("[process]", "`uids`", "before"): [
        ('[process]\nuids = "x"\n', "process.uids"),
        ('[process]\nuids = "9-5"\n', "process.uids"),
        ('[process]\nuids = "5-4294967295"\n', "process.uids"),
    ],
}


def qcow2(**fields: int) -> bytes:
    """Return a header of version 3; its fields are in docs/interop/qcow2.txt of QEMU's."""
    header = bytearray(104)
    header[:8] = b"QFI\xfb\0\0\0\3"
    for at, value in fields.items():
        header[int(at.removeprefix("at")) + 7 - 4 * (at == "at32")] = value
    return bytes(header)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    (folder / "folder").mkdir()
    files = {
        "vmlinuz": b"x", "raw": bytes(512), "luks": b"LUKS\xba\xbe\0\1", "luks2": b"LUKS\xba\xbe\0\2",
        "qcow2": qcow2(), "qcow2-luks": qcow2(at32=2), "qcow2-aes": qcow2(at32=1), "qcow2-backing": qcow2(at8=104),
        "qcow2-data": qcow2(at72=4), "key": b"k", "key-empty": b"", "key-large": b"k" * 4097, "key-open": b"k",
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o644 if name == "key-open" else 0o600)
    return folder


def refusal(folder: Path, text: str) -> str:
    """Return the message about a guest file of BASE and this text, without the folder."""
    base = "".join(part for start, part in BASE.items() if not text.lstrip("#").startswith(start))
    file = folder / "guest.toml"
    file.write_text(text + base if text.startswith("name") else base + text)
    with pytest.raises(ConfigError) as raised:
        load(file)
    return raised.value.message.replace(f"{folder}/", "")


def row_of(table: str, key: str, word: str) -> Row:
    found = [row for row in ROWS if (row.table.replace("`", ""), row.key) == (table, key) and word in row.refused]
    assert len(found) == 1, f"{len(found)} rows of {table} {key} speak of {word}"
    return found[0]


def test_each_row_is_tried_and_each_try_has_its_row() -> None:
    tried = [row_of(*about) for about in TRIES]
    assert sorted(tried) == sorted(ROWS)


@pytest.mark.parametrize(
    ("text", "key"), [case for tries in TRIES.values() for case in tries],
    ids=[f"{about[0]} {about[1]} {about[2]}" for about, tries in TRIES.items() for _ in tries],
)  # fmt: skip
def test_what_a_row_says_is_refused_by_table_and_key(folder: Path, text: str, key: str) -> None:
    assert re.match(rf"guest.toml(:\d+)?: {re.escape(key)}: .*\w", refusal(folder, text))


def refusing_lines() -> Iterator[tuple[str, range]]:
    """Yield file and lines of each place where a guest file is refused: errors raised, and conflicts told."""
    for path in CONFIG.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            raises = isinstance(node, ast.Raise) and ast.unparse(node).startswith("raise ValueError")
            tells = isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple)
            if raises or tells:
                assert isinstance(node, ast.Raise | ast.Yield)
                yield path.name, range(node.lineno, (node.end_lineno or node.lineno) + 1)


@contextmanager
def traced() -> Iterator[set[tuple[str, int]]]:
    """Collect which lines of vmmback/config/ run while the block does."""
    ran: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.parent != CONFIG:
            return None
        if event == "line":
            ran.add((path.name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield ran
    finally:
        sys.settrace(before)


def test_there_is_no_refusal_in_the_code_that_the_table_lacks(folder: Path) -> None:
    with traced() as ran:
        for tries in TRIES.values():
            for text, _ in tries:
                refusal(folder, text)
    untold = [
        f"{name}:{lines[0]}" for name, lines in refusing_lines() if not any((name, line) in ran for line in lines)
    ]
    assert untold == []


def test_each_key_with_bounds_has_a_row() -> None:
    bounded = {
        (table.name, key.name)
        for table in keys_of(GuestConfig).values()
        for key in (keys_of(table.table).values() if table.table else [table])
        if key.meta.ge is not None or key.meta.le is not None
    }
    told = {(row.table.strip("`[]"), key.strip("` ")) for row in ROWS for key in row.key.split(",")}
    assert len(bounded) > 3
    assert bounded - told == set()
