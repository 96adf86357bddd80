r"""The tiny guest: a 64 KiB ROM for `qemu -bios`, which boots, fills all RAM with a canary and says READY, in 0.1 s.

It is for whoever needs a guest but no Linux. Write the ROM to a file and start QEMU with it (q35 or pc, TCG):

    Path("tiny.rom").write_bytes(rom(halves))
    qemu-system-x86_64 -machine q35 -m 64 -nodefaults -display none -vga none -serial stdio -bios tiny.rom

After `READY\n` on the first serial port (COM1) it halts with interrupts off and costs no host CPU until QEMU is ended.

The canary is 64 bytes long and never leaves the guest: the ROM holds two random halves, and only the guest XORs them.
So a copy of the canary found anywhere on the host came out of the guest's RAM. As 64 divides the page size, a filled
page begins with a whole canary and holds nothing else. Filled are [0, 640 KiB) and [1 MiB, end of RAM); between the
two the guest sees video memory and ROM (at reset q35 shows ROM there, not the RAM beneath it).
"""

import hashlib
import secrets
import struct

CANARY_BYTES = 64
ROM_BYTES = 0x10000
READY = b"READY\n"

# What the guest fills, and where: from 0 to the video memory, and from 1 MiB on.
LOW_END = 0xA0000
HIGH_START = 0x100000

Halves = tuple[bytes, bytes]

# At reset the CPU runs at 0xfffffff0: CS has the base 0xffff0000 and IP is 0xfff0. QEMU shows a 64 KiB ROM right there,
# below 4 GiB, so that an offset in the ROM is also the value of IP for as long as nothing loads CS. Nothing does here.
_ROM_BASE = 0xFFFF0000
_RESET_VECTOR = 0xFFF0
_ORIGIN = 0xFC00

_MIN_RAM_BYTES = 16 << 20
_MAX_FILL_BYTES = 2 << 30


def new_halves() -> Halves:
    """Two random halves, of a canary that this host has never seen: what a hunt through host memory needs."""
    return secrets.token_bytes(CANARY_BYTES), secrets.token_bytes(CANARY_BYTES)


# For tests that do not hunt. Memory of an earlier guest that was not secret may still hold this canary.
DEFAULT_HALVES: Halves = (
    hashlib.shake_256(b"vmmback tiny guest, one half").digest(CANARY_BYTES),
    hashlib.shake_256(b"vmmback tiny guest, the other half").digest(CANARY_BYTES),
)


def canary(halves: Halves = DEFAULT_HALVES) -> bytes:
    """Return the 64 bytes that fill the guest. Calling this puts them into the memory of the calling process, too."""
    return bytes(a ^ b for a, b in zip(*halves, strict=True))


def filled_ranges(ram_bytes: int) -> list[tuple[int, int]]:
    """Return the guest-physical ranges (start, end) that consist of the canary once a guest of that size is READY."""
    return [(0, LOW_END), (HIGH_START, ram_bytes)]


# One row an instruction: its label, its bytes, what it says in assembler (Intel's order) and why. A byte is two hex
# digits. The rest is filled in: rel8:x and rel16:x are the distance from the next instruction to x (for jumps), abs16:x
# is x's offset in the ROM, lin32:x its linear address, imm32:n a number of 32 bits, and bytes:x a value given to
# _assemble. The CPU is in 16-bit mode: prefix 66 makes an operand 32 bits wide, 67 an address, 2e reads from the code
# segment, f3 repeats ECX times.
Row = tuple[str, str, str]

ENTER: list[Row] = [
    ("start", "fa", "cli                   ; there is no interrupt table: RAM is to hold the canary alone"),
    ("", "fc", "cld                   ; string instructions count upwards"),
    # "Unreal mode": a segment register loaded in protected mode keeps its limit of 4 GiB after the return to real mode.
    ("", "2e 66 0f 01 16 abs16:gdtr", "lgdt cs:[gdtr]        ; 66: with all 32 bits of the table's address"),
    ("", "0f 20 c0", "mov eax, cr0"),
    ("", "0c 01", "or al, 1              ; PE, protection enable"),
    ("", "0f 22 c0", "mov cr0, eax          ; protected mode; CS is not reloaded and works as before"),
    ("", "bb 08 00", "mov bx, 8             ; the second descriptor of the table: base 0, limit 4 GiB"),
    ("", "8e db", "mov ds, bx"),
    ("", "8e c3", "mov es, bx"),
    ("", "24 fe", "and al, 0xfe"),
    ("", "0f 22 c0", "mov cr0, eax          ; real mode again, DS and ES still reach 4 GiB"),
]

_FILL_LOW: list[Row] = [
    ("", "66 31 ff", "xor edi, edi          ; from 0 ..."),
    ("", "66 b9 bytes:low_dwords", "mov ecx, dwords       ; ... to 640 KiB"),
    ("", "bd abs16:high", "mov bp, high          ; where to go on: there is no stack, for it would lie in RAM"),
    ("", "eb rel8:fill", "jmp fill"),
]

# The firmware's old way to learn how much RAM there is: CMOS bytes 0x34 and 0x35 count 64 KiB units above 16 MiB
# (QEMU: hw/i386/pc.c, pc_cmos_init; RAM below 4 GiB only).
_SIZE_FROM_CMOS: list[Row] = [
    ("high", "b0 35", "mov al, 0x35          ; the high byte"),
    ("", "e6 70", "out 0x70, al"),
    ("", "e4 71", "in al, 0x71"),
    ("", "88 c4", "mov ah, al"),
    ("", "b0 34", "mov al, 0x34          ; the low byte"),
    ("", "e6 70", "out 0x70, al"),
    ("", "e4 71", "in al, 0x71           ; AX = units of 64 KiB above 16 MiB"),
    ("", "66 0f b7 c8", "movzx ecx, ax"),
    ("", "66 c1 e1 0e", "shl ecx, 14           ; the same in units of 4 bytes: times 65536, by 4"),
    ("", "66 81 c1 imm32:0x3c0000", "add ecx, 0x3c0000     ; and the 15 MiB from 1 MiB to 16 MiB"),
]

_SIZE_GIVEN: list[Row] = [
    ("high", "66 b9 bytes:high_dwords", "mov ecx, dwords       ; from 1 MiB to where the caller of rom() said"),
]

_FILL_HIGH: list[Row] = [
    ("", "66 bf imm32:0x100000", "mov edi, 0x100000     ; from 1 MiB on"),
    ("", "bd abs16:ready", "mov bp, ready"),
    ("", "eb rel8:fill", "jmp fill"),
]

# Fills ECX dwords from EDI on, then goes where BP says. Clobbers EAX, EBX, DL, ESI.
_FILL: list[Row] = [
    ("fill", "66 89 fb", "mov ebx, edi          ; remember the start"),
    ("", "be abs16:half_a", "mov si, half_a"),
    ("", "b2 10", "mov dl, 16            ; 16 dwords are one canary"),
    ("xor", "2e 66 8b 04", "mov eax, cs:[si]      ; the canary comes into being here, four bytes at a time ..."),
    ("", "2e 66 33 44 40", "xor eax, cs:[si+64]   ; half_b lies right behind half_a"),
    ("", "67 66 ab", "stosd es:[edi]        ; ... and goes to the guest's RAM"),
    ("", "83 c6 04", "add si, 4"),
    ("", "fe ca", "dec dl"),
    ("", "75 rel8:xor", "jnz xor"),
    ("", "66 31 c0", "xor eax, eax          ; registers live in QEMU's own memory: leave nothing there"),
    ("", "66 83 e9 10", "sub ecx, 16"),
    ("", "66 89 de", "mov esi, ebx          ; copying 64 bytes ahead of itself repeats the canary"),
    ("", "f3 67 66 a5", "rep movsd es:[edi], ds:[esi]"),
    ("", "ff e5", "jmp bp"),
]

_SAY_READY: list[Row] = [
    ("ready", "be abs16:message", "mov si, message"),
    ("char", "2e ac", "lodsb cs:[si]"),
    ("", "84 c0", "test al, al"),
    ("", "74 rel8:halt", "jz halt"),
    ("", "88 c4", "mov ah, al"),
    ("", "ba fd 03", "mov dx, 0x3fd         ; COM1, line status"),
    ("full", "ec", "in al, dx"),
    ("", "a8 20", "test al, 0x20         ; is the last byte gone? A socket that nobody reads takes some 280 ..."),
    ("", "74 rel8:full", "jz full               ; ... and QEMU drops the rest (hw/char/serial.c, serial_xmit)"),
    ("", "b2 f8", "mov dl, 0xf8          ; COM1, data; QEMU needs no baud rate"),
    ("", "88 e0", "mov al, ah"),
    ("", "ee", "out dx, al"),
    ("", "eb rel8:char", "jmp char"),
    ("halt", "f4", "hlt                   ; for good: interrupts are off"),
    ("", "eb rel8:halt", "jmp halt"),
]

DESCRIPTORS: list[Row] = [
    # The table of segment descriptors (GDT). Each is 8 bytes: limit, base, access, flags, base.
    ("gdt", "00 00 00 00 00 00 00 00", "the null descriptor, which the CPU demands"),
    ("", "ff ff 00 00 00 92 cf 00", "data, writable, base 0, limit 0xfffff units of 4 KiB"),
    ("gdtr", "0f 00 lin32:gdt", "for lgdt: the table's size less 1, and its linear address"),
]

_DATA: list[Row] = [
    ("message", "bytes:message 00", "what READY says, up to a zero byte"),
    ("half_a", "bytes:half_a", ""),
    ("half_b", "bytes:half_b", ""),
]

_RESET: list[Row] = [("", "e9 rel16:start", "jmp start             ; the first instruction that the CPU runs")]


def rom(
    canary_halves: Halves | None = None, fill_bytes: int | None = None, *, fill: bool = True, says: bytes = READY
) -> bytes:
    """Return the 65,536 bytes of the ROM.

    canary_halves: see new_halves; DEFAULT_HALVES if not given. fill_bytes: RAM is filled up to this address; if not
    given, to its end (the guest finds out where that is). fill=False: touch no RAM, say READY at once. says: what it
    prints instead of READY alone.
    A guest with this ROM needs 16 MiB of RAM or more, and less than 2.75 GiB (above, q35 moves a part of it).
    """
    halves = DEFAULT_HALVES if canary_halves is None else canary_halves
    if [len(half) for half in halves] != [CANARY_BYTES, CANARY_BYTES]:
        raise ValueError(f"each half of the canary must be {CANARY_BYTES} bytes long")
    values = {"message": says, "half_a": halves[0], "half_b": halves[1], "low_dwords": _dwords(LOW_END)}
    rows = [*ENTER]
    if fill:
        rows += _FILL_LOW
        if fill_bytes is None:
            rows += _SIZE_FROM_CMOS
        else:
            if not _MIN_RAM_BYTES <= fill_bytes <= _MAX_FILL_BYTES or fill_bytes % CANARY_BYTES:
                raise ValueError(f"fill_bytes must be a multiple of {CANARY_BYTES} from 16 MiB to 2 GiB")
            rows += _SIZE_GIVEN
            values["high_dwords"] = _dwords(fill_bytes - HIGH_START)
        rows += _FILL_HIGH + _FILL
    return image(rows + _SAY_READY + DESCRIPTORS + _DATA, values)


def rom_with_canary() -> bytes:
    """Return a ROM with a canary of its own, which prints its fingerprint and its halves (console.py), then READY."""
    halves = new_halves()
    fingerprint = hashlib.sha256(canary(halves)).hexdigest()
    lines = f"vmmback-canary sha256:{fingerprint}\nvmmback-canary halves:{halves[0].hex()}:{halves[1].hex()}\n"
    return rom(halves, says=lines.encode() + READY)


def image(rows: list[Row], values: dict[str, bytes]) -> bytes:
    """Return a ROM of 65,536 bytes with this code, which begins at the label `start` (see Row and ENTER)."""
    image = bytearray(ROM_BYTES)
    labels = _labels(rows, values)
    code = _assemble(rows, _ORIGIN, labels, values)
    assert _ORIGIN + len(code) <= _RESET_VECTOR
    image[_ORIGIN : _ORIGIN + len(code)] = code
    reset = _assemble(_RESET, _RESET_VECTOR, labels, values)
    image[_RESET_VECTOR : _RESET_VECTOR + len(reset)] = reset
    return bytes(image)


def _dwords(size_bytes: int) -> bytes:
    return struct.pack("<I", size_bytes // 4)


def _size(token: str, values: dict[str, bytes]) -> int:
    kind, _, name = token.partition(":")
    if kind == "bytes":
        return len(values[name])
    return {"rel8": 1, "rel16": 2, "abs16": 2, "lin32": 4, "imm32": 4}.get(kind, 1)


def _labels(rows: list[Row], values: dict[str, bytes]) -> dict[str, int]:
    """Each label's offset in the ROM."""
    labels = {}
    offset = _ORIGIN
    for label, code, _comment in rows:
        if label:
            labels[label] = offset
        offset += sum(_size(token, values) for token in code.split())
    return labels


def _assemble(rows: list[Row], origin: int, labels: dict[str, int], values: dict[str, bytes]) -> bytes:
    out = bytearray()
    for _label, code, _comment in rows:
        tokens = code.split()
        following = origin + len(out) + sum(_size(token, values) for token in tokens)
        for token in tokens:
            kind, _, name = token.partition(":")
            match kind:
                case "bytes":
                    out += values[name]
                case "imm32":
                    out += struct.pack("<I", int(name, 16))
                case "abs16":
                    out += struct.pack("<H", labels[name])
                case "lin32":
                    out += struct.pack("<I", _ROM_BASE + labels[name])
                case "rel8":
                    out += struct.pack("<b", labels[name] - following)
                case "rel16":
                    out += struct.pack("<h", labels[name] - following)
                case _:
                    out += bytes.fromhex(token)
    return bytes(out)
