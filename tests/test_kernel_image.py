"""Where the kernel's image is, from files and memory made up in the kernel's shape."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from vmmback.errors import HostUnfit
from vmmback.linux import kernel_image, procfs
from vmmback.linux.kernel_image import ImageRange
from vmmback.linux.procfs import PAGE_SIZE

PRESENT = 1 << 63
MIB = 1 << 20

X86 = """\
00001000-0009fbff : System RAM
00100000-3ffdffff : System RAM
  35400000-36201ef1 : Kernel code
  36400000-36c26fff : Kernel rodata
  36e00000-37045dff : Kernel data
  376b1000-37bfffff : Kernel bss
fec00000-fec003ff : IOAPIC 0
"""
ARM = """\
40000000-bfffffff : System RAM
  40210000-4180ffff : Kernel code
  41810000-41e5ffff : reserved
  41e60000-4219ffff : Kernel data
"""
HIDDEN = "00000000-00000000 : System RAM\n  00000000-00000000 : Kernel code\n  00000000-00000000 : Kernel bss\n"


parts_of = procfs.kernel_image


def iomem(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "iomem").write_text(text)
    parts = parts_of(folder)
    monkeypatch.setattr(procfs, "kernel_image", lambda: parts)


def test_the_range_is_all_that_pages_of_2_mib_can_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iomem(X86, tmp_path, monkeypatch)
    assert kernel_image.image_range() == ImageRange(0x35400000, 0x37E00000, 0x35400000, 0x36400000)
    iomem(X86.replace("37bfffff", "37c01fff"), tmp_path, monkeypatch)
    assert kernel_image.image_range() == ImageRange(0x35400000, 0x38000000, 0x35400000, 0x36400000)


@pytest.mark.parametrize("text", [ARM, HIDDEN, ""])
def test_no_range_where_iomem_names_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iomem(text, tmp_path, monkeypatch)
    assert kernel_image.image_range() is None


IMAGE = ImageRange(4 * MIB, 12 * MIB, 4 * MIB, 6 * MIB)


def test_only_present_pages_in_the_range_count() -> None:
    first, end = IMAGE.start // PAGE_SIZE, IMAGE.end // PAGE_SIZE
    flags = PRESENT | 1 << 61 | 1 << 55
    inside = [flags | first, PRESENT | end - 1]
    outside = [flags | first - 1, PRESENT | end, first, 1 << 62 | first, 0]
    assert kernel_image.frames_in(IMAGE, [*outside, *inside]) == array("Q", inside)


class Memory:
    """Reads `pages`, by address; physical address 0 is at `base`."""

    def __init__(self, pages: dict[int, bytes], base: int) -> None:
        self.pages, self.base = pages, base

    def at(self, base: int) -> Self:
        return type(self)(self.pages, base)

    def read_frames(self, entries: array[int]) -> Iterator[tuple[int, bytes | None]]:
        for index, entry in enumerate(entries):
            yield index, self.pages.get((self.base + (entry & (1 << 55) - 1) * PAGE_SIZE) % (1 << 64))


CODE, RODATA = b"code" * 1024, b"rodata.." * 512
DIRECT = 0xFFFF888000000000
TEXT = 0xFFFFFFFF9D000000


def memory(*places: tuple[int, bytes, bytes]) -> Memory:
    """Return memory in which code and rodata, 2 MiB apart, are at these places, beside the direct map."""
    pages = {DIRECT + IMAGE.code: CODE, DIRECT + IMAGE.rodata: RODATA}
    for text, code, rodata in places:
        pages |= {text: code, text + IMAGE.rodata - IMAGE.code: rodata}
    return Memory(pages, DIRECT)


def test_the_mapping_is_where_code_and_rodata_both_look_the_same() -> None:
    found = kernel_image.mapping(memory((TEXT - 64 * MIB, CODE, b"other"), (TEXT, CODE, RODATA)), IMAGE)
    assert (found.base + IMAGE.code) % (1 << 64) == TEXT
    lowest = kernel_image.mapping(memory((0xFFFFFFFF80000000, CODE, RODATA)), IMAGE)
    assert (lowest.base + IMAGE.code) % (1 << 64) == 0xFFFFFFFF80000000


@pytest.mark.parametrize(
    "wrong",
    [
        memory((TEXT, b"other", RODATA)),
        memory((TEXT + PAGE_SIZE, CODE, RODATA)),
        memory((0xFFFFFFFFC0000000, CODE, RODATA)),
        Memory({}, DIRECT),
        Memory(dict.fromkeys((DIRECT + IMAGE.code, DIRECT + IMAGE.rodata, TEXT, TEXT + 2 * MIB), bytes(8)), DIRECT),
    ],
    ids=["other code", "no multiple of 2 MiB", "past the image's GiB", "unreadable", "zeroes say nothing"],
)
def test_a_mapping_that_is_not_found_is_said(wrong: Memory) -> None:
    with pytest.raises(HostUnfit, match="mapping of the kernel's image was not found"):
        kernel_image.mapping(wrong, IMAGE)
