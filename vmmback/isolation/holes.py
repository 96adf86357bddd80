"""Known holes: what a holder of the key takes out of secret RAM all the same. Measured, so that none is only asserted.

Each is an exposure (`holders` names who holds the key), and `readable` is what is expected of it. There are two roots:
whoever gets the descriptor maps it; whoever makes QEMU execute something, or runs in its context, reads what it reads.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from vmmback.isolation import access, throwaway_worker
from vmmback.isolation.probe import Reading, Target
from vmmback.isolation.throwaway import ChildProbe, Throwaway
from vmmback.linux import arch, procfs, ptrace, user_reader
from vmmback.linux.perf import PerfEvent
from vmmback.linux.pidfd import pidfd_getfd
from vmmback.report import Verdict

_BYTES = user_reader.READ_BYTES
_WAIT_S = 2.0
_ROUNDS = 4
_TRACERS = "root, CAP_SYS_PTRACE"
_BPF_LOADERS = "root, CAP_BPF with CAP_PERFMON"
_PERF_USERS = "root, CAP_PERFMON"


class PidfdGetfdMmapProbe(ChildProbe):
    """pidfd_getfd(2) copies the descriptor out of the process, mmap(2) maps it here."""

    name = "pidfd-getfd-mmap"
    vector = "pidfd_getfd(2) of the descriptor, then mmap(2) of the copy"
    source = "kernel/pid.c, __pidfd_fget: PTRACE_MODE_ATTACH_REALCREDS alone; pidfd_getfd(2)"
    holders = _TRACERS

    def attempt(self, place: Throwaway) -> Reading:
        size = place.specimen.ram.size
        number = access.descriptors_of(Target(place.pid, {place.specimen.ram.inode: size}))[0]
        pidfd = os.pidfd_open(place.pid)
        try:
            descriptor = pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)
        try:
            with mmap.mmap(descriptor, size) as memory:
                return _compare(place, memory[:_BYTES])
        finally:
            os.close(descriptor)


class PtraceInjectionProbe(ChildProbe):
    """A stopped process is made to write(2) its memory into a pipe, by its registers: no code of it is changed."""

    name = "ptrace-injection"
    vector = "ptrace(2): the registers of a stopped process are set so that it makes write(2) of the memory to a pipe"
    source = "ptrace(2), PTRACE_SETREGSET; the process reads its own memory, as it must be able to"
    holders = _TRACERS

    def attempt(self, place: Throwaway) -> Reading:
        output = place.process.stdout
        assert output is not None
        wait_for_read(place)
        with ptrace.stopped(place.pid) as tracee:
            written = tracee.system_call(arch.current().write, 1, place.address, _BYTES)
            return _compare(place, output.read(written) or b"")


class BpfAtSystemCallsProbe(ChildProbe):
    """A BPF program that runs when the process makes a system call reads as the process itself."""

    name = "bpf-at-system-calls"
    vector = "a BPF program at the tracepoint sys_enter: bpf_probe_read_user() in the process's context"
    source = "kernel/trace/bpf_trace.c, bpf_probe_read_user_common; mm/maccess.c, copy_from_user_nofault"
    holders = _BPF_LOADERS

    def attempt(self, place: Throwaway) -> Reading:
        with user_reader.at_system_calls(place.pid) as reader:
            reader.expect(place.address)
            place.command(throwaway_worker.NOTHING)
            return _compare(place, reader.result())


class UprobeBpfProbe(ChildProbe):
    """A BPF program at an instruction of the process's libc (a uprobe) reads as the process itself."""

    name = "uprobe-bpf"
    vector = "a BPF program at a uprobe (perf_event_open(2)): bpf_probe_read_user() in the process's context"
    source = "kernel/trace/trace_uprobe.c, __uprobe_perf_func; kernel/trace/bpf_trace.c, bpf_probe_read_user_common"
    holders = _BPF_LOADERS
    may_sleep = False

    def attempt(self, place: Throwaway) -> Reading:
        file, offset = wait_for_read(place)
        with (
            PerfEvent.uprobe(place.pid, file, offset) as event,
            user_reader.at_event(event, place.pid, may_sleep=self.may_sleep) as reader,
        ):
            reader.expect(place.address)
            place.command(throwaway_worker.NOTHING)
            return _compare(place, reader.result())


class UprobeBpfSleepableProbe(UprobeBpfProbe):
    """The same by a program that may sleep, so that it can fault pages in too."""

    name = "uprobe-bpf-sleepable"
    vector = "a sleepable BPF program at a uprobe: bpf_copy_from_user() in the process's context"
    source = "kernel/bpf/helpers.c, bpf_copy_from_user"
    may_sleep = True


class PerfUserStackProbe(ChildProbe):
    """perf copies from where the stack pointer points to; here ptrace makes it point to the memory.

    No stack of QEMU's lies in guest RAM, so without ptrace this reads none of it.
    """

    name = "perf-user-stack"
    vector = "perf_event_open(2), PERF_SAMPLE_STACK_USER, while the stack pointer points to the memory"
    source = "kernel/events/core.c, perf_output_sample_ustack"
    holders = f"{_PERF_USERS}, together with {_TRACERS}"

    def attempt(self, place: Throwaway) -> Reading:
        file, offset = wait_for_read(place)
        with PerfEvent.uprobe(place.pid, file, offset, stack_bytes=_BYTES) as event, event.stacks() as stacks:
            with ptrace.stopped(place.pid) as tracee:
                tracee.step_with_stack(place.address)
            return _compare(place, stacks.first() or b"")


class ClearRefsProbe(ChildProbe):
    """Metadata: which pages a process used. Not what is in them."""

    name = "clear-refs"
    vector = "metadata: /proc/PID/clear_refs, then Referenced in smaps: how much of the memory was used since?"
    source = "fs/proc/task_mmu.c, clear_refs_pte_range, smaps_account; proc_pid_clear_refs(5)"
    holders = "root, CAP_SYS_PTRACE, the same user"

    def attempt(self, place: Throwaway) -> Reading:
        for processor in [*os.sched_getaffinity(place.pid)] * _ROUNDS:
            # A processor whose TLB still has the page notes no use of it: clear_refs flushes none. Another one does.
            os.sched_setaffinity(place.pid, {processor})
            Path(f"/proc/{place.pid}/clear_refs").write_text("1")
            before = self._referenced(place)
            place.command(throwaway_worker.TOUCH)
            used = self._referenced(place) - before
            if (before, used) == (0, procfs.PAGE_SIZE):
                return Reading(
                    Verdict.READABLE, f"one page was touched, {used} bytes are referenced; not what is there"
                )
        return Reading(Verdict.BLOCKED, "one page was touched, and none is referenced")

    @staticmethod
    def _referenced(child: Throwaway) -> int:
        mappings = procfs.memory_mappings(procfs.smaps(child.pid), child.specimen.ram.inode)
        return sum(mapping.sizes["Referenced"] for mapping in mappings)


class WatchpointProbe(ChildProbe):
    """Metadata: when a process touches an address. Not what is there."""

    name = "watchpoint"
    vector = "metadata: perf_event_open(2), PERF_TYPE_BREAKPOINT: does the memory tell when it is touched?"
    source = "kernel/events/hw_breakpoint.c; perf_event_open(2)"
    holders = "root, CAP_PERFMON, CAP_SYS_PTRACE, the same user"

    def attempt(self, place: Throwaway) -> Reading:
        with PerfEvent.watchpoint(place.pid, place.address) as event:
            before = event.count()
            place.command(throwaway_worker.TOUCH)
            count = event.count() - before
        return Reading(Verdict.READABLE if count else Verdict.BLOCKED, f"{count} accesses counted; not what is there")


def _compare(child: Throwaway, data: bytes) -> Reading:
    if data and child.specimen.canary.startswith(data):
        return Reading(Verdict.READABLE, f"the canary was read ({len(data)} bytes)")
    return Reading(Verdict.BLOCKED, f"{len(data)} bytes came out, not the canary")


def wait_for_read(child: Throwaway) -> tuple[Path, int]:
    """Wait until the child waits for a command; return the file and the offset in it of its next instruction."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        # Number, six arguments, stack pointer, instruction pointer; or "running" (fs/proc/base.c, proc_pid_syscall).
        fields = Path(f"/proc/{child.pid}/syscall").read_text().split()
        if len(fields) == 9 and fields[1] == "0x0":  # the only system call of its that takes standard input
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"the throwaway child did not read its standard input within {_WAIT_S:g} s")
        os.sched_yield()
    pointer = int(fields[8], 16)
    (mapping,) = (m for m in procfs.maps(child.pid) if m.start <= pointer < m.end)
    return Path(mapping.path), pointer - mapping.start + mapping.offset
