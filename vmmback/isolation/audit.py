"""All that is looked at on a live guest, in one go: none of it stops or disturbs the guest."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vmmback.isolation import exposures, qmp_proof
from vmmback.isolation.catalogue import ACCESS_PROBES
from vmmback.isolation.direct_map import DirectMapProbe, PageCount
from vmmback.isolation.probe import Probe, Target
from vmmback.report import Exposure, Observation

T = TypeVar("T")

REQUIRED = frozenset({DirectMapProbe.name, qmp_proof.NAME, *(probe.name for probe in ACCESS_PROBES)})
"""The names of the probes that must be blocked before a guest may be called isolated."""


@dataclass(frozen=True)
class Evidence:
    """What was seen of one guest."""

    proof: qmp_proof.Proof
    observations: tuple[Observation, ...]
    pages: PageCount
    frames: array[int]
    exposures: tuple[Exposure, ...]


async def audit(target: Target, hmp: qmp_proof.Hmp, prefaulted: array[int]) -> Evidence:
    """Take the QMP proof and run every probe that is safe on a live guest. Raises QemuFailed if QEMU is silent.

    `prefaulted` are the RAM's pagemap entries from before QEMU mapped it, empty if it was not prefaulted.
    """
    proof = await qmp_proof.observe(target, hmp)
    direct_map = DirectMapProbe(prefaulted)
    observations = await in_thread(lambda: [probe.observe(target) for probe in (direct_map, *_access_probes())])
    found = [await in_thread(lambda: exposures.pidfd_getfd_exposure(target))]
    if blocks := exposures.ordinary_blocks_exposure(proof.ram_blocks):
        found.append(blocks)
    return Evidence(
        proof=proof,
        observations=(*observations, proof.observation),
        pages=direct_map.pages,
        frames=direct_map.frames,
        exposures=tuple(found),
    )


def _access_probes() -> Sequence[Probe[Any]]:
    return [probe() for probe in ACCESS_PROBES]


async def in_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread. Unlike asyncio.to_thread, cancelling it waits for the thread's end.

    So no probe ever looks at a process that has ended, or at another one under its pid.
    """
    future = asyncio.get_running_loop().run_in_executor(None, function)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise
