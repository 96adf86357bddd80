"""Every vector that vmmback knows, in the order in which they are tried and documented."""

from __future__ import annotations

from typing import Any

from vmmback.isolation import access, core_dump, holders, holes, outside, physical
from vmmback.isolation.direct_map import DirectMapProbe
from vmmback.isolation.probe import Probe
from vmmback.isolation.task_memory import BpfCopyFromUserTaskProbe

ACCESS_PROBES: tuple[type[Probe[Any]], ...] = (
    access.ProcMemProbe,
    access.ProcessVmReadvProbe,
    access.FdReopenProbe,
    access.MapFilesProbe,
    access.VmaFlagsProbe,
)
"""Read-only looks at a live guest through the doors that the kernel gives to debuggers and to root."""

HOLDER_PROBES: tuple[type[Probe[Any]], ...] = (holders.HoldersProbe, holders.TracerProbe)
"""Who is at a live guest's RAM already. Of ordinary RAM, too, nobody else should be."""

LIVE_PROBES: tuple[type[Probe[Any]], ...] = (BpfCopyFromUserTaskProbe,)
"""More that leaves a live guest alone, but that not every host is able to try: not required."""

PROCESS_PROBES: tuple[type[Probe[Any]], ...] = (
    outside.ProcMemWriteProbe,
    outside.ProcessVmWritevProbe,
    outside.PtracePeekProbe,
    outside.PtracePokeProbe,
    outside.GcoreProbe,
    outside.ProcessMadvisePageoutProbe,
    core_dump.CoreDumpProbe,
    core_dump.CoreDumpForcedProbe,
    physical.KcoreProbe,
    physical.DevMemProbe,
    physical.DevMemMmapProbe,
    holes.PidfdGetfdMmapProbe,
    holes.PtraceInjectionProbe,
    holes.BpfAtSystemCallsProbe,
    holes.UprobeBpfProbe,
    holes.UprobeBpfSleepableProbe,
    holes.PerfUserStackProbe,
    holes.ClearRefsProbe,
    holes.WatchpointProbe,
)
"""What another process, root above all, does to a process that maps the memory."""

DISTURBING_PROBES: tuple[type[Probe[Any]], ...] = (*PROCESS_PROBES,)
"""What would disturb a guest: `vmmback selftest` tries it on throwaway memory and children."""

CATALOGUE: tuple[type[Probe[Any]], ...] = (
    DirectMapProbe,
    *ACCESS_PROBES,
    *HOLDER_PROBES,
    *LIVE_PROBES,
    *DISTURBING_PROBES,
)
