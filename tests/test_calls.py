"""The wrappers of calls on memory, on ordinary memory: what they return, and that errors are errors."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmmback.linux import aio, memory
from vmmback.linux.io_uring import Ring, rings_in
from vmmback.linux.memory import PAGE_SIZE
from vmmback.linux.syscall import libc, syscall
from vmmback.linux.userfaultfd import Mode, UserFault


@pytest.fixture
def pages() -> Iterator[mmap.mmap]:
    """Two pages, full of an x and a y each."""
    with mmap.mmap(-1, 2 * PAGE_SIZE) as mapping:
        mapping[:] = b"x" * PAGE_SIZE + b"y" * PAGE_SIZE
        yield mapping


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        with Ring.open() as opened:
            yield opened
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        pytest.skip(f"io_uring: {error.strerror}")


def test_an_error_of_libc_or_of_the_kernel_is_raised() -> None:
    with pytest.raises(OSError, match="Invalid argument"):  # an int's -1, not a long's
        libc("madvise", 1, 1, 0)
    with pytest.raises(OSError, match="Function not implemented"):
        syscall(100_000)


def test_presence_is_told_page_by_page(pages: mmap.mmap) -> None:
    assert memory.mincore(memory.address_of(pages), 2 * PAGE_SIZE) == (True, True)
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, 3 * PAGE_SIZE)
        os.pwrite(descriptor, b"x", PAGE_SIZE)
        with mmap.mmap(descriptor, 3 * PAGE_SIZE) as mapping:
            address = memory.address_of(mapping)
            assert memory.mincore(address, 3 * PAGE_SIZE) == (False, True, False)
            memory.punch_hole(descriptor, PAGE_SIZE, PAGE_SIZE)
            assert memory.mincore(address, 3 * PAGE_SIZE) == (False, False, False)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("text", "nodes"), [("0\n", [0]), ("0-2\n", [0, 1, 2]), ("0,2-3,7\n", [0, 2, 3, 7]), ("\n", [])]
)
def test_nodes_are_listed_as_ranges(text: str, nodes: list[int], tmp_path: Path) -> None:
    assert memory.nodes_with_memory(tmp_path) == []
    (tmp_path / "has_memory").write_text(text)
    assert memory.nodes_with_memory(tmp_path) == nodes


def test_pages_are_on_a_node_that_has_memory(pages: mmap.mmap) -> None:
    address = memory.address_of(pages)
    nodes = memory.nodes_with_memory()
    if not nodes:
        pytest.skip("the kernel knows no NUMA nodes")
    assert set(memory.nodes_of([address, address + PAGE_SIZE])) <= set(nodes)
    assert memory.move_pages([address, address + PAGE_SIZE], nodes[0]) == (nodes[0], nodes[0])
    with mmap.mmap(-1, PAGE_SIZE) as absent:
        assert memory.nodes_of([memory.address_of(absent)]) == (-errno.ENOENT,)


def test_an_aligned_mapping_is_the_files(tmp_path: Path) -> None:
    size = 1 << 21
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(size)
        with memory.mapped_aligned(file.fileno(), size) as address:
            assert address % size == 0
            memory.write(address + 5, b"here")
            assert memory.read(address, 10) == bytes(5) + b"here" + bytes(1)
        file.seek(5)
        assert file.read(4) == b"here"
    with Path("/proc/self/maps").open() as maps:
        assert f"{address:x}-" not in maps.read()


def test_a_fixed_buffer_is_written_and_errors_of_a_request_are_raised(ring: Ring, pages: mmap.mmap) -> None:
    address = memory.address_of(pages)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        ring.register_buffer(address, 2 * PAGE_SIZE)
        for _ in range(5):  # more than the rings hold
            assert ring.write_fixed(write_end, address + PAGE_SIZE - 2, 4) == 4
            assert os.read(read_end, 100) == b"xxyy"
        with pytest.raises(OSError, match="Bad file descriptor"):
            ring.write_fixed(read_end, address, 4)
        with pytest.raises(OSError, match="Bad address"):  # outside the buffer
            ring.write_fixed(write_end, address + 2 * PAGE_SIZE, 4)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_the_kernel_keeps_its_rings_in_our_memory(ring: Ring, pages: mmap.mmap) -> None:
    address = memory.address_of(pages)
    try:
        with rings_in(address, address + PAGE_SIZE) as count_at:
            assert memory.read(count_at, 4) == (1).to_bytes(4, "little")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("the kernel knows no IORING_SETUP_NO_MMAP")


def test_asynchronous_io_writes_and_errors_are_raised(pages: mmap.mmap, tmp_path: Path) -> None:
    address = memory.address_of(pages)
    with (tmp_path / "file").open("w+b") as file:
        assert aio.write(file.fileno(), address + PAGE_SIZE - 2, 4) == 4
        assert file.read() == b"xxyy"
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        aio.write(file.fileno(), address, 4)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    os.close(read_end)
    with open(write_end, "wb"), pytest.raises(OSError, match="Broken pipe"):  # told by the event, not by the call
        aio.write(write_end, address, 4)


def test_a_splice_of_memory_is_in_the_pipe(pages: mmap.mmap) -> None:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        assert memory.vmsplice(write_end, memory.address_of(pages) + PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE
        assert os.read(read_end, PAGE_SIZE) == b"y" * PAGE_SIZE
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_fault_is_handled_in_advance(pages: mmap.mmap) -> None:
    try:
        with UserFault.open(Mode.MISSING) as faults, mmap.mmap(-1, PAGE_SIZE) as absent:
            address = memory.address_of(absent)
            with faults.registered(address, PAGE_SIZE):
                faults.copy(address, memory.address_of(pages), PAGE_SIZE)
                with pytest.raises(OSError, match="File exists"):
                    faults.copy(address, memory.address_of(pages), PAGE_SIZE)
            assert absent[:] == b"x" * PAGE_SIZE
            with pytest.raises(OSError, match="No such file"):  # not registered any more
                faults.copy(address, memory.address_of(pages), PAGE_SIZE)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        pytest.skip(f"userfaultfd(2): {error.strerror}")
