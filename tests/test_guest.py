"""What a guest's examinations add up to: drifts, once each, and what stays known. What is seen is made up."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmmback.config import GuestConfig
from vmmback.errors import QemuFailed
from vmmback.guest import DRIFT_EVENT, Guest
from vmmback.isolation import audit
from vmmback.isolation.audit import REQUIRED, Evidence
from vmmback.isolation.direct_map import PageCount
from vmmback.isolation.qmp_proof import Proof
from vmmback.lifecycle import State
from vmmback.qmp_policy import Policy
from vmmback.report import Drift, GuestVerdict, Host, HostSetting, IsolationReport, Observation, RamBlock, Verdict

PAGES = 4096
SIZE = PAGES * 4096


def evidence(*readable: str, readable_pages: int = 0, details: Mapping[str, str] | None = None) -> Evidence:
    """Return what is seen of a guest on which these probes read something."""
    observations = tuple(
        Observation(
            name,
            Verdict.READABLE if name in readable else Verdict.BLOCKED,
            Verdict.READABLE,
            (details or {}).get(name, "detail"),
            0.001,
        )
        for name in sorted(REQUIRED)
    )
    block = RamBlock(name="ram0", size=SIZE, backing="secretmem", guest_writable=True)
    proof = Proof(observations[0], (block,), (), SIZE, {7: {"ram0": SIZE}}, {})
    return Evidence(proof, observations, PageCount(PAGES, PAGES, readable_pages), array("Q"), (), ())


@dataclass
class Watcher:
    drifts: list[Drift] = field(default_factory=list)

    def drifted(self, drift: Drift) -> None:
        self.drifts.append(drift)

    def entered(self, state: State) -> None:
        pass


@dataclass
class Clients:
    events: list[Mapping[str, Any]] = field(default_factory=list)
    denials: dict[str, int] = field(default_factory=dict)

    def broadcast(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)


async def never(timeout_s: float) -> None:
    raise TimeoutError


class Scene:
    """A guest, and what its next examinations see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sees: list[Evidence | Exception] = []
        self.watcher, self.clients = Watcher(), Clients()
        self.running = 0
        self.most_at_once = 0
        config = GuestConfig.of({"name": "demo", "memory": {"size": "16MiB"}, "boot": {"kernel": "vmlinuz"}})
        made: dict[str, Any] = {
            "ram": [SimpleNamespace(size=SIZE, inode=7, frames=array("Q"), backing="secret", direct_map=None)],
            "qemu": SimpleNamespace(pid=1, status=None, auxiliary_inodes=frozenset(), ended=never),
            "monitor": SimpleNamespace(hmp=None),
            "promise": None,
            "console": SimpleNamespace(bytes_seen=0, bytes_typed=0),
        }
        self.guest = Guest(
            config=config,
            folder=Path("/nowhere"),
            host=Host(kernel="k", qemu="q", accel="tcg"),
            devices=(),
            proof=evidence().proof,
            timings={},
            watcher=cast("Any", self.watcher),
            policy=Policy(()),
            clients=cast("Any", self.clients),
            **made,
        )
        monkeypatch.setattr(audit, "audit", self._audit)

    async def _audit(self, *_: object) -> Evidence:
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        seen = self.sees.pop(0)
        if isinstance(seen, Exception):
            raise seen
        return seen

    def examine(self, *sees: Evidence | Exception) -> list[IsolationReport]:
        """Examine the guest as often as there is something to see."""
        self.sees += sees

        async def each() -> list[IsolationReport]:
            return [await self.guest.examine() for _ in sees]

        return asyncio.run(each())


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def readable(report: IsolationReport) -> set[str]:
    return {probe.name for probe in report.probes if probe.verdict is Verdict.READABLE}


def test_a_guest_that_stays_isolated_drifts_nowhere(scene: Scene) -> None:
    reports = scene.examine(evidence(), evidence())
    assert [report.verdict for report in reports] == [GuestVerdict.ISOLATED] * 2
    assert (scene.watcher.drifts, scene.clients.events) == ([], [])
    assert not scene.guest.exposed.is_set()
    assert reports[1].timings.keys() == {"validate", "audit"}


def test_what_is_exposed_at_first_is_no_drift(scene: Scene) -> None:
    (report,) = scene.examine(evidence("holders"))
    assert (report.verdict, report.drifts) == (GuestVerdict.EXPOSED, ())
    assert scene.guest.exposed.is_set()
    assert (scene.watcher.drifts, scene.clients.events) == ([], [])


def test_what_becomes_readable_is_one_drift_and_stays(scene: Scene) -> None:
    seen = evidence("holders", details={"holders": "process 1 (cat) maps it"})
    first, second, third, fourth = scene.examine(evidence(), seen, seen, evidence())
    assert (first.verdict, first.drifts) == (GuestVerdict.ISOLATED, ())
    (drift,) = second.drifts
    assert (drift.probe, drift.detail) == ("holders", "process 1 (cat) maps it")
    assert third.drifts == fourth.drifts == (drift,)
    assert [readable(report) for report in (second, third, fourth)] == [{"holders"}] * 3
    assert fourth.verdict is GuestVerdict.EXPOSED
    assert scene.watcher.drifts == [drift]
    assert scene.clients.events == [{"event": DRIFT_EVENT, "data": drift.as_tables()}]
    assert scene.guest.exposed.is_set()


def test_what_comes_again_is_no_new_drift_and_another_one_is(scene: Scene) -> None:
    *_, last = scene.examine(evidence(), evidence("holders"), evidence(), evidence("holders"), evidence("tracer"))
    assert [drift.probe for drift in last.drifts] == ["holders", "tracer"]
    assert readable(last) == {"holders", "tracer"}
    assert len(scene.watcher.drifts) == len(scene.clients.events) == 2


def test_whoever_comes_and_goes_fills_no_memory(scene: Scene) -> None:
    many = [evidence("holders", details={"holders": f"process {pid}"}) for pid in range(150)]
    *_, last = scene.examine(evidence(), *many)
    assert len(last.drifts) == 100
    assert len(scene.watcher.drifts) == 150  # each is told all the same


def test_what_the_host_is_like_is_in_the_report(scene: Scene) -> None:
    swap = HostSetting(name="swap", value="off", risk="ok", detail="nothing is swapped", source="swapon(8)")
    (report,) = scene.examine(evidence()._replace(settings=(swap,)))
    assert report.host.settings == (swap,)


def test_several_at_once_are_a_drift_each_in_one_report(scene: Scene) -> None:
    _, report = scene.examine(evidence(), evidence("holders", "tracer"))
    assert {drift.probe for drift in report.drifts} == {"holders", "tracer"}
    assert scene.watcher.drifts == list(report.drifts)


def test_pages_that_were_read_once_stay_counted(scene: Scene) -> None:
    *_, last = scene.examine(evidence(), evidence("direct-map", readable_pages=3), evidence())
    assert (last.memory.readable_pages, last.verdict) == (3, GuestVerdict.EXPOSED)


def test_a_guest_that_cannot_be_examined_any_more_is_not_isolated_until_it_can(scene: Scene) -> None:
    scene.examine(evidence())
    for error in (QemuFailed("no answer"), OSError(24, "Too many open files"), RuntimeError("can't start new thread")):
        with pytest.raises(type(error)):
            scene.examine(error)
        report = scene.guest.report()
        assert report.verdict is GuestVerdict.INCONCLUSIVE
        assert report.reasons == (f"it could not be examined: {error}",)
    assert scene.guest.drifts == []
    assert scene.examine(evidence())[0].verdict is GuestVerdict.ISOLATED  # nor does it lock anybody out


def test_that_a_guest_ends_while_it_is_examined_says_nothing_against_it(scene: Scene) -> None:
    scene.examine(evidence())
    scene.guest.qemu.status = 0  # type: ignore[misc]
    with pytest.raises(QemuFailed):
        scene.examine(QemuFailed("gone"))
    assert scene.guest.unexamined == ""


def test_another_one_who_holds_the_ram_is_another_drift(scene: Scene) -> None:
    first, second = evidence("holders"), evidence("holders")
    other = tuple(
        seen._replace(detail="process 2") if seen.probe == "holders" else seen for seen in second.observations
    )
    *_, last = scene.examine(evidence(), first, first, second._replace(observations=other))
    assert [drift.detail for drift in last.drifts][1:] == ["process 2"]
    assert len(last.drifts) == 2


def test_examinations_take_turns(scene: Scene) -> None:
    scene.sees = [evidence("holders")] * 5

    async def at_once() -> None:
        await asyncio.gather(*(scene.guest.examine() for _ in range(5)))

    asyncio.run(at_once())
    assert scene.most_at_once == 1
    assert scene.guest.drifts == []


def test_a_guest_without_clients_drifts_all_the_same(scene: Scene) -> None:
    scene.guest.clients = None
    scene.examine(evidence(), evidence("holders"))
    assert [drift.probe for drift in scene.watcher.drifts] == ["holders"]


def test_what_an_earlier_look_saw_is_kept_in_evidence() -> None:
    """Evidence.after: readable once, readable for good, with what was seen then; all else is of the later look."""
    earlier, later = evidence("holders", details={"holders": "then"}), evidence("tracer", details={"tracer": "now"})
    both = later.after(earlier)
    assert {seen.probe: seen.detail for seen in both.observations if seen.target is Verdict.READABLE} == {
        "holders": "then",
        "tracer": "now",
    }
    assert both.proof is later.proof
    assert len(both.observations) == len(later.observations)
    again = evidence("holders", details={"holders": "now"}).after(earlier)
    assert {seen.detail for seen in again.observations if seen.probe == "holders"} == {"now"}
