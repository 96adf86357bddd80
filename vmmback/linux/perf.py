"""perf_event_open(2): events of one process, counted, sampled, or answered by a BPF program.

Sources: perf_event_open(2), include/uapi/linux/perf_event.h, kernel/events/core.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from vmmback.errors import HostUnfit
from vmmback.linux import arch
from vmmback.linux.syscall import syscall

DEVICES = Path("/sys/bus/event_source/devices")

_TYPE_BREAKPOINT = 5
_BREAKPOINT_RW = 3
_SAMPLE_STACK_USER = 1 << 13
_RECORD_SAMPLE = 9
_EXCLUDE_KERNEL = 1 << 5
_FLAG_FD_CLOEXEC = 1 << 3
_IOC_SET_BPF = 1 << 30 | 4 << 16 | ord("$") << 8 | 8  # _IOW('$', 8, __u32)

# struct perf_event_mmap_page: data_head, data_tail, data_offset, data_size
_RING_HEAD = 1024
_RING = struct.Struct("=4Q")
_RING_PAGES = 32  # a power of two; holds the largest sample of a stack
_RECORD = struct.Struct("=IHH")  # struct perf_event_header: type, misc, size


class _Attributes(ctypes.Structure):
    """struct perf_event_attr, version 5 (112 bytes)."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("wakeup_events", ctypes.c_uint32),
        ("bp_type", ctypes.c_uint32),
        ("config1", ctypes.c_uint64),  # the address of a breakpoint, the path of a uprobe's file
        ("config2", ctypes.c_uint64),  # the length of a breakpoint, a uprobe's offset in the file
        ("branch_sample_type", ctypes.c_uint64),
        ("sample_regs_user", ctypes.c_uint64),
        ("sample_stack_user", ctypes.c_uint32),
        ("clockid", ctypes.c_int32),
        ("sample_regs_intr", ctypes.c_uint64),
        ("aux_watermark", ctypes.c_uint32),
        ("sample_max_stack", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
    )


class PerfEvent:
    """An event of one process; owns its descriptor, with which the event goes.

    Raises HostUnfit where this kernel or machine has no such event or denies it, OSError otherwise.
    """

    def __init__(self, pid: int, attributes: _Attributes, what: str) -> None:
        attributes.size = ctypes.sizeof(attributes)
        try:
            self.descriptor = syscall(arch.current().perf_event_open, attributes, pid, -1, -1, _FLAG_FD_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                hint = "run as root; see perf_event_paranoid in perf_event_open(2)"
                raise HostUnfit(f"perf_event_open(2) of a {what} is not permitted", hint) from error
            if error.errno in (errno.ENOSYS, errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
                raise HostUnfit(f"this machine has no perf event {what} ({error.strerror})") from error
            raise

    @classmethod
    def uprobe(cls, pid: int, file: Path, offset: int, stack_bytes: int = 0) -> Self:
        """Hit each time that the process executes the instruction at `offset` of `file`.

        With `stack_bytes`, a multiple of 8 below 64 KiB, each hit is a sample of as much of the user's stack.
        """
        try:
            kind = int((DEVICES / "uprobe/type").read_text())
        except FileNotFoundError as error:
            raise HostUnfit(
                "this kernel has no perf event uprobe", "boot one built with CONFIG_UPROBE_EVENTS"
            ) from error
        path = ctypes.create_string_buffer(os.fsencode(file))
        return cls(
            pid,
            _Attributes(
                type=kind, config1=ctypes.addressof(path), config2=offset,
                sample_period=1 if stack_bytes else 0, sample_type=_SAMPLE_STACK_USER if stack_bytes else 0,
                sample_stack_user=stack_bytes,
            ),
            "uprobe",
        )  # fmt: skip

    @classmethod
    def watchpoint(cls, pid: int, address: int) -> Self:
        """Count each time that the process itself touches the 8 bytes at `address`; a debug register of the CPU."""
        attributes = _Attributes(
            type=_TYPE_BREAKPOINT, bp_type=_BREAKPOINT_RW, config1=address, config2=8, flags=_EXCLUDE_KERNEL
        )
        return cls(pid, attributes, "breakpoint")

    def run(self, program: int) -> None:
        """Let a BPF program (a descriptor) run at each hit."""
        fcntl.ioctl(self.descriptor, _IOC_SET_BPF, program)

    def count(self) -> int:
        """Return how often it was hit."""
        return int.from_bytes(os.read(self.descriptor, 8), "little")

    @contextmanager
    def stacks(self) -> Iterator[_Stacks]:
        """Collect samples of the stack while this lasts."""
        with mmap.mmap(self.descriptor, (1 + _RING_PAGES) * mmap.PAGESIZE) as ring:
            yield _Stacks(ring)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


class _Stacks:
    """The ring of samples that the kernel fills."""

    def __init__(self, ring: mmap.mmap) -> None:
        self._ring = ring

    def first(self) -> bytes | None:
        """Return the stack of the first sample, None if there was none."""
        head, _, offset, _ = _RING.unpack_from(self._ring, _RING_HEAD)
        position = 0
        while position < head:  # the ring is read once, from its start, so nothing wraps
            kind, _, size = _RECORD.unpack_from(self._ring, offset + position)
            if kind == _RECORD_SAMPLE:
                # u64 size; char data[size]; u64 how much of it is valid
                start = offset + position + _RECORD.size + 8
                (room,) = struct.unpack_from("=Q", self._ring, start - 8)
                (valid,) = struct.unpack_from("=Q", self._ring, start + room) if room else (0,)
                return self._ring[start : start + valid]
            position += size
        return None
