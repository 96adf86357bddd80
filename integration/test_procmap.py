"""Shared mappings as the kernel tells them one by one, against the text of maps."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import MIB, Backing
from vmmback import ram
from vmmback.linux import procfs, procmap, secret_use
from vmmback.linux.procmap import SharedFile


@pytest.fixture
def own_maps() -> Iterator[int]:
    descriptor = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        list(procmap.shared_files(descriptor))
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.ENOTTY:
            pytest.skip("this kernel has no PROCMAP_QUERY (Linux 6.11)")
        raise
    yield descriptor
    os.close(descriptor)


def by_text(pid: int | str) -> list[SharedFile]:
    return [
        SharedFile(each.start, each.end, each.inode, each.path.encode())
        for each in procfs.maps(pid)
        if each.permissions[3] == "s" and each.inode
    ]


def test_all_shared_files_are_told_as_the_text_tells_them(own_maps: int, backing: Backing, tmp_path: Path) -> None:
    long = tmp_path.joinpath(*["x" * 250] * 8) / "file"
    long.parent.mkdir(parents=True)
    long.write_bytes(bytes(procfs.PAGE_SIZE))
    with (
        ram.allocate(backing, 3 * MIB) as memory,
        mmap.mmap(memory.fileno(), MIB, prot=mmap.PROT_READ),
        mmap.mmap(memory.fileno(), MIB, offset=MIB) as second,
        long.open("r+b") as opened,
        mmap.mmap(opened.fileno(), 0),
    ):
        second.madvise(mmap.MADV_DONTFORK, 0, MIB // 2)  # which splits it
        found = list(procmap.shared_files(own_maps))
        assert found == by_text("self")
        assert [file.end - file.start for file in found if file.inode == memory.inode] == [MIB // 2, MIB // 2, MIB]
        assert os.fsencode(long) in [file.path for file in found]
    assert list(procmap.shared_files(own_maps)) == by_text("self")


@pytest.mark.usefixtures("own_maps")
def test_a_kernel_thread_and_a_process_that_has_ended_map_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        theirs = os.open(f"/proc/{child.pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        kernels = os.open("/proc/2/maps", os.O_RDONLY | os.O_CLOEXEC)  # kthreadd
    try:
        assert list(procmap.shared_files(theirs)) == []
        assert list(procmap.shared_files(kernels)) == []
    finally:
        os.close(theirs)
        os.close(kernels)


@pytest.mark.usefixtures("own_maps")
def test_secret_files_are_the_same_on_a_kernel_that_tells_them_as_text_alone(
    backing: Backing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> Iterator[SharedFile]:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    with ram.allocate(backing, 2 * MIB) as memory, mmap.mmap(memory.fileno(), MIB) as view:
        view[: MIB // 2] = bytes(MIB // 2)
        asked = secret_use.secret_files()
        monkeypatch.setattr(procmap, "shared_files", refuse)
        read = secret_use.secret_files()
    assert asked.get(memory.inode) == read.get(memory.inode)
    assert (memory.inode in read) == (backing == "secret")
    if backing == "secret":
        assert read[memory.inode] == secret_use.SecretFile(MIB, MIB // 2, frozenset({os.getpid()}))
