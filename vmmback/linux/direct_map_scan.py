"""A search through all RAM as the kernel sees it: by the direct map, a window of 2 MiB at a time.

A BPF program copies the window, libc's memmem() searches the copy; both run without Python's lock, so that two threads
keep two processors busy. Where a piece of 64 KiB faults, its pages are copied one by one; a page that the direct map
lacks counts as unreadable. See direct_map.py for what a read there does, and which hosts it is not for.

The copies are in memory of our own, which is scrubbed in the end. A frame of it holds what was read elsewhere: hits
there are left out. What is searched for is never whole anywhere but in secret RAM (see `Pattern`).
"""

from __future__ import annotations

import ctypes
import heapq
import mmap
import os
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol, Self, TypeAlias

from vmmback.linux import bpf_assembler as asm
from vmmback.linux import procfs
from vmmback.linux.bpf import Program, SharedValue
from vmmback.linux.bpf_assembler import R0, R1, R2, R3, R6, R7, R8, Helper, Instruction, Label
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.memfd_secret import address_of
from vmmback.linux.procfs import PAGE_SIZE

_libc = ctypes.CDLL(None)
_libc.memmem.restype = ctypes.c_void_p
_libc.memmem.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcmp.restype = ctypes.c_int
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

WINDOW = 2 << 20
"""Bytes that are copied and searched at a time."""

_PIECE = 64 << 10
_PIECES = WINDOW // _PIECE

# A lane: what the program is told, what came of each piece (0 or -errno), the copies. Behind the window comes the page
# that follows it, for what begins in the window and ends behind it.
_ADDRESS, _OFFSET, _SIZE, _COUNT, _AHEAD, _FAULTS, _AHEAD_STATUS = range(0, 56, 8)
_HEADER = struct.Struct("=7Q")
_STATUSES = 64
_COPY = PAGE_SIZE
_LANE_BYTES = _COPY + WINDOW + _PIECE

# One thread saturates about a processor; more than two would keep a host's guests from theirs.
_MAX_LANES = 2
# How often the caller hears of progress, and how soon at the latest a scan stops, in seconds.
_TICK_S = 0.1
# The threads yield to whatever else wants a processor: a share of one tenth (sched(7), sched_prio_to_weight of
# kernel/sched/core.c). Not less: they hold Python's lock now and then, and others of this process wait for it.
_NICE = 10

Progress: TypeAlias = Callable[[int, int, float], None]
"""Is told the bytes that were looked at, the bytes there are, and the bytes a second so far."""


class Pattern(Protocol):
    """What is searched for. Only a part of it, the anchor, is plain, and only at `anchor_address`.

    A whole copy would be found: in a register that the kernel saves, in Python's heap. So the rest is compared byte by
    byte by `is_at`.
    """

    size: int
    """Bytes, not all of them the same."""
    anchor_address: int
    anchor_size: int
    anchor_offset: int

    def is_at(self, memory: mmap.mmap, offset: int) -> bool:
        """Tell whether it is at this offset of `memory`, where its anchor is."""


class Scan(NamedTuple):
    """Bytes that were searched, bytes that faulted, and the frames in which the pattern begins, in their order."""

    scanned: int
    unreadable: int
    frames: array[int]
    seconds: float


class Cancelled(Exception):
    """A scan was told to stop."""


class Scanner:
    """Searches RAM. `with Scanner.open() as scanner`; one search at a time."""

    def __init__(self, lanes: list[_Lane], base: int, own: frozenset[int]) -> None:
        self.base = base  # the kernel's address of physical address 0
        self.ranges = procfs.ram_ranges()
        self._lanes = lanes
        self._own = own

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Self]:
        """Load the program; takes 2 MiB for each of up to 2 processors. Raises as DirectMap.open() does."""
        with DirectMap.open() as direct_map:
            base = direct_map.base
        with ExitStack() as stack:
            count = min(len(os.sched_getaffinity(0)), _MAX_LANES)
            value = stack.enter_context(SharedValue(count * _LANE_BYTES, "vmmback_scan"))
            program = stack.enter_context(Program(_copy_window(value, count), "vmmback_copy"))
            address = address_of(value.memory)
            own = frozenset(entry & procfs.PFN_MASK for entry in procfs.pagemap("self", address, len(value.memory)))
            lanes = [_Lane(value.memory, address, program, number, base) for number in range(count)]
            try:
                yield cls(lanes, base, own)
            finally:
                ctypes.memset(address, 0, len(value.memory))

    @property
    def total(self) -> int:
        """Bytes of RAM there are to search."""
        return sum(end - start for start, end in self.ranges)

    def scan(self, pattern: Pattern, progress: Progress, stop: threading.Event) -> Scan:
        """Search all RAM. Raises Cancelled within about 0.1 s after `stop` is set."""
        started = time.perf_counter()
        windows = _windows(self.ranges)
        lock = threading.Lock()
        done = [0] * len(self._lanes)
        abandon = threading.Event()

        def work(number: int) -> tuple[int, array[int]]:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            unreadable, frames = 0, array("Q")
            while not (stop.is_set() or abandon.is_set()):
                with lock:
                    window = next(windows, None)
                if window is None:
                    break
                faulted, found = self._lanes[number].search(pattern, *window)
                unreadable += faulted
                frames.extend(frame for frame in found if frame not in self._own)
                done[number] += window[1]
            return unreadable, frames

        with ThreadPoolExecutor(len(self._lanes), "vmmback-scan") as pool:
            parts = [pool.submit(work, number) for number in range(len(self._lanes))]
            try:
                self._watch(parts, done, progress, started)
            finally:
                abandon.set()
        seconds = time.perf_counter() - started
        if stop.is_set():
            raise Cancelled
        unreadable = sum(part.result()[0] for part in parts)
        frames = array("Q", heapq.merge(*(part.result()[1] for part in parts)))  # windows are taken in their order
        return Scan(sum(done) - unreadable, unreadable, frames, seconds)

    def _watch(
        self, parts: list[Future[tuple[int, array[int]]]], done: list[int], progress: Progress, started: float
    ) -> None:
        pending = set(parts)
        while pending:
            _, pending = wait(pending, timeout=_TICK_S)
            progress(sum(done), self.total, sum(done) / (time.perf_counter() - started))

    def holds(self, pattern: Pattern, frame: int) -> bool:
        """Tell whether the pattern begins in this frame now."""
        for start, end in self.ranges:
            if start <= frame * PAGE_SIZE < end:
                ahead = PAGE_SIZE if (frame + 1) * PAGE_SIZE < end else 0
                return bool(self._lanes[0].search(pattern, frame * PAGE_SIZE, PAGE_SIZE, ahead)[1])
        return False

    def read(self, address: int, size: int) -> bytes | None:
        """Return up to 64 KiB at an address of the kernel's, None where it faults. For the kernel's own records."""
        return self._lanes[0].read(address, size)


def _windows(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Cut RAM into windows; yield physical address, size and how many bytes there are to look ahead."""
    for first, end in ranges:
        for start in range(first, end, WINDOW):
            size = min(WINDOW, end - start)
            yield start, size, PAGE_SIZE if start + size < end else 0


class _Lane:
    """A part of the shared value, so that each thread can copy and search at the same time."""

    def __init__(self, memory: mmap.mmap, address: int, program: Program, number: int, base: int) -> None:
        self._memory = memory
        self._header = number * _LANE_BYTES
        self._copy = self._header + _COPY
        self._address = address
        self._program = program
        self._context = struct.pack("=Q", number)
        self._base = base

    def search(self, pattern: Pattern, start: int, size: int, ahead: int) -> tuple[int, list[int]]:
        """Search a window at a physical address; return the bytes that faulted, and the frames that have it."""
        missing = self._load(start, size, ahead)
        return (
            sum(index < size // PAGE_SIZE for index in missing) * PAGE_SIZE,
            [start // PAGE_SIZE + index for index in self._find(pattern, size, ahead, missing)],
        )

    def read(self, address: int, size: int) -> bytes | None:
        if self._run(address, 0, size, 1, 0)[0]:
            return None
        return self._memory[self._copy : self._copy + size]

    def _load(self, start: int, size: int, ahead: int) -> set[int]:
        """Copy a window; return the indexes of its pages that could not be read, which are zero in the copy."""
        address = self._base + start
        pieces, rest = divmod(size, _PIECE)
        missing: set[int] = set()
        faults, ahead_status = self._run(address, 0, _PIECE, pieces, 0 if rest else ahead) if pieces else (0, 0)
        for piece in self._failed(pieces) if faults else ():
            at = piece * _PIECE
            self._run(address + at, at, PAGE_SIZE, _PIECE // PAGE_SIZE, 0)
            missing.update(at // PAGE_SIZE + page for page in self._failed(_PIECE // PAGE_SIZE))
        if rest:
            at = pieces * _PIECE
            _, ahead_status = self._run(address + at, at, PAGE_SIZE, rest // PAGE_SIZE, ahead)
            missing.update(at // PAGE_SIZE + page for page in self._failed(rest // PAGE_SIZE))
        if ahead_status or not ahead:
            missing.add(size // PAGE_SIZE)
        return missing

    def _run(self, address: int, offset: int, size: int, count: int, ahead: int) -> tuple[int, int]:
        """Copy `count` pieces of `size` bytes to `offset`, and `ahead` bytes more; return faults and ahead's status."""
        _HEADER.pack_into(self._memory, self._header, address, offset, size, count, ahead, 0, 0)
        self._program.run(self._context)
        faults, ahead_status = _HEADER.unpack_from(self._memory, self._header)[5:]
        return faults, ahead_status

    def _failed(self, count: int) -> list[int]:
        statuses = struct.unpack_from(f"={count}q", self._memory, self._header + _STATUSES)
        return [index for index, status in enumerate(statuses) if status]

    def _find(self, pattern: Pattern, size: int, ahead: int, missing: set[int]) -> Iterator[int]:
        """Yield the indexes of the window's pages in which the pattern begins, each once."""
        end = size + ahead
        if self._is_uniform(end):
            return
        at = pattern.anchor_offset
        while (found := self._memmem(pattern, at, end)) is not None:
            start = found - pattern.anchor_offset
            page = start // PAGE_SIZE
            if start >= size or start + pattern.size > end:
                return
            if pattern.is_at(self._memory, self._copy + start) and not any(
                index in missing for index in range(page, (start + pattern.size - 1) // PAGE_SIZE + 1)
            ):
                yield page
                at = (page + 1) * PAGE_SIZE + pattern.anchor_offset
            else:
                at = found + 1

    def _is_uniform(self, size: int) -> bool:
        """Tell whether the copy is one byte again and again: memmem() is up to 100 times slower there than this."""
        first = self._address + self._copy
        difference: int = _libc.memcmp(first, first + 1, size - 1)
        return difference == 0

    def _memmem(self, pattern: Pattern, start: int, end: int) -> int | None:
        first = self._address + self._copy
        if start >= end:
            return None
        found: int | None = _libc.memmem(first + start, end - start, pattern.anchor_address, pattern.anchor_size)
        return None if found is None else found - first


def _copy_window(value: SharedValue, lanes: int) -> list[Instruction | Label]:
    """Return the program: R6 is the lane that the context names, R7 counts pieces.

    bpf_probe_read_kernel() zeroes the destination of a read that faults (bpf_probe_read_kernel_common() of
    kernel/trace/bpf_trace.c).
    """
    return [
        asm.load(R7, R1, 0),
        asm.jump_if(R7, ">=", lanes, "done"),
        asm.multiply(R7, _LANE_BYTES),
        asm.load_map_value(R6, value.descriptor),
        asm.add(R6, R7),
        asm.move(R7, 0),
        Label("next"),
        asm.load(R1, R6, _COUNT),
        asm.jump_if(R7, ">=", R1, "ahead"),
        # bpf_probe_read_kernel(copy + offset, size, address), with bounds that the verifier sees
        asm.load(R2, R6, _SIZE),
        asm.jump_if(R2, ">", _PIECE, "done"),
        asm.load(R1, R6, _OFFSET),
        asm.jump_if(R1, ">", WINDOW, "done"),
        asm.load(R3, R6, _ADDRESS),
        asm.move(R8, R1),
        asm.add(R8, R2),
        asm.store(R6, _OFFSET, R8),
        asm.move(R8, R3),
        asm.add(R8, R2),
        asm.store(R6, _ADDRESS, R8),
        asm.add(R1, R6),
        asm.add(R1, _COPY),
        asm.call(Helper.PROBE_READ_KERNEL),
        asm.move(R8, R7),
        asm.shift_left(R8, 3),
        asm.add(R8, R6),
        asm.store(R8, _STATUSES, R0),
        asm.jump_if(R0, "==", 0, "read"),
        asm.load(R1, R6, _FAULTS),
        asm.add(R1, 1),
        asm.store(R6, _FAULTS, R1),
        Label("read"),
        asm.add(R7, 1),
        asm.jump_if(R7, "<", _PIECES, "next"),
        Label("ahead"),
        asm.load(R2, R6, _AHEAD),
        asm.jump_if(R2, ">", PAGE_SIZE, "done"),
        asm.load(R1, R6, _OFFSET),
        asm.jump_if(R1, ">", WINDOW, "done"),
        asm.load(R3, R6, _ADDRESS),
        asm.add(R1, R6),
        asm.add(R1, _COPY),
        asm.call(Helper.PROBE_READ_KERNEL),
        asm.store(R6, _AHEAD_STATUS, R0),
        Label("done"),
        asm.move(R0, 0),
        asm.leave(),
    ]
