"""A small assembler of BPF programs, so that none needs a compiler.

Sources: Documentation/bpf/standardization/instruction-set.rst, include/uapi/linux/bpf.h and include/linux/filter.h of
the kernel. Everything here is little-endian, as x86-64 and aarch64 are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple


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
