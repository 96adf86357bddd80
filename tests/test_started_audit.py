"""The audits of a domain's start, when they come to nothing: a process in place of QEMU, and examinations made up."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
from msgspec.structs import replace

from tests.sample_reports import guest_report, probe
from vmmback.errors import HostUnfit, NoSuchGuest
from vmmback.isolation.audit import REQUIRED
from vmmback.libvirt import domains, records, started_audit
from vmmback.libvirt.started_audit import StandsStill, audit_started
from vmmback.report import GuestVerdict, IsolationReport, Verdict

UUID = "0d7e5a4f-8a1c-4b1e-9b0e-6a1f7e5d3c2b"
STATUS = f"""<!-- libvirt's own -->
<domstatus state='running' pid='1'>
  <domain type='qemu' id='1'>
    <name>one</name>
    <uuid>{UUID}</uuid>
    <metadata>
      <v:secret-ram xmlns:v="urn:vmmback:domain:1.0" on-exposed="POLICY" emulator="/usr/bin/qemu-system-x86_64"/>
    </metadata>
  </domain>
</domstatus>
"""
GOOD = guest_report(probes=tuple(probe(name, Verdict.BLOCKED, "refused") for name in sorted(REQUIRED)))


Answer = IsolationReport | Exception | Callable[[], IsolationReport]


class Domain:
    """A domain that runs, named "one"; `answers` are what its examinations come to, and the last one goes on."""

    def __init__(self, folder: Path, qemu: subprocess.Popen[bytes]) -> None:
        self.folder, self.qemu = folder, qemu
        self.said = list[str]()
        self.tries = 0

    def start(
        self, *answers: IsolationReport | Exception | Callable[[], IsolationReport], policy: str = "kill"
    ) -> None:
        (self.folder / "one.pid").write_text(str(self.qemu.pid))
        (self.folder / "one.xml").write_text(STATUS.replace("POLICY", policy))

        def examine() -> IsolationReport:
            answer = answers[min(self.tries, len(answers) - 1)]
            self.tries += 1
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, IsolationReport):
                records.write(UUID, answer)
                return answer
            return answer()

        audit_started("one", examine, self.said.append)

    @property
    def runs(self) -> bool:
        return self.qemu.poll() is None

    @property
    def found(self) -> tuple[str, tuple[str, ...]]:
        report = records.read(UUID)
        assert report is not None
        return report.verdict.value, report.reasons


@pytest.fixture
def domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Domain]:
    monkeypatch.setattr(records, "RECORDS", tmp_path / "run/records")
    monkeypatch.setattr(domains, "_PIDFILES", tmp_path)
    monkeypatch.setattr(started_audit, "_STATUS", tmp_path)
    monkeypatch.setattr(started_audit, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(started_audit, "_PAUSE_S", 0.01)
    monkeypatch.setattr(started_audit, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(started_audit, "_BOOTED_S", 0.01)
    records.begin(UUID)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as qemu:
        yield Domain(tmp_path, qemu)
        qemu.kill()


BUSY = HostUnfit("libvirt is busy")


def test_it_is_examined_twice(domain: Domain) -> None:
    domain.start(GOOD)
    assert (domain.tries, domain.said) == (2, ["is isolated while it runs"] * 2)
    assert (domain.found, domain.runs) == (("isolated", ()), True)


@pytest.mark.parametrize(
    "error", [BUSY, NoSuchGuest("not found yet"), OSError("reset"), MemoryError(), ValueError("of ours")], ids=repr
)
def test_what_fails_is_tried_again(domain: Domain, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(started_audit, "_PATIENCE_S", 30.0)
    domain.start(error, error, GOOD)
    assert domain.tries == 4
    assert [said.startswith("could not be examined: ") for said in domain.said] == [True, True, False, False]
    assert (domain.found, domain.runs) == (("isolated", ()), True)


@pytest.mark.parametrize("policy", ["kill", "warn"])
def test_one_that_is_never_examined_does_not_go_on_unless_it_may(domain: Domain, policy: str) -> None:
    started = time.monotonic()
    domain.start(BUSY, policy=policy)
    assert time.monotonic() - started < 20
    assert 1 < domain.tries < 40
    assert domain.found == ("inconclusive", ("not examined: libvirt is busy",))
    if policy == "kill":
        assert domain.said[-1] == "was never examined and is ended (on-exposed is kill)"
        assert domain.qemu.wait(20) == -9
    else:
        assert set(domain.said) == {"could not be examined: libvirt is busy"}
        assert domain.runs


def test_an_examination_that_hangs_is_given_up(domain: Domain) -> None:
    go = Event()

    def hang() -> IsolationReport:
        go.wait(60)
        raise BUSY

    domain.start(hang)
    go.set()
    assert domain.found == ("inconclusive", ("not examined: no answer within 0.3 s",))
    assert domain.qemu.wait(20) == -9


def test_one_that_was_examined_once_goes_on_and_what_is_not_known_is_kept(domain: Domain) -> None:
    domain.start(GOOD, BUSY)
    assert domain.found == ("inconclusive", ("not examined: libvirt is busy",))
    assert domain.said[-1] == "could not be examined: libvirt is busy"
    assert domain.runs
    report = records.read(UUID)
    assert report is not None
    assert report.probes == GOOD.probes


def test_what_was_exposed_stays_exposed(domain: Domain) -> None:
    reasons = (f"1 of {GOOD.memory.checked_pages} pages of its RAM were read",)
    memory = replace(GOOD.memory, readable_pages=1)
    exposed = replace(GOOD, memory=memory, verdict=GuestVerdict.EXPOSED, reasons=reasons)
    domain.start(exposed, BUSY, policy="warn")
    assert domain.found == ("exposed", reasons)


def test_the_time_of_one_that_stands_still_does_not_begin(domain: Domain) -> None:
    started = time.monotonic()

    def migrating() -> IsolationReport:
        if time.monotonic() - started < 1:  # more than its patience
            raise StandsStill("busy")
        return GOOD

    domain.start(migrating)
    assert domain.said[-2:] == ["is isolated while it runs"] * 2
    assert domain.runs


def test_one_that_ends_meanwhile_is_left_at_that(domain: Domain) -> None:
    def end() -> IsolationReport:
        domain.qemu.kill()
        domain.qemu.wait()
        raise BUSY

    domain.start(end)
    assert (domain.tries, domain.said) == (1, ["could not be examined: libvirt is busy"])
    with pytest.raises(NoSuchGuest):
        domain.start(GOOD)


def test_a_record_says_so_from_the_beginning(domain: Domain) -> None:
    seen = list[tuple[str, tuple[str, ...]]]()

    def look() -> IsolationReport:
        seen.append(domain.found)
        return GOOD

    domain.start(look)
    assert seen[0] == ("inconclusive", ("not examined: its first audit has not come to an end",))


@pytest.mark.parametrize("status", ["", "<domstatus/>", STATUS.replace("POLICY", "maybe")], ids=["none", "no", "odd"])
def test_one_whose_policy_cannot_be_read_is_ended(domain: Domain, status: str) -> None:
    def unreadable() -> IsolationReport:
        raise BUSY

    (domain.folder / "one.pid").write_text(str(domain.qemu.pid))
    if status:
        (domain.folder / "one.xml").write_text(status)
    audit_started("one", unreadable, domain.said.append)
    assert domain.qemu.wait(20) == -9
    assert records.read(UUID) is None


def test_one_that_does_not_ask_is_left_alone(domain: Domain) -> None:
    """What says that it does can be of an earlier start."""
    (domain.folder / "one.pid").write_text(str(domain.qemu.pid))
    (domain.folder / "one.xml").write_text(STATUS.replace("urn:vmmback:domain:1.0", "urn:others"))
    audit_started("one", lambda: pytest.fail("it was examined"), domain.said.append)
    assert (domain.qemu.poll(), domain.said, records.read(UUID)) == (None, [], None)


def test_a_place_that_is_full_does_not_keep_a_domain_from_being_ended(domain: Domain) -> None:
    (domain.folder / "run/records").rmdir()
    domain.start(BUSY)
    assert domain.qemu.wait(20) == -9


def test_the_time_is_longer_for_more_ram(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(started_audit, "_secret_bytes", lambda _: 1 << 30)
    monkeypatch.setattr(started_audit, "_PATIENCE_S_PER_GIB", 0.2)
    go = Event()

    def hang() -> IsolationReport:
        go.wait(60)
        raise BUSY

    domain.start(hang)
    go.set()
    assert domain.found[1] == ("not examined: no answer within 0.5 s",)


def test_the_verdict_of_a_report_is_what_is_said(domain: Domain) -> None:
    doubtful = replace(GOOD, verdict=GuestVerdict.INCONCLUSIVE, reasons=("direct-map: did not run",))
    domain.start(doubtful)
    assert domain.said == ["is inconclusive while it runs; direct-map: did not run"] * 2
    assert domain.runs
