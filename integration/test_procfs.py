"""/proc as the running kernel writes it: our own mappings, frames and counters."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from integration.conftest import MIB, TINY_BYTES, Backing, eventually
from vmmback import ram
from vmmback.linux import procfs
from vmmback.linux.procfs import PAGE_SIZE

PRESENT, PFN = 1 << 63, (1 << 55) - 1


@contextmanager
def mapped(memory: ram.Ram) -> Iterator[mmap.mmap]:
    with mmap.mmap(memory.fileno(), memory.size) as view:
        yield view


@pytest.fixture
def memory(backing: Backing) -> Iterator[ram.Ram]:
    with ram.allocate(backing, TINY_BYTES) as memory:
        yield memory


def test_our_mapping_is_found_by_its_inode(memory: ram.Ram) -> None:
    assert procfs.memory_mappings(procfs.maps("self"), memory.inode) == []
    with mapped(memory):
        (mapping,) = procfs.memory_mappings(procfs.maps("self"), memory.inode)
        assert (mapping.size, mapping.offset, mapping.permissions) == (memory.size, 0, "rw-s")
        secret = procfs.secret_mappings(procfs.maps("self"), memory.inode)
    assert secret == ([mapping] if memory.backing == "secret" else [])
    assert mapping.path == (
        "/secretmem (deleted)" if memory.backing == "secret" else "/memfd:vmmback-ordinary (deleted)"
    )


def test_secret_memory_is_locked_and_left_out_of_dumps_and_ordinary_memory_is_not(memory: ram.Ram) -> None:
    with mapped(memory) as view:
        view[: 3 * PAGE_SIZE] = b"x" * 3 * PAGE_SIZE
        (mapping,) = procfs.memory_mappings(procfs.smaps("self"), memory.inode)
    assert ({"lo", "dd"} <= mapping.flags) == (memory.backing == "secret")
    assert {"lo", "dd"} & mapping.flags == ({"lo", "dd"} if memory.backing == "secret" else set())
    assert mapping.sizes["Size"] == memory.size
    assert mapping.sizes["Rss"] == 3 * PAGE_SIZE


def test_a_mapping_that_madvise_split_adds_up(memory: ram.Ram) -> None:
    with mapped(memory) as view:
        view.madvise(mmap.MADV_DONTFORK, MIB, MIB)
        parts = procfs.memory_mappings(procfs.smaps("self"), memory.inode)
    assert [(part.offset, part.size) for part in parts] == [(0, MIB), (MIB, MIB), (2 * MIB, memory.size - 2 * MIB)]


@pytest.mark.usefixtures("needs_direct_map")
def test_pagemap_has_a_frame_for_each_page_that_is_present(memory: ram.Ram) -> None:
    touched = (0, 7, memory.size // PAGE_SIZE - 1)
    with mapped(memory) as view:
        for page in touched:
            view[page * PAGE_SIZE] = 1
        (mapping,) = procfs.memory_mappings(procfs.maps("self"), memory.inode)
        entries = procfs.pagemap("self", mapping.start, mapping.size)
        part = procfs.pagemap(os.getpid(), mapping.start + 7 * PAGE_SIZE, PAGE_SIZE)
    assert len(entries) == memory.size // PAGE_SIZE
    if memory.backing == "ordinary" and sum(entry >> 63 for entry in entries) > len(touched):
        pytest.skip("needs 4 KiB pages in shmem: this host's gives huge ones (shmem_enabled)")
    assert tuple(index for index, entry in enumerate(entries) if entry & PRESENT) == touched
    assert all(entries[page] & PFN for page in touched)
    assert list(part) == [entries[7]]


@pytest.mark.usefixtures("needs_direct_map")
def test_secret_memory_splits_the_direct_maps_huge_pages(secret_ram: ram.Ram) -> None:
    """No more than this: frames that were split for an earlier guest stay so, and split nothing more."""
    before = procfs.vmstat()
    with mapped(secret_ram) as view:
        for page in range(secret_ram.size // PAGE_SIZE):
            view[page * PAGE_SIZE] = 1
    after = procfs.vmstat()
    assert after["direct_map_level2_splits"] >= before["direct_map_level2_splits"]
    assert after["direct_map_level2_splits"] > 0


def test_memory_counters_are_bytes() -> None:
    counters = procfs.meminfo()
    total = os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE
    assert counters["MemTotal"] == total
    assert 0 < counters["MemAvailable"] < total


def test_a_thread_belongs_to_its_process() -> None:
    tids: list[int] = []
    up = threading.Event()

    def live() -> None:
        tids.append(threading.get_native_id())
        up.wait(10)

    thread = threading.Thread(target=live)
    thread.start()
    eventually(lambda: bool(tids), "the thread runs")
    try:
        assert tids[0] != os.getpid()
        assert procfs.thread_group(tids[0]) == os.getpid()
    finally:
        up.set()
        thread.join()


def test_a_process_that_is_gone_is_an_oserror() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    for read in (procfs.maps, procfs.smaps, procfs.status, procfs.thread_group):
        with pytest.raises(OSError, match="No such"):
            read(pid)


def test_who_holds_and_who_maps_a_file() -> None:
    """Of the files asked for alone, told apart by device as well."""
    descriptor = os.memfd_create("held")
    os.ftruncate(descriptor, 4096)
    (file,) = {(seen.device, seen.inode) for seen in procfs.descriptors("self") if seen.number == descriptor}
    others = {(file[0], file[1] + 1), ("ff:ff", file[1])}
    assert procfs.held("self", {file, *others}) == {file}
    assert procfs.mapped("self", {file, *others}) == set()
    with mmap.mmap(descriptor, 4096):
        assert procfs.mapped("self", {file, *others}) == {file}
    os.close(descriptor)
    assert procfs.held("self", {file}) == set()
    assert procfs.mapped("self", {file}) == set()
