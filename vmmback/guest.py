"""A guest whose QEMU is up: what is known of it, and what is found whenever it is examined."""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from vmmback import command, console, handoff, monitor, ram, report, shares
from vmmback.admission import Promise
from vmmback.config import GuestConfig
from vmmback.errors import HandoffFailed, VmmbackError
from vmmback.isolation import qmp_proof
from vmmback.isolation.probe import Target
from vmmback.lifecycle import State
from vmmback.qmp_policy import Policy
from vmmback.qmp_socket import QmpSocket
from vmmback.report import Drift, GuestVerdict, IsolationReport, Observation, Verdict
from vmmback.threads import in_thread

if TYPE_CHECKING:
    from vmmback.isolation.audit import Evidence

# A name of our own among QEMU's events: docs/interop/qmp-spec.rst asks vendors for "__" and their domain.
DRIFT_EVENT = "__org.vmmback_DRIFT"

_MOST_DRIFTS = 100  # whoever comes and goes makes new ones


class Watcher(console.Watcher, Protocol):
    """Who watches a guest."""

    def prefaulted(self, done: int, size: int) -> None:
        """Show that `done` of `size` bytes of RAM are present."""

    def validated(self, report: IsolationReport) -> None:
        """Show what was found while the guest runs; the check of its former frames comes after its end."""

    def drifted(self, drift: Drift) -> None:
        """Show that the guest, validated before, became exposed."""

    def entered(self, state: State) -> None:
        """Show that the guest's life has gone on to this state."""


class SilentWatcher:
    """Shows nothing."""

    def console(self, data: bytes | memoryview) -> None:
        """Drop it."""

    def note(self, message: str) -> None:
        """Drop it."""

    def prefaulted(self, done: int, size: int) -> None:
        """Drop it."""

    def validated(self, report: IsolationReport) -> None:
        """Drop it."""

    def drifted(self, drift: Drift) -> None:
        """Drop it."""

    def entered(self, state: State) -> None:
        """Drop it."""


@dataclass
class Guest:
    """A guest whose QEMU is up, paused or running."""

    config: GuestConfig
    folder: Path
    ram: list[ram.Ram]
    devices: Sequence[command.Device]
    qemu: handoff.Qemu
    monitor: monitor.Monitor
    console: console.Console
    host: report.Host
    proof: qmp_proof.Proof
    timings: dict[str, float]
    watcher: Watcher
    policy: Policy
    promise: Promise
    daemons: Sequence[shares.Daemon] = ()
    clients: QmpSocket | None = None
    validated_after: str = ""
    evidence: Evidence | None = None
    found: IsolationReport | None = None
    """The last report of an examination."""
    drifts: list[Drift] = field(default_factory=list)
    unexamined: str = ""
    """Why the guest could not be examined the last time that it was to be; "" if it could."""
    exposed: asyncio.Event = field(default_factory=asyncio.Event)
    examining: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is examined, and while its RAM changes."""
    growing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def target(self) -> Target:
        """The guest's RAM in the terms of a probe."""
        return target_of(self.qemu, self.ram, self.daemons)

    @property
    def prefaulted(self) -> dict[int, array[int]]:
        """The pagemap entries of its RAM from before QEMU mapped it, by inode, as far as it was prefaulted."""
        return {memory.inode: memory.frames for memory in self.ram}

    async def examine(self) -> IsolationReport:
        """Audit the running guest and report it; what is exposed now and was not before is a drift.

        What was found exposed once stays so in every later report. Raises QemuFailed when QEMU does not answer.
        """
        async with self.examining:
            self.validated_after = self.validated_after or "a request while it ran"
            started = time.perf_counter()
            try:
                from vmmback.isolation import audit

                evidence = await audit.audit(self.target, self.monitor.hmp, self.prefaulted)
            except (VmmbackError, OSError, MemoryError, RuntimeError) as error:
                with suppress(TimeoutError):
                    await self.qemu.ended(timeout_s=1.0)
                if self.qemu.status is None:  # that a guest ends while it is examined says nothing against it
                    self.unexamined = f"it could not be examined: {error}"
                raise
            self.unexamined = ""
            self.timings["audit" if self.evidence else "validate"] = time.perf_counter() - started
            new = _newly_readable(self.evidence, evidence) if self.evidence else []
            self.evidence = evidence.after(self.evidence) if self.evidence else evidence
            now = datetime.now(UTC).isoformat(timespec="seconds")
            drifts = [Drift(at=now, probe=seen.probe, detail=seen.detail) for seen in new]
            self.drifts += drifts[: _MOST_DRIFTS - len(self.drifts)]
            self.found = found = self.report()
            for drift in drifts:
                self.watcher.drifted(drift)
                if self.clients:
                    self.clients.broadcast({"event": DRIFT_EVENT, "data": drift.as_tables()})
            if found.verdict is GuestVerdict.EXPOSED:
                self.exposed.set()
            return found

    def canary_halves(self) -> tuple[bytes, bytes] | None:
        """Return two halves whose XOR is the guest's canary, if it printed them (console.py)."""
        return self.console.canary_halves

    async def frames(self) -> array[int]:
        """Return the pagemap entry of each page of the RAM (procfs.pagemap). Raises OSError when QEMU is gone."""
        from vmmback.isolation.direct_map import guest_frames

        return await in_thread(lambda: guest_frames(self.target, self.prefaulted))

    def observe_freed_frames(self) -> Observation | None:
        """Look at the former frames of a guest that has ended; None for one that was never examined.

        This closes the RAM: with the last descriptor its frames are the kernel's again.
        """
        if self.evidence is None:
            return None
        from vmmback.isolation.residue import FreedFramesProbe

        return FreedFramesProbe(self.ram, self.evidence.frames, self.console.canary_fingerprint).observe(self.target)

    def report(self, freed: Observation | None = None) -> IsolationReport:
        """Judge what was seen so far. `freed` is what became of the guest's frames, None while it runs."""
        from vmmback.isolation import exposures
        from vmmback.isolation.audit import REQUIRED
        from vmmback.isolation.residue import FreedFramesProbe

        evidence = self.evidence
        proof = evidence.proof if evidence else self.proof
        memory = report.Memory(
            size=self.target.size,
            secret=proof.secret,
            present_pages=evidence.pages.present if evidence else 0,
            checked_pages=evidence.pages.checked if evidence else 0,
            readable_pages=evidence.pages.readable if evidence else 0,
        )
        observations = [*(evidence.observations if evidence else ()), *([freed] if freed else ())]
        probes = tuple(report.judge_probe(observation) for observation in observations)
        required = REQUIRED | {FreedFramesProbe.name} if self.qemu.status is not None else REQUIRED
        verdict, reasons = report.judge_guest(memory, proof.ram_blocks, probes, required, self.unexamined)
        return IsolationReport(
            guest=self.config.name,
            verdict=verdict,
            validated_after=self.validated_after if evidence else "",
            reasons=reasons,
            memory=memory,
            ram_blocks=proof.ram_blocks,
            memory_map=proof.memory_map,
            probes=probes,
            exposures=(
                *(evidence.exposures if evidence else ()),
                exposures.console_exposure(self.console.bytes_seen, self.console.bytes_typed),
                *(exposure for device in self.devices for exposure in device.exposures),
                *(daemon.exposure for daemon in self.daemons if daemon.exposure),
            ),
            drifts=tuple(self.drifts),
            process=evidence.process if evidence else None,
            direct_map=ram.direct_map(self.ram),
            host=replace(self.host, settings=evidence.settings if evidence else ()),
            denied_commands=dict(self.clients.denials) if self.clients else {},
            timings={name: round(seconds, 6) for name, seconds in self.timings.items()},
        )


def target_of(qemu: handoff.Qemu, guest_ram: Sequence[ram.Ram], daemons: Iterable[shares.Daemon]) -> Target:
    """Return a guest's RAM in the terms of a probe; this process is the supervisor."""
    descriptors = {memory.inode: memory.size for memory in guest_ram}
    partners = frozenset[int]().union(*(daemon.pids for daemon in daemons))
    return Target(qemu.pid, descriptors, os.getpid(), qemu.auxiliary_inodes, partners)


def confirm(guest_ram: Sequence[ram.Ram], proof: qmp_proof.Proof) -> None:
    """Raise HandoffFailed unless all memory that the guest can write to lies in our descriptors, and fills each.

    Secret RAM must, besides, lie in secretmem mappings; the control's is ordinary by intent.
    """
    ours = proof.auxiliary.keys() | {name for blocks in proof.ours.values() for name in blocks}
    strangers = [block.name for block in proof.ram_blocks if block.guest_writable and block.name not in ours]
    size = sum(memory.size for memory in guest_ram)
    mapped = {memory.inode: sum(proof.ours.get(memory.inode, {}).values()) for memory in guest_ram}
    if strangers:
        problem = f"the guest could write to memory that is not ours: {', '.join(strangers)}"
    elif any(mapped[memory.inode] != memory.size for memory in guest_ram):
        problem = f"{sum(mapped.values())} of {size} bytes of its RAM lie in the descriptors that were handed over"
    elif guest_ram[0].backing == "secret" and proof.secret != size:
        problem = f"{proof.secret} of {size} bytes of its RAM are secret"
    else:
        return
    raise HandoffFailed(f"QEMU's RAM is not where it must be: {problem}", "the guest does not run with it; report this")


def _newly_readable(earlier: Evidence, evidence: Evidence) -> list[Observation]:
    """Return what is readable now and was not; of holders and tracers, also others than were found before."""
    from vmmback.isolation.catalogue import HOLDER_PROBES

    who = {probe.name for probe in HOLDER_PROBES}  # whose detail names those who were found

    def told(seen: Observation) -> tuple[str, str]:
        return seen.probe, seen.detail if seen.probe in who else ""

    known = {told(seen) for seen in earlier.observations if seen.target is Verdict.READABLE}
    return [seen for seen in evidence.observations if seen.target is Verdict.READABLE and told(seen) not in known]
