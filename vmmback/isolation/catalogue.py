"""Every vector that vmmback knows, in the order in which they are tried and documented."""

from __future__ import annotations

from typing import Any

from vmmback.isolation import (
    access,
    core_dump,
    file_calls,
    holders,
    holes,
    memory_calls,
    metadata,
    outside,
    owner_copies,
    physical,
    pinning,
    rights,
)
from vmmback.isolation.direct_map import DirectMapProbe
from vmmback.isolation.probe import Documented, Probe
from vmmback.isolation.qmp_proof import QmpProof
from vmmback.isolation.residue import FreedFramesProbe
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

RIGHTS_PROBES: tuple[type[Probe[Any]], ...] = (rights.UnprivilegedProbe,)
"""Who could get at a live guest's QEMU, whatever its RAM is. Not required: only root can try as others."""

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

PINNING_PROBES: tuple[type[Probe[Any]], ...] = (
    pinning.DirectWriteProbe,
    pinning.DirectReadProbe,
    pinning.AioDirectProbe,
    pinning.VmspliceProbe,
    pinning.VmspliceGiftProbe,
    pinning.IoUringFixedProbe,
    pinning.IoUringRingProbe,
    pinning.ZerocopySendProbe,
    pinning.XdpMemoryProbe,
    pinning.KvmSlotProbe,
)
"""What the kernel does with pages that it has pinned for their owner."""

FILE_PROBES: tuple[type[Probe[Any]], ...] = (
    file_calls.FileReadProbe,
    file_calls.FileWriteProbe,
    file_calls.SendfileProbe,
    file_calls.SpliceProbe,
    file_calls.CopyFileRangeProbe,
    file_calls.PrivateMappingProbe,
    file_calls.PunchHoleProbe,
    file_calls.TruncateProbe,
    file_calls.FileHandleProbe,
    file_calls.SeekHoleProbe,
)
"""What can be done with the memory's descriptor as a file."""

PAGE_PROBES: tuple[type[Probe[Any]], ...] = (
    memory_calls.PageoutProbe,
    metadata.EvictableProbe,
    memory_calls.MunlockProbe,
    memory_calls.DodumpProbe,
    memory_calls.RemoveProbe,
    memory_calls.UserFaultMissingProbe,
    memory_calls.UserFaultWriteProbe,
    memory_calls.UserFaultMinorProbe,
    memory_calls.KsmProbe,
    memory_calls.HugePageProbe,
    memory_calls.MigrationProbe,
)
"""What the kernel does to the pages on its owner's advice or by itself: swap, share, copy or empty them."""

OWNER_PROBES: tuple[type[Probe[Any]], ...] = (
    owner_copies.OwnerWriteProbe,
    owner_copies.OwnerSendProbe,
    owner_copies.ForkProbe,
)
"""What the owner gives away itself."""

METADATA_PROBES: tuple[type[Probe[Any]], ...] = (
    metadata.MincoreProbe,
    metadata.CachestatProbe,
    metadata.PagemapProbe,
    metadata.NodeProbe,
    metadata.SoftDirtyProbe,
    metadata.PageIdleProbe,
    metadata.PageFlagsProbe,
    metadata.PageCountProbe,
    metadata.PageCgroupProbe,
)
"""What the kernel tells of the pages, without their contents."""

MEMORY_PROBES = (*PINNING_PROBES, *FILE_PROBES, *PAGE_PROBES, *OWNER_PROBES, *METADATA_PROBES)
"""What the kernel does, or refuses, for the process that maps the memory."""

DISTURBING_PROBES: tuple[type[Probe[Any]], ...] = (*MEMORY_PROBES, *PROCESS_PROBES)
"""What would disturb a guest: `vmmback selftest` tries it on throwaway memory and children."""

CATALOGUE: tuple[type[Documented], ...] = (
    DirectMapProbe,
    QmpProof,
    *ACCESS_PROBES,
    *LIVE_PROBES,
    *HOLDER_PROBES,
    *RIGHTS_PROBES,
    FreedFramesProbe,
    *DISTURBING_PROBES,
)
"""All of them."""
