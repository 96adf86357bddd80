"""bpf(2) without a compiler: a small assembler, array maps shared with the kernel, programs run once on request.

Sources: bpf(2), Documentation/bpf/standardization/instruction-set.rst, include/uapi/linux/bpf.h,
kernel/bpf/verifier.c and net/bpf/test_run.c of the kernel. Everything here is little-endian, as x86-64 and aarch64 are.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple, Self

from vmmback.errors import HostUnfit
from vmmback.linux import arch
from vmmback.linux.syscall import syscall

# enum bpf_cmd, enum bpf_map_type, enum bpf_prog_type and flags of include/uapi/linux/bpf.h
_MAP_CREATE, _PROG_LOAD, _PROG_TEST_RUN = 0, 5, 10
_MAP_TYPE_ARRAY = 2
_F_MMAPABLE = 1 << 10
_F_SLEEPABLE = 1 << 4

# The helpers that read kernel memory want a licence that license_is_gpl_compatible() knows (include/linux/license.h).
_LICENCE = b"Dual MIT/GPL"
_LOG_BYTES = 1 << 20
_LOG_TAIL_LINES = 6

_LOADS = 5


class Register(IntEnum):
    """R0 results, R1 to R5 arguments (lost in a call), R6 to R9 kept over calls, R10 the frame pointer."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10


R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = Register

# A register, or a constant that the kernel sign-extends from 32 to 64 bits.
Operand = Register | int


class Helper(IntEnum):
    """Kernel functions that a program calls: ___BPF_FUNC_MAPPER of include/uapi/linux/bpf.h."""

    GET_CURRENT_TASK = 35
    PROBE_READ_USER = 112
    PROBE_READ_KERNEL = 113
    GET_NS_CURRENT_PID_TGID = 120
    COPY_FROM_USER = 148
    COPY_FROM_USER_TASK = 191


class Instruction(NamedTuple):
    """One instruction (struct bpf_insn, 8 bytes), or a wide one of two slots where `high` is its second constant."""

    code: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    constant: int = 0
    high: int | None = None
    target: str = ""  # the label that a jump goes to; gives `offset`

    @property
    def slots(self) -> int:
        """How many times 8 bytes it takes."""
        return 1 if self.high is None else 2

    def encode(self, offset: int) -> bytes:
        """Return the machine code; struct.error where a number does not fit its field."""
        # Bit fields of a little-endian machine: the destination is the low half of the byte.
        code = struct.pack("<BBhi", self.code, self.destination | self.source << 4, offset, self.constant)
        return code if self.high is None else code + struct.pack("<BBhi", 0, 0, 0, self.high)


class Label(NamedTuple):
    """A place in a program that jumps name."""

    name: str


def assemble(program: Sequence[Instruction | Label]) -> bytes:
    """Return the machine code of a program. Raises ValueError for a label that is missing or there twice."""
    places: dict[str, int] = {}
    slot = 0
    for item in program:
        if isinstance(item, Instruction):
            slot += item.slots
        elif item.name in places:
            raise ValueError(f"label {item.name!r} is there twice")
        else:
            places[item.name] = slot
    code = bytearray()
    for item in program:
        if isinstance(item, Label):
            continue
        offset = item.offset
        if item.target:
            if item.target not in places:
                raise ValueError(f"no label {item.target!r}")
            offset = places[item.target] - (len(code) // 8 + 1)  # counted from the instruction after the jump
        code += item.encode(offset)
    return bytes(code)


_ALU64, _JMP, _REGISTER = 0x07, 0x05, 0x08
_COMPARISONS = {"==": 0x10, ">": 0x20, ">=": 0x30, "!=": 0x50, "<": 0xA0, "<=": 0xB0}  # all unsigned


def _operation(code: int, destination: Register, operand: Operand, target: str = "") -> Instruction:
    if isinstance(operand, Register):
        return Instruction(code | _REGISTER, destination, operand, target=target)
    return Instruction(code, destination, constant=operand, target=target)


def move(destination: Register, operand: Operand) -> Instruction:
    """Destination = operand, 64 bits."""
    return _operation(_ALU64 | 0xB0, destination, operand)


def add(destination: Register, operand: Operand) -> Instruction:
    """Destination += operand, 64 bits."""
    return _operation(_ALU64 | 0x00, destination, operand)


def multiply(destination: Register, operand: Operand) -> Instruction:
    """Destination *= operand, 64 bits."""
    return _operation(_ALU64 | 0x20, destination, operand)


def shift_left(destination: Register, operand: Operand) -> Instruction:
    """Destination <<= operand, 64 bits."""
    return _operation(_ALU64 | 0x60, destination, operand)


def shift_right(destination: Register, operand: Operand) -> Instruction:
    """Destination >>= operand, 64 bits, filled with zeroes."""
    return _operation(_ALU64 | 0x70, destination, operand)


def load(destination: Register, address: Register, offset: int) -> Instruction:
    """Destination = the 8 bytes at address + offset."""
    return Instruction(0x79, destination, address, offset)  # BPF_LDX | BPF_MEM | BPF_DW


def store(address: Register, offset: int, operand: Operand) -> Instruction:
    """Set the 8 bytes at address + offset to operand."""
    if isinstance(operand, Register):
        return Instruction(0x7B, address, operand, offset)  # BPF_STX | BPF_MEM | BPF_DW
    return Instruction(0x7A, address, offset=offset, constant=operand)  # BPF_ST | BPF_MEM | BPF_DW


def load_map_value(destination: Register, descriptor: int) -> Instruction:
    """Destination = address of the one value of the array map `descriptor`."""
    return Instruction(0x18, destination, 2, constant=descriptor, high=0)  # BPF_LD | BPF_IMM | BPF_DW, PSEUDO_MAP_VALUE


def jump(target: str) -> Instruction:
    """Go to the label."""
    return Instruction(_JMP, target=target)


def jump_if(left: Register, comparison: str, right: Operand, target: str) -> Instruction:
    """Go to the label if `left comparison right` holds for unsigned 64-bit numbers."""
    return _operation(_JMP | _COMPARISONS[comparison], left, right, target)


def call(helper: Helper) -> Instruction:
    """R0 = helper(R1, …)."""
    return Instruction(_JMP | 0x80, constant=helper)


def leave() -> Instruction:
    """End the program; R0 is its result."""
    return Instruction(_JMP | 0x90)


class _MapCreate(ctypes.Structure):
    """The part of union bpf_attr that BPF_MAP_CREATE reads; the kernel takes what is missing as 0."""

    _fields_ = (
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("map_name", ctypes.c_char * 16),
    )


class _ProgLoad(ctypes.Structure):
    """The part of union bpf_attr that BPF_PROG_LOAD reads."""

    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_name", ctypes.c_char * 16),
        ("prog_ifindex", ctypes.c_uint32),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf_fd", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("func_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64),
        ("line_info_cnt", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
    )


class _TestRun(ctypes.Structure):
    """The part of union bpf_attr that BPF_PROG_TEST_RUN reads; this type wants only the program and its context."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("data_in", ctypes.c_uint64),
        ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32),
        ("duration", ctypes.c_uint32),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_uint64),
        ("ctx_out", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


def command(number: int, attributes: ctypes.Structure) -> int:
    """Call bpf(2). Raises HostUnfit where it is missing or not allowed, OSError otherwise."""
    try:
        return syscall(arch.current().bpf, number, attributes, ctypes.sizeof(attributes))
    except OSError as error:
        if error.errno == errno.EPERM:
            raise HostUnfit(
                "bpf(2) is not permitted (EPERM): CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, are missing",
                "run as root; where a seccomp filter or a container runtime denies bpf(2), allow it",
            ) from error
        if error.errno == errno.ENOSYS:
            raise HostUnfit(
                "this kernel has no bpf(2) (ENOSYS)",
                "boot a kernel built with CONFIG_BPF_SYSCALL (distribution kernels are)",
            ) from error
        raise


class SharedValue:
    """An array map of one value whose `size` bytes are mapped here as `memory`; owns descriptor and mapping.

    The kernel starts it zeroed. It reads and writes the same memory: no system call copies anything. Raises HostUnfit
    without the right to make maps, OSError (ENOMEM, EMFILE, …).
    """

    def __init__(self, size: int, name: str) -> None:
        attributes = _MapCreate(
            map_type=_MAP_TYPE_ARRAY,
            key_size=4,
            value_size=size,
            max_entries=1,
            map_flags=_F_MMAPABLE,
            map_name=name.encode(),
        )
        self.descriptor = command(_MAP_CREATE, attributes)  # bpf(2) sets close-on-exec on what it returns
        try:
            self.memory = mmap.mmap(self.descriptor, size)
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.memory.close()
        os.close(self.descriptor)


class ProgramKind(NamedTuple):
    """Where a program may run: enum bpf_prog_type, whether it may sleep, enum bpf_attach_type, BTF id of its target."""

    type: int
    sleepable: bool = False
    attach_type: int = 0
    attach_btf_id: int = 0


# Linux 5.14; check_attach_btf_id() of the verifier wants it to be sleepable.
_RUN_ON_REQUEST = ProgramKind(31, sleepable=True)  # BPF_PROG_TYPE_SYSCALL


class Program:
    """A verified program, of type BPF_PROG_TYPE_SYSCALL unless `kind` says otherwise; owns its descriptor.

    Raises HostUnfit with the end of the verifier's log where it is rejected, and without the right to load programs.
    """

    def __init__(self, program: Sequence[Instruction | Label], name: str, kind: ProgramKind = _RUN_ON_REQUEST) -> None:
        self.descriptor = _load(assemble(program), name, kind)

    def run(self, context: bytes) -> bytes:
        """Run it once on the caller's processor; return the context, which R1 pointed to, as the program left it.

        For the type BPF_PROG_TYPE_SYSCALL alone. The context must not be empty. Other threads of Python run meanwhile,
        as ctypes lets them. Raises OSError.
        """
        copy = ctypes.create_string_buffer(context, len(context))
        run = _TestRun(prog_fd=self.descriptor, ctx_size_in=len(context), ctx_in=ctypes.addressof(copy))
        command(_PROG_TEST_RUN, run)
        return copy.raw

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.descriptor)


def _load(code: bytes, name: str, kind: ProgramKind) -> int:
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(_LICENCE)
    attributes = _ProgLoad(
        prog_type=kind.type,
        insn_cnt=len(code) // 8,
        insns=ctypes.addressof(instructions),
        license=ctypes.addressof(licence),
        prog_flags=_F_SLEEPABLE if kind.sleepable else 0,
        prog_name=name.encode(),
        expected_attach_type=kind.attach_type,
        attach_btf_id=kind.attach_btf_id,
    )
    try:
        return _verified(attributes)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.E2BIG):
            raise
        reason = errno.errorcode[error.errno]
        raise HostUnfit(
            f"the kernel's verifier rejected the BPF program {name} ({reason}): {_rejection(attributes)}",
            "kernel lockdown in confidentiality mode keeps BPF from reading kernel memory: "
            "see /sys/kernel/security/lockdown",
        ) from error


def _verified(attributes: _ProgLoad) -> int:
    """Load a program while this thread takes no signals: the verifier gives up for one (do_check, verifier.c).

    It starts from nothing then, and signals that come more often than it takes would keep it at that. What cannot be
    kept off (a stop, other work for the thread) is rare: it is tried again then.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for _ in range(_LOADS - 1):
            with suppress(BlockingIOError):  # EAGAIN
                return command(_PROG_LOAD, attributes)
        return command(_PROG_LOAD, attributes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _rejection(attributes: _ProgLoad) -> str:
    """Load once more, for the log: writing it makes a load that succeeds slow. Return its last lines."""
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attributes.log_level = 1
    attributes.log_size = _LOG_BYTES
    attributes.log_buf = ctypes.addressof(log)
    try:
        os.close(_verified(attributes))
    except OSError:
        lines = log.value.decode(errors="replace").splitlines()
        return " | ".join(lines[-_LOG_TAIL_LINES:]) or "no log"
    return "accepted when tried again"
