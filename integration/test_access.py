"""The probes on a running guest: blocked on secret RAM, readable on its twin, and red when one protection is broken."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from integration.conftest import TINY_BYTES, LiveGuest
from vmmback.isolation import access, exposures
from vmmback.isolation.audit import REQUIRED, audit
from vmmback.isolation.catalogue import ACCESS_PROBES, HOLDER_PROBES, LIVE_PROBES, RIGHTS_PROBES
from vmmback.isolation.probe import Probe, Target
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Verdict, judge_probe

NOT_OF_THE_MEMORY = {probe.name for probe in (*HOLDER_PROBES, *RIGHTS_PROBES)}
ACCESS = pytest.mark.parametrize("probe", ACCESS_PROBES, ids=lambda probe: probe.name)


@ACCESS
def test_secret_ram_is_blocked_and_the_control_readable(probe: type[Probe[Any]], guest_running: LiveGuest) -> None:
    seen = probe().observe(guest_running.guest.target)
    assert (seen.target, seen.control) == (Verdict.BLOCKED, Verdict.READABLE), seen.detail
    assert judge_probe(seen).verdict is Verdict.BLOCKED


@ACCESS
def test_its_twin_is_readable(probe: type[Probe[Any]], ordinary_guest_running: LiveGuest) -> None:
    seen = probe().observe(ordinary_guest_running.guest.target)
    assert (seen.target, seen.control) == (Verdict.READABLE, Verdict.READABLE), seen.detail
    assert judge_probe(seen).verdict is Verdict.READABLE


@ACCESS
def test_ram_that_qemu_does_not_hold_proves_nothing(probe: type[Probe[Any]], guest_running: LiveGuest) -> None:
    """A wrong inode, as after a mistake of ours: a probe that finds no RAM must not call it blocked."""
    target = guest_running.guest.target
    seen = probe().observe(Target(target.pid, {inode + 1_000_000: size for inode, size in target.ram.items()}))
    assert seen.target is Verdict.INCONCLUSIVE, seen.detail


@ACCESS
def test_a_qemu_that_is_gone_proves_nothing(probe: type[Probe[Any]], guest_running: LiveGuest) -> None:
    target = guest_running.guest.target
    guest_running.run(guest_running.guest.qemu.kill())
    seen = probe().observe(target)
    assert (seen.target, seen.control) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE), seen.detail


@pytest.mark.parametrize("probe", [access.ProcMemProbe, access.ProcessVmReadvProbe])
def test_the_first_the_middle_and_the_last_page_are_tried(
    probe: type[access.ReadProbe], guest_running: LiveGuest, ordinary_guest_running: LiveGuest
) -> None:
    refused = probe().observe(guest_running.guest.target).detail
    assert refused.startswith("3 sampled pages refused, E")
    read = probe().observe(ordinary_guest_running.guest.target).detail
    assert read == "3 of 3 sampled pages were read"


@pytest.mark.usefixtures("needs_direct_map")
def test_the_whole_audit(guest_running: LiveGuest, ordinary_guest_running: LiveGuest) -> None:
    pages = TINY_BYTES // PAGE_SIZE
    for live, expected, readable in (
        (guest_running, Verdict.BLOCKED, 0),
        (ordinary_guest_running, Verdict.READABLE, pages),
    ):
        guest = live.guest
        evidence = live.run(audit(guest.target, guest.monitor.hmp, guest.prefaulted))
        assert {seen.probe for seen in evidence.observations} == REQUIRED | {
            probe.name for probe in (*LIVE_PROBES, *RIGHTS_PROBES)
        }
        for seen in evidence.observations:
            # Of ordinary RAM, too, nobody but QEMU and its supervisor has a descriptor or a mapping.
            wanted = Verdict.BLOCKED if seen.probe in NOT_OF_THE_MEMORY else expected
            assert (seen.target, seen.control) == (wanted, Verdict.READABLE), seen
        assert (evidence.pages.present, evidence.pages.checked, evidence.pages.readable) == (pages, pages, readable)
        assert len(evidence.frames) == pages


@pytest.mark.usefixtures("needs_direct_map")
def test_pages_that_were_not_prefaulted_are_counted_as_they_come(guest_paused: LiveGuest) -> None:
    """The tiny guest leaves the 384 KiB below 1 MiB alone, so QEMU never maps those; without the prefault's list they
    are absent, and the report says so instead of calling them checked.
    """
    guest_paused.start()
    guest = guest_paused.guest
    without = guest_paused.run(audit(guest.target, guest.monitor.hmp, {})).pages
    assert without.present == without.checked < TINY_BYTES // PAGE_SIZE


# --- Each protection broken once --------------------------------------------------------------------------------------


def test_a_dump_of_the_ram_switched_on_is_seen(guest_running: LiveGuest) -> None:
    """qom-set of the backend's `dump` takes the flag `dd` off the live mapping."""
    probe = access.VmaFlagsProbe()
    assert probe.observe(guest_running.guest.target).target is Verdict.BLOCKED
    change = {"path": "/objects/ram0", "property": "dump", "value": True}
    guest_running.run(guest_running.guest.monitor.execute("qom-set", change))
    seen = probe.observe(guest_running.guest.target)
    assert (seen.target, seen.detail) == (Verdict.READABLE, "flags missing: dd")


@pytest.mark.usefixtures("needs_direct_map")
def test_without_the_flag_lo_unevictable_frames_are_as_good(guest_running: LiveGuest) -> None:
    """As on Debian's 6.1, whose secret mappings lack it: the frames are looked at, in every part of a split mapping."""
    probe = access.VmaFlagsProbe()
    pid, (mapping,) = probe.target(guest_running.guest.target)
    unlocked = mapping._replace(flags=mapping.flags - {"lo"})
    seen = probe.attempt((pid, [mapping, unlocked]))
    assert seen.verdict is Verdict.BLOCKED, seen
    assert seen.detail.startswith("unevictable, ")
    seen = probe.attempt((pid, [mapping, unlocked._replace(flags=unlocked.flags - {"dd"})]))
    assert (seen.verdict, seen.detail) == (Verdict.READABLE, "flags missing: dd")


@pytest.mark.usefixtures("needs_direct_map")
def test_without_the_flag_lo_ordinary_frames_can_be_swapped_out(ordinary_guest_running: LiveGuest) -> None:
    """The twin: with `dd`, only its frames tell it from secret memory without `lo`."""
    probe = access.VmaFlagsProbe()
    pid, (mapping,) = probe.target(ordinary_guest_running.guest.target)
    seen = probe.attempt((pid, [mapping._replace(flags=mapping.flags | {"dd"})]))
    assert seen.verdict is Verdict.READABLE
    assert re.fullmatch(r"not locked \(lo\), and [1-9]\d* of \d+ frames can be swapped out", seen.detail)


# --- The ways out that stay open are named ----------------------------------------------------------------------------


def test_a_copy_of_the_descriptor_is_reported_as_an_exposure(guest_running: LiveGuest) -> None:
    assert os.geteuid() == 0
    exposure = exposures.pidfd_getfd_exposure(guest_running.guest.target)
    assert exposure.name == "pidfd-getfd"
    assert exposure.detail.startswith("tried as uid 0: 1 descriptor(s) copied")


def test_who_may_put_code_into_qemu_is_told_and_nothing_is_written(guest_running: LiveGuest) -> None:
    exposure = exposures.code_injection_exposure(guest_running.guest.target)
    assert (exposure.name, exposure.holders) == ("code-injection", "root, CAP_SYS_PTRACE")
    assert exposure.detail.startswith("tried as uid 0: QEMU may be written to")
    assert guest_running.run(guest_running.guest.monitor.execute("query-status"))["status"] == "running"


def test_it_is_the_right_to_write_that_is_tried(guest_running: LiveGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    original = os.open

    def watched(path: str, flags: int) -> int:
        opened.append(flags & os.O_ACCMODE)
        return original(path, flags)

    monkeypatch.setattr(os, "open", watched)
    exposures.code_injection_exposure(guest_running.guest.target)
    assert opened == [os.O_RDWR]


def test_a_qemu_that_is_gone_cannot_be_written_to(guest_running: LiveGuest) -> None:
    target = guest_running.guest.target
    guest_running.run(guest_running.guest.qemu.kill())
    assert exposures.code_injection_exposure(target).detail == "tried as uid 0: refused, ENOENT"


def test_a_descriptor_that_qemu_does_not_hold_is_no_exposure_claimed(guest_running: LiveGuest) -> None:
    target = guest_running.guest.target
    guest_running.run(guest_running.guest.qemu.kill())
    assert "refused" in exposures.pidfd_getfd_exposure(target).detail
