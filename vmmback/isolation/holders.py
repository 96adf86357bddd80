"""Who else is at a guest's RAM: another process that holds its descriptor or maps it, a tracer on QEMU.

Both are found by looking through /proc. Not seen are: who came and went between two looks, processes of a PID namespace
that is not below ours (pid_namespaces(7)), a descriptor that lies unreceived in a socket (unix(7)), or that is
registered with io_uring (io_uring_register(2)).
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

from vmmback.isolation.direct_map import ordinary_memory
from vmmback.isolation.probe import Probe, Reading, Target
from vmmback.linux import procfs, ptrace
from vmmback.linux.kcmp import share_descriptors
from vmmback.report import Verdict

_CAP_SYS_PTRACE = 19  # include/uapi/linux/capability.h


class Memory(NamedTuple):
    """Memory files, each by its device and inode, and the processes that may have them.

    Inodes alone do not tell files apart: memfd_secret and memfd number theirs by counters of their own (get_next_ino()
    of fs/inode.c, shmem_reserve_inode() of mm/shmem.c), and anybody can make memfds until one has a wanted number.
    """

    files: frozenset[tuple[str, int]]
    known: frozenset[int]
    parent: int = 0
    """Whose children are no strangers either: until one executes a program it has what its parent has. 0: nobody's."""


class HoldersProbe(Probe[Memory]):
    """Looks at the descriptors and mappings of all threads: only QEMU, its supervisor and partners may have it.

    QEMU's other secret RAM blocks are the guest's as well.
    """

    name = "holders"
    vector = "a process other than QEMU, its supervisor and its daemons holds the descriptor of the RAM, or maps it"
    control_is = "a memfd that the prober itself holds and maps"
    source = "proc_pid_fd(5), proc_pid_maps(5); a descriptor spreads by fork(2), SCM_RIGHTS of unix(7), pidfd_getfd(2)"

    def target(self, target: Target) -> Memory:
        wanted = {*target.ram, *target.auxiliary}
        of_qemu: list[procfs.Descriptor | procfs.Mapping] = [
            *procfs.maps(target.pid),
            *procfs.descriptors(target.pid),
        ]
        files = {(file.device, file.inode) for file in of_qemu if _is_one_of(wanted, file)}
        if not target.ram.keys() <= {inode for _, inode in files}:
            raise OSError(errno.ENOENT, "QEMU does not have the guest's RAM")
        return Memory(frozenset(files), frozenset({target.pid, target.supervisor}) | target.partners, target.supervisor)

    def control(self, target: Target) -> Memory:  # noqa: ARG002
        _, inode = self._resources.enter_context(ordinary_memory(bytes(procfs.PAGE_SIZE)))
        own = {(file.device, file.inode) for file in procfs.descriptors(os.getpid()) if _is_one_of({inode}, file)}
        return Memory(frozenset(own), frozenset())

    def attempt(self, place: Memory) -> Reading:
        others = [pid for pid in procfs.processes() if pid not in place.known]
        found: list[str] = []
        closed = 0
        for pid in others:
            try:
                if (holding := _holding(pid, place)) and not (place.parent and _is_child(pid, place.parent)):
                    found.append(f"process {pid} ({procfs.command_name(pid)}) {holding}")
            except PermissionError:
                closed += 1
        if found:
            return Reading(Verdict.READABLE, "; ".join(found))
        detail = f"none of {len(others) - closed} other processes holds it or maps it"
        if closed:
            detail += f"; {closed} may not be looked at"
        # Whom even CAP_SYS_PTRACE does not open has more rights than root has here.
        unseen = closed and not procfs.has_capability(_CAP_SYS_PTRACE)
        return Reading(Verdict.INCONCLUSIVE if unseen else Verdict.BLOCKED, detail)


class TracerProbe(Probe[tuple[int, ...]]):
    """Looks for a tracer on each thread of QEMU and of its partners. A place is their pids, QEMU's first."""

    name = "tracer"
    vector = "a debugger is attached to a thread of QEMU or of a daemon of its: it can run code in it"
    control_is = "a child of ours that we trace"
    source = "TracerPid of proc_pid_status(5); ptrace(2)"

    def target(self, target: Target) -> tuple[int, ...]:
        return target.pid, *sorted(target.partners)

    def control(self, target: Target) -> tuple[int, ...]:  # noqa: ARG002
        child = self._resources.enter_context(
            subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        )
        self._resources.callback(child.kill)
        self._resources.enter_context(ptrace.stopped(child.pid))
        return (child.pid,)

    def attempt(self, place: tuple[int, ...]) -> Reading:
        tracers: set[int] = set()
        threads = [(pid, thread) for pid in place for thread in _live_threads(pid)]
        for pid, thread in threads:
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                tracers.add(int(procfs.status(f"{pid}/task/{thread}")["TracerPid"]))
        if not tracers:
            raise ProcessLookupError(errno.ESRCH, f"process {place[0]} ended")
        if tracers := tracers - {0}:
            names = ", ".join(f"{tracer} ({procfs.command_name(tracer)})" for tracer in sorted(tracers))
            return Reading(Verdict.READABLE, f"traced by process {names}")
        return Reading(Verdict.BLOCKED, f"none of {len(threads)} threads is traced")


def _live_threads(pid: int) -> list[int]:
    try:
        return procfs.threads(pid)
    except FileNotFoundError:
        return []


def _is_child(pid: int, parent: int) -> bool:
    """Tell whether a process is the parent's, or gone meanwhile."""
    try:
        return int(procfs.status(pid)["PPid"]) == parent
    except (FileNotFoundError, ProcessLookupError):
        return True


def _is_one_of(inodes: Collection[int], file: procfs.Descriptor | procfs.Mapping) -> bool:
    return file.inode in inodes and procfs.is_memory_file(file.path)


def _holding(pid: int, memory: Memory) -> str:
    """Say how a process has one of the files, "" if it has not, or is gone. Raises PermissionError.

    A thread can have descriptors of its own (unshare(2), CLONE_FILES), and live on when the first one has ended.
    """
    holds = maps = False
    seen: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in procfs.threads(pid):
            if any(share_descriptors(other, thread) for other in seen):
                continue
            task = f"{pid}/task/{thread}"
            with suppress(FileNotFoundError, ProcessLookupError):
                holds = holds or bool(procfs.held(task, memory.files))
                maps = maps or bool(procfs.mapped(task, memory.files))
                seen.append(thread)
    return " and ".join(word for word, is_so in (("holds its descriptor", holds), ("maps it", maps)) if is_so)
