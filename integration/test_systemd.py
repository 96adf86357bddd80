"""The systemd unit: systemd finds no fault with it, and a guest is isolated with the rights that the unit leaves."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration import capabilities
from integration.conftest import ROOT, Start, guest_file
from integration.intruders import probes_of, report_of
from vmmback import errors, launch

UNIT = ROOT / "configs/systemd/vmmback@.service"


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit beside an installed vmmback."""
    unit = tmp_path / UNIT.name
    program = Path(sys.executable).with_name("vmmback")
    text = UNIT.read_text()
    assert text.count("ExecStart=vmmback ") == 1
    unit.write_text(text.replace("ExecStart=vmmback ", f"ExecStart={program} "))
    return unit


def analyzed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    capabilities.require(capabilities.SYSTEMD_ANALYZE)
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_systemd_finds_no_fault_with_the_unit(installed: Path) -> None:
    done = analyzed("verify", "--man=no", installed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # And it would: the twin has a word that systemd does not know.
    installed.write_text(installed.read_text().replace("KillMode=mixed", "KillMode=mixt"))
    assert "mixt" in analyzed("verify", "--man=no", installed).stderr


def test_the_documented_exposure_level_is_that_of_the_unit(installed: Path) -> None:
    done = analyzed("security", "--offline=true", "--no-pager", installed)
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert level is not None, done.stderr
    documented = re.search(r"exposure level ([0-9.]+)", (ROOT / "docs/SYSTEMD.md").read_text())
    assert documented is not None
    assert float(level[1]) == pytest.approx(float(documented[1]), abs=0.5)  # its weights change between releases


def test_there_is_time_for_every_step_of_an_end() -> None:
    (seconds,) = settings("TimeoutStopSec")
    steps_s = launch._POWERDOWN_TIMEOUT_S + launch._QUIT_TIMEOUT_S
    assert int(seconds.removesuffix("s")) >= 2 * steps_s


def test_no_error_that_would_come_again_is_tried_again() -> None:
    (kept,) = settings("RestartPreventExitStatus")
    fixed = {errors.UsageError.exit_code, errors.HostUnfit.exit_code, errors.AdmissionRefused.exit_code, 5}
    assert {int(code) for code in kept.split()} == fixed
    assert settings("SuccessExitStatus") == [str(128 + signal.SIGTERM)]


# ProtectSystem=full and ProtectControlGroups=yes, in a mount namespace of its own.
READ_ONLY = """
    for folder in /usr /boot /etc /sys/fs/cgroup; do
        [ ! -d $folder ] || { mount --bind $folder $folder && mount -o remount,bind,ro $folder; } || exit
    done
    ! touch /etc/vmmback-test 2>/dev/null || exit
    exec "$@"
"""


@pytest.mark.usefixtures("needs_qemu", "needs_direct_map")
def test_a_guest_is_isolated_with_the_rights_that_the_unit_leaves(start: Start, tmp_path: Path) -> None:
    """The same bounding set, by setpriv(1), and the same folders read-only. Every probe can still be tried."""
    assert settings("ProtectSystem") == ["full"]
    assert settings("ProtectControlGroups") == settings("NoNewPrivileges") == settings("ProtectHostname") == ["yes"]
    taken = [name for line in settings("CapabilityBoundingSet") for name in line.removeprefix("~").split()]
    assert len(taken) == len(set(taken)) > 10
    without = ",".join(f"-{name.removeprefix('CAP_').lower()}" for name in taken)
    file = guest_file(tmp_path, isolation='after-validation = "powerdown"')
    confined = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", READ_ONLY, "sh"]
    limited = ["setpriv", f"--bounding-set={without}", "--no-new-privs"]
    running = start(*confined, *limited, sys.executable, "-m", "vmmback", "launch", file, "--json")
    running.wait_for("while it runs")
    for _ in range(3):  # the tiny guest has no driver of its power button
        running.process.send_signal(signal.SIGTERM)
    ended = running.ended()
    assert ended.code == 0, ended.stderr
    report = report_of(ended)
    assert report["verdict"] == "isolated"
    probes = probes_of(report)
    assert {(probe["verdict"], probe["control"]) for probe in probes.values()} == {("blocked", "readable")}
