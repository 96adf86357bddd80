"""`vmmback libvirt` against a real libvirtd: what it installs and removes, makes of domains, and hears of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.conftest import Supervisor, eventually

if TYPE_CHECKING:
    from integration.libvirtd import Libvirtd

MEMFD = "--memorybacking=source.type=memfd"
PASSWORD = "for-vnc"
VNC = f"--graphics=vnc,password={PASSWORD},listen=127.0.0.1"
EDITED = ("etc", "usr/local", "var/lib/libvirt", "run")


def vmmback(libvirtd: Libvirtd, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command of vmmback inside, where libvirt is at its usual place."""
    ended = libvirtd.run(sys.executable, "-m", "vmmback", "libvirt", *arguments, check=False)
    assert ended.returncode == exit_code, (ended.returncode, ended.stdout, ended.stderr)
    return ended


def listed(libvirtd: Libvirtd, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(vmmback(libvirtd, "list", "--json", *arguments).stdout)
    return found


def tree(libvirtd: Libvirtd) -> dict[str, tuple[int, bytes]]:
    """Return what is in the folders that an installation could write to."""
    found = {}
    for top in EDITED:
        for folder, folders, files in os.walk(libvirtd.inside / top):
            for name in folders + files:
                path = Path(folder, name)
                if path.is_socket() or "libvirt/qemu/" in str(path) or path.suffix == ".pid":
                    continue  # libvirt's own
                content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
                found[str(path.relative_to(libvirtd.inside))] = (path.lstat().st_mode, content)
    return found


@pytest.fixture
def installed(libvirtd: Libvirtd) -> Libvirtd:
    vmmback(libvirtd, "install")
    return libvirtd


def test_uninstall_leaves_nothing(libvirtd: Libvirtd) -> None:
    (libvirtd.hooks / "qemu.d").mkdir()
    before = tree(libvirtd)
    done = vmmback(libvirtd, "install", "--json")
    told = json.loads(done.stdout)
    assert "/etc/libvirt/hooks/qemu.d/50-vmmback" in told["installed"]
    assert any("restart libvirtd" in step for step in told["next"])
    after = tree(libvirtd)
    assert {f"/{name}" for name in after if after[name] != before.get(name)} >= set(told["installed"])
    assert json.loads(vmmback(libvirtd, "install", "--json").stdout) == {"installed": [], "next": []}
    vmmback(libvirtd, "uninstall")
    assert tree(libvirtd) == before


def test_libvirt_knows_the_wrapper_as_it_knows_its_qemu(installed: Libvirtd) -> None:
    """What the wrapper can do is what QEMU can: libvirt asks it, and no Python is started for that."""
    real = installed.virsh("domcapabilities", "--virttype=qemu", "--emulatorbin=/usr/bin/qemu-system-x86_64")
    wrapped = "/usr/local/libexec/vmmback/qemu-system-x86_64"
    assert installed.virsh("domcapabilities", "--virttype=qemu", f"--emulatorbin={wrapped}") == real.replace(
        "<path>/usr/bin/qemu-system-x86_64</path>", f"<path>{wrapped}</path>"
    )


def test_qemus_group_has_one_capability_by_our_emulator_and_others_none(installed: Libvirtd) -> None:
    emulator = "/usr/local/libexec/vmmback/emulator"
    as_qemu = ["setpriv", "--reuid=libvirt-qemu", "--regid=libvirt-qemu", "--clear-groups"]
    only = f"{1 << 14:016x}"
    assert installed.run(*as_qemu, emulator).stdout.split() == ["permitted", only, "effective", only]
    # What it executes without a claim has none.
    shown = installed.run(*as_qemu, emulator, "/bin/cat", "wrapper", "/proc/self/status").stdout
    assert "CapEff:\t0000000000000000\n" in shown
    # By a shell: setpriv executes with root's rights what it executes.
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", 'exec "$@"', "sh"]
    assert "Permission denied" in installed.run(*nobody, emulator, check=False).stderr


def test_a_domain_asks_and_asks_no_longer(installed: Libvirtd) -> None:
    installed.define(installed.domain_xml("one", VNC, "--video=model=none"))
    # libvirt puts the devices of its own making in order when it reads them again.
    installed.define(installed.virsh("dumpxml", "--inactive", "--security-info", "one"))
    before = installed.virsh("dumpxml", "--inactive", "--security-info", "one")
    assert PASSWORD in before
    assert listed(installed) == []

    dry = vmmback(installed, "enable", "one", "--dry-run", "--on-exposed", "warn").stdout
    assert "+    <emulator>/usr/local/libexec/vmmback/qemu-system-x86_64</emulator>" in dry
    assert 'on-exposed="warn"' in dry
    assert "-    <emulator>/usr/bin/qemu-system-x86_64</emulator>" in dry
    assert installed.virsh("dumpxml", "--inactive", "--security-info", "one") == before

    done = vmmback(installed, "enable", "one")
    assert "asks for secret RAM from its next start on" in done.stderr
    assert "start it" not in done.stderr  # it does not run
    enabled = installed.virsh("dumpxml", "--inactive", "--security-info", "one")
    assert PASSWORD in enabled
    row = {"name": "one", "state": "shut off", "asks": True, "source": "memfd", "against": [], "verdict": ""}
    assert [{key: found[key] for key in row} for found in listed(installed)] == [row]

    vmmback(installed, "enable", "one", "--source", "file")
    assert listed(installed)[0]["source"] == "file"
    vmmback(installed, "disable", "one")
    assert installed.virsh("dumpxml", "--inactive", "--security-info", "one") == before
    assert "as it is to be" in vmmback(installed, "disable", "one").stderr


def test_all_that_speaks_against_a_domain_is_told_at_once(installed: Libvirtd) -> None:
    installed.define(installed.domain_xml("bad", "--video=vga", "--tpm=none", "--memorybacking=hugepages=yes"))
    before = installed.virsh("dumpxml", "--inactive", "bad")
    error = vmmback(installed, "enable", "bad", exit_code=2).stderr
    assert "devices/video[0]/model" in error
    assert "memoryBacking/hugepages" in error
    assert installed.virsh("dumpxml", "--inactive", "bad") == before
    assert listed(installed) == []
    (row,) = listed(installed, "--all")
    assert row["asks"] is False
    assert {"devices/video[0]/model", "memoryBacking/hugepages"} <= set(row["against"])
    assert "no domain 'none'" in vmmback(installed, "enable", "none", exit_code=7).stderr.replace('"', "'")


def test_a_domain_is_not_left_with_an_emulator_that_is_not_there(libvirtd: Libvirtd) -> None:
    libvirtd.define(libvirtd.domain_xml("early", MEMFD))
    error = vmmback(libvirtd, "enable", "early", exit_code=2).stderr
    assert "vmmback libvirt install" in error
    assert "vmmback" not in libvirtd.virsh("dumpxml", "early")


def test_one_that_runs_goes_on_and_one_that_is_transient_is_left_alone(installed: Libvirtd) -> None:
    installed.define(installed.domain_xml("runs", MEMFD))
    installed.virsh("start", "runs")
    pid = installed.qemu_pid("runs")
    assert "start it" in vmmback(installed, "enable", "runs").stderr
    assert installed.qemu_pid("runs") == pid
    assert listed(installed)[0]["state"] == "running"
    installed.create(installed.domain_xml("passing", MEMFD))
    assert "transient" in vmmback(installed, "enable", "passing", exit_code=2).stderr
    assert installed.virsh("list", "--persistent", "--name").split() == ["runs"]


def test_one_that_was_saved_would_start_as_it_was(installed: Libvirtd) -> None:
    installed.define(installed.domain_xml("saved", MEMFD))
    installed.virsh("start", "saved")
    installed.virsh("managedsave", "saved")
    assert "saved with its memory" in vmmback(installed, "enable", "saved", exit_code=2).stderr
    assert listed(installed) == []
    installed.virsh("managedsave-remove", "saved")
    vmmback(installed, "enable", "saved")


def test_uninstall_does_not_take_away_what_domains_need(installed: Libvirtd) -> None:
    installed.define(installed.domain_xml("needs", MEMFD))
    vmmback(installed, "enable", "needs")
    before = tree(installed)
    error = vmmback(installed, "uninstall", exit_code=2).stderr
    assert "could not start any more: needs" in error
    assert tree(installed) == before
    vmmback(installed, "uninstall", "--force")
    assert not (installed.hooks / "qemu.d/50-vmmback").exists()


def test_libvirts_that_cannot_be_asked_are_told(installed: Libvirtd) -> None:
    error = vmmback(installed, "list", "--connect", "qemu+unix:///system?socket=/run/none", exit_code=3).stderr
    assert error.count("\n") == 2, error  # ours, with its hint; libvirt prints nothing itself
    assert "cannot be reached" in error
    assert "not the QEMU of a whole system" in vmmback(installed, "list", "-c", "test:///default", exit_code=2).stderr
    assert listed(installed, "--connect", installed.uri) == []


def watcher(libvirtd: Libvirtd, *arguments: str) -> Supervisor:
    program = libvirtd.start(sys.executable, "-m", "vmmback", "libvirt", "watch", "--json", *arguments)
    program.wait_for("watching qemu")
    return program


def events(program: Supervisor) -> list[dict[str, Any]]:
    return [json.loads(line) for line in program.stdout.splitlines()]


def test_what_happens_to_domains_is_heard(installed: Libvirtd) -> None:
    for name in ("asks", "other"):
        installed.define(installed.domain_xml(name, MEMFD))
    vmmback(installed, "enable", "asks")
    # Started as it would be where it had the RAM: what is watched is told by libvirt, whoever starts QEMU.
    everything, some = watcher(installed, "--all"), watcher(installed)
    installed.virsh("start", "other")
    installed.virsh("destroy", "other")
    installed.virsh("undefine", "asks")

    def heard(program: Supervisor, domain: str, source: str, event: str) -> bool:
        return (domain, source, event) in [(one["domain"], one["source"], one["event"]) for one in events(program)]

    for what in (("other", "libvirt", "started"), ("other", "qemu", "RESUME"), ("other", "libvirt", "stopped")):
        eventually(lambda what=what: heard(everything, *what), f"{what} is heard")  # type: ignore[misc]
    eventually(lambda: heard(some, "asks", "libvirt", "undefined"), "the domain's end is heard")
    assert {one["domain"] for one in events(some)} == {"asks"}
    booted = [one["detail"] for one in events(everything) if one["event"] == "started"]
    assert booted == ["booted"]
    some.signal(signal.SIGINT)
    assert some.ended().code == 130
    installed.stop(signal.SIGKILL)
    ended = everything.ended()
    assert (ended.code, "it closed the connection" in ended.stderr) == (3, True), ended.stderr
    installed.begin()
