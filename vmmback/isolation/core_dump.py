"""The kernel's own core dump of a process that maps the memory, searched for the memory's canary."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import tempfile
from pathlib import Path
from typing import Literal

from vmmback.isolation import throwaway_worker
from vmmback.isolation.probe import Missing, Reading
from vmmback.isolation.throwaway import ChildProbe, Throwaway, throwaway
from vmmback.report import Verdict

_PATTERN = Path("/proc/sys/kernel/core_pattern")
_EVERYTHING = "0x1ff"  # all nine kinds of mappings of core(5)


class CoreDumpProbe(ChildProbe):
    """A child is aborted; every kind of mapping is to be dumped (coredump_filter of core(5))."""

    name = "core-dump"
    vector = "abort(3), with every kind of mapping in coredump_filter: the core file is searched for the canary"
    source = "mm/secretmem.c, secretmem_mmap: VM_DONTDUMP; fs/coredump.c, vma_dump_size; core(5)"

    def _child(self, backing: Literal["secret", "ordinary"]) -> Throwaway:
        folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="vmmback-core-"))
        return self._resources.enter_context(throwaway(backing, Path(folder)))

    def attempt(self, place: Throwaway) -> Reading:
        assert place.folder is not None
        _allow_core_of(place.pid)
        os.kill(place.pid, signal.SIGABRT)
        ended = os.waitid(os.P_PID, place.pid, os.WEXITED | os.WNOWAIT)
        cores = list(place.folder.iterdir())
        if ended is None or ended.si_code != os.CLD_DUMPED or len(cores) != 1:
            raise Missing(f"core dumps of a child that is aborted ({len(cores)} core files)")
        with cores[0].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as core:
            size, copies = len(core), _count(core, place.specimen.canary)
        detail = f"{copies} copies of the canary in a core of {size >> 10} KiB"
        return Reading(Verdict.READABLE if copies else Verdict.BLOCKED, detail)


class CoreDumpForcedProbe(CoreDumpProbe):
    """The same, after the child has asked for its memory to be dumped: the flag dd is gone."""

    name = "core-dump-dodump"
    vector = "madvise(2), MADV_DODUMP on the memory, then as core-dump"
    source = "mm/gup.c, get_dump_page: a hole in the file where get_user_pages fails; madvise(2)"

    def attempt(self, place: Throwaway) -> Reading:
        place.command(throwaway_worker.DUMP)
        return super().attempt(place)


def _allow_core_of(pid: int) -> None:
    """Let the kernel dump the process into its working directory. Raises Missing where this host does otherwise."""
    pattern = _PATTERN.read_text().strip()
    if not pattern or pattern[0] in "|@" or "/" in pattern:
        raise Missing(f"core_pattern that names a file in the working directory (it is {pattern!r})")
    _, hard = resource.prlimit(pid, resource.RLIMIT_CORE)
    if hard == 0:
        raise Missing("RLIMIT_CORE above 0")
    resource.prlimit(pid, resource.RLIMIT_CORE, (hard, hard))
    Path(f"/proc/{pid}/coredump_filter").write_text(_EVERYTHING)


def _count(memory: mmap.mmap, needle: bytes) -> int:
    count, position = 0, memory.find(needle)
    while position >= 0:
        count += 1
        position = memory.find(needle, position + len(needle))
    return count
