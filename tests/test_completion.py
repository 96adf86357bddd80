"""Shell completion: what click answers a shell, and what a real bash makes of it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    """A runtime folder with two live guests, and what a power cut left of a third."""
    with ExitStack() as stack:
        for name in ("demo", "demo-service", "dead"):
            (tmp_path / name).mkdir()
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(tmp_path / name / "control"))
            if name != "dead":
                listening.listen()
        (tmp_path / "empty").mkdir()
        yield tmp_path


def answered(line: str, runtime: Path | str, shell: str = "bash") -> list[str]:
    """Ask as a shell's script asks; the last word is to be completed."""
    environment = {
        **os.environ,
        "_VMMBACK_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "VMMBACK_RUNTIME_DIR": str(runtime),
    }
    program = "import sys; sys.argv[0] = 'vmmback'; from vmmback.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize("command", ["audit", "console"])
def test_the_names_of_live_guests_complete(runtime: Path, command: str) -> None:
    assert answered(f"vmmback {command} d", runtime) == ["plain,demo", "plain,demo-service"]
    assert answered(f"vmmback {command} demo-", runtime) == ["plain,demo-service"]
    assert answered(f"vmmback {command} x", runtime) == []


@pytest.mark.parametrize("runtime_dir", ["/nonexistent/run", "not absolute", "/proc/1/nothing"])
def test_where_nothing_can_be_known_nothing_is_said(runtime_dir: str) -> None:
    assert answered("vmmback console ", runtime_dir) == []


def test_commands_options_and_files_complete(runtime: Path) -> None:
    assert answered("vmmback con", runtime) == ["plain,console"]
    assert "plain,--no-validate" in answered("vmmback launch --", runtime)
    assert answered("vmmback launch conf", runtime) == ["file,conf"]  # the shell completes it, folders too


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_clicks(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmmback", "completion", shell], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_VMMBACK_COMPLETE={shell}_complete" in done.stdout


def test_a_real_bash_completes(runtime: Path, tmp_path: Path) -> None:
    program = tmp_path / "vmmback"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vmmback "$@"\n')
    program.chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    script = """
        eval "$(vmmback completion bash)"
        complete -p vmmback
        COMP_WORDS=(vmmback console demo-) COMP_CWORD=2
        _vmmback_completion vmmback
        printf '%s\n' "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VMMBACK_RUNTIME_DIR": str(runtime)}
    done = subprocess.run(
        [bash, "--norc", "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "complete -o nosort -F _vmmback_completion vmmback\ndemo-service\n"


def test_completing_a_name_does_not_wait_for_what_it_does_not_need(runtime: Path) -> None:
    heavy = ["rich", "msgspec", "asyncio", "qemu", "ctypes", "asyncvarlink"]
    program = (
        "import sys; from vmmback.cli.completion import live_guests; "
        f"print(live_guests(), [name for name in {heavy} if name in sys.modules])"
    )
    environment = {**os.environ, "VMMBACK_RUNTIME_DIR": str(runtime)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("['demo', 'demo-service'] []\n", "")
