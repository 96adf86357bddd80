"""`vmmback disk create`, as far as it needs no qemu-img: what it refuses, and that it never leaves half of a thing."""

from __future__ import annotations

import signal
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmmback import cli, disk_images
from vmmback.errors import HostUnfit, UsageError, VmmbackError

MIB = 1 << 20


def create(*arguments: str) -> str:
    """What the command prints to standard output."""
    done = CliRunner().invoke(cli.commands, ["disk", "create", *arguments], catch_exceptions=True)
    if isinstance(done.exception, VmmbackError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not the command's own
    return tmp_path


def test_a_raw_image_is_made_and_its_table_printed(folder: Path) -> None:
    printed = create("a.raw", "--size", "4MiB", "--format", "raw")
    status = (folder / "a.raw").stat()
    assert (status.st_size, status.st_mode & 0o777, status.st_nlink) == (4 * MIB, 0o600, 1)
    assert tomllib.loads(printed) == {
        "disk": [{"path": str(folder / "a.raw"), "format": "raw", "plaintext": "allowed"}]
    }


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("new --size 4MB", '--size: "4MB" is not a size'),
        ("new --size 1KiB", '--size: "1KiB" is out of range'),
        ("new --size 4MiB", "--format luks needs --key-file"),
        ("new --size 4MiB --key-file gone", "gone: No such file"),
        ("new --size 4MiB --key-file open.key", "open.key: others may use it"),
        ("new --size 4MiB --key-file . ", ".: is not a regular file"),
        ("new --size 4MiB --key-file there --new-key", "there is there already, and is not overwritten"),
        ("new --size 4MiB --new-key", "--format luks needs --key-file"),
        ("new --size 4MiB --format qcow2 --new-key", "--new-key needs --key-file"),
        ("new --size 4MiB --format raw --key-file there", "--key-file does not go with --format raw"),
        ("there --size 4MiB --format raw", "there is there already, and is not overwritten"),
        ("link --size 4MiB --format raw", "link is there already, and is not overwritten"),
        ("no/folder --size 4MiB --format raw", "no/folder cannot be made: No such file"),
        ("/proc/new --size 4MiB --format raw", "/proc/new cannot be made: "),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(folder: Path, arguments: str, problem: str) -> None:
    (folder / "there").write_text("mine")
    (folder / "open.key").write_text("key")
    (folder / "link").symlink_to("nowhere")
    with pytest.raises(UsageError) as caught:
        create(*arguments.split())
    assert caught.value.message.startswith(problem)
    assert (folder / "there").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["link", "open.key", "there"]


def test_without_qemu_img_it_says_how_to_get_it_and_leaves_no_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostUnfit) as caught:
        create("a.luks", "--size", "4MiB", "--key-file", "a.key", "--new-key")
    assert "apt-get install qemu-utils" in caught.value.hint
    assert list(folder.iterdir()) == []


def test_who_is_faster_keeps_his_file_and_no_key_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def format_slowly(*_: object) -> None:
        (folder / "a.luks").write_text("another's")

    monkeypatch.setattr(disk_images, "_format", format_slowly)
    with pytest.raises(UsageError, match=r"a\.luks is there by now"):
        create("a.luks", "--size", "4MiB", "--key-file", "a.key", "--new-key")
    assert [path.name for path in folder.iterdir()] == ["a.luks"]
    assert (folder / "a.luks").read_text() == "another's"


def test_a_new_key_is_random_text_of_256_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_images, "_format", lambda *_: None)
    keys = set()
    for name in ("a", "b"):
        create(f"{name}.luks", "--size", "4MiB", "--key-file", f"{name}.key", "--new-key")
        keys.add((folder / f"{name}.key").read_text())
        assert (folder / f"{name}.key").stat().st_mode & 0o777 == 0o600
    assert len(keys) == 2
    assert all(len(key) == 64 and int(key, 16) for key in keys)
