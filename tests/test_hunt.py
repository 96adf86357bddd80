"""The hunt's judgement: whose memory a frame is, by all that the kernel tells; which hosts it refuses."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from vmmback.errors import HostUnfit
from vmmback.isolation import hunt
from vmmback.isolation.frame_owners import Owner, judge, mounts, path_of
from vmmback.linux.direct_map_scan import WINDOW, _windows
from vmmback.linux.kpage import Flag, User
from vmmback.linux.page_records import CachedFile, PageRecord
from vmmback.report import HuntPlace

MOUNTS = [("254:0", "/", "/"), ("0:25", "/", "/dev/shm"), ("254:1", "/@home", "/home")]
FILE = CachedFile("254:0", 12, "/var/log/x")
HEAP, ANONYMOUS = User(7, "qemu", "[heap]"), User(8, "qemu", "")
MAPPED = User(9, "cat", "/var/log/x")
THREE = "9 (cat), 9 (cat), 9 (cat)"
NOT_KNOWN = "this kernel has no struct page"

KNOWN = PageRecord(1, None, "")
FREED = PageRecord(0, None, "")
IN_SLAB = PageRecord(1, None, "kmalloc-64")
IN_FILE = PageRecord(2, FILE, "")


@pytest.mark.parametrize(
    ("flags", "record", "users", "owner"),
    [
        (Flag.ANON | Flag.MMAP, KNOWN, [HEAP], Owner("process", "7 (qemu): [heap]")),
        (Flag.ANON, KNOWN, [HEAP, ANONYMOUS], Owner("process", "7 (qemu): [heap], 8 (qemu): anonymous")),
        (Flag.ANON, KNOWN, [HEAP] * 5, Owner("process", ", ".join(["7 (qemu): [heap]"] * 3) + ", 2 more")),
        (Flag.ANON, None, [], Owner("process", "no process maps it any more")),
        (Flag(0), KNOWN, [User(7, "qemu", "[vvar]")], Owner("process", "7 (qemu): [vvar]")),
        (Flag.LRU, IN_FILE, [], Owner("page cache", "/var/log/x")),
        (Flag(0), IN_FILE, [], Owner("page cache", "/var/log/x")),
        (Flag.LRU, IN_FILE, [MAPPED], Owner("page cache", "/var/log/x, mapped by 9 (cat)")),
        (Flag.LRU, IN_FILE, [MAPPED] * 4, Owner("page cache", f"/var/log/x, mapped by {THREE} and 1 more")),
        (Flag.LRU, None, [MAPPED], Owner("page cache", "/var/log/x, mapped by 9 (cat)")),
        (Flag.LRU, None, [], Owner("page cache", "file not known")),
        (Flag.LRU | Flag.SWAPBACKED, IN_FILE, [], Owner("shared memory", "/var/log/x")),
        (Flag.SLAB, IN_SLAB, [], Owner("slab", "kmalloc-64")),
        (Flag.SLAB | Flag.ANON, IN_SLAB, [], Owner("slab", "kmalloc-64")),
        (Flag.SLAB, None, [], Owner("slab", "")),
        (Flag.BUDDY, None, [], Owner("free", "")),
        (Flag(0), FREED, [], Owner("free", "")),
        (Flag.RESERVED, FREED, [], Owner("kernel", "the kernel's image, or reserved")),
        (Flag.NOPAGE, None, [], Owner("kernel", "the kernel's image, or reserved")),
        (Flag.PGTABLE, KNOWN, [], Owner("kernel", "page table")),
        (Flag(0), KNOWN, [], Owner("kernel", "pipe, socket, kernel stack, vmalloc or other")),
    ],
)  # fmt: skip
def test_owners(flags: Flag, record: PageRecord | None, users: list[User], owner: Owner) -> None:
    assert judge(flags, record, users, MOUNTS) == owner


def test_without_the_kernels_records_free_and_kernel_are_not_told_apart() -> None:
    assert judge(Flag(0), None, [], MOUNTS, NOT_KNOWN) == Owner("kernel", f"free, or the kernel's: {NOT_KNOWN}")


@pytest.mark.parametrize(
    ("file", "path"),
    [
        (CachedFile("254:0", 1, "/etc/x"), "/etc/x"),
        (CachedFile("0:25", 1, "/x"), "/dev/shm/x"),
        (CachedFile("254:1", 1, "/@home/me/x"), "/home/me/x"),
        (CachedFile("254:1", 1, "/@other/x"), "/@other/x (inode 1 of device 254:1)"),
        (CachedFile("0:1", 77, "memfd:x"), "memfd:x (inode 77 of device 0:1)"),
        (CachedFile("0:1", 77, ""), "name not known (inode 77 of device 0:1)"),
    ],
)
def test_paths(file: CachedFile, path: str) -> None:
    assert path_of(file, MOUNTS) == path


def test_mounts_are_read_with_their_white_space(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 22 0:25 /a\\040b /mnt/c\\011d rw - tmpfs tmpfs rw\n"
        "no mount\n"
    )
    assert mounts(tmp_path) == [("254:0", "/", "/"), ("0:25", "/a b", "/mnt/c\td")]


def modules(folder: Path, parameter: str, value: str) -> Path:
    file = folder / "modules" / parameter
    file.parent.mkdir(parents=True)
    file.write_text(value + "\n")
    return folder / "modules"


def proc(folder: Path, extra: str = "") -> Path:
    (folder / "meminfo").write_text(f"MemTotal:  1024 kB\n{extra}")
    return folder


@pytest.mark.parametrize(
    ("parameter", "kind"), [("kvm_intel/parameters/tdx", "TDX"), ("kvm_amd/parameters/sev_snp", "SEV-SNP")]
)
def test_hosts_of_confidential_guests_are_refused(tmp_path: Path, parameter: str, kind: str) -> None:
    for value in ("Y", "1"):
        with pytest.raises(HostUnfit, match=kind):
            hunt.refuse_confidential(modules(tmp_path / value, parameter, value), proc(tmp_path))
    hunt.refuse_confidential(modules(tmp_path / "N", parameter, "N"), proc(tmp_path))
    hunt.refuse_confidential(tmp_path / "none", proc(tmp_path))


def test_memory_that_is_not_accepted_is_refused(tmp_path: Path) -> None:
    hunt.refuse_confidential(tmp_path, proc(tmp_path, "Unaccepted:  0 kB\n"))
    with pytest.raises(HostUnfit, match="not accepted"):
        hunt.refuse_confidential(tmp_path, proc(tmp_path, "Unaccepted:  4 kB\n"))


def test_hits_are_parted_by_guest() -> None:
    present = 1 << 63
    guests = {
        "a": array("Q", [present | 3, present | 9, 5, present | 1 << 40]),  # 5 is not present
        "b": array("Q", [present | 5, present | 9]),
        "none": array("Q"),
    }
    places, rest = hunt._by_guest(array("Q", [1, 3, 5, 9, 11]), guests)
    assert places == [
        HuntPlace(place="guest", owner="a", hits=2, examples=(3, 9)),
        HuntPlace(place="guest", owner="b", hits=1, examples=(5,)),
    ]
    assert list(rest) == [1, 11]
    assert hunt._by_guest(array("Q"), guests) == ([], array("Q"))


def test_windows_cover_ram_once_and_look_ahead_inside_a_range_only() -> None:
    windows = list(_windows([(0x1000, 0x9F000), (WINDOW, 3 * WINDOW + 0x1000)]))
    assert windows == [
        (0x1000, 0x9E000, 0),
        (WINDOW, WINDOW, 0x1000),
        (2 * WINDOW, WINDOW, 0x1000),
        (3 * WINDOW, 0x1000, 0),
    ]
