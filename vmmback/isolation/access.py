"""Probes through the doors that the kernel gives to debuggers and to root: all of them safe on a live guest."""

from __future__ import annotations

import errno
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from vmmback.isolation.probe import Probe, Reading, Target
from vmmback.linux import kpage, process_vm, procfs
from vmmback.linux.procfs import Mapping
from vmmback.report import Verdict

_READ_BYTES = 8


class ReadProbe(Probe[tuple[int, Sequence[int]]]):
    """Reads the first, the middle and the last page of each mapping. A place is a pid and addresses in it."""

    refusal: int
    """The errno with which the kernel keeps secret RAM from this vector."""

    def target(self, target: Target) -> tuple[int, Sequence[int]]:
        return target.pid, _sample(_guest_ram(procfs.maps(target.pid), target))

    def control(self, target: Target) -> tuple[int, Sequence[int]]:
        return target.pid, _sample(_ordinary(procfs.maps(target.pid)))

    @abstractmethod
    def read(self, pid: int, address: int) -> bytes:
        """Read 8 bytes. Raises OSError."""

    def attempt(self, place: tuple[int, Sequence[int]]) -> Reading:
        pid, addresses = place
        readable = 0
        for address in addresses:
            try:
                readable += bool(self.read(pid, address))
            except OSError as error:
                if error.errno != self.refusal:
                    raise
        if readable:
            return Reading(Verdict.READABLE, f"{readable} of {len(addresses)} sampled pages were read")
        refusal = errno.errorcode[self.refusal]
        return Reading(Verdict.BLOCKED, f"{len(addresses)} sampled pages refused, {refusal}", refusal)


class ProcMemProbe(ReadProbe):
    """read(2) of /proc/PID/mem. The kernel answers EIO where get_user_pages fails (fs/proc/base.c, mem_rw)."""

    name = "proc-mem"
    vector = "read(2) of /proc/PID/mem: first, middle and last page of each mapping"
    control_is = "QEMU's heap and stack"
    source = "fs/proc/base.c, mem_rw: EIO where get_user_pages fails; proc_pid_mem(5)"
    refusal = errno.EIO

    def read(self, pid: int, address: int) -> bytes:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), _READ_BYTES, address)


class ProcessVmReadvProbe(ReadProbe):
    """process_vm_readv(2). get_user_pages refuses secretmem mappings with EFAULT (mm/gup.c, check_vma_flags)."""

    name = "process-vm-readv"
    vector = "process_vm_readv(2), the same pages"
    control_is = "QEMU's heap and stack"
    source = "mm/gup.c, check_vma_flags: EFAULT for secretmem; process_vm_readv(2)"
    refusal = errno.EFAULT

    def read(self, pid: int, address: int) -> bytes:
        return process_vm.read(pid, address, _READ_BYTES)


class _ReopenProbe(Probe[Sequence[Path]]):
    """Opens a file anew through a magic link of /proc. secretmem has no open method: ENXIO (fs/inode.c, no_open)."""

    def attempt(self, place: Sequence[Path]) -> Reading:
        if not place:
            return Reading(Verdict.INCONCLUSIVE, "QEMU holds no such file")
        for link in place:
            try:
                os.close(os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            else:
                return Reading(Verdict.READABLE, f"{link} could be opened")
        return Reading(Verdict.BLOCKED, f"{len(place)} file(s) refused, ENXIO", "ENXIO")


class FdReopenProbe(_ReopenProbe):
    """open(2) of /proc/PID/fd/N. The control is QEMU's standard output, the log file."""

    name = "fd-reopen"
    vector = "open(2) of /proc/PID/fd/N of the descriptor"
    control_is = "QEMU's log file"
    source = "fs/inode.c, no_open: ENXIO; proc_pid_fd(5)"

    def target(self, target: Target) -> Sequence[Path]:
        return [Path(f"/proc/{target.pid}/fd/{number}") for number in descriptors_of(target)]

    def control(self, target: Target) -> Sequence[Path]:
        return [Path(f"/proc/{target.pid}/fd/1")]


class MapFilesProbe(_ReopenProbe):
    """open(2) of /proc/PID/map_files/START-END. The control is QEMU's own program file."""

    name = "map-files"
    vector = "open(2) of /proc/PID/map_files/START-END"
    control_is = "QEMU's program file"
    source = "fs/inode.c, no_open: ENXIO; proc_pid_map_files(5)"

    def target(self, target: Target) -> Sequence[Path]:
        return [self._link(target.pid, mapping) for mapping in _guest_ram(procfs.maps(target.pid), target)]

    def control(self, target: Target) -> Sequence[Path]:
        program = str(Path(f"/proc/{target.pid}/exe").readlink())
        return [self._link(target.pid, m) for m in procfs.maps(target.pid) if m.path == program][:1]

    @staticmethod
    def _link(pid: int, mapping: Mapping) -> Path:
        return Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")


class VmaFlagsProbe(Probe[tuple[int, Sequence[Mapping]]]):
    """VmFlags in /proc/PID/smaps: `lo`, never swapped out, and `dd`, left out of core dumps (fs/proc/task_mmu.c).

    Memory without one of them is `readable`: in swap, or in a dump. Not every kernel sets `lo` on secret memory (Linux
    6.18 does, Debian's 6.1 does not), so without it the frames are looked at: secretmem makes its files unevictable,
    and what is unevictable is never reclaimed. A place is a pid and mappings of it.
    """

    name = "vma-flags"
    vector = "/proc/PID/smaps: memory neither locked (lo) nor unevictable can be swapped out, without dd dumped"
    control_is = "QEMU's heap and stack"
    source = "fs/proc/task_mmu.c, show_smap_vma_flags; mm/secretmem.c, mapping_set_unevictable"

    def target(self, target: Target) -> tuple[int, Sequence[Mapping]]:
        return target.pid, _guest_ram(procfs.smaps(target.pid), target)

    def control(self, target: Target) -> tuple[int, Sequence[Mapping]]:
        return target.pid, _ordinary(procfs.smaps(target.pid))

    def attempt(self, place: tuple[int, Sequence[Mapping]]) -> Reading:
        pid, mappings = place
        dumped = any("dd" not in mapping.flags for mapping in mappings)
        unlocked = [mapping for mapping in mappings if "lo" not in mapping.flags]
        try:
            frames = _frames(pid, unlocked)
            lists = kpage.lists(frames)
        except OSError:
            if not dumped:
                raise
            return Reading(Verdict.READABLE, "flags missing: dd")  # reason enough, whatever the kernel hides from us
        found = ["flags missing: dd"] if dumped else []
        if lists.evictable:
            found.append(f"not locked (lo), and {lists.evictable} of {len(frames)} frames can be swapped out")
        if found:
            return Reading(Verdict.READABLE, "; ".join(found))
        if not unlocked:
            return Reading(Verdict.BLOCKED, f"locked (lo) and left out of dumps (dd): {len(mappings)} mapping(s)")
        if not lists.unevictable:
            return Reading(
                Verdict.INCONCLUSIVE, f"not locked (lo), and none of {len(frames)} frames is unevictable yet"
            )
        return Reading(
            Verdict.BLOCKED,
            f"unevictable, {len(frames)} frames, and left out of dumps (dd): {len(mappings)} mapping(s)",
        )


def descriptors_of(target: Target) -> list[int]:
    """Return the numbers of QEMU's descriptors of the guest's RAM. Raises OSError."""
    # Inode numbers are only unique within a file system: the link's text tells which one it is.
    return sorted(
        descriptor.number
        for descriptor in procfs.descriptors(target.pid)
        if descriptor.inode in target.ram and procfs.is_memory_file(descriptor.path)
    )


def _guest_ram(mappings: Sequence[Mapping], target: Target) -> list[Mapping]:
    """Return the mappings of the guest's RAM. Raises OSError when QEMU does not map each of its descriptors."""
    found = [procfs.memory_mappings(mappings, inode) for inode in target.ram]
    if not found or not all(found):
        raise OSError(errno.ENOENT, "QEMU does not map the guest's RAM")
    return [mapping for mappings_of_one in found for mapping in mappings_of_one]


def _frames(pid: int, mappings: Sequence[Mapping]) -> list[int]:
    """Return the frames of the present pages of mappings. Raises PermissionError where the kernel hides them."""
    entries = [entry for mapping in mappings for entry in procfs.pagemap(pid, mapping.start, mapping.size)]
    frames = [entry & procfs.PFN_MASK for entry in entries if entry & procfs.PRESENT]
    if not all(frames):
        raise PermissionError(errno.EPERM, f"/proc/{pid}/pagemap hides frame numbers (CAP_SYS_ADMIN)")
    return frames


def _ordinary(mappings: Sequence[Mapping]) -> list[Mapping]:
    """Return QEMU's heap and stack: memory of the same process that is surely present and ordinary."""
    return [mapping for mapping in mappings if mapping.path in {"[heap]", "[stack]"}]


def _sample(mappings: Sequence[Mapping]) -> list[int]:
    """Return the addresses of the first, the middle and the last page of each mapping."""
    page = procfs.PAGE_SIZE
    return sorted(
        {
            address
            for mapping in mappings
            for address in (mapping.start, mapping.start + mapping.size // 2 // page * page, mapping.end - page)
        }
    )
