"""`[isolation] every`: a guest that becomes exposed while it runs is found, told once, and gets what its file says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import Start, eventually, guest_file, prepared
from integration.intruders import (
    WITH_FULL_QMP,
    Launched,
    Launches,
    intruder,
    launches,
    qmp,
    readable,
    report_of,
    unprotect,
)
from vmmback.linux import procfs

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_direct_map")

EVERY = 'every = "1s"\n'


@pytest.fixture
def launched(start: Start, vmmback: Start, runtime_dir: Path, tmp_path: Path) -> Launches:
    return launches(start, vmmback, runtime_dir, tmp_path)


def drifts_in(stderr: str) -> list[str]:
    return re.findall(r"^vmmback: drift at [0-9T:+-]+: (.*)$", stderr, re.MULTILINE)


@contextmanager
def events_of(guest: Launched) -> Iterator[Callable[[], list[Any]]]:
    """Connect to qmp.sock; yield a function that returns the events that have come."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(guest.folder / "qmp.sock"))
        connection.sendall(b'{"execute":"qmp_capabilities","id":1}')
        connection.setblocking(False)
        received = b""

        def events() -> list[Any]:
            nonlocal received
            with suppress(BlockingIOError):
                received += connection.recv(1 << 20)
            return [event for line in received.splitlines() if "event" in (event := json.loads(line))]

        def negotiated() -> bool:
            events()
            return b'"return"' in received

        eventually(negotiated, "it negotiated")
        yield events


def test_a_drift_is_told_once_and_ends_the_guest(launched: Launches) -> None:
    """on-exposed = "kill" is the default."""
    guest = launched(isolation=EVERY)
    with events_of(guest) as events, intruder("maps", guest) as pid:
        expected = f"process {pid} ({procfs.command_name(pid)}) maps it"
        over = guest.process.ended()
        told = [event for event in events() if event["event"] == "__org.vmmback_DRIFT"]
    assert over.code == 5, over.stderr
    report = report_of(over)
    assert (report["verdict"], readable(report)) == ("exposed", {"holders"})
    (drift,) = report["drifts"]
    assert (drift["probe"], drift["detail"]) == ("holders", expected)
    assert drifts_in(over.stderr) == [f"holders: {expected}"]
    assert "the guest is exposed and is ended (on-exposed is kill)" in over.stderr
    assert [event["data"] for event in told] == [drift]
    assert told[0]["timestamp"].keys() == {"seconds", "microseconds"}
    assert not os.path.lexists(f"/proc/{guest.qemu}")


def test_it_pauses_a_guest_that_nobody_resumes(launched: Launches) -> None:
    guest = launched(isolation=f'{EVERY}on-exposed = "pause"')
    with intruder("traces", guest):
        guest.process.wait_for("the guest is exposed and stands still (on-exposed is pause)")
    path = guest.folder / "qmp.sock"
    eventually(lambda: qmp(path, "query-status")["return"]["status"] == "paused", "it stands still")
    assert "the guest is exposed and stands still" in qmp(path, "cont")["error"]["desc"]
    assert "error" in qmp(path, "system_wakeup")
    assert qmp(path, "query-status")["return"]["status"] == "paused"
    over = guest.end()
    assert over.code == 5, over.stderr
    report = report_of(over)
    assert readable(report) == {"tracer"}
    assert report["denied_commands"] == {"cont": 1, "system_wakeup": 1}


def test_it_warns_of_each_drift_once_and_goes_on(launched: Launches, tmp_path: Path) -> None:
    guest = launched(WITH_FULL_QMP, tmp_path / "full", isolation=f'{EVERY}on-exposed = "warn"')
    unprotect(tmp_path / "full", guest)
    guest.process.wait_for(": vma-flags: ")
    with intruder("holds", guest):
        guest.process.wait_for(": holders: ")
        audits = [report_of(guest.audit()) for _ in range(2)]  # by the way: they find nothing that is new
    assert [[drift["probe"] for drift in report["drifts"]] for report in audits] == [["vma-flags", "holders"]] * 2
    assert qmp(guest.folder / "qmp.sock", "query-status")["return"]["status"] == "running"
    over = guest.end()
    assert over.code == 5, over.stderr
    assert [told.partition(":")[0] for told in drifts_in(over.stderr)] == ["vma-flags", "holders"]
    assert [drift["probe"] for drift in report_of(over)["drifts"]] == ["vma-flags", "holders"]


def test_a_healthy_guest_raises_no_alarm(tmp_path: Path) -> None:
    """Ten examinations, two at a time, while the supervisor starts programs."""
    with prepared(guest_file(tmp_path)) as live:
        live.start()

        async def examined() -> None:
            for _ in range(5):
                report = await live.guest.examine()
                assert (report.verdict, report.reasons) == ("isolated", ())

        async def programs(examinations: asyncio.Future[tuple[None, None]]) -> None:
            started = 0
            while started < 20 or not examinations.done():
                program = await asyncio.create_subprocess_exec("true")
                await program.wait()
                started += 1

        async def both() -> None:
            examinations = asyncio.gather(examined(), examined())
            await asyncio.gather(examinations, programs(examinations))

        live.run(both())
        assert live.watcher.drifts == []
        assert not live.guest.exposed.is_set()


def test_a_healthy_guest_that_is_watched_and_audited_raises_no_alarm(launched: Launches) -> None:
    guest = launched(isolation=EVERY)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert guest.audit().code == 0
    over = guest.end()
    assert over.code == 0, over.stderr
    assert drifts_in(over.stderr) == []
    assert report_of(over)["drifts"] == []
