"""Who else is at a guest's RAM: another process that holds its descriptor or maps it, a tracer on QEMU.

Both are found by looking through /proc. Not seen are: who came and went between two looks, processes of a PID namespace
that is not below ours (pid_namespaces(7)), and a descriptor that lies unreceived in a socket (unix(7)).
"""

from __future__ import annotations

import errno
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass

from vmmback.isolation.direct_map import ordinary_memory
from vmmback.isolation.probe import Place, Probe, Reading, Target
from vmmback.linux import procfs, ptrace
from vmmback.report import Observation, Verdict

# A program that the supervisor starts shares all of its descriptors until its exec closes them.
_SETTLE_S = 0.02

_CAP_SYS_PTRACE = 19  # include/uapi/linux/capability.h


class _ResourceProbe(Probe[Place]):
    """A probe whose control must be made first; `_resources` lives while it observes."""

    def observe(self, target: Target) -> Observation:
        with ExitStack() as self._resources:
            return super().observe(target)


@dataclass(frozen=True)
class Memory:
    """A memory file by its kind and inode, and the processes that may have it.

    memfd_secret and memfd number their inodes by counters of their own (get_next_ino() of fs/inode.c,
    shmem_reserve_inode() of mm/shmem.c): one of each can have the same number.
    """

    inode: int
    is_secret: bool
    known: frozenset[int]

    def is_at(self, inode: int, path: str) -> bool:
        """Tell whether an inode number and a path, as /proc shows them, are this file's."""
        return inode == self.inode and procfs.is_memory_file(path) and (path == procfs.SECRETMEM) == self.is_secret


class HoldersProbe(_ResourceProbe[Memory]):
    """Looks at the descriptors and mappings of every process: only QEMU and its supervisor may have the guest's RAM."""

    name = "holders"
    vector = "a process other than QEMU and its supervisor holds the descriptor of the RAM, or maps it"
    control_is = "a memfd that the prober itself holds and maps"
    source = "proc_pid_fd(5), proc_pid_maps(5); a descriptor spreads by fork(2), SCM_RIGHTS of unix(7), pidfd_getfd(2)"

    def target(self, target: Target) -> Memory:
        for is_secret in (True, False):
            memory = Memory(target.inode, is_secret, frozenset({target.pid, target.supervisor}))
            if _holding(target.pid, memory):
                return memory
        raise OSError(errno.ENOENT, "QEMU does not have the guest's RAM")

    def control(self, target: Target) -> Memory:  # noqa: ARG002
        _, inode = self._resources.enter_context(ordinary_memory(bytes(procfs.PAGE_SIZE)))
        return Memory(inode, is_secret=False, known=frozenset())

    def attempt(self, place: Memory) -> Reading:
        others = [pid for pid in procfs.processes() if pid not in place.known]
        found: list[str] = []
        closed = 0
        for pid in others:
            try:
                if not _holding(pid, place):
                    continue
                time.sleep(_SETTLE_S)
                if holding := _holding(pid, place):
                    found.append(f"process {pid} ({procfs.command_name(pid)}) {holding}")
            except PermissionError:
                closed += 1
        if found:
            return Reading(Verdict.READABLE, "; ".join(found))
        detail = f"none of {len(others) - closed} other processes holds it or maps it"
        if closed:
            detail += f"; {closed} may not be looked at"
        # Whom even CAP_SYS_PTRACE does not open has more rights than root has here: it is among the exposures.
        unseen = closed and not procfs.has_capability(_CAP_SYS_PTRACE)
        return Reading(Verdict.INCONCLUSIVE if unseen else Verdict.BLOCKED, detail)


class TracerProbe(_ResourceProbe[int]):
    """Looks for a tracer on each of QEMU's threads. A place is a pid."""

    name = "tracer"
    vector = "a debugger is attached to a thread of QEMU: it can run code in it"
    control_is = "a child of ours that we trace"
    source = "TracerPid of proc_pid_status(5); ptrace(2)"

    def target(self, target: Target) -> int:
        return target.pid

    def control(self, target: Target) -> int:  # noqa: ARG002
        child = self._resources.enter_context(
            subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        )
        self._resources.callback(child.kill)
        self._resources.enter_context(ptrace.stopped(child.pid))
        return child.pid

    def attempt(self, place: int) -> Reading:
        threads = procfs.threads(place)
        tracers = {int(procfs.status(f"{place}/task/{thread}")["TracerPid"]) for thread in threads} - {0}
        if tracers:
            names = ", ".join(f"{tracer} ({procfs.command_name(tracer)})" for tracer in sorted(tracers))
            return Reading(Verdict.READABLE, f"traced by process {names}")
        return Reading(Verdict.BLOCKED, f"none of {len(threads)} threads is traced")


def _holding(pid: int, memory: Memory) -> str:
    """Say how a process has a memory file, "" if it has not, or is gone. Raises PermissionError."""
    try:
        holds = any(memory.is_at(link.inode, link.path) for link in procfs.descriptors(pid))
        maps = any(memory.is_at(mapping.inode, mapping.path) for mapping in procfs.maps(pid))
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return " and ".join(word for word, is_so in (("holds its descriptor", holds), ("maps it", maps)) if is_so)
