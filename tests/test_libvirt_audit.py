"""What an audit of a domain of libvirt's goes by, and what becomes of its record. QEMU, broker, probes are made up."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from tests.domain_frames import write_frames
from tests.sample_reports import guest_report, probe
from vmmback.broker import client
from vmmback.errors import HostUnfit
from vmmback.isolation import audit as isolation_audit
from vmmback.isolation.audit import REQUIRED, Evidence
from vmmback.isolation.direct_map import PageCount
from vmmback.isolation.probe import Target
from vmmback.isolation.qmp_proof import Proof
from vmmback.isolation.residue import FreedFramesProbe
from vmmback.libvirt import audit, records
from vmmback.libvirt.audit import Subject
from vmmback.libvirt.installed_files import filled
from vmmback.linux import procfs
from vmmback.linux.procfs import PAGE_SIZE, Mapping
from vmmback.report import GuestVerdict, IsolationReport, Observation, Verdict

UUID = "0d7e5a4f-8a1c-4b1e-9b0e-6a1f7e5d3c2b"
UID = 1885632029
PID = os.getpid()
SUBJECT = Subject("one", UUID, "qemu", PID)
FRAMES = {1: array("Q", [5] * 4)}
PLUGGED = 2
PAGE = (Path(__file__).parents[1] / "docs/LIBVIRT.md").read_text().splitlines()
GOOD = guest_report(probes=tuple(probe(name, Verdict.BLOCKED, "refused") for name in sorted(REQUIRED)))


class Lease(NamedTuple):
    inode: int
    size: int = 8 * PAGE_SIZE
    purpose: str = "domain one"
    uid: int = UID


def secret(*inodes: int) -> list[Mapping]:
    return [Mapping(0, PAGE_SIZE, "rw-s", 0, "0:1", inode, procfs.SECRETMEM) for inode in inodes]


class Host:
    """What can be known of the domain. A broker's answers come one after the other, and the last one stays."""

    def __init__(self) -> None:
        self.answers: list[list[Lease]] | None = [[]]
        """None where no broker runs."""
        self.mapped = secret(*FRAMES)
        self.gone = set[int]()
        """What QEMU maps, and what is in none of its views."""
        self.looked_at = list[set[int]]()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Host | None]:
        yield None if self.answers is None else self

    async def leases(self) -> list[Lease]:
        assert self.answers
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    async def audit(self, target: Target, _: object, frames: object) -> Evidence:
        assert frames == records.frames(UUID, PID)
        self.looked_at.append(set(target.ram))
        ours = {inode: {} if inode in self.gone else {f"ram{inode}": size} for inode, size in target.ram.items()}
        found = sum(sum(blocks.values()) for blocks in ours.values())
        seen = [Observation(name, Verdict.BLOCKED, Verdict.READABLE, "refused", 0.0) for name in sorted(REQUIRED)]
        proof = Proof(seen[0], GOOD.ram_blocks, (), found, ours, {})
        pages = PageCount(found // PAGE_SIZE, found // PAGE_SIZE, 0)
        return Evidence(proof, tuple(seen), pages, array("Q"), (), ())


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    monkeypatch.setattr(records, "RECORDS", tmp_path / "run/records")
    records.begin(UUID)
    write_frames(UUID, PID, FRAMES)
    host = Host()
    monkeypatch.setattr(client, "connected", host.connected)
    monkeypatch.setattr(procfs, "maps", lambda _: host.mapped)
    monkeypatch.setattr(procfs, "status", lambda _: {"Uid": f"{UID}\t{UID}\t{UID}\t{UID}"})
    monkeypatch.setattr(isolation_audit, "audit", host.audit)
    return host


async def hmp(command: str) -> str:
    assert command == "info version"
    return "7.2.22 (Debian)\r\n"


def examined() -> IsolationReport:
    return asyncio.run(audit.examine(SUBJECT, hmp))


# --- Which files are the domain's -------------------------------------------------------------------------------------


def test_its_ram_is_what_it_was_started_with_and_what_was_plugged_in(host: Host) -> None:
    host.answers = [[Lease(1, 4 * PAGE_SIZE), Lease(PLUGGED, uid=0)]]
    host.mapped = secret(1, PLUGGED)
    found = examined()
    assert host.looked_at == [{1, PLUGGED}]
    assert (found.guest, found.verdict, found.memory.size) == ("one", GuestVerdict.ISOLATED, 12 * PAGE_SIZE)
    assert (found.host.qemu, found.host.accel) == ("7.2.22", "tcg")
    assert found.validated_after


@pytest.mark.parametrize(
    "lease",
    [
        Lease(PLUGGED, purpose="domain two"),
        Lease(PLUGGED, purpose="domain one "),
        Lease(PLUGGED, purpose="guest one"),
        Lease(PLUGGED, uid=UID + 1),
        Lease(PLUGGED, uid=1000),
    ],
    ids=["another's", "almost its", "a guest's", "another user's", "a user's"],
)
def test_what_others_have_is_none_of_its_ram(host: Host, lease: Lease) -> None:
    """Anybody could borrow RAM with a domain's purpose, and have the audit find what it is to find."""
    host.answers = [[lease]]
    examined()
    assert host.looked_at == [{1}]


def test_without_a_broker_it_is_what_was_written_down(host: Host) -> None:
    host.answers = None
    assert examined().memory.size == 4 * PAGE_SIZE
    assert host.looked_at == [{1}]


def test_without_a_broker_nobody_knows_what_was_plugged_in(host: Host) -> None:
    host.answers = None
    host.mapped = secret(1, PLUGGED)
    with pytest.raises(HostUnfit, match="no broker says whose it is"):
        examined()
    assert host.looked_at == []


def test_with_a_broker_that_does_not_know_of_it_the_proof_has_to_say_so(host: Host) -> None:
    host.mapped = secret(1, PLUGGED)
    examined()
    assert host.looked_at == [{1}]


@pytest.mark.parametrize("answers", [None, [[]], [[Lease(1, purpose="domain two")]]], ids=["no broker", "none", "two"])
def test_where_nobody_knows_of_any_there_is_nothing_to_examine(host: Host, answers: list[list[Lease]] | None) -> None:
    records.forget_frames(UUID, PID)
    host.answers, host.mapped = answers, []
    with pytest.raises(HostUnfit, match="nobody knows of secret RAM that domain 'one' has"):
        examined()


# --- What changes meanwhile -------------------------------------------------------------------------------------------


def test_what_is_plugged_in_during_an_audit_is_looked_at_too(host: Host) -> None:
    host.answers = [[], [Lease(PLUGGED)]]
    assert examined().memory.size == 12 * PAGE_SIZE
    assert host.looked_at == [{1}, {1, PLUGGED}]


def test_what_is_unplugged_during_an_audit_is_left_out(host: Host) -> None:
    host.answers = [[Lease(PLUGGED)], []]
    assert examined().memory.size == 4 * PAGE_SIZE
    assert host.looked_at == [{1, PLUGGED}, {1}]


def test_what_was_unplugged_and_qemu_still_maps_is_no_longer_the_guests(host: Host) -> None:
    host.answers, host.gone = [[Lease(PLUGGED)]], {PLUGGED}
    found = examined()
    assert (found.verdict, found.memory.size) == (GuestVerdict.ISOLATED, 4 * PAGE_SIZE)
    assert host.looked_at == [{1, PLUGGED}, {1}]


def test_what_it_was_started_with_cannot_be_gone(host: Host) -> None:
    host.gone = {1}
    found = examined()
    assert (found.verdict, found.memory.secret) == (GuestVerdict.INCONCLUSIVE, 0)
    assert host.looked_at == [{1}]


# --- Its end ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ended(host: Host) -> int:
    """The pid of a QEMU that has ended, whose frames are known."""
    with subprocess.Popen([sys.executable, "-c", ""]) as qemu:
        pass
    records.forget_frames(UUID, PID)
    write_frames(UUID, qemu.pid, FRAMES)
    return qemu.pid


class Freed:
    """In place of the probe of former frames."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked_at: list[array[int]] = []
        self.target, self.control, self.missing = Verdict.BLOCKED, Verdict.READABLE, ""

        def observe(probe: FreedFramesProbe, _: Target) -> Observation:
            self.looked_at.append(probe._entries)
            return Observation(FreedFramesProbe.name, self.target, self.control, "looked at", 0.0, "", self.missing)

        monkeypatch.setattr(FreedFramesProbe, "observe", observe)


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Freed:
    return Freed(monkeypatch)


def test_the_frames_of_a_run_that_ended_are_looked_at_and_forgotten(ended: int, freed: Freed) -> None:
    write_frames(UUID, ended, {1: array("Q", [5, 6]), 2: array("Q", [7])})
    records.write(UUID, GOOD)
    found = audit.observe_end(UUID)
    assert found is not None
    assert [sorted(entries) for entries in freed.looked_at] == [[5, 6, 7]]
    assert (found.verdict, [each.name for each in found.probes[-1:]]) == (GuestVerdict.ISOLATED, ["freed-frames"])
    assert records.read(UUID) == found
    assert records.runs(UUID) == []
    assert audit.observe_end(UUID) is None  # nothing is left to look at
    assert records.read(UUID) == found


@pytest.mark.parametrize(
    ("target", "control", "verdict"),
    [
        (Verdict.READABLE, Verdict.READABLE, GuestVerdict.EXPOSED),
        (Verdict.INCONCLUSIVE, Verdict.READABLE, GuestVerdict.INCONCLUSIVE),
        (Verdict.BLOCKED, Verdict.BLOCKED, GuestVerdict.INCONCLUSIVE),
    ],
)
def test_the_verdict_is_that_of_the_whole_run(
    ended: int, freed: Freed, target: Verdict, control: Verdict, verdict: GuestVerdict
) -> None:
    records.write(UUID, GOOD)
    freed.target, freed.control = target, control
    audit.observe_end(UUID)
    found = records.read(UUID)
    assert found is not None
    assert (found.verdict, found.reasons) == (verdict, ("freed-frames: looked at",))


def test_where_nobody_can_look_at_them_it_is_not_isolated(ended: int, freed: Freed) -> None:
    records.write(UUID, GOOD)
    freed.target, freed.control, freed.missing = Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE, "BPF"
    found = audit.observe_end(UUID)
    assert found is not None
    assert found.verdict is GuestVerdict.INCONCLUSIVE


def test_what_was_exposed_while_it_ran_stays_so(ended: int, freed: Freed) -> None:
    records.write(UUID, replace(GOOD, memory=replace(GOOD.memory, readable_pages=1)))
    found = audit.observe_end(UUID)
    assert found is not None
    assert found.verdict is GuestVerdict.EXPOSED


def test_that_its_last_audit_came_to_nothing_stays_known(ended: int, freed: Freed) -> None:
    records.write(UUID, GOOD)
    audit.record_unexamined(UUID, "one", "busy")
    found = audit.observe_end(UUID)
    assert found is not None
    assert (found.verdict, found.reasons) == (GuestVerdict.INCONCLUSIVE, ("not examined: busy",))


@pytest.mark.parametrize("unexamined", [False, True], ids=["no record", "not examined"])
def test_of_a_run_that_was_never_examined_nothing_is_said(ended: int, freed: Freed, *, unexamined: bool) -> None:
    if unexamined:
        audit.record_unexamined(UUID, "one", "busy")
    before = records.read(UUID)
    assert audit.observe_end(UUID) is None
    assert (records.read(UUID), records.runs(UUID), freed.looked_at) == (before, [], [])


def test_of_two_runs_that_ended_nobody_can_tell_whose_the_report_is(ended: int, freed: Freed) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as qemu:
        pass
    write_frames(UUID, qemu.pid, FRAMES)
    records.write(UUID, GOOD)
    assert audit.observe_end(UUID) is None
    assert (records.read(UUID), records.runs(UUID), freed.looked_at) == (GOOD, [], [])


def test_the_report_of_one_that_runs_again_is_that_of_its_new_run(ended: int, freed: Freed) -> None:
    write_frames(UUID, PID, FRAMES)
    records.write(UUID, GOOD)
    assert audit.observe_end(UUID) is None
    assert (records.read(UUID), records.runs(UUID), freed.looked_at) == (GOOD, [PID], [])


def test_one_that_runs_has_not_ended(host: Host, freed: Freed) -> None:
    records.write(UUID, GOOD)
    assert audit.observe_end(UUID) is None
    assert (records.read(UUID), records.runs(UUID), freed.looked_at) == (GOOD, [PID], [])


# --- Who else has its memory ------------------------------------------------------------------------------------------


def test_report_page_and_rule_name_the_same_rights(host: Host) -> None:
    rights = {
        each.name: re.findall(r"domain:([a-z-]+)", each.holders)
        for each in examined().exposures
        if each.name.startswith("libvirt-")
    }
    told = [re.findall(r"`domain\.([a-z-]+)`", row.split("|")[-2]) for row in PAGE if row.startswith("| ")]
    assert list(rights.values()) == [row for row in told if row]
    denied = re.findall(r'"org\.libvirt\.api\.domain\.([a-z-]+)"', filled("00-vmmback.rules"))
    # Who may change a domain cannot be told from who may have its memory, and what a guest shows is to be seen.
    assert set(denied) == {right for each in rights.values() for right in each} - {"write", *rights["libvirt-screen"]}
