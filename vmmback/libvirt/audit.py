"""A domain's isolation, measured: the probes of a guest's audit, and QEMU's monitor as libvirt passes it on.

Which files are the domain's is the broker's word (its leases), or where that is gone what it wrote down when it lent
(records.py). Nothing of the domain's XML is believed.
"""

from __future__ import annotations

import os
import select
import signal
import time
from array import array
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

from msgspec.structs import replace

from vmmback import report
from vmmback.broker import client
from vmmback.errors import HostUnfit, NoSuchGuest, QemuFailed
from vmmback.host.qemu import kernel_release
from vmmback.isolation import audit
from vmmback.isolation.probe import Target
from vmmback.isolation.qmp_proof import Hmp
from vmmback.isolation.residue import FreedFramesProbe
from vmmback.libvirt import records
from vmmback.libvirt.domains import pid_of, purpose
from vmmback.linux import procfs
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Exposure, GuestVerdict, IsolationReport, ProbeResult

# What of libvirt's interface brings memory of a guest out, and what its access driver asks for: @acl of each call in
# src/remote/remote_protocol.x and qemu_protocol.x of libvirt 9.0, as polkit spells it. A read-only connection may do
# none of it (virCheckReadOnlyGoto in src/libvirt-domain.c and libvirt-qemu.c).
_API = (
    ("dump", ("core-dump",), "virsh dump, also with --memory-only, writes all of the guest's memory to a file"),
    ("save", ("hibernate",), "virsh save and managedsave write the guest's memory to a file"),
    ("snapshot", ("snapshot",), "virsh snapshot-create with memory writes the guest's memory to a file"),
    ("migrate", ("migrate",), "virsh migrate sends the guest's memory to another host"),
    ("peek", ("mem-read",), "virDomainMemoryPeek returns the guest's memory"),
    ("monitor", ("write",), "virsh qemu-monitor-command passes on any command of QEMU's monitor, such as memsave"),
    (
        "attach",
        ("write",),
        "virsh attach-device: a process behind a vhost-user device gets the guest's memory, and a watchdog can have it "
        "dumped",
    ),
    (
        "crash",
        ("write",),
        "virsh set-lifecycle-action has the guest's memory written to a file when the guest panics (coredump-destroy)",
    ),
    (
        "screen",
        ("screenshot", "open-graphics", "open-device"),
        "virsh screenshot, VNC and the console show what the guest shows; a display of ramfb lies in its memory",
    ),
)


_UNEXAMINED = "not examined: "


class Subject(NamedTuple):
    """A domain that runs: `pid` is QEMU's."""

    name: str
    uuid: str
    type: str
    pid: int


async def examine(domain: Subject, hmp: Hmp) -> IsolationReport:
    """Examine a running domain. Raises HostUnfit, QemuFailed, OSError."""
    started = time.perf_counter()
    frames = records.frames(domain.uuid, domain.pid)
    ram, unplugged = await _ram_of(domain, frames), set[int]()
    while True:
        target = Target(domain.pid, {inode: size for inode, size in ram.items() if inode not in unplugged})
        evidence = await audit.audit(target, hmp, frames)
        # QEMU keeps memory that was unplugged mapped, and so leased, if a look at its flat views held it (LIBVIRT.md).
        gone = {inode for inode in target.ram if inode not in frames and not evidence.proof.ours[inode]}
        unplugged |= gone
        before, ram = ram, await _ram_of(domain, frames)
        if ram == before and not gone:  # else something was plugged in or out meanwhile
            break
    proof, pages = evidence.proof, evidence.pages
    memory = report.Memory(
        size=target.size, secret=proof.secret, present_pages=pages.present, checked_pages=pages.checked,
        readable_pages=pages.readable,
    )  # fmt: skip
    probes = tuple(report.judge_probe(observation) for observation in evidence.observations)
    verdict, reasons = report.judge_guest(memory, proof.ram_blocks, probes, audit.REQUIRED)
    host = report.Host(kernel=kernel_release(), qemu=await _version(hmp), accel=_accel(domain.type))
    return IsolationReport(
        guest=domain.name,
        verdict=verdict,
        validated_after="a request while it ran",
        reasons=reasons,
        memory=memory,
        ram_blocks=proof.ram_blocks,
        memory_map=proof.memory_map,
        probes=probes,
        exposures=(*evidence.exposures, *_api_exposures()),
        drifts=(),
        process=evidence.process,
        direct_map=None,
        host=replace(host, settings=evidence.settings),
        denied_commands={},
        timings={"validate": round(time.perf_counter() - started, 6)},
    )


def record_unexamined(uuid: str, name: str, reason: str) -> None:
    """Keep of a domain that it could not be examined, beside what earlier audits of this run found.

    Raises OSError, ValueError for a record that another version has written.
    """
    found, unexamined = records.read(uuid), _UNEXAMINED + reason
    if found is None or not found.validated_after:
        found = IsolationReport(
            guest=name,
            verdict=GuestVerdict.INCONCLUSIVE,
            validated_after="",
            reasons=(unexamined,),
            memory=report.Memory(size=0, secret=0, present_pages=0, checked_pages=0, readable_pages=0),
            ram_blocks=(),
            probes=(),
            exposures=(),
            host=report.Host(kernel=kernel_release(), qemu="", accel=""),
            timings={},
        )
    else:
        found = _judged(found, found.probes, audit.REQUIRED, unexamined)
    records.write(uuid, found)


def observe_end(uuid: str) -> IsolationReport | None:
    """Look at the former frames of a domain that has ended; the result is part of its last report from now on.

    None for one that was never examined, or runs again. Raises OSError.
    """
    ended = [pid for pid in records.runs(uuid) if _has_ended(pid)]
    runs_again = len(ended) < len(records.runs(uuid))
    frames = [records.frames(uuid, pid) for pid in ended]
    for pid in ended:
        records.forget_frames(uuid, pid)
    found = records.read(uuid)
    if found is None or not found.validated_after or runs_again or len(ended) != 1:
        return None
    entries = array("Q", chain.from_iterable(frames[0].values()))
    freed = report.judge_probe(FreedFramesProbe([], entries, None).observe(Target(0, {})))
    unexamined = next((reason for reason in found.reasons if reason.startswith(_UNEXAMINED)), "")
    found = _judged(found, (*found.probes, freed), audit.REQUIRED | {FreedFramesProbe.name}, unexamined)
    records.write(uuid, found)
    return found


def _judged(
    found: IsolationReport, probes: tuple[ProbeResult, ...], required: Collection[str], unexamined: str
) -> IsolationReport:
    verdict, reasons = report.judge_guest(found.memory, found.ram_blocks, probes, required, unexamined)
    return replace(found, probes=probes, verdict=verdict, reasons=reasons)


async def _ram_of(domain: Subject, frames: Mapping[int, array[int]]) -> dict[int, int]:
    """Return the sizes of a domain's files, by inode. Raises HostUnfit where nobody knows all that it maps."""
    ram = {inode: len(entries) * PAGE_SIZE for inode, entries in frames.items()}
    async with client.connected() as lender:
        leases = await lender.leases() if lender else []
    # What was plugged in is lent to who answers QEMU's calls, which is root's (more_ram.py).
    own = [lease for lease in leases if lease.purpose == purpose(domain.name) and lease.uid in (0, _uid_of(domain.pid))]
    ram |= {lease.inode: lease.size for lease in own}
    secret = {mapping.inode for mapping in procfs.maps(domain.pid) if mapping.path == procfs.SECRETMEM}
    if lender is None and secret - ram.keys():
        raise HostUnfit(
            f"domain {domain.name!a} has secret RAM that was plugged in, and no broker says whose it is",
            "start the broker, then audit again",
        )
    if not ram:
        raise HostUnfit(
            f"nobody knows of secret RAM that domain {domain.name!a} has",
            "was it enabled, and started since? vmmback libvirt enable DOMAIN",
        )
    return ram


def _uid_of(pid: int) -> int:
    return int(procfs.status(pid)["Uid"].split()[1])


def _api_exposures() -> list[Exposure]:
    """Return what libvirt's own interface gives away, and to whom: who may is libvirt's to say, not measured here."""
    return [
        Exposure(
            name=f"libvirt-{name}",
            holders="who may read and write at libvirt's socket; with its access driver, who has "
            + " or ".join(f"domain:{right}" for right in rights),
            detail=detail,
        )
        for name, rights, detail in _API
    ]


async def _version(hmp: Hmp) -> str:
    return (await hmp("info version")).strip().partition("\r\n")[0].partition(" ")[0]


def _accel(kind: str) -> str:
    return "tcg" if kind == "qemu" else kind


def pid_of_running(name: str) -> int:
    """Return the pid of a domain's QEMU. Raises NoSuchGuest where it does not run."""
    if (pid := pid_of(name)) < 0:
        raise NoSuchGuest(f"domain {name} does not run", "start it: virsh start DOMAIN")
    return pid


@contextmanager
def held(pid: int) -> Iterator[int]:
    """Hold a descriptor of a process: nobody else is meant by it, whoever gets its pid. Raises NoSuchGuest."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise NoSuchGuest("the domain has ended", "start it: virsh start DOMAIN") from None
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def ends(pidfd: int, timeout_s: float) -> bool:
    """Wait so long for the end of a domain's QEMU; tell whether it came."""
    return bool(select.select([pidfd], [], [], timeout_s)[0])


def end(pidfd: int) -> None:
    """End a domain's QEMU, which libvirt then takes for crashed. Raises QemuFailed where it cannot be."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    except OSError as error:
        raise QemuFailed(f"QEMU cannot be ended: {error.strerror}") from error


def _has_ended(pid: int) -> bool:
    try:
        with held(pid) as pidfd:
            return ends(pidfd, 0)
    except NoSuchGuest:
        return True
