"""The files of a guest's folder are overwritten before they are removed: nothing of them stays in free memory."""

from __future__ import annotations

import hashlib
import mmap
import signal
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import ROOT, eventually, frames_with
from integration.planting import Halves
from vmmback import runtime
from vmmback.linux import procfs
from vmmback.linux.memfd_secret import address_of
from vmmback.linux.procfs import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("needs_direct_map")

PAGES = 2048

# Holds the folder of guest "demo" by the keeper or, told so, by one that does not wipe.
SUPERVISOR = """
import sys
from vmmback import runtime
if sys.argv[1] == "unwiped":
    assert "dd if=/dev/zero" in runtime._KEEPER
    runtime._KEEPER = runtime._KEEPER.replace("dd if=/dev/zero", "true")
with runtime.guest_folder("demo"):
    print("held", flush=True)
    sys.stdin.read()
"""


def write_log(path: Path) -> tuple[str, array[int]]:
    """Write a file of PAGES pages with a canary in each; return its fingerprint, and where the pages are."""
    halves = Halves.new()
    with path.open("w+b", buffering=0) as file:
        file.truncate(PAGES * PAGE_SIZE)
        with mmap.mmap(file.fileno(), PAGES * PAGE_SIZE) as memory:
            memory[:] = bytes(halves).ljust(PAGE_SIZE) * PAGES
            entries = procfs.pagemap("self", address_of(memory), len(memory))
    return hashlib.sha256(bytes(halves)).hexdigest(), entries


@pytest.fixture(params=["/dev/shm", ROOT / "build"], ids=["tmpfs", "disk"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmmback-", dir=request.param) as folder:
        monkeypatch.setenv("VMMBACK_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.mark.parametrize("how", ["released", "killed"])
@pytest.mark.parametrize("wiped", ["wiped", "unwiped"])
def test_a_guests_files_are_wiped_before_they_are_removed(place: Path, wiped: str, how: str) -> None:
    """And the twin, without the wipe: the kernel leaves in free frames what was in the file."""
    for _ in range(10):  # others may want the frames at once, and clear them
        argv = [sys.executable, "-c", SUPERVISOR, wiped]
        with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as supervisor:
            assert supervisor.stdout is not None
            assert supervisor.stdout.readline() == b"held\n"
            fingerprint, entries = write_log(place / "demo/serial.log")
            assert frames_with(fingerprint, entries) == PAGES
            if how == "killed":
                supervisor.send_signal(signal.SIGKILL)
        eventually(lambda: not (place / "demo").exists(), "the folder is gone")
        left = frames_with(fingerprint, entries)
        if left or wiped == "wiped":
            break
    assert (left == 0) == (wiped == "wiped"), f"{left} of {PAGES} frames hold it"


def test_what_a_killed_keeper_left_is_wiped_by_the_next_guest_of_the_name(place: Path) -> None:
    (place / "demo/sub").mkdir(parents=True, mode=0o700)
    fingerprint, entries = write_log(place / "demo/sub/serial.log")
    with runtime.guest_folder("demo") as folder:
        assert list(folder.iterdir()) == []
        assert frames_with(fingerprint, entries) == 0


def test_a_file_that_has_another_name_elsewhere_is_not_touched(place: Path) -> None:
    with runtime.guest_folder("demo") as folder:
        (place / "mine").write_bytes(b"precious")
        (folder / "hard").hardlink_to(place / "mine")
        (folder / "soft").symlink_to(place / "mine")
    assert (place / "mine").read_bytes() == b"precious"
    (place / "mine").unlink()
