"""BPF programs that read another process's memory: as a debugger would, and in the process's own context.

All put what they read into a value that they share with this process, and undo what they attached when they are closed.
Sources: include/uapi/linux/bpf.h, kernel/bpf/task_iter.c, kernel/trace/bpf_trace.c, bpf(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vmmback.errors import HostUnfit
from vmmback.linux import bpf, btf
from vmmback.linux import bpf_assembler as asm
from vmmback.linux.bpf import Program, ProgramKind, SharedValue
from vmmback.linux.bpf_assembler import R0, R1, R2, R3, R4, R5, R6, R7, R10, Helper, Instruction, Label
from vmmback.linux.perf import PerfEvent

# enum bpf_cmd, enum bpf_prog_type, enum bpf_attach_type
_RAW_TRACEPOINT_OPEN, _LINK_CREATE, _ITER_CREATE = 17, 28, 33
_TRACE_ITER = 28
_KPROBE, _RAW_TRACEPOINT, _TRACING = ProgramKind(2), ProgramKind(17), 26
_SLEEPABLE_KPROBE = ProgramKind(2, sleepable=True)

READ_BYTES = 64
# The shared value: where to read, what came of it (0 or -errno), how often it was tried; our PID namespace; the bytes.
_HEADER = struct.Struct("=Qqq")
_ADDRESS, _RESULT, _TRIES = 0, 8, 16
_NAMESPACE = struct.Struct("=QQ")
_NS_DEVICE, _NS_INODE = 24, 32
_DATA = 64

# struct bpf_pidns_info on the stack: the thread's id, the process's
_IDS, _IDS_BYTES = -8, 8

_CONTEXT_TASK = 8  # struct bpf_iter__task: meta, task


class _LinkCreate(ctypes.Structure):
    """The part of union bpf_attr that BPF_LINK_CREATE reads for an iterator."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_uint64),
        ("iter_info_len", ctypes.c_uint32),
    )


class _IterTask(ctypes.Structure):
    """The part `task` of union bpf_iter_link_info: which threads are walked through (Linux 6.1)."""

    _fields_ = (("tid", ctypes.c_uint32), ("pid", ctypes.c_uint32), ("pid_fd", ctypes.c_uint32))


class _IterCreate(ctypes.Structure):
    _fields_ = (("link_fd", ctypes.c_uint32), ("flags", ctypes.c_uint32))


class _RawTracepointOpen(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint64), ("prog_fd", ctypes.c_uint32))


class UserReader:
    """What a program of this module read last."""

    def __init__(self, value: SharedValue) -> None:
        self._memory = value.memory

    def expect(self, address: int) -> None:
        """Say where the next reads shall be."""
        _HEADER.pack_into(self._memory, 0, address, 0, 0)

    @property
    def tries(self) -> int:
        """How often the program has tried to read since."""
        _, _, tries = _HEADER.unpack_from(self._memory)
        return int(tries)

    def result(self) -> bytes:
        """Return the READ_BYTES bytes that were read. Raises OSError: what the read failed with, EAGAIN if none ran."""
        _, result, tries = _HEADER.unpack_from(self._memory)
        if tries == 0:
            raise OSError(errno.EAGAIN, "the BPF program did not run")
        if result:
            raise OSError(-result, os.strerror(-result))
        return self._memory[_DATA : _DATA + READ_BYTES]


class TaskReader(UserReader):
    """bpf_copy_from_user_task() (Linux 5.18): reads a process's memory as access_process_vm() of mm/memory.c does.

    The process is neither stopped nor changed.
    """

    def __init__(self, value: SharedValue, program: Program) -> None:
        super().__init__(value)
        self._program = program

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[TaskReader]:
        """Load the program, an iterator over tasks. Raises HostUnfit where the kernel lacks it or forbids it."""
        kind = ProgramKind(
            _TRACING, sleepable=True, attach_type=_TRACE_ITER,
            attach_btf_id=btf.kernel_function_id("bpf_iter_task"),
        )  # fmt: skip
        with (
            SharedValue(4096, "vmmback_task") as value,
            Program(_copy_from_task(value), "vmmback_task", kind) as program,
        ):
            yield cls(value, program)

    def read(self, pid: int, address: int) -> bytes:
        """Return READ_BYTES bytes at `address` of the process. Raises OSError: EFAULT when they are out of reach."""
        self.expect(address)
        which = _IterTask(tid=pid)  # one thread: all threads of a process have the same memory
        with ExitStack() as stack:
            link = bpf.command(
                _LINK_CREATE,
                _LinkCreate(
                    prog_fd=self._program.descriptor, attach_type=_TRACE_ITER,
                    iter_info=ctypes.addressof(which), iter_info_len=ctypes.sizeof(which),
                ),
            )  # fmt: skip
            stack.callback(os.close, link)
            iterator = bpf.command(_ITER_CREATE, _IterCreate(link))
            stack.callback(os.close, iterator)
            os.read(iterator, 1)  # runs the program; it prints nothing
        if self.tries > 1:  # the filter was ignored, and what came last is some other process's (before Linux 6.1)
            raise HostUnfit("this kernel walks through all tasks instead of one", "boot Linux 6.1 or later")
        return self.result()


@contextmanager
def at_system_calls(pid: int) -> Iterator[UserReader]:
    """Read at each system call that the process makes: in its context, by bpf_probe_read_user().

    The program runs at every system call of the host while this lasts (raw tracepoint sys_enter), and reads only then.
    """
    with SharedValue(4096, "vmmback_enter") as value:
        code = _read_in_context(value, pid, Helper.PROBE_READ_USER)
        with Program(code, "vmmback_enter", _RAW_TRACEPOINT) as program:
            name = ctypes.create_string_buffer(b"sys_enter")
            attributes = _RawTracepointOpen(ctypes.addressof(name), program.descriptor)
            try:
                link = bpf.command(_RAW_TRACEPOINT_OPEN, attributes)
            except FileNotFoundError as error:
                hint = "boot a kernel built with CONFIG_FTRACE_SYSCALLS"
                raise HostUnfit("this kernel has no tracepoint sys_enter", hint) from error
            try:
                yield UserReader(value)
            finally:
                os.close(link)


@contextmanager
def at_event(event: PerfEvent, pid: int, *, may_sleep: bool) -> Iterator[UserReader]:
    """Read each time that `event`, a uprobe, is hit: in the context of the process.

    By bpf_copy_from_user(), which can fault pages in, if it `may_sleep` (Linux 6.0), else by bpf_probe_read_user().
    """
    helper, kind = (Helper.COPY_FROM_USER, _SLEEPABLE_KPROBE) if may_sleep else (Helper.PROBE_READ_USER, _KPROBE)
    with (
        SharedValue(4096, "vmmback_uprobe") as value,
        Program(_read_in_context(value, pid, helper), "vmmback_uprobe", kind) as program,
    ):
        event.run(program.descriptor)
        yield UserReader(value)


def _copy_from_task(value: SharedValue) -> Sequence[Instruction | Label]:
    return [
        asm.load(R4, R1, _CONTEXT_TASK),
        asm.jump_if(R4, "==", 0, "done"),  # the walk is at its end
        asm.move(R5, 0),
        *_read(value, Helper.COPY_FROM_USER_TASK),
    ]


def _read_in_context(value: SharedValue, pid: int, helper: Helper) -> Sequence[Instruction | Label]:
    """Return the program, for a `pid` of our own PID namespace: the kernel's own numbers are those of the first one."""
    namespace = Path("/proc/self/ns/pid").stat()
    device = os.major(namespace.st_dev) << 20 | os.minor(namespace.st_dev)  # as the kernel writes it inside
    _NAMESPACE.pack_into(value.memory, _NS_DEVICE, device, namespace.st_ino)
    return [
        asm.load_map_value(R6, value.descriptor),
        asm.load(R1, R6, _NS_DEVICE),
        asm.load(R2, R6, _NS_INODE),
        asm.move(R3, R10),
        asm.add(R3, _IDS),
        asm.move(R4, _IDS_BYTES),
        asm.call(Helper.GET_NS_CURRENT_PID_TGID),
        asm.jump_if(R0, "!=", 0, "done"),
        asm.load(R0, R10, _IDS),
        asm.shift_right(R0, 32),
        asm.jump_if(R0, "!=", pid, "done"),
        *_read(value, helper),
    ]


def _read(value: SharedValue, helper: Helper) -> Sequence[Instruction | Label]:
    """Call helper(data, READ_BYTES, address, R4, R5), count it and note its result."""
    return [
        asm.load_map_value(R6, value.descriptor),
        asm.load(R3, R6, _ADDRESS),
        asm.move(R1, R6),
        asm.add(R1, _DATA),
        asm.move(R2, READ_BYTES),
        asm.call(helper),
        asm.store(R6, _RESULT, R0),
        asm.load(R7, R6, _TRIES),
        asm.add(R7, 1),
        asm.store(R6, _TRIES, R7),
        Label("done"),
        asm.move(R0, 0),
        asm.leave(),
    ]
