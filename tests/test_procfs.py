"""The readers of /proc, on text that real kernels wrote (Linux 6.18 where it does not say otherwise)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.linux import procfs
from vmmback.linux.procfs import Mapping

MAPS = """\
55a5a8219000-55a5a8620000 r--p 00000000 fe:00 2170887                    /usr/bin/qemu-system-x86_64
55a5bfa3b000-55a5c096b000 rw-p 00000000 00:00 0                          [heap]
7efe3b000000-7efe3b001000 ---p 00000000 00:00 0 
7fb3b583a000-7fb3b583b000 rw-s 00000000 00:0e 64210                      /secretmem (deleted)
7fb3b583b000-7fb3b583c000 rw-s 00001000 00:0e 64210                      /secretmem (deleted)
7fb3b583c000-7fb3b587a000 rw-s 00002000 00:0e 64210                      /secretmem (deleted)
7fb3b587a000-7fb3b587c000 rw-s 00000000 00:01 1308                       /memfd:vmmback-ordinary (deleted)
7fb3b65ba000-7fb3b65bb000 rw-s 00000000 fe:00 2146551                    /tmp/tmp328upyzy/\udce9
7fb3b65bb000-7fb3b65bc000 rw-s 00000000 fe:00 2146533                    /tmp/tmp328upyzy/gone (deleted)
7fb3b65bc000-7fb3b65bd000 rw-s 00000000 fe:00 2146503                    /tmp/tmp328upyzy/(deleted)
7fb3b66f0000-7fb3b66f1000 rw-s 00000000 fe:00 2146486                    /tmp/tmp328upyzy/back\\slash
7fb3b66f1000-7fb3b66f2000 rw-s 00000000 fe:00 2146459                    /tmp/tmp328upyzy/new\\012line
7fb3b66f2000-7fb3b66f3000 rw-s 00000000 fe:00 2146421                    /tmp/tmp328upyzy/with  two spaces
7fb3b66fc000-7fb3b6700000 r--p 00000000 00:00 0                          [vvar]
7ffc84dd6000-7ffc84df7000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""  # noqa: W291 (as the kernel writes it)

SMAPS = """\
7fb3b583a000-7fb3b587a000 rw-s 00000000 00:0e 64210                      /secretmem (deleted)
Size:                256 kB
KernelPageSize:        4 kB
Rss:                   0 kB
Locked:                4 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd wr sh mr mw ms lo dd 
7ffc84dd6000-7ffc84df7000 rw-p 00000000 00:00 0                          [stack]
Size:                132 kB
KernelPageSize:        4 kB
Rss:                  60 kB
VmFlags: rd wr mr mw me gd ac 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Size:                  4 kB
VmFlags: ex 
"""  # noqa: W291

MEMINFO = """\
MemTotal:       24684092 kB
MemFree:        23931312 kB
MemAvailable:   24267152 kB
Active(anon):       1560 kB
VmallocTotal:   34359738367 kB
HugePages_Total:       3
Hugepagesize:       2048 kB
DirectMap1G:    23068672 kB
"""

IOMEM = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-bfffffff : System RAM
  01000000-02209987 : Kernel code
c0001000-eebfffff : PCI Bus 0000:00
100000000-63fffffff : System RAM
1000000000-10ffffffff : Persistent Memory
  1000000000-103fffffff : System RAM (kmem)
1100000000-1100000fff : System RAMDISK
"""

VMSTAT = """\
nr_free_pages 5982828
direct_map_level2_splits 539
direct_map_level3_splits 2
nr_unstable 0
"""

STATUS = """\
Name:\tmy: prog\\nname
Umask:\t0022
State:\tR (running)
Tgid:\t16220
Pid:\t16221
Uid:\t0\t0\t0\t0
Groups:\t \n\
VmRSS:\t    1772 kB
CapEff:\t000001fffeffffff
"""


def proc(folder: Path, name: str, text: str) -> Path:
    """Make a /proc with one file."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return folder


def test_maps_reads_every_line_with_the_path_as_the_kernel_wrote_it(tmp_path: Path) -> None:
    mappings = procfs.maps(7, proc(tmp_path, "7/maps", MAPS))
    assert len(mappings) == len(MAPS.splitlines())
    assert mappings[0] == Mapping(
        0x55A5A8219000, 0x55A5A8620000, "r--p", 0, "fe:00", 2170887, "/usr/bin/qemu-system-x86_64"
    )
    assert [mapping.path for mapping in mappings[2:]] == [
        "",
        "/secretmem (deleted)",
        "/secretmem (deleted)",
        "/secretmem (deleted)",
        "/memfd:vmmback-ordinary (deleted)",
        "/tmp/tmp328upyzy/\udce9",
        "/tmp/tmp328upyzy/gone (deleted)",
        "/tmp/tmp328upyzy/(deleted)",
        "/tmp/tmp328upyzy/back\\slash",
        "/tmp/tmp328upyzy/new\\012line",
        "/tmp/tmp328upyzy/with  two spaces",
        "[vvar]",
        "[stack]",
        "[vsyscall]",
    ]
    assert mappings[-1].start == 0xFFFF_FFFF_FF60_0000
    assert mappings[-1].permissions == "--xp"
    assert mappings[5].offset == 0x2000
    assert mappings[5].size == 0x3E000


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "7fb3b65ba000 rw-s 00000000 fe:00 1 /x",
        "7fb3b65ba000-7fb3b65bb000 rwsx- 00000000 fe:00 1 /x",
        "7fb3b65ba000-7fb3b65bb000 rw-s 00000000 fe:00",
        "7fb3b65ba000-7fb3b65bb000 rw-s 00000000 fe:00 inode /x",
        "7FB3B65BA000-7fb3b65bb000 rw-s 00000000 fe:00 1 /x",
    ],
)
def test_maps_leaves_out_a_line_that_is_none(tmp_path: Path, line: str) -> None:
    whole, *_ = MAPS.splitlines()
    assert len(procfs.maps(7, proc(tmp_path, "7/maps", f"{whole}\n{line}\n{whole}\n"))) == 2
    assert procfs.maps(7, proc(tmp_path, "7/maps", line)) == []


@pytest.mark.parametrize("sign", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028"], ids=ascii)
def test_maps_takes_no_sign_but_the_newline_for_the_end_of_a_line(tmp_path: Path, sign: str) -> None:
    # seq_path escapes the newline alone (fs/proc/task_mmu.c), so whoever names a file could else make up a VMA.
    lie = "7fb3b583a000-7fb3b587a000 rw-s 00000000 00:0e 64210 /secretmem (deleted)"
    line = f"7fb3b65ba000-7fb3b65bb000 rw-s 00000000 fe:00 1 /tmp/x{sign}{lie}\n"
    assert [mapping.path for mapping in procfs.maps(7, proc(tmp_path, "7/maps", line))] == [f"/tmp/x{sign}{lie}"]


def test_maps_of_a_process_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        procfs.maps(7, tmp_path)


@given(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])))
def test_whatever_a_file_is_called_its_line_is_one_mapping(name: str) -> None:
    line = f"7fb3b65ba000-7fb3b65bb000 rw-s 00000000 fe:00 1                    /{name}"
    mapping = procfs._mapping(line)
    assert mapping is not None
    assert mapping.path == f"/{name}"


def test_secret_and_memory_mappings_are_all_vmas_of_that_file_and_no_others(tmp_path: Path) -> None:
    mappings = procfs.maps(7, proc(tmp_path, "7/maps", MAPS))
    assert procfs.secret_mappings(mappings, 64210) == mappings[3:6]
    assert procfs.memory_mappings(mappings, 64210) == mappings[3:6]
    assert procfs.secret_mappings(mappings, 1308) == []
    assert procfs.memory_mappings(mappings, 1308) == [mappings[6]]
    for not_memory in (0, 1, 2146533):
        assert procfs.memory_mappings(mappings, not_memory) == []


@pytest.mark.parametrize(
    "path",
    [
        "/tmp/secretmem (deleted)",
        "/tmp/memfd:x (deleted)",
        "[heap]",
        "/secretmem2",
        "/secretmem/ram0",
        "/secretmem (deleted)/x",
    ],
)
def test_a_file_of_another_name_with_the_same_inode_is_not_secret(path: str) -> None:
    assert procfs.secret_mappings([Mapping(0x1000, 0x2000, "rw-s", 0, "fe:00", 7, path)], 7) == []


@pytest.mark.parametrize("path", ["/secretmem2", "/secretmem/ram0", "/secretmem (deleted)/x"])
def test_a_file_of_another_name_with_the_same_inode_is_not_ours(path: str) -> None:
    assert procfs.memory_mappings([Mapping(0x1000, 0x2000, "rw-s", 0, "fe:00", 7, path)], 7) == []


def test_smaps_adds_sizes_in_bytes_and_flags(tmp_path: Path) -> None:
    secret, stack, vsyscall = procfs.smaps(7, proc(tmp_path, "7/smaps", SMAPS))
    assert secret == Mapping(
        start=0x7FB3B583A000,
        end=0x7FB3B587A000,
        permissions="rw-s",
        offset=0,
        device="00:0e",
        inode=64210,
        path="/secretmem (deleted)",
        sizes={"Size": 256 << 10, "KernelPageSize": 4096, "Rss": 0, "Locked": 4096},
        flags=frozenset({"rd", "wr", "sh", "mr", "mw", "ms", "lo", "dd"}),
    )
    assert procfs.secret_mappings([secret, stack], 64210) == [secret]
    assert stack.sizes["Rss"] == 60 << 10
    assert vsyscall.flags == {"ex"}
    assert vsyscall.sizes == {"Size": 4096}


@pytest.mark.parametrize("text", ["", "Size: 4 kB\nVmFlags: rd\n", SMAPS.splitlines()[0] + "\nSize:  4 kB\n"])
def test_smaps_shows_only_whole_entries(tmp_path: Path, text: str) -> None:
    assert procfs.smaps(7, proc(tmp_path, "7/smaps", text)) == []


def test_meminfo_is_in_bytes_and_counters_stay_as_they_are(tmp_path: Path) -> None:
    assert procfs.meminfo(proc(tmp_path, "meminfo", MEMINFO)) == {
        "MemTotal": 24684092 << 10,
        "MemFree": 23931312 << 10,
        "MemAvailable": 24267152 << 10,
        "Active(anon)": 1560 << 10,
        "VmallocTotal": 34359738367 << 10,
        "HugePages_Total": 3,
        "Hugepagesize": 2 << 20,
        "DirectMap1G": 23068672 << 10,
    }


def test_ram_ranges_are_whole_pages_of_all_ram(tmp_path: Path) -> None:
    assert procfs.ram_ranges(proc(tmp_path, "iomem", IOMEM)) == [
        (0x1000, 0x9F000),
        (0x100000, 0xC0000000),
        (0x100000000, 0x640000000),
        (0x1000000000, 0x1040000000),
    ]


def test_ram_ranges_are_none_where_the_kernel_hides_addresses(tmp_path: Path) -> None:
    hidden = "00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n"
    assert procfs.ram_ranges(proc(tmp_path, "iomem", hidden)) == []


def test_vmstat_counts(tmp_path: Path) -> None:
    assert procfs.vmstat(proc(tmp_path, "vmstat", VMSTAT)) == {
        "nr_free_pages": 5982828,
        "direct_map_level2_splits": 539,
        "direct_map_level3_splits": 2,
        "nr_unstable": 0,
    }


def test_status_gives_each_field_as_text_and_thread_group_the_process(tmp_path: Path) -> None:
    root = proc(tmp_path, "16221/status", STATUS)
    fields = procfs.status(16221, root)
    assert fields["Name"] == "my: prog\\nname"
    assert fields["Uid"] == "0\t0\t0\t0"
    assert fields["Groups"] == ""
    assert fields["VmRSS"] == "1772 kB"
    assert int(fields["CapEff"], 16) == 0x1FFFEFFFFFF
    assert procfs.thread_group(16221, root) == 16220


@pytest.mark.parametrize("name", ["caf\udcc3", "a\rTgid:\t1", "a\x85b"], ids=ascii)
def test_status_survives_any_name_that_a_process_gives_itself(tmp_path: Path, name: str) -> None:
    # PR_SET_NAME takes any 15 bytes; a name cut at 15 may end within a character.
    root = proc(tmp_path, "16221/status", STATUS.replace("my: prog\\nname", name))
    assert procfs.status(16221, root)["Name"] == name
    assert procfs.thread_group(16221, root) == 16220


def test_the_readers_understand_the_kernel_that_runs_here() -> None:
    assert any(mapping.path == "[stack]" for mapping in procfs.maps("self"))
    assert any({"rd", "wr"} <= mapping.flags for mapping in procfs.smaps("self"))
    assert procfs.meminfo()["MemTotal"] > 0
    assert procfs.vmstat()["nr_free_pages"] >= 0
    assert procfs.thread_group(os.getpid()) == os.getpid()
