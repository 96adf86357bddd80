"""A guest's RAM: prefault in a worker process, and every way in which it ends early."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import (
    GONE_S,
    MIB,
    TINY_BYTES,
    Backing,
    MemoryGroup,
    Start,
    Supervisor,
    children,
    eventually,
    guest_file,
    open_descriptors,
    processes_of,
    worker_of,
)
from vmmback import ram
from vmmback.errors import AdmissionRefused, HostUnfit
from vmmback.linux import kernel_image, prefault_worker, procfs
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.kernel_image import ImageRange
from vmmback.linux.procfs import PAGE_SIZE

LARGE_BYTES = 256 * MIB  # some tenths of a second of prefault: time to disturb it

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def memory(backing: Backing) -> Iterator[ram.Ram]:
    with ram.allocate(backing, TINY_BYTES) as memory:
        yield memory


@pytest.fixture
def large(backing: Backing) -> Iterator[ram.Ram]:
    with ram.allocate(backing, LARGE_BYTES) as memory:
        yield memory


def prefault(memory: ram.Ram, threads: int | None = None) -> list[int]:
    progress: list[int] = []
    asyncio.run(memory.prefault(progress.append, threads))
    return progress


def present_pages(memory: ram.Ram) -> int:
    """Count the pages that are in memory, by mincore(2): unlike pagemap it counts those that nobody has mapped."""
    with mmap.mmap(memory.fileno(), memory.size) as view:
        first = ctypes.c_char.from_buffer(view)
        vector = (ctypes.c_ubyte * (memory.size // PAGE_SIZE))()
        address, size = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(memory.size)
        failed = _libc.mincore(address, size, vector)
        del first
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in vector)


def test_nothing_is_allocated_before_the_prefault_and_everything_after_it(memory: ram.Ram) -> None:
    assert present_pages(memory) == 0
    prefault(memory)
    assert present_pages(memory) == memory.size // PAGE_SIZE


def test_its_size_is_set_once(secret_ram: ram.Ram) -> None:
    assert os.fstat(secret_ram.fileno()).st_size == secret_ram.size
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        os.ftruncate(secret_ram.fileno(), 2 * secret_ram.size)


def test_the_descriptor_is_close_on_exec(memory: ram.Ram) -> None:
    assert not os.get_inheritable(memory.fileno())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_progress_goes_up_to_the_end(memory: ram.Ram, threads: int) -> None:
    progress = prefault(memory, threads)
    assert progress == sorted(set(progress))
    assert progress[-1] == memory.size


@pytest.mark.parametrize("size", [MIB, 2 * MIB + PAGE_SIZE, 3 * MIB - PAGE_SIZE])
def test_a_size_that_is_no_multiple_of_the_workers_step(backing: Backing, size: int) -> None:
    with ram.allocate(backing, size) as memory:
        assert prefault(memory)[-1] == size
        assert present_pages(memory) == size // PAGE_SIZE


def test_prefault_twice_is_harmless(memory: ram.Ram) -> None:
    assert prefault(memory)[-1] == prefault(memory)[-1] == memory.size


def test_prefaulted_memory_is_zero(memory: ram.Ram) -> None:
    prefault(memory)
    with mmap.mmap(memory.fileno(), memory.size) as view:
        assert view[:] == bytes(memory.size)


def test_this_process_keeps_no_page_tables_of_it(large: ram.Ram) -> None:
    prefault(large)  # whatever Python itself allocates for it, it has now
    before = procfs.status("self")
    prefault(large)
    after = procfs.status("self")
    for name in ("VmPTE", "RssShmem", "RssFile"):
        assert kib(after[name]) - kib(before[name]) < 64, name  # all of it would be 512 KiB of page tables
    assert procfs.memory_mappings(procfs.maps("self"), large.inode) == []


def kib(text: str) -> int:
    number, unit = text.split()
    assert unit == "kB"
    return int(number)


@pytest.mark.usefixtures("needs_direct_map")
def test_the_frames_it_names_are_the_guests(memory: ram.Ram) -> None:
    prefault(memory)
    assert list(memory.frames) == list(own_entries(memory))


@pytest.mark.usefixtures("needs_direct_map")
def test_close_gives_the_frames_back(large: ram.Ram) -> None:
    prefault(large)
    entries = own_entries(large)
    with DirectMap.open() as kernel:
        before = kernel.check(entries)
        large.close()
        after = kernel.check(entries)
    assert before.readable == (0 if large.backing == "secret" else before.present)
    # The frames of secret RAM are back in the direct map, but for those that a test beside us took for its own.
    assert after.readable > after.present // 2


def own_entries(memory: ram.Ram) -> array[int]:
    """Return the pagemap entries of all pages, through a mapping of our own."""
    with mmap.mmap(memory.fileno(), memory.size) as view:
        for page in range(memory.size // PAGE_SIZE):
            _ = view[page * PAGE_SIZE]  # a read maps the page
        (mapping,) = procfs.memory_mappings(procfs.maps("self"), memory.inode)
        return procfs.pagemap("self", mapping.start, mapping.size)


def test_close_twice_is_harmless(memory: ram.Ram) -> None:
    memory.close()
    memory.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(memory.fileno())


def test_cancelled_in_the_middle_it_leaves_no_worker(large: ram.Ram) -> None:
    before = children()

    async def cancel() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(large.prefault(lambda _: begun.set()))
        await begun.wait()
        assert children() > before
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == before

    asyncio.run(cancel())
    assert present_pages(large) < large.size // PAGE_SIZE


def test_an_error_of_the_progress_display_leaves_no_worker(large: ram.Ram) -> None:
    before = children()

    def fail(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(large.prefault(fail))
    assert children() == before


def test_a_worker_that_is_killed_is_memory_refused(large: ram.Ram) -> None:
    """The OOM killer ends it by SIGKILL."""
    before = children()

    def kill(_: int) -> None:
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(AdmissionRefused) as caught:
        asyncio.run(large.prefault(kill))
    assert caught.value.exit_code == 4
    assert f"{large.backing} RAM was prefaulted: the OOM killer ended the prefault after" in caught.value.message
    assert "of 256 MiB" in caught.value.message
    assert "[memory] size" in caught.value.hint


def test_the_oom_killer_takes_the_worker_before_all_others(large: ram.Ram) -> None:
    before = children()
    scores: set[str] = set()

    def look(_: int) -> None:
        scores.update(Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in children() - before)

    asyncio.run(large.prefault(look))
    assert scores == {"1000"}


def test_out_of_descriptors(backing: Backing) -> None:
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(AdmissionRefused, match=os.strerror(errno.EMFILE)) as caught:
            ram.allocate(backing, TINY_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.exit_code == 4
    assert open_descriptors() == before


# --- Out of memory for real, in a supervisor of its own in a memory cgroup --------------------------------------------

SUPERVISOR = """
import asyncio, json, os, sys
from vmmback import errors, ram
backing, size = sys.argv[1], int(sys.argv[2])
try:
    with ram.allocate(backing, size) as memory:
        asyncio.run(memory.prefault(lambda done: print(done, file=sys.stderr, flush=True)))
    answer = ["done"]
except errors.VmmbackError as error:
    answer = [type(error).__name__, error.exit_code, error.message, error.hint]
print(json.dumps(answer))
"""


def supervisor(start: Start, group: MemoryGroup, backing: Backing, size: int) -> Supervisor:
    return start(*group.command([sys.executable, "-c", SUPERVISOR, backing, str(size)]))


def answer(running: Supervisor) -> Any:
    ended = running.ended(60)
    assert ended.code == 0, f"the supervisor itself died: {ended}"
    return json.loads(ended.stdout)


def test_out_of_memory_the_supervisor_lives(start: Start, memory_group: MemoryGroup, backing: Backing) -> None:
    memory_group.limit(128 * MIB)
    kind, code, message, hint = answer(supervisor(start, memory_group, backing, 256 * MIB))
    assert (kind, code) == ("AdmissionRefused", 4)
    assert f"the host ran out of memory while {backing} RAM was prefaulted" in message
    assert "of 256 MiB" in message
    assert "cgroup" in hint
    eventually(lambda: memory_group.used() < 32 * MIB, "memory is back", GONE_S)


def test_the_same_guest_in_a_larger_cgroup(start: Start, memory_group: MemoryGroup, backing: Backing) -> None:
    """The twin: it is the limit, and nothing else about a cgroup."""
    memory_group.limit(512 * MIB)
    assert answer(supervisor(start, memory_group, backing, 256 * MIB)) == ["done"]


@pytest.mark.usefixtures("needs_qemu")
def test_a_launch_that_is_too_large_for_its_own_cgroup_is_exit_code_4(
    start: Start, memory_group: MemoryGroup, tmp_path: Path
) -> None:
    memory_group.limit(128 * MIB)
    file = guest_file(tmp_path, size="256MiB")
    ended = start(*memory_group.command([sys.executable, "-m", "vmmback", "launch", file, "--json"])).ended()
    assert (ended.code, ended.stdout) == (4, "")
    assert ended.has_one_error()
    assert "256 MiB of secret RAM do not fit" in ended.stderr
    assert "The memory cgroup has room for" in ended.stderr


def test_a_supervisor_that_is_killed_takes_the_worker_and_the_memory_with_it(
    start: Start, memory_group: MemoryGroup, backing: Backing, runtime_dir: Path
) -> None:
    running = supervisor(start, memory_group, backing, 1024 * MIB)
    running.wait_until(lambda: running.stderr.count("\n") > 5, "the prefault is under way")
    assert worker_of(runtime_dir)
    running.process.kill()
    running.process.wait()
    eventually(lambda: not processes_of(runtime_dir), "the worker is gone", GONE_S)
    eventually(lambda: memory_group.used() < 32 * MIB, "memory is back", GONE_S)


@pytest.mark.parametrize("entries", [b"", b"12345678", b"1234"])
def test_a_prefault_that_does_not_tell_all_frames_is_an_error(
    secret_ram: ram.Ram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: bytes
) -> None:
    """A report would speak of fewer pages than the guest has."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"import sys\nsys.stdout.buffer.write({prefault_worker.END + entries!r})\n")
    monkeypatch.setattr(prefault_worker, "__file__", str(worker))
    with pytest.raises(HostUnfit, match="did not tell where all of its pages are"):
        asyncio.run(secret_ram.prefault(lambda _: None))


# --- Frames that no RAM should have -----------------------------------------------------------------------------------


def busiest(frames: Iterable[int]) -> ImageRange:
    """Return the 2 MiB with most of these pagemap entries, as if the kernel's image were there."""
    block = 2 * MIB // PAGE_SIZE
    ((index, _),) = Counter((entry & (1 << 55) - 1) // block for entry in frames).most_common(1)
    return ImageRange(index * 2 * MIB, (index + 1) * 2 * MIB, 0, 0)


@pytest.mark.usefixtures("needs_direct_map")
def test_frames_that_the_kernel_reads_elsewhere_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which frames these are is made up: 2 MiB that the kernel gives again, as it gives what was freed last first.

    Other processes use that part of RAM as well, and free frames of it when they like: one time of several must do.
    """
    touched: list[array[int]] = []
    touch = ram.Ram._touch

    async def spy(self: ram.Ram, *arguments: Any) -> array[int]:
        touched.append(await touch(self, *arguments))
        return touched[-1]

    monkeypatch.setattr(ram.Ram, "_touch", spy)
    counts = []
    for _ in range(20):
        monkeypatch.setattr(kernel_image, "image_range", lambda: None)
        with ram.SecretRam(8 * MIB) as before:
            prefault(before)
            shunned = busiest(before.frames)
        monkeypatch.setattr(kernel_image, "image_range", lambda shunned=shunned: shunned)
        touched.clear()
        with ram.SecretRam(8 * MIB) as memory:
            descriptor, inode = memory.fileno(), memory.inode
            prefault(memory)
            assert memory.frames == touched[-1]
            assert memory.fileno() == descriptor
            assert os.fstat(descriptor).st_ino == memory.inode
            assert (memory.inode != inode) == (len(touched) > 1)
            assert not os.get_inheritable(descriptor)
            assert present_pages(memory) == memory.size // PAGE_SIZE
        counts.append([len(kernel_image.frames_in(shunned, frames)) for frames in touched])
        if counts[-1][0] > 0 and counts[-1][-1] == 0:
            return
    pytest.fail(f"of such frames each prefault had, time for time: {counts}")


def test_ordinary_ram_takes_any_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_image, "image_range", lambda: ImageRange(0, 1 << 50, 0, 0))
    with ram.OrdinaryRam(8 * MIB) as memory:
        inode = memory.inode
        prefault(memory)
        assert memory.inode == inode


def test_where_no_other_frames_are_to_be_had_the_prefault_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes then tell which of the pages can be read; a host that takes the mapping away is no worse off."""
    with ram.SecretRam(2 * MIB) as before:
        prefault(before)
        shunned = busiest(before.frames)
    monkeypatch.setattr(kernel_image, "image_range", lambda: shunned)
    monkeypatch.setattr(kernel_image, "frames_in", lambda *_: array("Q", [1]))
    with ram.SecretRam(2 * MIB) as memory:
        progress: list[int] = []
        had: list[bool] = []

        async def anew() -> None:
            had.append(present_pages(memory) == memory.size // PAGE_SIZE)

        asyncio.run(memory.prefault(progress.append, anew=anew))
        assert progress.count(memory.size) == 1 + ram._RETRIES
        assert had == [True] * ram._RETRIES  # it is told while the pages are still there
        assert present_pages(memory) == len(memory.frames) == memory.size // PAGE_SIZE
