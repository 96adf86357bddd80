"""`vmmback audit` from outside: of guests that run, that are broken on purpose, that end, and that are not there."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from junitparser import JUnitXml

from integration.conftest import TINY_BYTES, Ended, Start, eventually, guest_file, processes_of, qemu_of
from integration.intruders import (
    SLOW_AUDIT,
    WITH_FULL_QMP,
    WITHOUT_HANDOFF,
    Launched,
    Launches,
    intruder,
    launches,
    probes_of,
    qmp,
    readable,
    report_of,
    unprotect,
)
from integration.terminal import Terminal
from vmmback import tiny_guest
from vmmback.isolation.audit import REQUIRED
from vmmback.isolation.catalogue import HOLDER_PROBES, LIVE_PROBES, RIGHTS_PROBES
from vmmback.linux import procfs

# A hunt that is the first of all to read the whole of RAM may take a minute (docs/HUNT.md).
pytestmark = [pytest.mark.usefixtures("needs_qemu", "needs_direct_map"), pytest.mark.timeout_s(300)]

WARN = 'on-exposed = "warn"'
ALL = REQUIRED | {probe.name for probe in (*LIVE_PROBES, *RIGHTS_PROBES)}


@pytest.fixture
def launched(start: Start, vmmback: Start, runtime_dir: Path, tmp_path: Path) -> Launches:
    return launches(start, vmmback, runtime_dir, tmp_path)


def status_of(guest: Launched) -> Any:
    return qmp(guest.folder / "qmp.sock", "query-status")["return"]["status"]


# --- Guests as they should be -----------------------------------------------------------------------------------------


def test_a_running_guest_is_isolated_and_goes_on(launched: Launches, vmmback: Start, tmp_path: Path) -> None:
    guest = launched()
    page, xml = tmp_path / "page.html", tmp_path / "junit.xml"
    page.write_text("what was there before")
    ended = guest.audit("--html", page, "--junit", xml)
    assert (ended.code, ended.stderr) == (0, "")
    report = report_of(ended)
    assert (report["guest"], report["verdict"], report["reasons"]) == (guest.name, "isolated", [])
    assert report["memory"]["checked_pages"] == report["memory"]["present_pages"] == TINY_BYTES // procfs.PAGE_SIZE
    probes = probes_of(report)
    assert probes.keys() == ALL
    assert {(probe["verdict"], probe["control"]) for probe in probes.values()} == {("blocked", "readable")}
    assert 0 < report["timings"]["audit"] < 20  # ./dev bench has the figure
    assert (report["drifts"], report["hunt"]) == ([], None)
    assert f">{guest.name}<" in page.read_text()
    assert {case.name for suite in JUnitXml.fromfile(str(xml)) for case in suite} >= ALL
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # no draft is left
    assert status_of(guest) == "running"
    for_people = vmmback("audit", guest.name).ended()
    assert (for_people.code, for_people.stderr) == (0, "")
    assert "│ direct-map" in for_people.stdout
    assert ": 16 MiB of 16 MiB secret, 4096 of 4096 pages checked, 0 readable: isolated" in for_people.stdout
    over = guest.end()
    assert over.code == 0, over.stderr
    final = report_of(over)
    assert (final["verdict"], final["drifts"]) == ("isolated", [])


def test_who_has_qmp_may_pause_the_guest_and_let_it_go_on(launched: Launches) -> None:
    guest = launched()
    for command, status in (("stop", "paused"), ("cont", "running")):
        assert qmp(guest.folder / "qmp.sock", command) == {"return": {}}
        assert status_of(guest) == status
    assert guest.end().code == 0


def test_its_twin_is_exposed(launched: Launches) -> None:
    guest = launched(backing="ordinary", isolation=WARN)
    ended = guest.audit()
    assert ended.code == 5, ended.stderr
    report = report_of(ended)
    probes = probes_of(report)
    assert report["verdict"] == "exposed"
    assert probes.keys() == ALL
    assert readable(report) == ALL - {probe.name for probe in (*HOLDER_PROBES, *RIGHTS_PROBES)}
    assert {probe["control"] for probe in probes.values()} == {"readable"}
    assert status_of(guest) == "running"
    assert guest.end().code == 5


# --- Each protection, broken once -------------------------------------------------------------------------------------


def assert_exposed(ended: Ended, *names: str) -> Any:
    assert ended.code == 5, ended.stderr
    report = report_of(ended)
    assert report["verdict"] == "exposed"
    assert readable(report) == set(names)
    for name in names:
        assert any(reason.startswith(f"{name}: ") for reason in report["reasons"])
    return report


def test_a_qemu_without_the_handoff(launched: Launches) -> None:
    guest = launched(WITHOUT_HANDOFF, isolation=WARN)
    report = assert_exposed(guest.audit(), "qmp-proof")
    assert probes_of(report)["qmp-proof"]["detail"].startswith("the guest can write to ordinary memory: ram0")
    assert {"name": "ram0", "size": TINY_BYTES, "backing": "ordinary", "guest_writable": True} in report["ram_blocks"]


def test_dump_turned_on_over_a_full_qmp_connection(launched: Launches, tmp_path: Path) -> None:
    guest = launched(WITH_FULL_QMP, tmp_path / "full", isolation=WARN)
    assert guest.audit().code == 0
    unprotect(tmp_path / "full", guest)
    report = assert_exposed(guest.audit(), "vma-flags")
    assert [drift["probe"] for drift in report["drifts"]] == ["vma-flags"]


@pytest.mark.parametrize(
    ("what", "probe", "detail"),
    [
        ("holds", "holders", "process {pid} ({name}) holds its descriptor"),
        ("maps", "holders", "process {pid} ({name}) maps it"),
        ("traces", "tracer", "traced by process {pid} ({name})"),
    ],
)
def test_another_process_is_at_the_ram(launched: Launches, what: str, probe: str, detail: str) -> None:
    guest = launched(isolation=WARN)
    with intruder(what, guest) as pid:
        expected = detail.format(pid=pid, name=procfs.command_name(pid))
        report = assert_exposed(guest.audit(), probe)
        assert probes_of(report)[probe]["detail"] == expected
    assert status_of(guest) == "running"
    report = assert_exposed(guest.audit(), probe)  # it is gone, but what it copied is not
    assert probes_of(report)[probe]["detail"] == expected
    assert [drift["probe"] for drift in report["drifts"]] == [probe]
    over = guest.end()
    assert over.code == 5
    assert report_of(over)["verdict"] == "exposed"


def test_whoever_audits_gets_the_report_before_the_guest_is_ended(launched: Launches, runtime_dir: Path) -> None:
    """on-exposed = "kill" is the default."""
    guest = launched()
    with intruder("maps", guest):
        assert_exposed(guest.audit(), "holders")
        over = guest.process.ended()
    assert over.code == 5, over.stderr
    assert readable(report_of(over)) == {"holders"}
    assert "drift at " in over.stderr
    assert "the guest is exposed and is ended (on-exposed is kill)" in over.stderr
    assert processes_of(runtime_dir) == {}
    assert list(runtime_dir.iterdir()) == []


def test_a_guest_found_exposed_before_it_is_ready_is_ended_at_once(
    start: Start, vmmback: Start, runtime_dir: Path, tmp_path: Path
) -> None:
    file = guest_file(tmp_path, backing="ordinary", ready="NEVER")
    running = start(sys.executable, "-m", "vmmback", "launch", file, "--json")
    running.wait_until(lambda: (runtime_dir / file.stem / "control").exists(), "the guest runs")
    running.wait_for("READY")
    ended = vmmback("audit", file.stem, "--json").ended()
    assert ended.code == 5, ended.stderr
    assert report_of(ended)["validated_after"] == "a request while it ran"
    over = running.ended()
    assert over.code == 5, over.stderr
    assert "the guest is exposed and is ended (on-exposed is kill)" in over.stderr


# --- Guests that end, or are not there --------------------------------------------------------------------------------


def test_a_guest_that_ends_during_the_audit(launched: Launches, vmmback: Start, tmp_path: Path) -> None:
    began = tmp_path / "began"
    guest = launched(SLOW_AUDIT, began)
    audit = vmmback("audit", guest.name, "--json")
    audit.wait_until(began.exists, "the audit is under way")
    os.kill(guest.qemu, signal.SIGKILL)
    ended = audit.ended()
    assert ended.code == 6, ended.stderr
    assert ended.stdout == ""
    assert ended.has_one_error()
    over = guest.process.ended()
    assert over.code == 6, over.stderr
    assert over.has_one_error()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=lambda signum: signum.name)
def test_a_supervisor_that_is_killed_during_the_audit(
    launched: Launches, vmmback: Start, tmp_path: Path, runtime_dir: Path, signum: signal.Signals
) -> None:
    began = tmp_path / "began"
    guest = launched(SLOW_AUDIT, began)
    audit = vmmback("audit", guest.name, "--json")
    audit.wait_until(began.exists, "the audit is under way")
    guest.process.process.send_signal(signum)
    if signum == signal.SIGSTOP:  # it answers nobody; whoever asked can still be stopped
        audit.signal(signal.SIGINT)
        ended = audit.ended()
        assert (ended.code, ended.stderr) == (130, "vmmback: error: stopped by SIGINT before the audit was done\n")
        guest.process.process.kill()
    else:
        ended = audit.ended()
        assert (ended.code, ended.stderr) == (6, "vmmback: error: the guest ended meanwhile\n")
    assert ended.stdout == ""


def test_no_such_guest(launched: Launches, vmmback: Start, runtime_dir: Path) -> None:
    guest = launched()
    (runtime_dir / "empty").mkdir()
    (runtime_dir / "stale").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(runtime_dir / "stale/control"))
    for name in ("gone", "empty", "stale"):
        ended = vmmback("audit", name).ended()
        assert ended.code == 7, ended.stderr
        assert ended.stdout == ""
        assert f"vmmback: error: no guest named {name} is running\n" in ended.stderr
        assert guest.name in ended.stderr
    for name in ("empty", "stale"):
        for file in (runtime_dir / name).iterdir():
            file.unlink()
        (runtime_dir / name).rmdir()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../run/a", "A", "-", "a" * 64, "\u00e9", "a\nb"])
def test_what_is_no_name(vmmback: Start, name: str) -> None:
    ended = vmmback("audit", "--", name).ended()
    assert ended.code == 2, ended.stderr
    assert ended.has_one_error()
    assert "is not a guest name" in ended.stderr


def test_a_place_where_no_report_can_be_written_is_refused_before_anything_is_tried(
    launched: Launches, tmp_path: Path
) -> None:
    guest = launched()
    (tmp_path / "link").symlink_to("target.html")
    for place in ("/proc/report.html", "/dev/null", tmp_path / "no/folder.html", tmp_path, "x" * 300):
        ended = guest.audit("--html", place)
        assert ended.code == 2, (place, ended.stderr)
        assert ended.stdout == ""
        assert ended.has_one_error()
    assert Path("/dev/null").is_char_device()
    ended = guest.audit("--html", tmp_path / "link")
    assert ended.code == 0, ended.stderr
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target.html").is_file()
    assert list(report_of(guest.end())["timings"]).count("audit") == 1


# --- The hunt ---------------------------------------------------------------------------------------------------------

# `vmmback` whose hunt only tells how long the needle is.
SHORT_HUNT = """
from vmmback import cli
from vmmback.isolation import hunt
from vmmback.report import Hunt
def told(needle, frames, progress):
    assert [len(entries) for entries in frames.values()] == [4096]
    return Hunt(needle_bytes=needle.size, scanned_bytes=1, unreadable_bytes=0, seconds=1, gib_per_s=1, hits=0,
                guest_hits=0, places=())
hunt.hunt = told
cli.main()
"""


def test_the_guests_canary_is_not_in_its_frames(launched: Launches) -> None:
    guest = launched()
    ended = guest.audit("--hunt-from-guest")
    assert ended.code == 0, ended.stderr
    report = report_of(ended)
    assert report["verdict"] == "isolated"
    found = report["hunt"]
    assert (found["needle_bytes"], found["guest_hits"]) == (64, 0)
    assert found["unreadable_bytes"] >= TINY_BYTES
    assert found["scanned_bytes"] > 1 << 30


def test_in_ordinary_ram_it_is(launched: Launches) -> None:
    guest = launched(backing="ordinary", isolation=WARN)
    ended = guest.audit("--hunt-from-guest")
    assert ended.code == 5, ended.stderr
    report = report_of(ended)
    found = report["hunt"]
    assert found["guest_hits"] > 3000  # of 4096 pages, less those of its code and its legacy areas
    assert {place["owner"] for place in found["places"] if place["place"] == "guest"} == {guest.name}
    assert any(reason.startswith("hunt: the canary begins in ") for reason in report["reasons"])


def test_a_canary_from_a_pipe_and_from_a_file(launched: Launches, start: Start, tmp_path: Path) -> None:
    guest = launched()
    (tmp_path / "canary").write_bytes(secrets.token_bytes(99) + b"\n")
    short = [sys.executable, "-c", SHORT_HUNT, "audit", guest.name, "--json", "--hunt"]
    for shell in ('head -c 77 /dev/urandom | tr "\\n" x | "$@" -', f'"$@" 7 7<{tmp_path}/canary'):
        ended = start("sh", "-c", shell, "sh", *short).ended()
        assert ended.code == 0, ended.stderr
        assert report_of(ended)["hunt"]["needle_bytes"] == (77 if "urandom" in shell else 99)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("0123456789abcdef0123456789abcdef", "never the canary itself"),
        ("deadbeefdeadbeefdeadbeef", "never the canary itself"),
        ("\u00b3", "never the canary itself"),
        ("999", "no such descriptor is open"),
    ],
)
def test_a_canary_on_the_command_line_is_refused_and_not_repeated(vmmback: Start, source: str, words: str) -> None:
    ended = vmmback("audit", "none", "--hunt", source).ended()
    assert ended.code == 2
    assert words in ended.stderr
    assert source == "999" or source not in ended.stderr


def test_needles_that_cannot_be_hunted(launched: Launches, start: Start) -> None:
    guest = launched()
    audit = [sys.executable, "-m", "vmmback", "audit", guest.name]
    for shell, words in (
        ('printf 0123456789abcde | "$@" --hunt -', "a needle has 16 to 4096 bytes, this one 15 bytes"),
        ('"$@" --hunt - </dev/null', "this one 0 bytes"),
        ('head -c 5000 /dev/urandom | "$@" --hunt -', "this one more than 4096 bytes"),
        ('head -c 50 /dev/zero | "$@" --hunt -', "would be found by chance"),
        ('"$@" --hunt - --hunt-from-guest </dev/null', "do not go together"),
    ):
        ended = start("sh", "-c", shell, "sh", *audit).ended()
        assert ended.code == 2, (shell, ended.stderr)
        assert words in ended.stderr
        assert ended.stdout == ""
        assert ended.has_one_error()


def test_a_guest_that_printed_no_halves(launched: Launches) -> None:
    rom = tiny_guest.rom(tiny_guest.new_halves())
    guest = launched(rom=rom.replace(b"halves:", b"hidden:"))
    ended = guest.audit("--hunt-from-guest")
    assert ended.code == 2, ended.stderr
    assert "the guest has printed no halves of a canary" in ended.stderr


PROMPT = "the canary (it is not shown): "


def on_a_terminal(guest: Launched, *program: str) -> Terminal:
    terminal = Terminal([sys.executable, *(program or ("-m", "vmmback")), "audit", guest.name, "--hunt", "-"])
    wait_for_prompt(terminal)
    return terminal


def wait_for_prompt(terminal: Terminal) -> None:
    terminal.read_until(lambda: PROMPT in terminal.text, "it asks for the canary")
    eventually(lambda: not terminal.echoes, "what is typed is not shown")


def test_a_canary_typed_on_a_terminal_is_not_shown(launched: Launches) -> None:
    guest = launched()
    canary = secrets.token_hex(24)
    with on_a_terminal(guest, "-c", SHORT_HUNT) as terminal:
        terminal.type(canary.encode() + b"\n")
        assert terminal.ended() == 0, terminal.text
        text = terminal.text
    assert canary not in text
    assert "hunt: 0 frames" in text
    assert ": isolated" in text


@pytest.mark.parametrize(
    ("signum", "typed"),
    [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False)],
    ids=["SIGINT-in-the-hunt", "SIGTERM-in-the-hunt", "SIGTERM-at-the-prompt"],
)
def test_a_signal_ends_a_hunt_and_the_terminal_echoes_again(
    launched: Launches, runtime_dir: Path, signum: signal.Signals, typed: bool
) -> None:
    guest = launched()
    with on_a_terminal(guest) as terminal:
        if typed:
            terminal.type(secrets.token_hex(24).encode() + b"\n")
            terminal.read_until(lambda: "hunt ━" in terminal.text, "the hunt is under way")
        if signum == signal.SIGINT:
            terminal.type(b"\x03")
        else:
            os.kill(terminal.process.pid, signum)
        terminal.read_until(lambda: "before the audit was done" in terminal.text, "it says what ended it")
        echoes = terminal.echoes
        assert terminal.ended() == 128 + signum, terminal.text
    assert echoes
    assert terminal.text.count("vmmback: error: ") == 1
    assert "Traceback" not in terminal.text
    assert status_of(guest) == "running"
    assert qemu_of(runtime_dir) == [guest.qemu]


def test_a_terminal_under_another_number_is_not_shown_what_is_typed_either(launched: Launches) -> None:
    guest = launched()
    argv = [
        "sh",
        "-c",
        '"$@" 3<&0 </dev/null',
        "sh",
        sys.executable,
        "-m",
        "vmmback",
        "audit",
        guest.name,
        "--hunt",
        "3",
    ]
    with Terminal(argv) as terminal:
        wait_for_prompt(terminal)
        terminal.type(b"too short\n")
        assert terminal.ended() == 2
    assert "too short" not in terminal.text
