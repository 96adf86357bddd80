"""The manual page as `./dev man` makes it: man(1) and groff(1) find no fault with it, and show it as it is meant."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from integration import capabilities
from integration.conftest import ROOT
from vmmback import cli

PAGE = ROOT / "build/vmmback.1"


@pytest.fixture(scope="module")
def shown() -> str:
    """The page as a terminal of 100 columns shows it, without bold and underlined letters."""
    capabilities.require(capabilities.MANUAL)
    made = subprocess.run([ROOT / "dev", "man"], capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr
    environment = {**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8"}
    command = ["man", "--warnings=all", "-l", str(PAGE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return re.sub(".\b", "", done.stdout)


def test_groff_finds_no_fault_with_it(shown: str, tmp_path: Path) -> None:
    def complaints(page: Path) -> str:
        command = ["groff", "-man", "-ww", "-z", "-Tutf8", "-k", str(page)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr

    assert complaints(PAGE) == ""
    (tmp_path / "bad.1").write_text(PAGE.read_text() + ".nosuchmacro\n")
    assert "nosuchmacro" in complaints(tmp_path / "bad.1")


def test_it_shows_every_command_with_its_options_as_they_are_typed(shown: str) -> None:
    assert shown.startswith("VMMBACK(1)")
    for section in ("NAME", "SYNOPSIS", "COMMANDS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES", "SEE ALSO"):
        assert f"\n{section}\n" in shown
    for name, command in cli.commands.commands.items():
        assert f"\n   vmmback {name} " in shown
        for param in command.params:
            for option in [*param.opts, *param.secondary_opts]:
                assert not option.startswith("-") or option in shown
    assert "\n       vmmback launch configs/demo.toml --json | jq .verdict\n" in shown
    assert "\\" not in shown
    assert "`" not in shown
