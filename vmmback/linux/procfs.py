"""Readers of /proc: mappings, page tables and memory counters. Sources: proc(5), proc_pid_pagemap(5), Documentation/mm.

`root` is another folder with files of the same shape, for tests of the parsers.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import abc
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

PROC = Path("/proc")
PAGE_SIZE = os.sysconf("SC_PAGESIZE")
File = tuple[str, int]
"""A file by its device, as in Mapping, and its inode."""

# Of an entry of pagemap: whether the page is present, and its frame (Documentation/admin-guide/mm/pagemap.rst).
PRESENT, PFN_MASK = 1 << 63, (1 << 55) - 1

# mm/secretmem.c names its files so; they have no link in any folder.
SECRETMEM = "/secretmem (deleted)"


_MAPS_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<permissions>[-rwxsp]{4}) (?P<offset>[0-9a-f]+) "
    r"(?P<device>[0-9a-f]+:[0-9a-f]+) (?P<inode>\d+) *(?P<path>.*)",
    re.DOTALL,
)

# r_show() of kernel/resource.c. Memory that drivers/dax/kmem.c adds has its driver's name behind it.
_SYSTEM_RAM = re.compile(r"^ *([0-9a-f]+)-([0-9a-f]+) : System RAM(?: \(kmem\))?$", re.MULTILINE)

_KERNEL_PART = re.compile(r"^ *([0-9a-f]+)-([0-9a-f]+) : Kernel (code|rodata|data|bss)$", re.MULTILINE)


class Mapping(NamedTuple):
    """One VMA: [start, end) in bytes, its offset in the file, and the file's inode (0 where it maps none)."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str
    sizes: abc.Mapping[str, int] = MappingProxyType({})
    """In bytes, by the names that smaps has for them; without smaps, there are none."""
    flags: frozenset[str] = frozenset()
    """Of two letters, as smaps has them."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start


def maps(pid: int | str, root: Path = PROC) -> list[Mapping]:
    """Return the VMAs of a process in the order of their addresses. Raises OSError when it is gone or out of reach."""
    return [mapping for line in _lines(root / str(pid) / "maps") if (mapping := _mapping(line))]


def smaps(pid: int | str, root: Path = PROC) -> list[Mapping]:
    """Return the VMAs of a process with their sizes in bytes and their VmFlags."""
    return list(_detailed(_lines(root / str(pid) / "smaps")))


def secret_mappings(mappings: Iterable[Mapping], inode: int) -> list[Mapping]:
    """Return those VMAs that map the memfd_secret file `inode`; madvise(2) may have split one mapping into several."""
    return [mapping for mapping in mappings if mapping.inode == inode and mapping.path == SECRETMEM]


def is_memory_file(path: str) -> bool:
    """Tell whether a path, as maps and the links in fd show it, is that of a memfd_secret or a memfd file."""
    return path == SECRETMEM or path.startswith("/memfd:")


def memory_mappings(mappings: Iterable[Mapping], inode: int) -> list[Mapping]:
    """Return those VMAs that map `inode`, be it a memfd_secret file or the plain memfd of a control."""
    return [mapping for mapping in mappings if mapping.inode == inode and is_memory_file(mapping.path)]


def pagemap(pid: int | str, start: int, size: int) -> array[int]:
    """Return one 64-bit entry for each page of [start, start + size) bytes: bit 63 present, bits 0 to 54 the PFN.

    The kernel shows PFNs as 0 without CAP_SYS_ADMIN (fs/proc/task_mmu.c). Raises OSError.
    """
    entries = array("Q")
    with (PROC / str(pid) / "pagemap").open("rb", buffering=0) as file:
        file.seek(start // PAGE_SIZE * 8)
        remaining = size // PAGE_SIZE * 8
        while remaining and (chunk := file.read(remaining)):
            entries.frombytes(chunk)
            remaining -= len(chunk)
    return entries


def meminfo(root: Path = PROC) -> dict[str, int]:
    """Return /proc/meminfo in bytes (counters without a unit, such as HugePages_Total, as they are)."""
    values = {}
    for line in (root / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        values[name] = int(number) * (1024 if unit == "kB" else 1)
    return values


def ram_ranges(root: Path = PROC) -> list[tuple[int, int]]:
    """Return where RAM is, as physical addresses [start, end) in bytes, whole pages only, in their order.

    Empty without CAP_SYS_ADMIN: the kernel then shows every address as 0.
    """
    found = _SYSTEM_RAM.findall((root / "iomem").read_text())
    pages = ((-(-int(first, 16) // PAGE_SIZE), (int(last, 16) + 1) // PAGE_SIZE) for first, last in found)
    return sorted((start * PAGE_SIZE, end * PAGE_SIZE) for start, end in pages if start < end)


def kernel_image(root: Path = PROC) -> dict[str, tuple[int, int]]:
    """Return where the parts of the kernel's image are in RAM: `code`, `rodata`, `data`, `bss`, each [start, end).

    In bytes. Not every architecture has all of them; empty without CAP_SYS_ADMIN, as `ram_ranges` is.
    """
    found = _KERNEL_PART.findall((root / "iomem").read_text())
    parts = {name: (int(first, 16), int(last, 16) + 1) for first, last, name in found}
    return {name: (start, end) for name, (start, end) in parts.items() if start}


def vmstat(root: Path = PROC) -> dict[str, int]:
    """Return the counters of /proc/vmstat, such as `direct_map_level2_splits`."""
    return {name: int(value) for name, value in (line.split() for line in (root / "vmstat").read_text().splitlines())}


class Descriptor(NamedTuple):
    """One open descriptor of a process: its number, the device and inode of its file, the text of its link.

    `device` is written as in Mapping, so that a file has the same one in both.
    """

    number: int
    device: str
    inode: int
    path: str


def processes(root: Path = PROC) -> list[int]:
    """Return the pids of all processes that this one can see."""
    return sorted(int(entry.name) for entry in root.iterdir() if entry.name.isdecimal())


def children(pid: int, root: Path = PROC) -> list[int]:
    """Return the pids of the children of all threads of a process; none when it is gone."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in threads(pid, root):
            found += [int(child) for child in (root / f"{pid}/task/{thread}/children").read_text().split()]
    return found


def threads(pid: int, root: Path = PROC) -> list[int]:
    """Return the ids of a process's threads. Raises OSError when it is gone."""
    return sorted(int(entry.name) for entry in (root / str(pid) / "task").iterdir())


def descriptors(pid: int | str, root: Path = PROC) -> Iterator[Descriptor]:
    """Yield the open descriptors of a process that stay open meanwhile. Raises OSError when it is gone."""
    for link in (root / str(pid) / "fd").iterdir():
        try:
            status = link.stat()
            yield Descriptor(int(link.name), _device(status.st_dev), status.st_ino, str(link.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue


def _device(number: int) -> str:
    return f"{os.major(number):02x}:{os.minor(number):02x}"


def held(pid: int | str, files: Collection[File], root: Path = PROC) -> set[File]:
    """Return those of `files` of which a process has a descriptor.

    As `descriptors` would tell, and several times as fast. Raises OSError when the process is gone.
    """
    folder = f"{root}/{pid}/fd"
    inodes = {inode for _, inode in files}
    found: set[File] = set()
    for number in os.listdir(folder):  # noqa: PTH208 (a process may have thousands)
        with suppress(FileNotFoundError):  # closed meanwhile
            status = os.stat(f"{folder}/{number}")  # noqa: PTH116
            if status.st_ino in inodes:
                found.add((_device(status.st_dev), status.st_ino))
    return found & set(files)


def mapped(pid: int | str, files: Collection[File], root: Path = PROC) -> set[File]:
    """Return those of `files` that a process maps.

    As `maps` would tell, and several times as fast. Raises OSError when the process is gone.
    """
    text = (root / str(pid) / "maps").read_bytes()
    wanted = [b" %s %d " % (device.encode(), inode) for device, inode in files]
    if not any(word in text for word in wanted):
        return set()
    return {(mapping.device, mapping.inode) for mapping in maps(pid, root)} & set(files)


def command_name(pid: int, root: Path = PROC) -> str:
    """Return the name of a process (15 bytes at most), "?" when it is gone. A process gives itself any name."""
    try:
        return (root / str(pid) / "comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return "?"


def has_capability(number: int, root: Path = PROC) -> bool:
    """Tell whether this process has a capability in effect, by its number in include/uapi/linux/capability.h."""
    return bool(int(status("self", root)["CapEff"], 16) >> number & 1)


def thread_group(tid: int, root: Path = PROC) -> int:
    """Return the pid of the process that the thread `tid` belongs to. Raises OSError when it is gone."""
    return int(status(tid, root)["Tgid"])


def start_time(pid: int, root: Path = PROC) -> int:
    """Return when a process was started, in ticks since boot: field 22 of proc_pid_stat(5). Raises OSError."""
    # Its name, in parentheses, can hold any sign.
    return int((root / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[19])


def status(pid: int | str, root: Path = PROC) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = _lines(root / str(pid) / "status")
    return {name: value.strip(" \t") for name, _, value in (line.partition(":") for line in lines) if name}


def _lines(file: Path) -> list[str]:
    """Cut at newlines alone: the kernel escapes no other sign, so a file's name could else make up a line."""
    return file.read_bytes().decode(errors="surrogateescape").split("\n")


def _mapping(line: str) -> Mapping | None:
    match = _MAPS_LINE.fullmatch(line)
    if match is None:
        return None
    return Mapping(
        start=int(match["start"], 16),
        end=int(match["end"], 16),
        permissions=match["permissions"],
        offset=int(match["offset"], 16),
        device=match["device"],
        inode=int(match["inode"]),
        path=match["path"],
    )


_HEX_DIGITS = frozenset("0123456789abcdef")


def _detailed(lines: Iterable[str]) -> Iterator[Mapping]:
    head: Mapping | None = None
    sizes: dict[str, int] = {}
    for line in lines:
        if line[:1] in _HEX_DIGITS and (mapping := _mapping(line)):  # else a name, with a capital letter
            head, sizes = mapping, {}
        elif head is not None and line.startswith("VmFlags:"):  # the last line of each VMA
            yield head._replace(sizes=sizes, flags=frozenset(line.split()[1:]))
        else:
            name, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                sizes[name] = int(rest.split()[0]) * 1024
