"""The kernel's image: frames that x86-64 maps a second time, beside the direct map.

What the kernel frees of its image (the code and data of its start, the padding of read-only data) can stay mapped
there: free_kernel_image_pages() of arch/x86/mm/init.c takes it out with page table isolation alone, and
cleanup_highmap() of arch/x86/mm/init_64.c keeps whole pages of 2 MiB. Secret memory is taken out of the direct map
alone (set_direct_map_invalid_noflush() of arch/x86/mm/pat/set_memory.c checks no alias). So a secret frame that once
was the image's is blocked in the direct map, and a read of the kernel's still reaches it.

The mapping is found by what it shows, not by /proc/kallsyms, which may hide addresses even from root. aarch64 unmaps
what it frees (free_initmem() of arch/arm64/mm/init.c), and names no `Kernel bss`: there is no such range there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, Self, TypeVar

from vmmback.errors import HostUnfit
from vmmback.linux import procfs
from vmmback.linux.procfs import PAGE_SIZE

# __START_KERNEL_map of arch/x86/include/asm/page_64_types.h; the image is in the GiB that starts there
# (KERNEL_IMAGE_SIZE), and begins at a multiple of CONFIG_PHYSICAL_ALIGN, 2 MiB or more, there and in RAM.
_MAP_START = 0xFFFF_FFFF_8000_0000
_MAP_BYTES = 1 << 30
_ALIGN = 2 << 20
_ADDRESSES = 1 << 64
_TOGETHER = 512  # pagemap entries that are looked at together


class ImageRange(NamedTuple):
    """Physical addresses in bytes: [start, end) is all that the image's mapping may show; code, rodata start parts."""

    start: int
    end: int
    code: int
    rodata: int


class Reader(Protocol):
    """Reads frames where physical memory is mapped; see direct_map.DirectMap."""

    def at(self, base: int) -> Self:
        """Return the same where physical address 0 is at `base`."""

    def read_frames(self, entries: array[int]) -> Iterator[tuple[int, bytes | None]]:
        """Yield index and bytes of each present page, None where it cannot be read."""


AnyReader = TypeVar("AnyReader", bound=Reader)


def image_range() -> ImageRange | None:
    """Return where the image is, None where /proc/iomem names no such parts. Raises OSError."""
    parts = procfs.kernel_image()
    if not parts.keys() >= {"code", "rodata", "bss"}:
        return None
    start = parts["code"][0] // _ALIGN * _ALIGN
    # Behind bss comes what was allocated first at boot (.brk of arch/x86/kernel/vmlinux.lds.S), and the rest of its
    # 2 MiB. What is not mapped there faults, so a page too many claims nothing.
    end = (-(-parts["bss"][1] // _ALIGN) + 1) * _ALIGN
    return ImageRange(start, end, parts["code"][0], parts["rodata"][0])


def frames_in(image: ImageRange, entries: Sequence[int]) -> array[int]:
    """Return those raw pagemap entries that are present in frames of the range."""
    first, end = image.start // PAGE_SIZE, image.end // PAGE_SIZE
    found = array("Q")
    for start in range(0, len(entries), _TOGETHER):
        part = entries[start : start + _TOGETHER]
        least, most = min(part), max(part)
        # Where all have the same flags, the least and the greatest have the least and the greatest frame.
        if least & ~procfs.PFN_MASK == most & ~procfs.PFN_MASK and not (
            first <= most & procfs.PFN_MASK and least & procfs.PFN_MASK < end
        ):
            continue
        found.extend(e for e in part if first <= e & procfs.PFN_MASK < end and e & procfs.PRESENT)
    return found


def mapping(direct_map: AnyReader, image: ImageRange) -> AnyReader:
    """Return a reader of the image's mapping: the only place where code and rodata look as in the direct map.

    Takes up to 512 reads. Raises HostUnfit where it is not found.
    """
    parts = array("Q", [procfs.PRESENT | image.code // PAGE_SIZE, procfs.PRESENT | image.rodata // PAGE_SIZE])
    shown = list(direct_map.read_frames(parts))
    if len(shown) == len(parts) and all(page and any(page) for _, page in shown):
        for code in range(_MAP_START, _MAP_START + _MAP_BYTES, _ALIGN):
            candidate = direct_map.at((code - image.code) % _ADDRESSES)
            if list(candidate.read_frames(parts[:1])) == shown[:1] and list(candidate.read_frames(parts)) == shown:
                return candidate
    raise HostUnfit(
        "the mapping of the kernel's image was not found: nowhere does its code look as in the direct map",
        "frames of the guest that once were part of the image cannot be tried",
    )
