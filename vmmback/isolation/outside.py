"""What another process, root above all, does to a process that maps the memory: refused where the memory is secret.

Each is tried on throwaway children (throwaway.py): QEMU would be stopped, changed or killed by it.
"""

from __future__ import annotations

import errno
import os
import sys
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from vmmback.isolation.probe import Missing, Reading
from vmmback.isolation.throwaway import ChildProbe, Throwaway
from vmmback.linux import process_vm, procfs, ptrace
from vmmback.linux.ptrace import Tracee
from vmmback.report import Verdict

_WORD_BYTES = 8
_KPF_UNEVICTABLE = 1 << 18  # include/uapi/linux/kernel-page-flags.h


class _RefusedProbe(ChildProbe):
    """Reaches for the first bytes of the memory. One errno is the kernel's refusal; any other is no answer."""

    refusal: ClassVar[int]

    @abstractmethod
    def reach(self, child: Throwaway) -> str:
        """Return what was done to the memory, "" where that came to nothing. Raises OSError."""

    def attempt(self, place: Throwaway) -> Reading:
        try:
            done = self.reach(place)
        except OSError as error:
            if error.errno != self.refusal:
                raise
            name = errno.errorcode[self.refusal]
            return Reading(Verdict.BLOCKED, f"refused, {name}", name)
        if not done:
            return Reading(Verdict.BLOCKED, "not refused, but nothing came of it")
        return Reading(Verdict.READABLE, done)


def _read(child: Throwaway, data: bytes) -> str:
    return "the canary was read" if data and child.specimen.canary.startswith(data) else ""


def _marker(child: Throwaway) -> bytes:
    """Return a word that the memory's first word is not."""
    return bytes(byte ^ 0xFF for byte in child.specimen.canary[:_WORD_BYTES])


def _written(child: Throwaway, marker: bytes) -> str:
    return "the memory was changed" if child.specimen.memory[:_WORD_BYTES] == marker else ""


class ProcMemWriteProbe(_RefusedProbe):
    """write(2) of /proc/PID/mem, which also ignores the protection of a mapping (FOLL_FORCE)."""

    name = "proc-mem-write"
    vector = "write(2) of /proc/PID/mem: is the memory changed?"
    source = "fs/proc/base.c, mem_rw: EIO where get_user_pages fails; proc_pid_mem(5)"
    refusal = errno.EIO

    def reach(self, child: Throwaway) -> str:
        marker = _marker(child)
        with Path(f"/proc/{child.pid}/mem").open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), marker, child.address)
        return _written(child, marker)


class ProcessVmWritevProbe(_RefusedProbe):
    """process_vm_writev(2)."""

    name = "process-vm-writev"
    vector = "process_vm_writev(2): is the memory changed?"
    source = "mm/gup.c, check_vma_flags: EFAULT for secretmem; process_vm_writev(2)"
    refusal = errno.EFAULT

    def reach(self, child: Throwaway) -> str:
        marker = _marker(child)
        process_vm.write(child.pid, child.address, marker)
        return _written(child, marker)


class PtracePeekProbe(_RefusedProbe):
    """PTRACE_PEEKDATA of a stopped process."""

    name = "ptrace-peek"
    vector = "PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_PEEKDATA"
    source = "kernel/ptrace.c, generic_ptrace_peekdata: EIO where access_process_vm() reads nothing; ptrace(2)"
    refusal = errno.EIO

    def reach(self, child: Throwaway) -> str:
        with ptrace.stopped(child.pid) as tracee:
            return _read(child, tracee.peek(child.address))


class PtracePokeProbe(_RefusedProbe):
    """PTRACE_POKEDATA of a stopped process."""

    name = "ptrace-poke"
    vector = "PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_POKEDATA: is the memory changed?"
    source = "kernel/ptrace.c, generic_ptrace_pokedata: EIO where access_process_vm() writes nothing; ptrace(2)"
    refusal = errno.EIO

    def reach(self, child: Throwaway) -> str:
        marker = _marker(child)
        with ptrace.stopped(child.pid) as tracee:
            tracee.poke(child.address, marker)
        return _written(child, marker)


class GcoreProbe(_RefusedProbe):
    """What a debugger's gcore does, with all mappings forced, those left out of dumps too."""

    name = "gcore"
    vector = "a stopped process: every mapping is read through /proc/PID/mem and searched for the canary"
    source = "fs/proc/base.c, mem_rw; gcore(1) with `set dump-excluded-mappings on`"
    refusal = errno.EIO

    def reach(self, child: Throwaway) -> str:
        with ptrace.stopped(child.pid) as tracee:
            return self._dump(child, tracee)

    @staticmethod
    def _dump(child: Throwaway, tracee: Tracee) -> str:
        copies = read = 0
        refused: OSError | None = None
        mappings = procfs.maps(tracee.pid)
        with Path(f"/proc/{tracee.pid}/mem").open("rb", buffering=0) as memory:
            for mapping in mappings:
                if mapping.path == "[vsyscall]":  # above what a seek can name
                    continue
                try:
                    contents = os.pread(memory.fileno(), mapping.size, mapping.start)
                except OSError as error:
                    if mapping.start == child.address:
                        refused = error
                    continue  # [vvar] and its like are refused in every process
                read += len(contents)
                copies += contents.count(child.specimen.canary)
        if copies:
            return f"{copies} copies of the canary in {read >> 10} KiB"
        if refused:
            raise refused
        return ""


class ProcessMadvisePageoutProbe(_RefusedProbe):
    """process_madvise(2) with MADV_PAGEOUT: writes pages to swap, where there is some.

    A kernel may accept it for secret memory (Linux 6.1 does: the mapping lacks VM_LOCKED there), but not write the
    frames, as they are unevictable.
    """

    name = "process-madvise-pageout"
    vector = "process_madvise(2), MADV_PAGEOUT: would the kernel write the memory to swap?"
    source = "mm/madvise.c, can_madv_lru_vma: EINVAL if locked; mm/secretmem.c: mapping_set_unevictable()"
    refusal = errno.EINVAL

    def reach(self, child: Throwaway) -> str:
        size = process_vm.advise(child.pid, child.address, child.specimen.ram.size, process_vm.MADV_PAGEOUT)
        (entry,) = procfs.pagemap(child.pid, child.address, procfs.PAGE_SIZE)
        if entry & procfs.PRESENT and _frame_flags(entry & procfs.PFN_MASK) & _KPF_UNEVICTABLE:
            return ""
        return f"accepted for {size} bytes, and their first frame can be written to swap"


def _frame_flags(pfn: int) -> int:
    """Return the flags of a frame (proc_kpageflags(5)). Raises Missing where frame numbers are hidden, OSError."""
    if not pfn:
        raise Missing("/proc/PID/pagemap that shows frame numbers (CAP_SYS_ADMIN)")
    with Path("/proc/kpageflags").open("rb", buffering=0) as file:
        return int.from_bytes(os.pread(file.fileno(), 8, pfn * 8), sys.byteorder)
