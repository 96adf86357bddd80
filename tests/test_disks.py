"""QEMU's arguments for disks, as text, and what is told of their errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vmmback.config import GuestConfig
from vmmback.config.disk import Disk
from vmmback.disks import DiskErrors, argv, key_pipe
from vmmback.errors import UsageError

LUKS: dict[str, Any] = {"path": "/g/root.luks", "format": "luks", "key-file": "/g/root.key"}
PLAIN: dict[str, Any] = {"path": "/g/a.raw", "format": "raw", "plaintext": "allowed"}


def arguments(disk: dict[str, Any], key: int | None = None, **more: Any) -> list[Any]:
    """QEMU's arguments, with what is JSON as what it says."""
    made = argv("disk1", Disk.of(disk), 7, key, **more)
    return [json.loads(word) if word.startswith("{") else word for word in made]


def test_the_arguments_of_an_encrypted_disk() -> None:
    words = argv("disk0", Disk.of({**LUKS, "serial": "root", "boot-order": 1}), 7, 8)
    assert (
        "\n".join(words)
        == """\
-add-fd
fd=7,set=0
-object
{"qom-type": "secret", "id": "disk0-key", "format": "raw", "file": "/proc/self/fd/8"}
-blockdev
{"driver": "luks", "node-name": "disk0-image", "file": {"driver": "file", "node-name": "disk0-file", \
"filename": "/dev/fdset/0", "locking": "on", "read-only": false, "cache": {"direct": true, "no-flush": false}, \
"discard": "ignore"}, "read-only": false, "cache": {"direct": true, "no-flush": false}, "discard": "ignore", \
"key-secret": "disk0-key"}
-device
{"driver": "virtio-blk-pci", "id": "disk0", "drive": "disk0-image", "write-cache": "on", "discard": false, \
"write-zeroes": false, "serial": "root", "bootindex": 1}"""
    )
    assert not any("/g/" in word for word in words)  # no path of the host's


def test_luks_inside_qcow2() -> None:
    node = arguments({**LUKS, "format": "qcow2"}, 8)[5]
    assert node["encrypt"] == {"format": "luks", "key-secret": "disk1-key"}
    assert node["backing"] is None
    assert node["file"]["cache"]["direct"] is True


def test_a_plain_disk_has_no_key() -> None:
    words = arguments({**PLAIN, "read-only": True})
    assert words[:2] == ["-add-fd", "fd=7,set=1"]
    assert "-object" not in words
    assert words[3]["read-only"] is words[3]["file"]["read-only"] is True
    assert words[3]["cache"]["direct"] is words[3]["file"]["cache"]["direct"] is False


@pytest.mark.parametrize(
    ("cache", "direct", "write_cache"),
    [("none", True, "on"), ("directsync", True, "off"), ("writeback", False, "on"), ("writethrough", False, "off")],
)
def test_the_four_kinds_of_cache(cache: str, direct: bool, write_cache: str) -> None:
    words = arguments({**LUKS, "cache": cache}, 8)
    assert words[5]["file"]["cache"]["direct"] is words[5]["cache"]["direct"] is direct
    assert words[7]["write-cache"] == write_cache


def test_discards_reach_the_host_only_if_asked() -> None:
    for wanted, mode in ((False, "ignore"), (True, "unmap")):
        words = arguments({**PLAIN, "discard": wanted})
        assert words[3]["discard"] == words[3]["file"]["discard"] == mode
        assert words[5]["discard"] is words[5]["write-zeroes"] is wanted


def test_a_block_device_has_a_driver_of_its_own() -> None:
    assert arguments(PLAIN, is_device=True)[3]["file"]["driver"] == "host_device"


# --- Keys -------------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_key_is_passed_as_it_is(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"a key\n")
    key.chmod(0o600)
    reader = key_pipe(key)
    try:
        assert os.read(reader, 100) == b"a key\n"
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)


def test_a_key_that_changed_since_it_was_checked_is_looked_at_again(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"a key")
    key.chmod(0o644)
    before = descriptors()
    with pytest.raises(UsageError, match="others may use it"):
        key_pipe(key)
    with pytest.raises(UsageError, match="No such file"):
        key_pipe(tmp_path / "gone")
    assert descriptors() == before


# --- Errors while a guest runs ----------------------------------------------------------------------------------------

GUEST = GuestConfig.of({"name": "demo", "memory": {"size": "64MiB"}, "disk": [LUKS, PLAIN]})


def error(node: str, *, nospace: bool = False, action: str = "report", operation: str = "write") -> dict[str, object]:
    reason = "No space left on device" if nospace else "Input/output error"
    data = {"node-name": node, "operation": operation, "action": action, "nospace": nospace, "reason": reason}
    return {"event": "BLOCK_IO_ERROR", "data": data}


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def errors(notes: list[str]) -> DiskErrors:
    return DiskErrors(GUEST, Path("/run/vmmback/demo/qmp.sock"), notes.append)


def test_a_full_host_is_told_once_until_the_guest_goes_on(errors: DiskErrors, notes: list[str]) -> None:
    full = error("disk0-image", nospace=True, action="stop")
    for event in (full, full, {"event": "STOP"}, full):
        errors.receive(event)
    assert notes == [
        "the file system of the disk /g/root.luks is full, and the guest stands still: free space there, then send "
        "`cont` to /run/vmmback/demo/qmp.sock"
    ]
    errors.receive({"event": "RESUME"})
    errors.receive(full)
    assert len(notes) == 2


def test_each_other_error_is_told_once(errors: DiskErrors, notes: list[str]) -> None:
    for _ in range(100):
        errors.receive(error("disk1-image"))
        errors.receive(error("disk1-image", operation="read"))
    assert notes == [
        "the disk /g/a.raw had an error, and the guest was told so: write, Input/output error",
        "the disk /g/a.raw had an error, and the guest was told so: read, Input/output error",
    ]


def test_what_else_qemu_says_is_nothing_of_a_disks(errors: DiskErrors, notes: list[str]) -> None:
    for event in ({"event": "STOP"}, {"event": "BLOCK_IO_ERROR"}, {"event": "BLOCK_IO_ERROR", "data": 1}, {}):
        errors.receive(event)
    assert notes == []
