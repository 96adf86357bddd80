"""`vmmback console` of real guests: a shell on a terminal and by a pipe, and every way in which it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.conftest import ROOT, Start, eventually
from integration.intruders import Launches, launches, probes_of, report_of
from integration.terminal import Terminal

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_direct_map")

SERVICE = ROOT / "configs/demo-service.toml"
NAME = "demo-service"


@pytest.fixture
def launched(start: Start, vmmback: Start, runtime_dir: Path, tmp_path: Path) -> Launches:
    return launches(start, vmmback, runtime_dir, tmp_path)


def console(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vmmback", "console", *arguments]


def piped(typed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Give `vmmback console` this as its standard input."""
    return subprocess.run(
        console(*arguments), input=typed, capture_output=True, text=True, cwd=ROOT, timeout=30, check=False
    )


def attached(terminal: Terminal, text: str) -> None:
    """Wait until a terminal shows this, and is in raw mode."""
    terminal.read_until(lambda: text in terminal.text, f"{text!r} is shown")
    eventually(lambda: terminal.mode != terminal.mode_before, "the terminal is in raw mode")


def descriptors_of(pid: int) -> int:
    """Return how many descriptors a process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.usefixtures("needs_guest_kernel")
def test_the_service_guest_has_a_shell_on_its_console_until_its_power_button_is_pressed(
    vmmback: Start, runtime_dir: Path
) -> None:
    """One guest, one boot: isolated, a shell on two terminals and by a pipe, and off at the button."""
    running = vmmback("launch", SERVICE, "--json")
    said = "is isolated while it runs"
    running.wait_until(lambda: said in running.stderr, f"it {said}", 60)
    supervisor = running.process.pid
    descriptors = descriptors_of(supervisor)
    with Terminal(console(NAME)) as first, Terminal(console(NAME, "--no-scrollback")) as second:
        for terminal in (first, second):
            attached(terminal, "Ctrl-] q leaves")
        # The scrollback, then the shell.
        first.read_until(lambda: "GUEST READY" in first.text and "/ #" in first.text, "the shell's prompt is shown")
        assert "Linux version" in first.text
        first.type(b"echo $((6 * 7))x $(uname -s)\r")
        first.read_until(lambda: "\n42x Linux\n" in first.text, "the shell answers")
        second.read_until(lambda: "\n42x Linux\n" in second.text, "the other terminal shows it too")
        assert "GUEST READY" not in second.text
        # The size of the terminal, which SIGWINCH alone does not carry to the guest.
        first.resize(33, 111)
        first.type(b"\x1dr")
        first.read_until(lambda: "stty rows 33 cols 111\n" in first.text, "the size is typed")
        first.type(b"stty size\r")
        first.read_until(lambda: "\n33 111\n" in first.text, "the guest knows the size")
        # Ctrl-C is the guest's.
        first.type(b"sh -c 'echo sleep\"\"ing; exec sleep 1000'\r")
        first.read_until(lambda: "\nsleeping\n" in first.text, "sleep begins")
        first.type(b"\x03echo interrupt''ed\r")
        first.read_until(lambda: "\ninterrupted\n" in first.text, "Ctrl-C ends a program of the guest's")
        first.type(b"\x1d?")
        first.read_until(lambda: "q or . leaves" in first.text, "help is shown")
        assert first.mode != first.mode_before
        first.type(b"\x1dq")
        assert first.ended() == 0
        assert f"you left the console of {NAME}, which runs on" in first.text
        assert first.mode == first.mode_before
        second.process.kill()
    eventually(lambda: descriptors_of(supervisor) == descriptors, "nothing of the clients is left")

    answer = piped("echo by-$((1 + 1))-pipe\n", NAME, "--no-scrollback")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "\nby-2-pipe\n" in answer.stdout
    assert "GUEST READY" not in answer.stdout

    assert report_of(vmmback("audit", NAME, "--json").ended())["verdict"] == "isolated"
    with Terminal(console(NAME)) as terminal:
        terminal.read_until(lambda: "by-2-pipe\n" in terminal.text, "the scrollback is shown")
        running.process.terminate()
        assert terminal.ended() == 0
        assert "power button pressed: powering off" in terminal.text
        assert f"vmmback: guest {NAME} has ended" in terminal.text
        assert terminal.mode == terminal.mode_before
    ended = running.ended()
    assert ended.code == 0, ended.stderr
    report = report_of(ended)
    assert report["verdict"] == "isolated"
    assert all(probe["verdict"] == "blocked" for probe in probes_of(report).values())
    (told,) = [exposure["detail"] for exposure in report["exposures"] if exposure["name"] == "serial-console"]
    assert " bytes that were typed to it" in told


def test_the_supervisors_sigkill_is_told_apart_from_the_guests_end(launched: Launches) -> None:
    guest = launched()
    with Terminal(console(guest.name)) as terminal, Terminal(console(guest.name)) as stopped:
        for each in (terminal, stopped):
            attached(each, "READY")
        stopped.process.send_signal(signal.SIGTERM)
        assert stopped.ended() == 128 + signal.SIGTERM
        assert "stopped by SIGTERM at the console" in stopped.text
        assert stopped.mode == stopped.mode_before
        guest.process.process.kill()
        assert terminal.ended() == 6
        assert "vmmback: error: the guest's supervisor is gone" in terminal.text
        assert terminal.mode == terminal.mode_before
    guest.process.ended()


def test_a_guest_that_reads_nothing_holds_up_nobody(launched: Launches) -> None:
    """The tiny guest has halted: its UART takes what a few buffers hold."""
    guest = launched()
    descriptors = descriptors_of(guest.process.process.pid)
    with (
        subprocess.Popen(console(guest.name), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT) as typing,
        Terminal(console(guest.name)) as terminal,
    ):
        assert typing.stdin is not None
        number = typing.stdin.fileno()
        os.set_blocking(number, False)

        def stuck() -> bool:
            try:
                return not os.write(number, b"x" * 4096)
            except BlockingIOError:  # the pipe is full, and nobody takes of it
                return descriptors_of(guest.process.process.pid) >= descriptors + 2

        eventually(stuck, "no more can be typed", 20)
        assert guest.audit().code == 0
        attached(terminal, "READY")

        def told() -> bool:
            terminal.type(b"y" * 2000)
            return terminal.shows_within("what you type is lost", 0.01)

        eventually(told, "it says that nothing is read", 20)
        terminal.type(b"\x1d.")
        assert terminal.ended() == 0
        typing.kill()
    eventually(lambda: descriptors_of(guest.process.process.pid) == descriptors, "nothing of them is left")
    assert guest.end().code == 0


def test_no_such_guest(runtime_dir: Path) -> None:
    done = piped("", "nobody")
    assert (done.returncode, done.stdout) == (7, "")
    assert "no guest named nobody is running" in done.stderr
