"""/proc/kcore and /dev/mem as files that are made here: the kernel that the tests run on may have neither."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmmback.isolation.physical import DevMemMmapProbe, DevMemProbe, KcoreProbe
from vmmback.isolation.probe import Missing
from vmmback.isolation.specimen import Specimen, specimen
from vmmback.linux import kcore, procfs
from vmmback.linux.kcore import Segment
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Verdict

NOTE, LOAD = 4, 1
DIRECT_MAP, VMALLOC = 0xFFFF_8880_0000_0000, 0xFFFF_C900_0000_0000
NO_RAM = (1 << 64) - 1
PFN = 0x102  # of the specimen, as these tests have it


def program_header(kind: int, offset: int, virtual: int, physical: int, size: int) -> bytes:
    return struct.pack("=IIQQQQQQ", kind, 7, offset, virtual, physical, size, size, PAGE_SIZE)


def elf(*headers: bytes) -> bytes:
    """Return an ELF header as fs/proc/kcore.c makes it, and its program headers."""
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    return (
        identity
        + struct.pack("=HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(headers), 0, 0, 0)
        + b"".join(headers)
    )


KCORE = elf(
    program_header(NOTE, 0x1000, 0, 0, 0x500),
    program_header(LOAD, 0x2000, VMALLOC, NO_RAM, 0x10_0000),
    program_header(LOAD, 0x3000, DIRECT_MAP + 0x1000, 0x1000, 0x9F000),
    program_header(LOAD, 0xA2000, DIRECT_MAP + 0x10_0000, 0x10_0000, 0x4000),
)
AT = 0xA2000 + PFN * PAGE_SIZE - 0x10_0000


def test_ranges_of_ram_are_found_by_their_physical_addresses() -> None:
    start, size = kcore.table(KCORE[: kcore.HEADER_BYTES])
    ranges = kcore.segments(KCORE[start : start + size])
    assert ranges == [Segment(0x3000, 0x1000, 0x9F000), Segment(0xA2000, 0x10_0000, 0x4000)]
    for physical, offset in ((0x1000, 0x3000), (0x9FFFF, 0xA1FFF), (0x10_0000, 0xA2000), (0x10_3FFF, 0xA5FFF)):
        assert kcore.offsets_of(physical, ranges) == [offset]
    for physical in (0, 0xFFF, 0xA0000, 0xFFFFF, 0x10_4000):
        assert kcore.offsets_of(physical, ranges) == []
    image = Segment(0x9000, 0x10_1000, 0x1000)
    assert kcore.offsets_of(0x10_1800, [image, *ranges]) == [0x9800, 0xA3800]


@pytest.mark.parametrize("broken", [b"", b"\x7fELF", KCORE[:63], b"\x7fELF\x01" + KCORE[5:], bytes(64)])
def test_another_file_is_an_error(broken: bytes) -> None:
    with pytest.raises(ValueError, match="no 64-bit ELF file"):
        kcore.table(broken)


def test_program_headers_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="program headers of 32 bytes"):
        kcore.table(KCORE[:54] + struct.pack("=H", 32) + KCORE[56:64])


# --- The probes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Specimen]:
    monkeypatch.setattr(procfs, "pagemap", lambda *_: array("Q", [1 << 63 | PFN]))
    with specimen("ordinary", PAGE_SIZE) as memory:
        yield memory


def write(file: Path, head: bytes, page: bytes, at: int) -> Path:
    with file.open("wb") as output:
        output.write(head)
        output.seek(at)
        output.write(page)
        output.truncate(0xA6000 if head else (PFN + 1) * PAGE_SIZE)
    return file


@pytest.mark.parametrize(
    ("probe", "head", "at"),
    [(KcoreProbe, KCORE, AT), (DevMemProbe, b"", PFN * PAGE_SIZE), (DevMemMmapProbe, b"", PFN * PAGE_SIZE)],
)
@pytest.mark.parametrize("page", ["canary", "zeroes", "other"])
def test_only_the_canary_in_the_specimens_frame_counts(
    probe: type[KcoreProbe],
    head: bytes,
    at: int,
    page: str,
    place: Specimen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contents = {"canary": place.memory[:], "zeroes": bytes(PAGE_SIZE), "other": os.urandom(PAGE_SIZE)}[page]
    monkeypatch.setattr(probe, "file", write(tmp_path / "memory", head, contents, at))
    reading = probe().attempt(place)
    assert reading.verdict is (Verdict.READABLE if page == "canary" else Verdict.BLOCKED)
    assert reading.detail.startswith(f"the canary is in {int(page == 'canary')} of 1 frames")


def test_a_file_that_is_not_there_is_named(place: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KcoreProbe, "file", tmp_path / "kcore")
    with pytest.raises(Missing, match=r"kcore \(ENOENT\)"):
        KcoreProbe().attempt(place)


def test_a_device_that_shows_no_ram_is_named(place: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with CONFIG_STRICT_DEVMEM, which refuses the control too."""

    def refuse(*_: object) -> bytes:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "mem").touch()
    monkeypatch.setattr(DevMemProbe, "file", tmp_path / "mem")
    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(Missing, match=r"that shows RAM \(EPERM\)"):
        DevMemProbe().attempt(place)


def test_a_refused_frame_is_blocked_with_its_errno(
    place: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(14, "Bad address")

    (tmp_path / "mem").touch()
    monkeypatch.setattr(DevMemProbe, "file", tmp_path / "mem")
    monkeypatch.setattr(os, "pread", refuse)
    reading = DevMemProbe().attempt(place)
    assert (reading.verdict, reading.errno) == (Verdict.BLOCKED, "EFAULT")


def test_a_frame_that_no_segment_has_is_no_answer(
    place: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procfs, "pagemap", lambda *_: array("Q", [1 << 63 | 0x500]))
    monkeypatch.setattr(KcoreProbe, "file", write(tmp_path / "kcore", KCORE, b"", 0))
    with pytest.raises(OSError, match="no segment with the frame at 0x500000"):
        KcoreProbe().attempt(place)


def test_hidden_frame_numbers_are_named(place: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "pagemap", lambda *_: array("Q", [1 << 63]))
    with pytest.raises(Missing, match="CAP_SYS_ADMIN"):
        DevMemProbe().attempt(place)
