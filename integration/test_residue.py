"""What a guest's data leaves on the host, while it writes and after its end.

The whole matrix is `./dev residue`; its table is in docs/RESIDUE.md.
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from integration import capabilities, residue
from integration.conftest import ROOT, Backing, LiveGuest, frames_with, guest_file, prepared
from integration.residue import End, Search, Way
from vmmback import ram
from vmmback.errors import HostUnfit
from vmmback.isolation import exposures
from vmmback.isolation.direct_map import pagemap_entries
from vmmback.isolation.residue import FreedFramesProbe, clears_freed_memory
from vmmback.report import Verdict

# The first of all to read the whole of RAM may take a minute (docs/HUNT.md).
pytestmark = pytest.mark.timeout_s(300)


@pytest.fixture(autouse=True)
def needs(needs_qemu: None, needs_direct_map: None) -> None:
    """All of these tests need both."""


# --- After the end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", residue.ENDS)
def test_no_former_frame_of_secret_ram_holds_the_canary_however_the_guest_ends(
    backing: Backing, how: End, tmp_path: Path
) -> None:
    if how == "out-of-memory":
        capabilities.require(capabilities.MEMORY_GROUP)
    with prepared(guest_file(tmp_path, backing=backing)) as live:
        live.start()
        fingerprint = live.guest.console.canary_fingerprint
        assert fingerprint is not None
        frames: array[int] = live.run(live.guest.frames())
        residue.end(live, how)
        live.guest.ram[0].close()
        left = frames_with(fingerprint, frames)
    assert len(frames) == 4096
    if backing == "secret":
        assert left == 0
    else:
        assert left > 0


def test_frames_that_nobody_has_freed_prove_nothing(secret_ram: ram.Ram, guest_paused: LiveGuest) -> None:
    """Somebody maps the RAM still when its descriptor is closed: its frames are out of the direct map as before."""
    with mmap.mmap(secret_ram.fileno(), secret_ram.size) as memory:
        memory[:] = b"x" * secret_ram.size
        frames = pagemap_entries(os.getpid(), secret_ram.inode)
        seen = FreedFramesProbe([secret_ram], frames, None).observe(guest_paused.guest.target)
    assert (seen.target, seen.control) == (Verdict.INCONCLUSIVE, Verdict.READABLE), seen
    assert f"none of {len(frames)} former frames is free" in seen.detail


# --- While it writes --------------------------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path, backing: Backing, way: Way) -> Iterator[tuple[dict[str, int], Search, ExitStack]]:
    """Yield what a guest that writes in this way leaves while it runs; closing the stack ends it, by `quit`."""
    capabilities.require(capabilities.GUEST_KERNEL)
    with ExitStack() as stack:
        live = stack.enter_context(residue.residue_guest(folder, backing, way))
        search = Search.of(live)
        stack.callback(residue.end, live, "quit")
        with residue.frozen(live):
            hits, _ = search.counts()
        yield dict(hits), search, stack


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on a disk, not in a tmpfs, for what is to be seen in the page cache; open(2) with O_DIRECT works."""
    with tempfile.TemporaryDirectory(prefix="vmmback-", dir=ROOT / "build") as name:
        yield Path(name)


def test_a_disk_with_writeback_leaves_all_of_it_in_the_page_cache(folder: Path) -> None:
    with writing(folder, "secret", "disk-writeback") as (hits, search, stack):
        assert hits.get("guest", 0) == 0
        assert hits["page cache"] > 512  # 4 MiB were written; of some the owner may not be known while they are
        stack.close()
        after, _ = search.counts()
    assert after["guest"] == 0
    assert after["page cache"] > 512


def test_the_same_on_ordinary_memory_is_found_in_the_guests_frames_too(folder: Path) -> None:
    with writing(folder, "ordinary", "disk-writeback") as (hits, _, _):
        assert hits["guest"] >= 1024
        assert hits["page cache"] > 512


def test_an_encrypted_disk_with_o_direct_leaves_nothing_in_the_page_cache(folder: Path) -> None:
    with writing(folder, "secret", "disk-luks") as (hits, _, _):
        assert hits.get("guest", 0) == 0
        assert hits.get("page cache", 0) == 0


def test_what_is_printed_is_in_no_buffer_and_no_file_of_ours_after_the_end(folder: Path) -> None:
    with writing(folder, "secret", "serial") as (hits, search, stack):
        assert hits.get("guest", 0) == 0
        assert hits["supervisor"] > 0  # the control: it is on its way through us
        stack.close()
        after, found = search.counts()
    ours = {place: after[place] for place in ("guest", "supervisor", "page cache", "shared memory")}
    assert not any(ours.values()), found.places


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_report_says_how_much_memory_qemu_has_and_that_what_it_frees_is_not_cleared(
    guest_running: LiveGuest,
) -> None:
    exposure = exposures.qemu_memory_exposure(guest_running.guest.target)
    found = re.match(r"(\d+) KiB of QEMU's own memory", exposure.detail)
    assert found
    assert 1024 < int(found[1]) < 1 << 20
    if "init_on_free=1" in Path("/proc/cmdline").read_text():
        assert "this kernel clears what QEMU leaves" in exposure.detail
    else:
        assert "held its contents still" in exposure.detail


def test_secret_memory_shows_what_a_kernel_that_clears_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmmback.isolation.residue.allocate", lambda _, size: ram.allocate("secret", size))
    assert clears_freed_memory.__wrapped__() is True


def test_where_frames_cannot_be_read_it_says_so(monkeypatch: pytest.MonkeyPatch, guest_paused: LiveGuest) -> None:
    def unfit() -> None:
        raise HostUnfit("no BPF here", "get it")

    monkeypatch.setattr(exposures, "clears_freed_memory", unfit)
    assert "could not be tried: no BPF here" in exposures.qemu_memory_exposure(guest_paused.guest.target).detail
