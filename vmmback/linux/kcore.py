"""/proc/kcore: the kernel's memory as an ELF core file. Sources: elf(5), proc_kcore(5), fs/proc/kcore.c.

Its program headers name ranges of addresses; those of RAM, in the direct map, also by physical address.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

# The first 64 bytes of a 64-bit ELF file: what it is; the place, size and number of its program headers.
_MAGIC = b"\x7fELF\x02"  # ELFCLASS64
HEADER_BYTES = 64
_PROGRAM_HEADERS = struct.Struct("=32xQ14xHH")
_SEGMENT = struct.Struct("=IIQQQQQQ")  # Elf64_Phdr: type, flags, offset, vaddr, paddr, filesz, memsz, align
_LOAD = 1
_NOT_RAM = (1 << 64) - 1  # the physical address of vmalloc and its like (fs/proc/kcore.c, read_kcore_iter)


class Segment(NamedTuple):
    """A range of memory: its offset in the file, its physical address and its size, all in bytes."""

    offset: int
    physical: int
    size: int


def table(header: bytes) -> tuple[int, int]:
    """Return offset and size, in bytes, of the program headers, from a file's first bytes. Raises ValueError."""
    if len(header) < HEADER_BYTES or not header.startswith(_MAGIC):
        raise ValueError("no 64-bit ELF file")
    offset, size, count = _PROGRAM_HEADERS.unpack_from(header)
    if size != _SEGMENT.size:
        raise ValueError(f"program headers of {size} bytes")
    return offset, size * count


def segments(headers: bytes) -> list[Segment]:
    """Return the ranges of RAM that the program headers name."""
    found = []
    for kind, _, offset, _, physical, size, _, _ in _SEGMENT.iter_unpack(headers):
        if kind == _LOAD and physical != _NOT_RAM:
            found.append(Segment(offset, physical, size))
    return found


def offsets_of(physical: int, ranges: Sequence[Segment]) -> list[int]:
    """Return where in the file a physical address is: in the direct map, and in the kernel's image if it lies there."""
    return [
        segment.offset + physical - segment.physical
        for segment in ranges
        if segment.physical <= physical < segment.physical + segment.size
    ]
