"""The assembler, against encodings of the kernel's instruction-set.rst and linux/filter.h."""

import struct

import pytest

from vmmback.linux import bpf_assembler as asm
from vmmback.linux.bpf_assembler import R0, R1, R2, R3, R6, R7, R8, R10, Helper, Instruction, Label, assemble


@pytest.mark.parametrize(
    ("instruction", "code"),
    [
        (asm.move(R0, 0), "b7 00 0000 00000000"),
        (asm.move(R6, R1), "bf 16 0000 00000000"),
        (asm.add(R1, -8), "07 01 0000 f8ffffff"),
        (asm.add(R1, R2), "0f 21 0000 00000000"),
        (asm.multiply(R3, R2), "2f 23 0000 00000000"),
        (asm.shift_left(R3, 9), "67 03 0000 09000000"),
        (asm.shift_right(R3, 63), "77 03 0000 3f000000"),
        (asm.load(R7, R1, 16), "79 17 1000 00000000"),
        (asm.store(R10, -8, R1), "7b 1a f8ff 00000000"),
        (asm.store(R8, 64, 1), "7a 08 4000 01000000"),
        (asm.call(Helper.PROBE_READ_KERNEL), "85 00 0000 71000000"),
        (asm.leave(), "95 00 0000 00000000"),
        (asm.load_map_value(R6, 5), "18 26 0000 05000000 00 00 0000 00000000"),
    ],
)
def test_instructions_are_encoded_as_the_kernel_documents_them(instruction: Instruction, code: str) -> None:
    assert assemble([instruction]) == bytes.fromhex(code)


@pytest.mark.parametrize(
    ("comparison", "constant_code", "register_code"),
    [
        ("==", 0x15, 0x1D),
        (">", 0x25, 0x2D),
        (">=", 0x35, 0x3D),
        ("!=", 0x55, 0x5D),
        ("<", 0xA5, 0xAD),
        ("<=", 0xB5, 0xBD),
    ],
)
def test_conditional_jumps(comparison: str, constant_code: int, register_code: int) -> None:
    end = Label("end")
    assert assemble([asm.jump_if(R1, comparison, 7, "end"), end]) == bytes([constant_code, 1, 0, 0, 7, 0, 0, 0])
    assert assemble([asm.jump_if(R1, comparison, R2, "end"), end]) == bytes([register_code, 0x21, 0, 0, 0, 0, 0, 0])


def offset(code: bytes, slot: int) -> int:
    (value,) = struct.unpack_from("<h", code, slot * 8 + 2)
    assert isinstance(value, int)
    return value


def test_jumps_count_slots_from_the_next_instruction() -> None:
    code = assemble(
        [
            Label("start"),
            asm.jump("end"),  # slot 0
            asm.load_map_value(R6, 3),  # slots 1 and 2
            asm.jump_if(R1, "==", 0, "start"),  # slot 3
            asm.jump("start"),  # slot 4
            Label("end"),
            asm.leave(),  # slot 5
        ]
    )
    assert len(code) == 6 * 8
    assert [offset(code, slot) for slot in (0, 3, 4)] == [4, -4, -5]


def test_a_missing_label_is_an_error() -> None:
    with pytest.raises(ValueError, match="no label 'nowhere'"):
        assemble([asm.jump("nowhere")])


def test_a_label_that_is_there_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="label 'here' is there twice"):
        assemble([Label("here"), asm.leave(), Label("here")])


@pytest.mark.parametrize("instruction", [asm.move(R0, 1 << 31), asm.load(R0, R1, 1 << 15)])
def test_a_number_that_does_not_fit_is_an_error(instruction: Instruction) -> None:
    with pytest.raises(struct.error):
        assemble([instruction])
