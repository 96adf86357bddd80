"""Guests in the background: started, listed, asked, read, stopped; and the sudden end of each of their processes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import (
    ROOT,
    TEST_TIMEOUT_S,
    Ended,
    Start,
    Supervisor,
    eventually,
    guest_file,
    processes_of,
    stopped_workers,
    tiny_rom,
)
from integration.leftovers import children_of, command_line, descriptors_of
from integration.terminal import Terminal
from vmmback.ask import ask_all
from vmmback.report import IsolationReport

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_direct_map")

VMMBACK = [sys.executable, "-m", "vmmback"]
NEVER = "NEVER"


def run(*arguments: str | Path, timeout_s: float = 60.0) -> Ended:
    """Run a command of vmmback to its end."""
    argv = [*VMMBACK, *map(str, arguments)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, check=False, timeout=timeout_s)
    return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def detached(file: Path, *options: str) -> str:
    """Start a guest in the background; return its name."""
    ended = run("launch", file, "--detach", *options)
    assert ended.code == 0, ended.stderr
    return file.stem


def listed() -> dict[str, Any]:
    """Return what `ps` says of each guest, by name."""
    ended = run("ps", "--json")
    assert (ended.code, ended.stderr) == (0, "")
    return {guest["name"]: guest for guest in json.loads(ended.stdout)}


def status(name: str) -> Any:
    ended = run("status", name, "--json")
    assert ended.code == 0, ended.stderr
    return json.loads(ended.stdout)


def gone(pid: int) -> bool:
    """Tell whether a process is gone, or a zombie that whoever adopted it has not reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


def keeper_of(pid: int) -> int:
    return next(child for child in children_of(pid) if "vmmback-keeper" in command_line(child))


def all_is_gone(runtime_dir: Path) -> None:
    eventually(lambda: not processes_of(runtime_dir), "all processes are gone")
    eventually(lambda: not runtime_dir.exists() or not list(runtime_dir.iterdir()), "all folders are gone")


# --- A life -----------------------------------------------------------------------------------------------------------


def test_a_guest_is_started_on_a_terminal_and_outlives_it(
    tmp_path: Path, runtime_dir: Path, vmmback: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = guest_file(tmp_path, rom=tiny_rom())
    with Terminal([*VMMBACK, "launch", str(file), "--detach"]) as terminal:
        assert terminal.ended() == 0, terminal.text
        assert f"guest {file.stem}: 16 MiB of 16 MiB secret" in terminal.text
        assert f"guest {file.stem} runs in the background: vmmback status {file.stem}" in terminal.text
    name = file.stem
    guest = status(name)
    assert listed().keys() == {name}
    assert guest["state"] == "running"
    assert guest["verdict"] == "isolated"
    assert (guest["secret_bytes"], guest["validated_after"]) == (16 << 20, "'READY' on the console")
    assert guest["config_file"] == str(file)
    assert guest["console_logs"] == [str(runtime_dir / name / "serial.log"), str(file.with_suffix(".serial.log"))]

    # The supervisor has nothing of the terminal, nor of whoever started it.
    pid = guest["pid"]
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"  # noqa: PTH115
    links = descriptors_of(pid)
    assert [links[number] for number in "012"] == ["/dev/null"] * 3
    assert not any("/pts/" in link or ("/tmp/" in link and str(runtime_dir) not in link and "serial.log" not in link)
                   for link in links.values())  # fmt: skip

    text = run("status", name).stdout
    assert f"supervisor:      pid {pid}\n" in text
    table = run("ps").stdout.splitlines()
    assert table[0].split() == ["NAME", "STATE", "PID", "UPTIME", "SECRET", "VERDICT"]
    assert table[1].split()[:3] == [name, "running", str(pid)]
    assert table[1].split()[-3:] == ["16", "MiB", "isolated"]

    assert run("logs", name).stdout.endswith("READY\n")
    assert "the guest is isolated while it runs\n" in run("logs", name, "--supervisor").stdout
    assert run("logs", name, "--qemu").code == 0
    assert json.loads(run("qmp", name, "query-status").stdout)["status"] == "running"
    denied = run("qmp", name, "pmemsave", '{"val": 0, "size": 4096, "filename": "/tmp/x"}')
    assert denied.code == 6
    assert denied.has_one_error()
    assert run("qmp", name, "query-status", "[]").code == 2
    assert run("qmp", name, "stop").code == 0
    assert listed()[name]["state"] == "paused"
    assert run("qmp", name, "cont").code == 0

    follower = vmmback("logs", name, "-f")
    follower.wait_for("READY")
    ended = run("stop", name, "--timeout", "200ms", "--json")
    assert ended.code == 0, ended.stderr
    report = IsolationReport.from_json(ended.stdout)
    assert report.verdict == "isolated"
    assert report.probes[-1].name == "freed-frames"
    assert report.denied_commands == {"pmemsave": 1}
    assert listed() == {}  # no folder of it is left at the moment that `stop` has ended
    assert list(runtime_dir.iterdir()) == []
    assert follower.ended().code == 0
    all_is_gone(runtime_dir)


@pytest.mark.parametrize("command", ["status", "stop", "logs", "qmp"])
def test_no_such_guest_names_the_live_ones(tmp_path: Path, runtime_dir: Path, command: str) -> None:
    (runtime_dir / "a").mkdir(mode=0o700, parents=True)  # a stale one, which is none
    ended = run(command, "demo", *(["query-status"] if command == "qmp" else []))
    assert (ended.code, ended.stdout) == (7, "")
    assert ended.stderr.splitlines() == [
        "vmmback: error: no guest named demo is running",
        f"vmmback: hint: running in {runtime_dir}: none",
    ]
    assert list(runtime_dir.iterdir()) == []


def test_the_json_of_a_detached_launch_is_its_report_and_unvalidated_it_is_null(tmp_path: Path) -> None:
    ended = run("launch", guest_file(tmp_path), "--detach", "--json")
    assert IsolationReport.from_json(ended.stdout).verdict == "isolated"
    file = guest_file(tmp_path, ready=NEVER)
    ended = run("launch", file, "--detach", "--json", "--no-validate")
    assert (ended.code, ended.stdout) == (0, "null\n"), ended.stderr
    for guest in listed().values():
        assert guest["verdict"] == (None if guest["name"] == file.stem else "isolated")
        assert run("stop", guest["name"], "--kill").code == 0


def test_an_exposed_guest_exits_with_5_and_is_ended(tmp_path: Path, runtime_dir: Path) -> None:
    ended = run("launch", guest_file(tmp_path, backing="ordinary"), "--detach")
    assert ended.code == 5
    all_is_gone(runtime_dir)


@pytest.mark.parametrize("what", ["memory", "name", "QEMU"])
def test_an_error_of_the_start_comes_as_usual(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "memory":
        ended, code, words = run("launch", guest_file(tmp_path, size="16TiB"), "--detach"), 4, "not enough memory"
    elif what == "name":
        file = guest_file(tmp_path)
        name = detached(file, "--no-validate")
        ended, code, words = run("launch", file, "--detach"), 2, f"a guest named {name} is running already"
        assert run("stop", name, "--kill").code == 0
    else:
        broken = tmp_path / "bin"
        broken.mkdir()
        (broken / "qemu-system-x86_64").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
        (broken / "qemu-system-x86_64").chmod(0o755)
        monkeypatch.setenv("PATH", f"{broken}:{os.environ['PATH']}")
        ended, code, words = run("launch", guest_file(tmp_path), "--detach"), 6, "broken"
    assert ended.code == code, ended.stderr
    assert ended.has_one_error()
    if what != "memory":
        assert words in ended.stderr
    all_is_gone(runtime_dir)


# --- Ends -------------------------------------------------------------------------------------------------------------


def test_sudden_ends_leave_nothing_and_touch_no_other_guest(tmp_path: Path, runtime_dir: Path) -> None:
    stays = detached(guest_file(tmp_path))
    before = status(stays)

    qemu_killed = detached(guest_file(tmp_path), "--no-validate")
    os.kill(status(qemu_killed)["qemu_pid"], signal.SIGKILL)
    eventually(lambda: not (runtime_dir / qemu_killed).exists(), "the folder is gone")

    killed = detached(guest_file(tmp_path), "--no-validate")
    guest = status(killed)
    os.kill(guest["pid"], signal.SIGKILL)
    eventually(lambda: gone(guest["qemu_pid"]), "QEMU is gone with its supervisor")
    eventually(lambda: not (runtime_dir / killed).exists(), "the folder is gone")

    both = detached(guest_file(tmp_path), "--no-validate")
    guest = status(both)
    os.kill(keeper_of(guest["pid"]), signal.SIGKILL)
    assert listed().keys() == {stays, both}  # a live guest's folder stays
    os.kill(guest["pid"], signal.SIGKILL)
    eventually(lambda: gone(guest["qemu_pid"]) and gone(guest["pid"]), "both are gone")
    assert (runtime_dir / both).exists()
    assert listed().keys() == {stays}
    assert [path.name for path in runtime_dir.iterdir()] == [stays]

    after = status(stays)
    assert (after["pid"], after["qemu_pid"], after["state"]) == (before["pid"], before["qemu_pid"], "running")
    assert run("audit", stays).code == 0
    assert run("stop", stays, "--kill").code == 0
    all_is_gone(runtime_dir)


STEPS = ("folder", "worker", "QEMU", "booting")


def reach(parent: Supervisor, file: Path, runtime_dir: Path, step: str) -> None:
    folder = runtime_dir / file.stem
    seen = {
        "folder": folder.exists,
        "worker": lambda: bool(stopped_workers(runtime_dir)),
        "QEMU": (folder / "qemu.log").exists,
        "booting": lambda: "READY" in file.with_suffix(".serial.log").read_text(),
    }
    with contextlib.suppress(FileNotFoundError):
        parent.wait_until(lambda: _is(seen[step]), step)


def _is(seen: Any) -> bool:
    try:
        return bool(seen())
    except OSError:
        return False


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL], ids=lambda signum: signum.name)
def test_the_end_of_who_waits_for_a_start_ends_it(
    tmp_path: Path, runtime_dir: Path, vmmback: Start, step: str, signum: signal.Signals
) -> None:
    file = guest_file(tmp_path, ready=NEVER, size="256MiB" if step == "worker" else "16MiB")
    parent = vmmback("launch", file, "--detach")
    reach(parent, file, runtime_dir, step)
    parent.signal(signum)
    if step == "booting" and signum == signal.SIGINT:  # the guest ignores its power button
        parent.signal(signal.SIGTERM)
    ended = parent.ended()
    if signum == signal.SIGINT:
        assert ended.code == (8 if step == "booting" else 130), ended.stderr
        assert "Traceback" not in ended.stderr
        assert step == "booting" or "stopped by SIGINT before the guest ran" in ended.stderr
        assert list(runtime_dir.iterdir()) == []
    all_is_gone(runtime_dir)


def test_standard_streams_that_are_closed_cost_no_guest(tmp_path: Path, runtime_dir: Path) -> None:
    file = guest_file(tmp_path)
    argv = [*VMMBACK, "launch", str(file), "--detach", "--no-validate"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *argv], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0
    assert listed()[file.stem]["state"] == "running"
    assert run("stop", file.stem, "--kill").code == 0
    all_is_gone(runtime_dir)


def test_what_is_wrong_with_a_qmp_command_is_told_at_once(tmp_path: Path) -> None:
    name = detached(guest_file(tmp_path), "--no-validate")
    for arguments, code in (('{"a": NaN}', 6), ("[" * 30_000, 2), ("[]", 2)):
        ended = run("qmp", name, "query-status", arguments, timeout_s=20)
        assert ended.code == code
        assert ended.stderr.startswith("vmmback: error: ")
        assert "did not answer" not in ended.stderr
    with open("/dev/full", "wb") as full:
        logs = [*VMMBACK, "logs", name, "--supervisor"]
        done = subprocess.run(logs, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False, timeout=20)
    assert done.returncode == 2
    assert b"No space left" in done.stderr
    assert run("stop", name, "--kill").code == 0


def test_ctrl_c_on_stop_leaves_the_guest_ending_and_says_so(tmp_path: Path, runtime_dir: Path, vmmback: Start) -> None:
    name = detached(guest_file(tmp_path), "--no-validate")
    stop = vmmback("stop", name, "--timeout", "1min")
    eventually(lambda: listed()[name]["state"] == "stopping", "the guest is asked to end")
    stop.signal(signal.SIGINT)
    ended = stop.ended()
    told = "vmmback: error: stopped by SIGINT before the guest was gone: it goes on ending\n"
    assert (ended.code, ended.stderr.endswith(told)) == (130, True), ended.stderr
    assert run("stop", name, "--kill").code == 0
    all_is_gone(runtime_dir)


def test_a_guest_that_starts_can_be_stopped(tmp_path: Path, runtime_dir: Path, vmmback: Start) -> None:
    file = guest_file(tmp_path, size="512MiB")
    parent = vmmback("launch", file, "--detach")
    parent.wait_until(lambda: bool(stopped_workers(runtime_dir)), "the prefault begins")
    assert listed()[file.stem]["state"] == "starting"
    refused = run("audit", file.stem)
    assert refused.code == 6
    assert "the guest is starting" in refused.stderr
    ended = run("stop", file.stem)
    assert (ended.code, ended.stdout) == (0, "")
    assert "is gone without a report: stopped by SIGTERM before the guest ran" in ended.stderr
    assert parent.ended().code == 128 + signal.SIGTERM
    all_is_gone(runtime_dir)


def test_two_stops_of_a_guest_that_ignores_its_power_button(tmp_path: Path, runtime_dir: Path, vmmback: Start) -> None:
    name = detached(guest_file(tmp_path))
    patient = vmmback("stop", name, "--timeout", "1h", "--json")
    eventually(lambda: listed()[name]["state"] == "stopping", "it is asked to end")
    hasty = run("stop", name, "--timeout", "100ms", "--json")
    both = [hasty, patient.ended()]
    assert [ended.code for ended in both] == [0, 0]
    assert both[0].stdout == both[1].stdout
    assert IsolationReport.from_json(both[0].stdout).probes[-1].name == "freed-frames"
    all_is_gone(runtime_dir)


def test_a_supervisor_that_hangs_holds_up_nobody(tmp_path: Path) -> None:
    well, hangs = detached(guest_file(tmp_path), "--no-validate"), detached(guest_file(tmp_path), "--no-validate")
    pid = status(hangs)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        guests = listed()
        assert time.monotonic() - started < 20
        assert (guests[well]["state"], guests[hangs]["state"]) == ("running", "no answer")
        assert f"{hangs}  no answer" in run("ps").stdout
    finally:
        os.kill(pid, signal.SIGCONT)
    for name in (well, hangs):
        assert run("stop", name, "--kill").code == 0


def test_a_reader_of_the_log_that_stands_still_harms_nobody(tmp_path: Path, runtime_dir: Path) -> None:
    rom = tiny_rom()
    name = detached(guest_file(tmp_path, rom=rom))
    with subprocess.Popen([*VMMBACK, "logs", name, "-f"], cwd=ROOT, stdout=subprocess.PIPE) as reader:
        reader.send_signal(signal.SIGSTOP)
        assert run("stop", name, "--kill").code == 0
        assert list(runtime_dir.iterdir()) == []
        reader.send_signal(signal.SIGCONT)
        assert reader.stdout is not None
        assert b"\0" not in reader.stdout.read()
        assert reader.wait(30) in (0, 7)  # 7: it was stopped before it had looked for the guest


# --- systemd ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    name = f"vmmback-{secrets.token_hex(4)}"
    path = str(tmp_path / name) if request.param == "path" else f"\0{name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path)
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", path.replace("\0", "@"))
        yield listening


def test_a_service_manager_is_told(tmp_path: Path, vmmback: Start, manager: socket.socket) -> None:
    foreground = vmmback("launch", guest_file(tmp_path))
    told: list[str] = []
    while not told or "READY=1" not in told[-1].splitlines():
        told.append(manager.recv(4096).decode())
    assert told[-1] == "READY=1\nSTATUS=running, isolated"
    assert all(message.startswith("STATUS=") for message in told[:-1])
    assert "STATUS=prefault: 100 % of 16 MiB" in told
    for signum in (signal.SIGTERM, signal.SIGINT):
        foreground.signal(signum)
    assert manager.recv(4096) == b"STOPPING=1\nSTATUS=stopping, isolated"
    assert foreground.ended().code == 0


# --- Many -------------------------------------------------------------------------------------------------------------

MANY = 50
MANY_TIMEOUT_S = 300.0  # nobody waits for so long on a machine that does nothing else: some 30 s


@pytest.mark.alone
def test_fifty_guests_are_started_at_once_listed_and_stopped(tmp_path: Path, runtime_dir: Path) -> None:
    signal.setitimer(signal.ITIMER_REAL, max(TEST_TIMEOUT_S, MANY_TIMEOUT_S))  # the watchdog's
    rom = tiny_rom()
    files = [guest_file(tmp_path, rom=rom) for _ in range(MANY)]
    starts = [
        subprocess.Popen(
            [*VMMBACK, "launch", str(file), "--detach"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for file in files
    ]
    said = [start.communicate(timeout=MANY_TIMEOUT_S)[1].decode() for start in starts]
    assert [start.returncode for start in starts] == [0] * MANY, said

    seconds = []
    for _ in range(3):
        started = time.monotonic()
        guests = listed()
        seconds.append(time.monotonic() - started)
        assert guests.keys() == {file.stem for file in files}
        assert {(guest["state"], guest["verdict"]) for guest in guests.values()} == {("running", "isolated")}
    assert min(seconds) < 10, seconds  # ./dev bench has the figure

    answers = ask_all([runtime_dir / file.stem for file in files], "Stop", {"timeout_s": 0.1}, 60)
    reports = [IsolationReport.of(answer["report"]) for answer in answers if isinstance(answer, dict)]
    assert [report.verdict for report in reports] == ["isolated"] * MANY, answers
    all_is_gone(runtime_dir)
    assert listed() == {}
