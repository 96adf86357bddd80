"""Observations in, verdicts out: the pure judgement of what was measured. It measures nothing itself.

The rules, in the order in which they are applied:

1. A probe is `readable` when it read guest RAM. That needs no control.
2. A probe is `blocked` when it was refused on guest RAM and, in the same run, the same attempt read ordinary
   memory.
3. Any other probe is `inconclusive`.
4. A guest is `exposed` when one probe is `readable`, when one page of its RAM was read, or when the guest can write
   to a RAM block that is ordinary memory.
5. It is `isolated` when every required probe is `blocked`, and every other one is, save those for which the host lacks
   what an attempt needs (`missing` names it); when all of its RAM is secret, and every present page was checked.
6. Otherwise it is `inconclusive`.

A self-test of the host has `failed` when one of its probes is `readable`. It has `passed` when every probe is
`blocked`, save those for which the host lacks something (`missing`), and at least one is. Otherwise it is
`inconclusive`. Exposures count neither for it nor against it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Self

import msgspec
from msgspec.structs import replace


class Verdict(StrEnum):
    """What one attempt to read memory came to."""

    BLOCKED = "blocked"
    READABLE = "readable"
    INCONCLUSIVE = "inconclusive"


class GuestVerdict(StrEnum):
    """What a whole report says of a guest."""

    ISOLATED = "isolated"
    EXPOSED = "exposed"
    INCONCLUSIVE = "inconclusive"


class Observation(NamedTuple):
    """What one probe saw: the same attempt on the guest's RAM (target) and on ordinary memory (control).

    `errno` is the name of the error that refused the target, `missing` what the host lacks for an attempt; "" if none.
    """

    probe: str
    target: Verdict
    control: Verdict
    detail: str
    seconds: float
    errno: str = ""
    missing: str = ""


class _Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    @classmethod
    def of(cls, tables: object) -> Self:
        """Return what `as_tables` was made of. Raises ValueError for anything else."""
        return msgspec.convert(tables, cls)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return what `as_json` was made of. Raises ValueError for anything else."""
        return msgspec.json.decode(text, type=cls)

    def as_tables(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        tables: dict[str, Any] = msgspec.to_builtins(self)
        return tables

    def as_json(self) -> str:
        """Return it as indented JSON, with a newline at the end."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


class ProbeResult(_Model, frozen=True):
    """One row of the table of probes; `seconds` is what the target and the control took together.

    `errno` is the name of the error that refused the target, `missing` what the host lacks for an attempt; "" if none.
    """

    name: str
    verdict: Verdict
    control: Verdict
    detail: str
    seconds: float
    errno: str = ""
    missing: str = ""


class Memory(_Model, frozen=True):
    """The guest's RAM in bytes, and how many of its 4 KiB pages were present, checked and found readable."""

    size: int
    secret: int
    present_pages: int
    checked_pages: int
    readable_pages: int


class DirectMap(_Model, frozen=True):
    """What secret RAM did to the direct map, with which the kernel maps all memory, while it was prefaulted.

    `regions` of 2 MiB hold its pages, None where only root may know; `ideal` would do. The splits of pages, and the
    bytes in huge pages, are the whole host's: others' count too; None where the kernel does not tell.
    """

    regions: int | None
    ideal: int
    splits_2m: int | None
    splits_1g: int | None
    huge_before: int | None
    huge_after: int | None


class RamBlock(_Model, frozen=True):
    """One of QEMU's RAM blocks: its size in bytes, what backs it, and whether the guest can write to it."""

    name: str
    size: int
    backing: Literal["secretmem", "ordinary"]
    guest_writable: bool


class MapRange(_Model, frozen=True):
    """A range of the guest's physical addresses in bytes, `last` inclusive, as its processor sees it.

    `region` is QEMU's name for what lies there, `block` the RAM block behind it and `backing` the kind of host memory
    that this is; a device has neither ("" and "none").
    """

    first: int
    last: int
    kind: Literal["ram", "rom", "device"]
    region: str
    block: str
    backing: Literal["secretmem", "ordinary", "none"]
    guest_writable: bool


class Exposure(_Model, frozen=True):
    """A way out of the guest that secret RAM does not close, and who holds the key to it."""

    name: str
    holders: str
    detail: str


class Drift(_Model, frozen=True):
    """A guest became exposed while it ran: when (ISO 8601, UTC), which probe saw it, and what."""

    at: str
    probe: str
    detail: str


class HostSetting(_Model, frozen=True):
    """A fact of the host that bears on secrets, as it is now; it is not tried, and no verdict comes of it.

    `risk` is `note` where it reaches other memory than secret RAM, or protects less than it could; it is `risk` where
    what is in secret RAM can come out by it. `source` is the documentation of the setting.
    """

    name: str
    value: str
    risk: Literal["ok", "note", "risk"]
    detail: str
    source: str


class Host(_Model, frozen=True):
    """What the guest ran on."""

    kernel: str
    qemu: str
    accel: str
    settings: tuple[HostSetting, ...] = ()


class Process(_Model, frozen=True):
    """QEMU as the kernel shows it: its ids, what it may do, and which namespaces it does not share with its supervisor.

    `capabilities` are those in effect or permitted. `dumpable` is None where it cannot be told. `memlock` and `core`
    are limits in bytes, None for no limit; `locks_by` is what lets it lock its secret RAM. `cgroup` is its memory
    cgroup, "" where that is its supervisor's. `lacking` is what differs from what a QEMU should be.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: tuple[str, ...]
    bounding_set: tuple[str, ...]
    no_new_privs: bool
    seccomp_filtered: bool
    dumpable: bool | None
    memlock: int | None
    core: int | None
    locks_by: Literal["limit", "CAP_IPC_LOCK"]
    own_namespaces: tuple[str, ...]
    cgroup: str = ""
    lacking: tuple[str, ...] = ()


class HuntPlace(_Model, frozen=True):
    """Frames in which a hunt's needle begins, by what they are used for and by whom; the first few frame numbers.

    `owner` is a guest's name, `PID (name): mapping`, a file, a slab cache, or "" where there is none.
    """

    place: Literal["guest", "process", "page cache", "shared memory", "slab", "free", "kernel", "gone"]
    owner: str
    hits: int
    examples: tuple[int, ...]


class Hunt(_Model, frozen=True):
    """What a search through all of the host's RAM found; a hit is a frame (a page of RAM) in which the needle begins.

    `unreadable_bytes` the direct map lacks: secret RAM. `guest_hits` of the `hits` are in frames of guest RAM.
    """

    needle_bytes: int
    scanned_bytes: int
    unreadable_bytes: int
    seconds: float
    gib_per_s: float
    hits: int
    guest_hits: int
    places: tuple[HuntPlace, ...]


class IsolationReport(_Model, frozen=True, kw_only=True):
    """Everything that was measured of one guest, and the verdict that follows.

    `validated_after` tells what the probes waited for, "" where they did not run; `memory_map` is in the order of the
    addresses; `denied_commands` counts, by name, the QMP commands that the policy denied; `timings` are seconds.
    """

    guest: str
    verdict: GuestVerdict
    validated_after: str
    reasons: tuple[str, ...]
    memory: Memory
    ram_blocks: tuple[RamBlock, ...]
    memory_map: tuple[MapRange, ...] = ()
    probes: tuple[ProbeResult, ...]
    exposures: tuple[Exposure, ...]
    drifts: tuple[Drift, ...] = ()
    denied_commands: dict[str, int] = {}
    hunt: Hunt | None = None
    process: Process | None = None
    direct_map: DirectMap | None = None
    host: Host
    timings: dict[str, float]


class SelftestVerdict(StrEnum):
    """What a self-test says of a host."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"


class VectorResult(_Model, frozen=True):
    """What a self-test saw of one vector, on throwaway memory; `seconds` is what target and control took together.

    `vector` says what is tried, `source` what makes the kernel refuse it or not; `live_safe` tells whether it would
    leave a live guest alone; `holders` names who holds the key to an exposure, "" for a probe.
    """

    name: str
    kind: Literal["probe", "exposure"]
    vector: str
    verdict: Verdict
    control: Verdict
    errno: str
    missing: str
    detail: str
    seconds: float
    live_safe: bool
    holders: str
    source: str


class SelftestReport(_Model, frozen=True):
    """Every vector tried on throwaway memory of this host, its settings, and the verdict that follows."""

    verdict: SelftestVerdict
    reasons: tuple[str, ...]
    vectors: tuple[VectorResult, ...]
    settings: tuple[HostSetting, ...]
    host: Host
    seconds: float


def judge_probe(observation: Observation) -> ProbeResult:
    """Return the verdict on one probe (rules 1 to 3)."""
    if observation.target is Verdict.READABLE or observation.control is Verdict.READABLE:
        verdict = observation.target
    else:
        verdict = Verdict.INCONCLUSIVE
    return ProbeResult(
        name=observation.probe,
        verdict=verdict,
        control=observation.control,
        detail=observation.detail,
        seconds=round(observation.seconds, 6),
        errno=observation.errno,
        missing=observation.missing,
    )


def judge_process(process: Process, supervisor: int, namespaces: Sequence[str]) -> tuple[str, ...]:
    """Return what QEMU has that it should not have; `supervisor` is the uid that started it.

    `namespaces` are those that it should share with no other.
    """
    spare = {"CAP_IPC_LOCK"}  # it locks memory, and nothing else
    shared = [kind for kind in namespaces if kind not in process.own_namespaces]
    wrong = {
        f"it runs as uid {process.uid}, as its supervisor does": process.uid == supervisor,
        "it has supplementary groups": bool(process.groups),
        f"it has {len(set(process.capabilities) - spare)} capabilities": bool(set(process.capabilities) - spare),
        "it could gain capabilities (bounding set)": bool(set(process.bounding_set) - spare),
        "it could gain privileges by what it executes (no_new_privs is off)": not process.no_new_privs,
        "no seccomp filter is on it": not process.seccomp_filtered,
        "it is dumpable: a process of its uid may trace it": process.dumpable is True,
        "it may dump core": process.core != 0,
        f"it shares namespaces: {', '.join(shared)}": bool(shared),
    }
    return tuple(what for what, is_so in wrong.items() if is_so)


def judge_guest(
    memory: Memory,
    ram_blocks: Sequence[RamBlock],
    probes: Sequence[ProbeResult],
    required: Collection[str],
    unexamined: str = "",
) -> tuple[GuestVerdict, tuple[str, ...]]:
    """Return the verdict on a guest and its reasons (rules 4 to 6).

    `required` names the probes it needs, `unexamined` says why the last attempt to examine it came to nothing.
    """
    exposed = [f"{probe.name}: {probe.detail}" for probe in probes if probe.verdict is Verdict.READABLE]
    if memory.readable_pages:
        exposed.append(f"{memory.readable_pages} of {memory.checked_pages} pages of its RAM were read")
    exposed += [
        f"RAM block {block.name} is ordinary memory that the guest can write to"
        for block in ram_blocks
        if block.guest_writable and block.backing != "secretmem"
    ]
    if exposed:
        return GuestVerdict.EXPOSED, tuple(exposed)

    unproven = _unproven(probes, required)
    if unexamined:
        unproven.append(unexamined)
    if not ram_blocks:
        unproven.append("QEMU's RAM blocks were not listed")
    if memory.secret != memory.size:
        unproven.append(f"{memory.secret} of {memory.size} bytes were shown to be secret RAM")
    if memory.checked_pages != memory.present_pages or not memory.checked_pages:
        unproven.append(f"{memory.checked_pages} of {memory.present_pages} present pages were checked")
    if unproven:
        return GuestVerdict.INCONCLUSIVE, tuple(unproven)
    return GuestVerdict.ISOLATED, ()


def with_hunt(report: IsolationReport, hunt: Hunt) -> IsolationReport:
    """Return the report with what a hunt found: a needle in the guest's frames makes it exposed."""
    changes: dict[str, object] = {"hunt": hunt}
    if hunt.guest_hits:
        reason = f"hunt: the canary begins in {hunt.guest_hits} of the guest's frames"
        reasons = report.reasons if report.verdict is GuestVerdict.EXPOSED else ()
        changes |= {"verdict": GuestVerdict.EXPOSED, "reasons": (*reasons, reason)}
    return replace(report, **changes)


def judge_selftest(
    vectors: Sequence[VectorResult], required: Collection[str]
) -> tuple[SelftestVerdict, tuple[str, ...]]:
    """Return the verdict on a host and its reasons: of its probes alone; `required` names those that it needs."""
    probes = [vector for vector in vectors if vector.kind == "probe"]
    failed = [f"{probe.name}: {probe.detail}" for probe in probes if probe.verdict is Verdict.READABLE]
    if failed:
        return SelftestVerdict.FAILED, tuple(failed)
    unproven = _unproven(probes, required)
    if not unproven and not any(probe.verdict is Verdict.BLOCKED for probe in probes):
        unproven.append("no probe was blocked")
    if unproven:
        return SelftestVerdict.INCONCLUSIVE, tuple(unproven)
    return SelftestVerdict.PASSED, ()


def _unproven(probes: Sequence[ProbeResult | VectorResult], required: Collection[str]) -> list[str]:
    """Return what of the probes keeps a verdict from being good: what a host lacks counts for required ones only."""
    unproven = [
        f"{probe.name}: {probe.detail}"
        for probe in probes
        if probe.verdict is Verdict.INCONCLUSIVE and (not probe.missing or probe.name in required)
    ]
    untried = set(required) - {probe.name for probe in probes}
    return unproven + [f"{name}: did not run" for name in sorted(untried)]
