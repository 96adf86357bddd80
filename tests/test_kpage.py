"""What the kernel says of frames, on files laid out as Documentation/admin-guide/mm/pagemap.rst says."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

import pytest

from vmmback.linux import kpage
from vmmback.linux.kpage import Flag, KernelPages, Lists, User
from vmmback.linux.procfs import PAGE_SIZE

PRESENT, SWAPPED = 1 << 63, 1 << 62
FLAG_BITS = 1 << 55 | 1 << 56 | 1 << 61  # soft-dirty, mapped once, a file's


def process(root: Path, pid: int, comm: str, mappings: dict[int, tuple[str, list[int]]]) -> None:
    """Write a process with mappings: the first page, its path, the entries."""
    folder = root / str(pid)
    folder.mkdir()
    (folder / "comm").write_text(comm + "\n")
    lines, pagemap = "", array("Q", bytes(8 * 100_000))
    for page, (path, entries) in mappings.items():
        start, end = page * PAGE_SIZE, (page + len(entries)) * PAGE_SIZE
        lines += f"{start:x}-{end:x} rw-p 00000000 00:00 0                    {path}\n"
        pagemap[page : page + len(entries)] = array("Q", entries)
    (folder / "maps").write_text(lines)
    (folder / "pagemap").write_bytes(pagemap.tobytes())


def always() -> bool:
    return True


def test_users_are_all_that_map_a_frame_each_mapping_once(tmp_path: Path) -> None:
    process(tmp_path, 7, "one", {10: ("[heap]", [PRESENT | 5, 0, PRESENT | FLAG_BITS | 6]), 20: ("", [PRESENT | 8])})
    process(tmp_path, 12, "two (2)", {3: ("/lib/x", [PRESENT | 6, PRESENT | 6]), 9: ("/lib/y", [PRESENT | 9])})
    (tmp_path / "13").mkdir()  # ended
    (tmp_path / "meminfo").touch()
    assert kpage.users({5, 6, 9, 99}, always, tmp_path) == {
        5: [User(7, "one", "[heap]")],
        6: [User(7, "one", "[heap]"), User(12, "two (2)", "/lib/x")],
        9: [User(12, "two (2)", "/lib/y")],
    }


def test_what_is_not_present_is_no_use(tmp_path: Path) -> None:
    process(tmp_path, 7, "one", {10: ("[heap]", [SWAPPED | 5, 5])})
    assert kpage.users({5}, always, tmp_path) == {}


def test_secret_memory_is_not_looked_at(tmp_path: Path) -> None:
    process(tmp_path, 7, "one", {10: ("/secretmem (deleted)", [PRESENT | 5])})
    assert kpage.users({5}, always, tmp_path) == {}


@pytest.mark.parametrize("place", [0, 8191, 8192, 20_000])
def test_large_mappings_are_looked_through_to_their_end(tmp_path: Path, place: int) -> None:
    entries = [PRESENT | FLAG_BITS | 1 << 20 | n for n in range(20_001)]
    process(tmp_path, 7, "one", {1: ("[heap]", entries)})
    assert list(kpage.users({1 << 20 | place}, always, tmp_path)) == [1 << 20 | place]


def test_it_ends_early_when_told(tmp_path: Path) -> None:
    process(tmp_path, 7, "one", {10: ("[heap]", [PRESENT | 5])})
    assert kpage.users({5}, lambda: False, tmp_path) == {}


def test_flags_and_counts_of_a_frame(tmp_path: Path) -> None:
    (tmp_path / "kpageflags").write_bytes(struct.pack("=3Q", 0, 1 << 63 | 1 << 12 | 1 << 5 | 1, 1 << 32))
    (tmp_path / "kpagecount").write_bytes(struct.pack("=3Q", 0, 3, 0))
    with KernelPages(tmp_path) as pages:
        assert [pages.flags(frame) for frame in range(4)] == [0, Flag.ANON | Flag.LRU, Flag.RESERVED, Flag.NOPAGE]
        assert [pages.maps(frame) for frame in range(4)] == [0, 3, 0, 0]


def test_without_the_files_it_is_an_os_error_and_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "kpageflags").touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        KernelPages(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def kpageflags(root: Path, words: dict[int, int]) -> None:
    table = array("Q", bytes(8 * 64))
    for frame, word in words.items():
        table[frame] = word
    (root / "kpageflags").write_bytes(table.tobytes())


def test_frames_are_counted_by_the_list_they_are_on(tmp_path: Path) -> None:
    other = 1 << 2 | 1 << 3 | 1 << 11  # referenced, uptodate, mapped
    lru, unevictable = 1 << 5 | other, 1 << 5 | 1 << 18 | other
    kpageflags(tmp_path, {3: lru, 4: unevictable, 5: other, 6: 1 << 18, 9: lru, 10: lru})
    assert kpage.lists([10, 4, 3, 5, 6], tmp_path) == Lists(evictable=2, unevictable=2)
    assert kpage.lists([5], tmp_path) == Lists(0, 0)


def test_no_frames_need_no_file(tmp_path: Path) -> None:
    assert kpage.lists([], tmp_path) == Lists(0, 0)
    with pytest.raises(FileNotFoundError):
        kpage.lists([1], tmp_path)
