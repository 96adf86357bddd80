"""Reader of the kernel's direct map: what the kernel itself can read of physical memory, frame by frame.

The kernel maps all RAM in one piece, at `page_offset_base` (x86-64) or PAGE_OFFSET less the start of RAM (aarch64). A
BPF program reads a frame there by bpf_probe_read_kernel(), which is copy_from_kernel_nofault() of mm/maccess.c. A
frame that the direct map lacks makes it fault; the exception table resolves that fault before anything is logged or
killed (kernelmode_fixup_or_oops() of arch/x86/mm/fault.c), and the read returns -EFAULT. Nothing is ever written.

Frame numbers past the end of RAM are not tried: vmalloc and device memory may follow the direct map, and a read can
change the state of a device. Numbers in a hole below that (PCI) are not mapped, they fault. Not for hosts that run
TDX or SEV-SNP guests, where a read of a private frame is no plain page fault.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import NamedTuple, Self, TypeAlias

from vmmback.errors import HostUnfit
from vmmback.linux import bpf_assembler as asm
from vmmback.linux import procfs
from vmmback.linux.bpf import Program, SharedValue
from vmmback.linux.bpf_assembler import R0, R1, R2, R3, R6, R7, R8, R9, Helper, Instruction, Label
from vmmback.linux.procfs import PAGE_SIZE

# Raw entries of /proc/PID/pagemap, 8 bytes a page: bit 63 present, bits 0 to 54 the PFN.
Entries: TypeAlias = "array[int] | bytes | bytearray | memoryview"  # quoted: array takes no [] before Python 3.12

# What the program and Python share, a lane for each processor: a header, the entries of one run, the frames it copies.
_BATCH = (512 << 10) // PAGE_SIZE  # pages a run: more are a little faster to read, but slower to load
_BASE, _LIMIT, _SIZE, _PRESENT, _CHECKED, _READABLE = range(0, 48, 8)
_HEADER = struct.Struct("=6Q")
_ENTRIES = 64
_FRAMES = _ENTRIES + _BATCH * 8
_LANE_BYTES = _FRAMES + _BATCH * PAGE_SIZE
_PAGE_SHIFT = PAGE_SIZE.bit_length() - 1

# A run leaves in place of each entry what came of it: 0 read, -errno not read, 1 absent, 2 present but not tried.
_ABSENT = 1

# The direct map starts at a multiple of it: kernel_randomize_memory() of arch/x86/mm/kaslr.c steps by PUD_SIZE, and
# ARM64_MEMSTART_ALIGN of arch/arm64/include/asm/kernel-pgtable.h is 1 GiB with 4 KiB pages.
_GIB = 1 << 30

_PROBE_BYTES = 8
_FIRST = 8
_MAX_LANES = 4
_NO_ENTRIES = bytes(_BATCH * 8)  # absent
_ZERO_FRAME = bytes(PAGE_SIZE)
_ZERO_BATCH = bytes(PAGE_SIZE * _BATCH)


class Readability(NamedTuple):
    """Of a batch of pages: present, checked (the read succeeded or faulted), readable, first few readable indexes."""

    present: int
    checked: int
    readable: int
    first_readable: tuple[int, ...]


class Zeroness(NamedTuple):
    """Of a batch of pages: present, checked (as in Readability), readable, and of these not zero; first few indexes."""

    present: int
    checked: int
    readable: int
    nonzero: int
    first_nonzero: tuple[int, ...]


class DirectMap:
    """The direct map of the running kernel. `with DirectMap.open() as direct_map`."""

    def __init__(self, lanes: list[_Lane], base: int, limit: int) -> None:
        self._lanes = lanes
        self.base = base  # the kernel's address of physical address 0
        self.limit = limit  # the first frame number past RAM

    @classmethod
    @contextmanager
    def open(cls, *, spare: int = 0) -> Iterator[Self]:
        """Load the programs and find the base, by frames of our own whose contents we know.

        `spare` processors, where there are more, are left to others: to a guest that is looked at while it runs.

        Takes 513 KiB for each of up to 4 processors, and about 15 ms, most of them the verifier's. Raises HostUnfit,
        saying what is missing, where the direct map cannot be read; OSError where memory or descriptors run out.
        """
        with ExitStack() as stack:
            limit = _ram_end() >> _PAGE_SHIFT
            count = max(1, min(len(os.sched_getaffinity(0)) - spare, _MAX_LANES))
            value = stack.enter_context(SharedValue(count * _LANE_BYTES, "vmmback_frames"))
            # Leave no copies of what was read in memory that the kernel frees without clearing it.
            stack.callback(_scrub, value.memory)
            program = stack.enter_context(Program(_read_frames(value, count), "vmmback_read"))
            lanes = [_Lane(value.memory, program, number, limit) for number in range(count)]
            base = _find_base(lanes[0], limit)
            for lane in lanes:
                lane.base = base
            yield cls(lanes, base, limit)

    def at(self, base: int) -> Self:
        """Return the same programs for another mapping of RAM, with physical address 0 at `base`; one at a time."""
        lanes = [copy(lane) for lane in self._lanes]
        for lane in lanes:
            lane.base = base
        return type(self)(lanes, base, self.limit)

    def check(self, entries: Entries) -> Readability:
        """Try to read 8 bytes of each present page: about 2 million pages a second and processor where all fault.

        A page whose PFN is hidden (0, without CAP_SYS_ADMIN) or past RAM is present but not checked.
        """
        counts, _, first = self._survey(entries, _PROBE_BYTES, _Lane.readable_indexes)
        return Readability(counts.present, counts.checked, counts.readable, tuple(first))

    def zeroness(self, entries: Entries) -> Zeroness:
        """Read each present page as a whole and tell which are not zero: 5 GiB a second and more."""
        counts, nonzero, first = self._survey(entries, PAGE_SIZE, _Lane.nonzero_indexes)
        return Zeroness(counts.present, counts.checked, counts.readable, nonzero, tuple(first))

    def read_frames(self, entries: Entries) -> Iterator[tuple[int, bytes | None]]:
        """Yield the index and the bytes of each present page, None where it cannot be read: about 5 GiB a second.

        The direct map must not be used for anything else until the iterator is at its end.
        """
        lane = self._lanes[0]
        for start, batch in _batches(entries):
            lane.run(batch, PAGE_SIZE)
            for index, status in enumerate(lane.statuses(len(batch) // 8)):
                if status != _ABSENT:
                    yield start + index, lane.frame(index) if status == 0 else None

    def _survey(
        self, entries: Entries, size: int, find: Callable[[_Lane, int, _Counts], list[int]]
    ) -> tuple[_Counts, int, list[int]]:
        """Run all batches, `size` bytes a page; return the counts, how many indexes `find` returned, the first few."""
        batches = list(_batches(entries))
        share = -(-len(batches) // len(self._lanes)) or 1

        def survey(number: int) -> tuple[_Counts, int, list[int]]:
            lane = self._lanes[number]
            counted, found, first = list[_Counts](), 0, list[int]()
            for start, batch in batches[number * share : (number + 1) * share]:
                counts = lane.run(batch, size)
                counted.append(counts)
                indexes = find(lane, len(batch) // 8, counts)
                found += len(indexes)
                first += [start + index for index in indexes[: _FIRST - len(first)]]
            return _Counts.total(counted), found, first

        from concurrent.futures import ThreadPoolExecutor  # for who reads much: to find the map, nobody needs it

        with ThreadPoolExecutor(len(self._lanes)) as pool:
            parts = list(pool.map(survey, range(len(self._lanes))))
        return (
            _Counts.total(counts for counts, _, _ in parts),
            sum(found for _, found, _ in parts),
            [index for _, _, first in parts for index in first][:_FIRST],
        )


class _Counts(NamedTuple):
    present: int
    checked: int
    readable: int

    @classmethod
    def total(cls, counts: Iterable[_Counts]) -> _Counts:
        return cls(*map(sum, zip((0, 0, 0), *counts, strict=True)))


class _Lane:
    """A part of the shared value, so that each processor can run the program at the same time."""

    def __init__(self, memory: mmap.mmap, program: Program, number: int, limit: int) -> None:
        self._memory = memory
        self._program = program
        self._context = struct.pack("=Q", number)
        self._header = number * _LANE_BYTES
        self._entries = self._header + _ENTRIES
        self._frames = self._header + _FRAMES
        self._limit = limit
        self.base = 0

    def run(self, entries: memoryview, size: int) -> _Counts:
        """Read `size` bytes of the page of each entry, up to _BATCH of them."""
        end = self._entries + len(entries)
        self._memory[self._entries : end] = entries
        self._memory[end : self._entries + len(_NO_ENTRIES)] = _NO_ENTRIES[len(entries) :]
        _HEADER.pack_into(self._memory, self._header, self.base, self._limit, size, 0, 0, 0)
        self._program.run(self._context)
        return _Counts(*_HEADER.unpack_from(self._memory, self._header)[3:])

    def statuses(self, count: int) -> tuple[int, ...]:
        """Return what came of each entry of the last run."""
        return struct.unpack_from(f"={count}q", self._memory, self._entries)

    def frame(self, index: int) -> bytes:
        """Return the page that the last run read for an entry; of no worth unless its status is 0."""
        start = self._frames + index * PAGE_SIZE
        return self._memory[start : start + PAGE_SIZE]

    def readable_indexes(self, count: int, counts: _Counts) -> list[int]:
        """Return which pages of the last run could be read."""
        return [index for index, status in enumerate(self.statuses(count)) if status == 0] if counts.readable else []

    def nonzero_indexes(self, count: int, counts: _Counts) -> list[int]:
        """Return which pages of the last run could be read and are not zero."""
        size = count * PAGE_SIZE
        # A slice of an mmap is bytes, and bytes compare by memcmp; a memoryview compares item by item.
        if counts.readable == 0 or self._memory[self._frames : self._frames + size] == _ZERO_BATCH[:size]:
            return []
        return [index for index in self.readable_indexes(count, counts) if self.frame(index) != _ZERO_FRAME]


def _scrub(memory: mmap.mmap) -> None:
    memory[:] = bytes(len(memory))


def _count(field: int) -> list[Instruction]:
    return [asm.load(R1, R6, field), asm.add(R1, 1), asm.store(R6, field, R1)]


def find() -> int:
    """Return the base of the direct map, as `DirectMap.open`, in a fifth of the time. Raises what that does."""
    limit = _ram_end() >> _PAGE_SHIFT
    with SharedValue(_LANE_BYTES, "vmmback_frames") as value:
        try:
            with Program(_read_frames(value, lanes=1, frames=1), "vmmback_find") as program:
                return _find_base(_Lane(value.memory, program, 0, limit), limit)
        finally:
            _scrub(value.memory)


def _read_frames(value: SharedValue, lanes: int, frames: int = _BATCH) -> list[Instruction | Label]:
    """Return the program, which reads so many frames a run.

    R6 is the lane that the context names, R7 the index, R8 the lane moved up 8 bytes an index. The verifier walks
    through all rounds and both ways at each jump: few of either make it load quickly.
    """
    return [
        asm.load(R7, R1, 0),
        asm.jump_if(R7, ">=", lanes, "done"),
        asm.multiply(R7, _LANE_BYTES),
        asm.load_map_value(R6, value.descriptor),
        asm.add(R6, R7),
        asm.load(R9, R6, _SIZE),
        asm.jump_if(R9, ">", PAGE_SIZE, "done"),
        asm.move(R7, 0),
        Label("next"),
        asm.move(R8, R7),
        asm.shift_left(R8, 3),
        asm.add(R8, R6),
        asm.load(R3, R8, _ENTRIES),
        # R2 = present, bit 63
        asm.move(R2, R3),
        asm.shift_right(R2, 63),
        asm.move(R1, R2),
        asm.add(R1, _ABSENT),
        asm.store(R8, _ENTRIES, R1),
        asm.load(R1, R6, _PRESENT),
        asm.add(R1, R2),
        asm.store(R6, _PRESENT, R1),
        # R3 = PFN, bits 0 to 54; for an absent page, where these bits can be a place in swap, 0
        asm.shift_left(R3, 9),
        asm.shift_right(R3, 9),
        asm.multiply(R3, R2),
        asm.jump_if(R3, "==", 0, "skip"),
        asm.load(R1, R6, _LIMIT),
        asm.jump_if(R3, ">=", R1, "skip"),
        # bpf_probe_read_kernel(frame[R7], size, base + PFN * PAGE_SIZE)
        asm.shift_left(R3, _PAGE_SHIFT),
        asm.load(R1, R6, _BASE),
        asm.add(R3, R1),
        asm.move(R1, R7),
        asm.shift_left(R1, _PAGE_SHIFT),
        asm.add(R1, R6),
        asm.add(R1, _FRAMES),
        asm.move(R2, R9),
        asm.call(Helper.PROBE_READ_KERNEL),
        asm.store(R8, _ENTRIES, R0),
        asm.jump_if(R0, "==", 0, "readable"),
        asm.jump_if(R0, "!=", -errno.EFAULT, "skip"),
        asm.jump("checked"),
        Label("readable"),
        *_count(_READABLE),
        Label("checked"),
        *_count(_CHECKED),
        Label("skip"),
        asm.add(R7, 1),
        asm.jump_if(R7, "<", frames, "next"),
        Label("done"),
        asm.move(R0, 0),
        asm.leave(),
    ]


def current_task() -> int:
    """Return the address of the calling thread's task_struct: slab memory, hence in the direct map."""
    program = [
        asm.move(R6, R1),
        asm.call(Helper.GET_CURRENT_TASK),
        asm.store(R6, 0, R0),
        asm.move(R0, 0),
        asm.leave(),
    ]
    with Program(program, "vmmback_task") as current_task:
        return int.from_bytes(current_task.run(bytes(8)), "little")


def _find_base(lane: _Lane, limit: int) -> int:
    """Return the base at which two frames of our own show their canaries.

    Tries each multiple of 1 GiB from RAM's size below our task_struct up to it. It goes up, because a base that is too
    low only reaches below the direct map, where nothing has side effects; one too high could reach vmalloc.
    """
    task = current_task()
    lowest = (task - (limit << _PAGE_SHIFT)) & -_GIB
    candidates = range(lowest, task, _GIB)
    canaries = os.urandom(PAGE_SIZE), os.urandom(PAGE_SIZE)
    with own_pages(canaries[0]) as first, own_pages(canaries[1]) as second:
        for lane.base in candidates:
            if _shows(lane, first, canaries[0]) and _shows(lane, second, canaries[1]):
                return lane.base
    raise HostUnfit(
        f"the kernel's direct map was not found: none of {len(candidates)} places showed what we had written",
        "the probe cannot work here, so it can prove nothing; kernel lockdown in confidentiality mode "
        "(/sys/kernel/security/lockdown) is one reason",
    )


def _shows(lane: _Lane, entries: array[int], canary: bytes) -> bool:
    return lane.run(memoryview(entries).cast("B"), PAGE_SIZE).readable == 1 and lane.frame(0) == canary


@contextmanager
def own_pages(contents: bytes) -> Iterator[array[int]]:
    """Put `contents`, whole pages, into ordinary memory of our own; yield its raw pagemap entries.

    Raises HostUnfit where the kernel hides frame numbers from us, OSError.
    """
    with mmap.mmap(-1, len(contents)) as memory:
        memory[:] = contents
        entries = procfs.pagemap("self", ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(contents))
        if not all(entry & procfs.PFN_MASK for entry in entries):
            raise HostUnfit(
                "/proc/self/pagemap hides frame numbers: CAP_SYS_ADMIN is missing",
                "run as root in the host's own user namespace (proc_pid_pagemap(5))",
            )
        yield entries


def _ram_end() -> int:
    """Return the first physical address past RAM, in bytes."""
    ranges = procfs.ram_ranges()
    if not ranges:
        raise HostUnfit("/proc/iomem hides where RAM ends: CAP_SYS_ADMIN is missing", "run as root")
    return ranges[-1][1]


def _batches(entries: Entries) -> Iterator[tuple[int, memoryview]]:
    """Cut raw entries into runs; yield the index of the first page of each, and its entries as bytes."""
    raw = memoryview(entries).cast("B")
    step = _BATCH * 8
    for start in range(0, len(raw), step):
        yield start // 8, raw[start : start + step]
