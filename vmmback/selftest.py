"""Every vector of the catalogue, tried on this host: on throwaway memory and children, and on two tiny guests.

The guests differ in nothing but their RAM: on the one of ordinary memory a probe of live guests must succeed, else what
it says of the other proves nothing.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import asdict

from vmmback import report, tiny_guest
from vmmback.config import GuestConfig
from vmmback.errors import AdmissionRefused, HostUnfit, QemuFailed, VmmbackError
from vmmback.guest import Guest, SilentWatcher
from vmmback.host.qemu import kernel_release
from vmmback.isolation import settings
from vmmback.isolation.audit import REQUIRED
from vmmback.isolation.catalogue import ACCESS_PROBES, DISTURBING_PROBES, HOLDER_PROBES, LIVE_PROBES, RIGHTS_PROBES
from vmmback.isolation.direct_map import DirectMapProbe
from vmmback.isolation.probe import Documented, Probe, Target
from vmmback.isolation.qmp_proof import QmpProof
from vmmback.isolation.residue import FreedFramesProbe
from vmmback.launch import prepare
from vmmback.report import Observation, SelftestReport, VectorResult, Verdict
from vmmback.threads import in_thread

Progress = Callable[[str, int, int], None]
"""Told the name of the vector that is tried, how many were tried before, and how many there are."""

_GUEST_SIZE = "16MiB"
_READY_TIMEOUT_S = 20.0
_NO_TARGET = Target(0, {})

_REQUIRED = (*sorted(REQUIRED), FreedFramesProbe.name)  # as for a guest: see vmmback.guest
_GUEST_VECTORS: tuple[type[Probe[Any]], ...] = (
    DirectMapProbe,
    *ACCESS_PROBES,
    *LIVE_PROBES,
    *HOLDER_PROBES,
    *RIGHTS_PROBES,
)


async def selftest(progress: Progress) -> SelftestReport:
    """Try everything and judge it; takes about 5 s. Cancelling it leaves nothing. Raises OSError, UsageError."""
    started = time.perf_counter()
    vectors: list[VectorResult] = []
    total = len(_GUEST_VECTORS) + 2 + len(DISTURBING_PROBES)

    def tell(name: str) -> None:
        progress(name, len(vectors), total)

    host = report.Host(kernel=kernel_release(), qemu="", accel="")
    try:
        async with _two_guests() as (secret, ordinary):
            host = secret.host
            vectors += [await _on_guests(kind, secret, ordinary, tell) for kind in _GUEST_VECTORS]
            vectors.append(_proofs(secret, ordinary))
            vectors.append(await _after_the_end(secret, ordinary, tell))
    except (HostUnfit, AdmissionRefused, QemuFailed) as error:
        tried = {vector.name for vector in vectors}
        kinds: tuple[type[Documented], ...] = (*_GUEST_VECTORS, QmpProof, FreedFramesProbe)
        untried = [kind for kind in kinds if kind.name not in tried]
        vectors += [_result(kind, _not_tried(kind.name, error)) for kind in untried]
    for kind in DISTURBING_PROBES:
        tell(kind.name)
        vectors.append(_result(kind, await in_thread(partial(_alone, kind()))))
    verdict, reasons = report.judge_selftest(vectors, _REQUIRED)
    return SelftestReport(
        verdict=verdict,
        reasons=reasons,
        vectors=tuple(vectors),
        settings=settings.observe(),
        host=host,
        seconds=round(time.perf_counter() - started, 6),
    )


@asynccontextmanager
async def _two_guests() -> AsyncIterator[tuple[Guest, Guest]]:
    """Bring up a guest on secret RAM, and its twin on ordinary RAM, each full of a canary. Raises VmmbackError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmmback-selftest-")))
        guests = []
        for backing in ("secret", "ordinary"):
            guest = await prepare(_config(folder, backing), SilentWatcher(), stack)
            await guest.monitor.cont()
            try:
                async with asyncio.timeout(_READY_TIMEOUT_S):
                    await guest.console.ready.wait()
            except TimeoutError:
                raise QemuFailed(f"the tiny guest was not ready within {_READY_TIMEOUT_S:g} s") from None
            guests.append(guest)
        yield guests[0], guests[1]


def _config(folder: Path, backing: Literal["secret", "ordinary"]) -> GuestConfig:
    rom = folder / f"{backing}.rom"
    rom.write_bytes(tiny_guest.rom_with_canary())
    return GuestConfig.of(
        {
            "name": f"{folder.name.replace('_', '-').lower()}-{backing}",
            "memory": {"size": _GUEST_SIZE, "backing": backing},
            "machine": {"accel": "tcg"},
            "boot": {"firmware": str(rom)},
            "isolation": {"ready": tiny_guest.READY.decode().strip()},
        }
    )


async def _on_guests(
    kind: type[Probe[Any]], secret: Guest, ordinary: Guest, tell: Callable[[str], None]
) -> VectorResult:
    tell(kind.name)

    def observe(guest: Guest) -> Observation:
        probe = kind(guest.prefaulted) if issubclass(kind, DirectMapProbe) else kind()
        return probe.observe(guest.target)

    seen, twin = await in_thread(lambda: (observe(secret), observe(ordinary)))
    # Nobody else is at the RAM of either guest, or may be: that the probe would see it is shown by its own control.
    return _result(kind, seen if kind in (*HOLDER_PROBES, *RIGHTS_PROBES) else _with_twin(seen, twin))


def _proofs(secret: Guest, ordinary: Guest) -> VectorResult:
    return _result(QmpProof, _with_twin(secret.proof.observation, ordinary.proof.observation))


async def _after_the_end(secret: Guest, ordinary: Guest, tell: Callable[[str], None]) -> VectorResult:
    tell(FreedFramesProbe.name)
    seen = []
    for guest in (secret, ordinary):
        frames: array[int] = await guest.frames()
        await guest.qemu.kill()
        probe = FreedFramesProbe(guest.ram, frames, guest.console.canary_fingerprint)
        seen.append(await in_thread(partial(probe.observe, guest.target)))
    return _result(FreedFramesProbe, _with_twin(seen[0], seen[1]))


def _with_twin(seen: Observation, twin: Observation) -> Observation:
    """Make the same probe's success on the ordinary guest a part of its control."""
    seconds = seen.seconds + twin.seconds
    if seen.missing or twin.target is Verdict.READABLE:
        return seen._replace(seconds=seconds)
    detail = f"{seen.detail}; on the guest of ordinary memory: {twin.detail}"
    return seen._replace(control=Verdict.INCONCLUSIVE, detail=detail, seconds=seconds)


def _alone(probe: Probe[Any]) -> Observation:
    """Observe on what the probe brings along itself."""
    try:
        return probe.observe(_NO_TARGET)
    except (VmmbackError, OSError) as error:
        return _not_tried(probe.name, error)


def _not_tried(name: str, error: VmmbackError | OSError) -> Observation:
    inconclusive = Verdict.INCONCLUSIVE
    reason = error.message if isinstance(error, VmmbackError) else str(error)
    # What failed though it is there, a QEMU or a system call, is nothing that the host lacks, and must not pass.
    missing = reason if isinstance(error, (HostUnfit, AdmissionRefused)) else ""
    return Observation(name, inconclusive, inconclusive, f"not tried: {reason}", 0.0, missing=missing)


def _result(kind: type[Documented], observation: Observation) -> VectorResult:
    judged = report.judge_probe(observation)
    return VectorResult(
        **asdict(judged),
        kind="exposure" if kind.holders else "probe",
        vector=kind.vector,
        live_safe=kind.live_safe,
        holders=kind.holders,
        source=kind.source,
    )
