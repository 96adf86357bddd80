"""A guest that measures how long it stood still: firmware that reads the time stamp counter over and over.

On its serial port it says READY and then, about twenty times a second, a line of two hexadecimal numbers: the longest
gap between two readings since the line before, and the counter's low 32 bits, both in ticks. Between the readings it
writes to its RAM. The time in which it prints does not count.
"""

from __future__ import annotations

from vmmback import tiny_guest

Rows = list[tuple[str, str, str]]

_STACK: Rows = [
    ("", "66 bc imm32:0x7000", "mov esp, 0x7000       ; SS has the base 0 since the reset"),
]

_MEASURE: Rows = [
    ("again", "66 31 ed", "xor ebp, ebp          ; the longest gap"),
    ("", "66 bf imm32:0x200000", "mov edi, 0x200000"),
    ("", "66 b9 imm32:0x400000", "mov ecx, 0x400000      ; readings a line"),
    ("", "0f 31", "rdtsc"),
    ("", "66 89 c6", "mov esi, eax          ; the reading before"),
    ("next", "0f 31", "rdtsc"),
    ("", "66 89 c3", "mov ebx, eax"),
    ("", "66 29 f0", "sub eax, esi"),
    ("", "66 89 de", "mov esi, ebx"),
    ("", "66 39 e8", "cmp eax, ebp"),
    ("", "76 rel8:shorter", "jbe shorter"),
    ("", "66 89 c5", "mov ebp, eax"),
    ("shorter", "67 66 89 07", "mov [edi], eax"),
    ("", "66 49", "dec ecx"),
    ("", "75 rel8:next", "jnz next"),
    ("", "66 89 e8", "mov eax, ebp"),
    ("", "e8 rel16:number", "call number"),
    ("", "66 89 f0", "mov eax, esi"),
    ("", "e8 rel16:number", "call number"),
    ("", "b0 0a", "mov al, 10"),
    ("", "ee", "out dx, al"),
    ("", "eb rel8:again", "jmp again"),
]

# Prints EAX as eight digits and a blank. Leaves COM1's data port in DX.
_NUMBER: Rows = [
    ("number", "ba f8 03", "mov dx, 0x3f8"),
    ("", "66 89 c3", "mov ebx, eax"),
    ("", "b1 08", "mov cl, 8"),
    ("digit", "66 c1 c3 04", "rol ebx, 4"),
    ("", "88 d8", "mov al, bl"),
    ("", "24 0f", "and al, 15"),
    ("", "04 30", "add al, '0'"),
    ("", "3c 39", "cmp al, '9'"),
    ("", "76 rel8:decimal", "jbe decimal"),
    ("", "04 27", "add al, 'a' - '9' - 1"),
    ("decimal", "ee", "out dx, al"),
    ("", "fe c9", "dec cl"),
    ("", "75 rel8:digit", "jnz digit"),
    ("", "b0 20", "mov al, ' '"),
    ("", "ee", "out dx, al"),
    ("", "c3", "ret"),
]

_SAY_READY: Rows = [
    ("", "ba f8 03", "mov dx, 0x3f8"),
    ("", "be abs16:message", "mov si, message"),
    ("char", "2e ac", "lodsb cs:[si]"),
    ("", "84 c0", "test al, al"),
    ("", "74 rel8:again", "jz again"),
    ("", "ee", "out dx, al"),
    ("", "eb rel8:char", "jmp char"),
]


def rom() -> bytes:
    """Return the 65,536 bytes of the ROM, for a guest of 16 MiB or more."""
    rows = [*tiny_guest.ENTER, *_STACK, *_SAY_READY, *_MEASURE, *_NUMBER, *tiny_guest.DESCRIPTORS]
    rows.append(("message", "bytes:message 00", ""))
    return tiny_guest.image(rows, {"message": tiny_guest.READY})
