"""The rules of report.py's docstring, one by one, and what must hold of any report whatever was observed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from tests.sample_reports import exposed_report, selftest_report, vector
from vmmback.report import (
    GuestVerdict,
    IsolationReport,
    Memory,
    Observation,
    ProbeResult,
    RamBlock,
    SelftestReport,
    SelftestVerdict,
    VectorResult,
    Verdict,
    judge_guest,
    judge_probe,
    judge_selftest,
)

BLOCKED, READABLE, INCONCLUSIVE = Verdict.BLOCKED, Verdict.READABLE, Verdict.INCONCLUSIVE
REQUIRED = ("direct-map", "proc-mem", "qmp-proof")
SIZE = 4 << 20
PAGES = SIZE // 4096


def observation(probe: str = "proc-mem", target: Verdict = BLOCKED, control: Verdict = READABLE) -> Observation:
    return Observation(probe, target, control, f"{probe} was {target.value}", 0.5)


ISOLATED = Memory(size=SIZE, secret=SIZE, present_pages=PAGES, checked_pages=PAGES, readable_pages=0)


@dataclass(frozen=True)
class Case:
    """All that a guest is judged by; as it stands, what an isolated guest shows."""

    memory: Memory = ISOLATED
    ram_blocks: tuple[RamBlock, ...] = (
        RamBlock(name="ram0", size=SIZE, backing="secretmem", guest_writable=True),
        RamBlock(name="pc.bios", size=1 << 18, backing="ordinary", guest_writable=False),
    )
    observations: tuple[Observation, ...] = field(default_factory=lambda: tuple(map(observation, REQUIRED)))

    def judged(self) -> tuple[GuestVerdict, tuple[str, ...]]:
        probes = [judge_probe(seen) for seen in self.observations]
        return judge_guest(self.memory, self.ram_blocks, probes, REQUIRED)

    def with_memory(self, **fields: int) -> Case:
        return replace(self, memory=structs.replace(self.memory, **fields))

    def with_probe(self, probe: str, target: Verdict, control: Verdict) -> Case:
        others = tuple(seen for seen in self.observations if seen.probe != probe)
        return replace(self, observations=(*others, observation(probe, target, control)))

    def without_probe(self, probe: str) -> Case:
        return replace(self, observations=tuple(seen for seen in self.observations if seen.probe != probe))

    def with_block(self, name: str, *, guest_writable: bool) -> Case:
        block = RamBlock(name=name, size=4096, backing="ordinary", guest_writable=guest_writable)
        return replace(self, ram_blocks=(*self.ram_blocks, block))


Change = Callable[[Case], Case]

EXPOSING: dict[str, tuple[Change, str]] = {
    "one readable page": (
        lambda case: case.with_memory(readable_pages=1),
        "1 of 1024 pages of its RAM were read",
    ),
    "a readable probe": (
        lambda case: case.with_probe("proc-mem", READABLE, READABLE),
        "proc-mem: proc-mem was readable",
    ),
    "a readable probe whose control failed": (
        lambda case: case.with_probe("proc-mem", READABLE, BLOCKED),
        "proc-mem: proc-mem was readable",
    ),
    "a readable probe that is not required": (
        lambda case: case.with_probe("another", READABLE, READABLE),
        "another: another was readable",
    ),
    "ordinary memory that the guest can write to": (
        lambda case: case.with_block("vga.vram", guest_writable=True),
        "RAM block vga.vram is ordinary memory that the guest can write to",
    ),
}

UNPROVEN: dict[str, tuple[Change, str]] = {
    "a required probe without a control": (
        lambda case: case.with_probe("direct-map", BLOCKED, INCONCLUSIVE),
        "direct-map: direct-map was blocked",
    ),
    "a required probe whose control was refused too": (
        lambda case: case.with_probe("direct-map", BLOCKED, BLOCKED),
        "direct-map: direct-map was blocked",
    ),
    "an inconclusive probe": (
        lambda case: case.with_probe("qmp-proof", INCONCLUSIVE, READABLE),
        "qmp-proof: qmp-proof was inconclusive",
    ),
    "an inconclusive probe that is not required": (
        lambda case: case.with_probe("another", INCONCLUSIVE, READABLE),
        "another: another was inconclusive",
    ),
    "a required probe that did not run": (lambda case: case.without_probe("direct-map"), "direct-map: did not run"),
    "less secret RAM than RAM": (
        lambda case: case.with_memory(secret=SIZE - 4096),
        f"{SIZE - 4096} of {SIZE} bytes were shown to be secret RAM",
    ),
    "more secret RAM than RAM": (
        lambda case: case.with_memory(secret=SIZE + 4096),
        f"{SIZE + 4096} of {SIZE} bytes were shown to be secret RAM",
    ),
    "a present page that was not checked": (
        lambda case: case.with_memory(present_pages=PAGES + 1),
        f"{PAGES} of {PAGES + 1} present pages were checked",
    ),
    "no page present": (
        lambda case: case.with_memory(present_pages=0, checked_pages=0),
        "0 of 0 present pages were checked",
    ),
    "no list of RAM blocks": (lambda case: replace(case, ram_blocks=()), "QEMU's RAM blocks were not listed"),
}

HARMLESS: dict[str, Change] = {
    "nothing": lambda case: case,
    "ordinary memory that the guest cannot write to": lambda case: case.with_block("rom", guest_writable=False),
    "another blocked probe": lambda case: case.with_probe("another", BLOCKED, READABLE),
    "a page that was never touched": lambda case: case.with_memory(present_pages=PAGES - 1, checked_pages=PAGES - 1),
}


@pytest.mark.parametrize("control", Verdict)
@pytest.mark.parametrize("target", Verdict)
def test_a_probe_is_readable_if_it_read_and_blocked_only_beside_a_readable_control(
    target: Verdict, control: Verdict
) -> None:
    expected = {(BLOCKED, READABLE): BLOCKED, (READABLE, control): READABLE}.get((target, control), INCONCLUSIVE)
    assert judge_probe(observation("proc-mem", target, control)) == ProbeResult(
        name="proc-mem", verdict=expected, control=control, detail=f"proc-mem was {target.value}", seconds=0.5
    )


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_isolated_when_all_is_proved_whatever_harmless_is_added(change: Change) -> None:
    assert change(Case()).judged() == (GuestVerdict.ISOLATED, ())


@pytest.mark.parametrize(("change", "reason"), EXPOSING.values(), ids=EXPOSING.keys())
def test_exposed_and_why(change: Change, reason: str) -> None:
    assert change(Case()).judged() == (GuestVerdict.EXPOSED, (reason,))


@pytest.mark.parametrize(("change", "reason"), UNPROVEN.values(), ids=UNPROVEN.keys())
def test_inconclusive_and_why(change: Change, reason: str) -> None:
    assert change(Case()).judged() == (GuestVerdict.INCONCLUSIVE, (reason,))


def a_few(changes: dict[str, tuple[Change, str]]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(sorted(changes)), max_size=4)


@given(exposing=a_few(EXPOSING), unproven=a_few(UNPROVEN), order=st.randoms(use_true_random=False))
def test_no_combination_of_faults_hides_another(exposing: list[str], unproven: list[str], order: object) -> None:
    case = Case()
    # Those that leave something out first, so that none takes away what another added.
    for name in sorted(unproven, key=lambda name: not name.startswith(("no ", "a required probe that did not"))):
        case = UNPROVEN[name][0](case)
    for name in exposing:
        case = EXPOSING[name][0](case)
    expected = (
        GuestVerdict.EXPOSED if exposing else GuestVerdict.INCONCLUSIVE if case != Case() else GuestVerdict.ISOLATED
    )
    assert case.judged()[0] is expected


small = st.integers(0, 3)
memories = st.builds(
    Memory, size=small, secret=small, present_pages=small, checked_pages=small, readable_pages=st.integers(0, 1)
)
blocks = st.lists(st.builds(RamBlock, name=st.just("ram0"), size=small), max_size=3)
observations = st.lists(
    st.builds(
        Observation,
        probe=st.sampled_from([*REQUIRED, "another"]),
        target=st.sampled_from(Verdict),
        control=st.sampled_from(Verdict),
        detail=st.just(""),
        seconds=st.floats(0, 10),
    ),
    max_size=6,
)
anything = st.builds(Case, memories, blocks.map(tuple), observations.map(tuple))


@given(anything, st.integers(1, PAGES))
def test_one_readable_page_makes_any_guest_exposed(case: Case, pages: int) -> None:
    assert case.with_memory(readable_pages=pages).judged()[0] is GuestVerdict.EXPOSED


@given(anything, st.sampled_from(Verdict))
def test_one_readable_probe_makes_any_guest_exposed(case: Case, control: Verdict) -> None:
    assert case.with_probe("another", READABLE, control).judged()[0] is GuestVerdict.EXPOSED


@given(observations.map(tuple))
def test_isolated_only_if_every_required_probe_is_blocked_beside_a_readable_control(
    seen: tuple[Observation, ...],
) -> None:
    verdict, reasons = replace(Case(), observations=seen).judged()
    proved = {one.probe for one in seen if (one.target, one.control) == (BLOCKED, READABLE)}
    doubted = {one.probe for one in seen if (one.target, one.control) != (BLOCKED, READABLE)}
    assert (verdict is GuestVerdict.ISOLATED) == (set(REQUIRED) <= proved and not doubted)
    assert (verdict is GuestVerdict.ISOLATED) == (reasons == ())


def test_the_report_has_the_fields_that_checks_read_and_takes_no_others() -> None:
    text = """{"guest": "demo", "verdict": "isolated", "validated_after": "", "reasons": [],
      "memory": {"size": 4096, "secret": 4096, "present_pages": 1, "checked_pages": 1, "readable_pages": 0},
      "ram_blocks": [{"name": "ram0", "size": 4096, "backing": "secretmem", "guest_writable": true}],
      "probes": [{"name": "direct-map", "verdict": "blocked", "control": "readable", "detail": "", "seconds": 0.05}],
      "exposures": [{"name": "pidfd-getfd", "holders": "root, CAP_SYS_PTRACE", "detail": ""}],
      "host": {"kernel": "6.1", "qemu": "7.2", "accel": "tcg"},
      "timings": {"prefault": 1.0, "qmp_ready": 0.1, "validate": 0.2}}"""
    report = IsolationReport.from_json(text)
    assert IsolationReport.from_json(report.as_json()) == report
    with pytest.raises(ValueError, match="unknown field `colour`"):
        IsolationReport.from_json(text.replace('"guest":', '"colour": "red", "guest":'))


def test_what_came_later_to_the_report_may_be_absent_and_survives_json() -> None:
    full = exposed_report()
    assert IsolationReport.from_json(full.as_json()) == full
    later = full.as_tables()
    del later["memory_map"], later["hunt"], later["drifts"], later["host"]["settings"]
    report = IsolationReport.of(later)
    assert (report.memory_map, report.hunt, report.drifts, report.host.settings) == ((), None, (), ())
    selftest = selftest_report()
    assert SelftestReport.from_json(selftest.as_json()) == selftest


@pytest.mark.parametrize("model", [IsolationReport, SelftestReport])
def test_the_docs_name_every_field(model: type[object]) -> None:
    told = Path(__file__).parents[1].joinpath("docs/REPORT.md").read_text()
    parts = [part for part in msgspec.json.schema(model)["$defs"].values() if "properties" in part]
    assert [name for part in parts for name in part["properties"] if f"`{name}`" not in told] == []


LACKING = vector("lacking", INCONCLUSIVE, control=INCONCLUSIVE, missing="/dev/mem")
DOUBTED = vector("doubted", INCONCLUSIVE, control=BLOCKED)
OPEN = vector("open", READABLE, kind="exposure")
UNMEASURED = vector("unmeasured", INCONCLUSIVE, kind="exposure", control=INCONCLUSIVE)


@pytest.mark.parametrize(
    ("vectors", "required", "verdict"),
    [
        ((vector("a"),), "", SelftestVerdict.PASSED),
        ((vector("a"),), "a", SelftestVerdict.PASSED),
        ((vector("a"), LACKING, OPEN, UNMEASURED), "a", SelftestVerdict.PASSED),
        ((vector("a"), LACKING), "a lacking", SelftestVerdict.INCONCLUSIVE),
        ((vector("a"),), "a b", SelftestVerdict.INCONCLUSIVE),
        ((vector("a"), vector("b", kind="exposure")), "b", SelftestVerdict.INCONCLUSIVE),
        ((vector("a"), vector("b", READABLE)), "a", SelftestVerdict.FAILED),
        ((vector("a"), vector("b", READABLE), DOUBTED), "", SelftestVerdict.FAILED),
        ((vector("a", READABLE), LACKING), "lacking", SelftestVerdict.FAILED),
        ((vector("a"), DOUBTED), "a", SelftestVerdict.INCONCLUSIVE),
        ((LACKING, OPEN), "", SelftestVerdict.INCONCLUSIVE),
        ((vector("closed", kind="exposure"),), "", SelftestVerdict.INCONCLUSIVE),
        ((), "", SelftestVerdict.INCONCLUSIVE),
    ],
)
def test_a_self_test_is_judged_by_its_probes_alone(
    vectors: tuple[VectorResult, ...], required: str, verdict: SelftestVerdict
) -> None:
    judged, reasons = judge_selftest(vectors, required.split())
    assert judged is judge_selftest(vectors[::-1], required.split())[0] is verdict
    assert (reasons == ()) == (verdict is SelftestVerdict.PASSED)


def reasons_of(*vectors: VectorResult, required: tuple[str, ...] = ()) -> tuple[str, ...]:
    return judge_selftest(vectors, required)[1]


def test_the_reasons_name_the_probes_that_decided() -> None:
    assert reasons_of(vector("a"), vector("b", READABLE), DOUBTED, LACKING, OPEN) == ("b: b: readable",)
    assert reasons_of(vector("a"), DOUBTED, LACKING, OPEN) == ("doubted: doubted: inconclusive",)
    assert reasons_of(vector("a"), LACKING, required=("lacking", "b")) == (
        "lacking: lacking: inconclusive",
        "b: did not run",
    )
    assert reasons_of(LACKING, OPEN) == ("no probe was blocked",)
