"""All that is looked at on a live guest, in one go: none of it stops or disturbs the guest."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple, TypeVar

from vmmback.isolation import exposures, owner, qmp_proof, settings
from vmmback.isolation.catalogue import ACCESS_PROBES, HOLDER_PROBES, LIVE_PROBES, RIGHTS_PROBES
from vmmback.isolation.direct_map import DirectMapProbe, PageCount
from vmmback.isolation.probe import Documented, Target
from vmmback.report import Exposure, HostSetting, Observation, Process, Verdict
from vmmback.threads import in_thread

T = TypeVar("T")

_REQUIRED: tuple[type[Documented], ...] = (DirectMapProbe, qmp_proof.QmpProof, *ACCESS_PROBES, *HOLDER_PROBES)
REQUIRED = frozenset(probe.name for probe in _REQUIRED)
"""The names of the probes that must be blocked before a guest may be called isolated."""


_NICE = 19  # setpriority(2): it is a thread's own in Linux, and what the thread starts inherits it


class Evidence(NamedTuple):
    """What was seen of one guest."""

    proof: qmp_proof.Proof
    observations: tuple[Observation, ...]
    pages: PageCount
    frames: array[int]
    exposures: tuple[Exposure, ...]
    settings: tuple[HostSetting, ...]
    process: Process | None = None

    def after(self, earlier: Evidence) -> Evidence:
        """Return this evidence with what `earlier` saw readable kept: what was out once stays known."""
        readable = {seen.probe: seen for seen in earlier.observations if seen.target is Verdict.READABLE}
        observations = tuple(
            seen if seen.target is Verdict.READABLE else readable.get(seen.probe, seen) for seen in self.observations
        )
        pages = self.pages if self.pages.readable >= earlier.pages.readable else earlier.pages
        return self._replace(observations=observations, pages=pages)


async def audit(target: Target, hmp: qmp_proof.Hmp, prefaulted: Mapping[int, array[int]]) -> Evidence:
    """Take the QMP proof and run every probe that is safe on a live guest. Raises QemuFailed if QEMU is silent.

    `prefaulted` are the RAM's pagemap entries from before QEMU mapped it, by inode, as far as it was prefaulted.
    """
    proof = await qmp_proof.observe(target, hmp)
    direct_map = DirectMapProbe(prefaulted)
    probes = [direct_map, *(probe() for probe in (*ACCESS_PROBES, *HOLDER_PROBES, *LIVE_PROBES, *RIGHTS_PROBES))]
    observations, found, host, process = await _behind_others(
        lambda: (
            [probe.observe(target) for probe in probes],
            _exposures(target),
            settings.observe(),
            _process(target),
        )
    )
    if blocks := exposures.ordinary_blocks_exposure(proof.ram_blocks):
        found.append(blocks)
    return Evidence(
        proof=proof,
        observations=(*observations, proof.observation),
        pages=direct_map.pages,
        frames=direct_map.frames,
        exposures=tuple(found),
        settings=host,
        process=process,
    )


def _process(target: Target) -> Process | None:
    with suppress(OSError):  # the guest ended meanwhile
        return owner.observe(target.pid)
    return None


def _exposures(target: Target) -> list[Exposure]:
    found = [exposures.pidfd_getfd_exposure(target), exposures.code_injection_exposure(target)]
    with suppress(OSError):  # the guest ended meanwhile
        found.append(exposures.qemu_memory_exposure(target))
    return found


async def _behind_others(function: Callable[[], T]) -> T:
    """Run `function` in a thread of its own that has the processor when no other wants it much.

    A guest whose virtual processors have all of the host's would stand still while probes run: see
    integration/test_audit_stall.py. Only the superuser may take a nice value back, so the thread ends with it.
    """
    with ThreadPoolExecutor(1, "audit", lambda: os.setpriority(os.PRIO_PROCESS, 0, _NICE)) as executor:
        return await in_thread(function, executor)
