"""The ground of all tests with libvirt: a libvirtd of a test's own, an ordinary domain of its, and what libvirt calls.

What is asserted of libvirt's hooks here is what vmmback's hook builds on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.conftest import ROOT, eventually
from integration.leftovers import descendants

if TYPE_CHECKING:
    from integration.libvirtd import Libvirtd

READY = "GUEST READY"
METADATA = '<metadata><a:mark xmlns:a="https://example.org/mark">kept</a:mark></metadata>'
CAN_GROW = ("--xml=./maxMemory=524288", "--xml=./maxMemory/@slots=2")
ONE_CELL = "--cpu=mode=maximum,disable=erms,disable=fsrm,numa.cell0.memory=98304,numa.cell0.cpus=0"
DIMM = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>"

OPERATIONS = ["prepare", "start", "started"]  # what the hook is called for when a domain starts

# Keeps the domain's XML, appends its arguments to a file, and fails in the operation that the file `fails` names.
HOOK = """#!/bin/sh
cat >"/run/$2.xml"
echo "$(basename "$0") $1 $2 $3" >>/run/calls
[ "$2" != "$(cat /run/fails 2>/dev/null)" ] || { echo "the reason" >&2 && exit 3; }
"""

# Tells of itself and what it was started with, then becomes QEMU.
EMULATOR = """#!/bin/sh
case "$*" in
*memory-backend-*)
  read -r known </run/libvirt/qemu/wrapped.pid
  echo "wrapper: pid $$ known $known uid $(id -u) cwd $(pwd) marked ${VMMBACK_RUNTIME_DIR-no}" >&2
  ;;
esac
exec /usr/bin/qemu-system-x86_64 "$@"
"""


def install(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def recorded_calls(libvirtd: Libvirtd) -> list[str]:
    record = libvirtd.inside / "run/calls"
    return record.read_text().splitlines() if record.exists() else []


def calls(libvirtd: Libvirtd) -> list[str]:
    """Return the calls of hooks since the last time; one that is just being recorded would be lost."""
    lines = recorded_calls(libvirtd)
    (libvirtd.inside / "run/calls").unlink(missing_ok=True)
    return lines


def wait_for_calls(libvirtd: Libvirtd, expected: list[str]) -> None:
    """Wait for calls that nobody's command waits for, and see that no others come."""
    eventually(lambda: len(recorded_calls(libvirtd)) >= len(expected), f"hooks are called: {expected}")
    assert calls(libvirtd) == expected


@pytest.fixture
def recorded(libvirtd: Libvirtd) -> Libvirtd:
    """A libvirtd with a hook that records; libvirt looks for hooks when it starts."""
    install(libvirtd.hooks / "qemu", HOOK)
    libvirtd.restart()
    return libvirtd


def test_an_ordinary_domain_boots_and_answers(libvirtd: Libvirtd) -> None:
    libvirtd.define(libvirtd.domain_xml("plain", "--memorybacking=source.type=memfd"))
    assert libvirtd.qemu_pid("plain") == 0
    libvirtd.virsh("start", "plain")
    libvirtd.wait_for("plain", READY)
    argv = libvirtd.argv("plain")
    assert argv[argv.index("-name") + 1] == "guest=plain,debug-threads=on"
    backends = [json.loads(word) for word in argv if "memory-backend-" in word]
    assert [(backend["qom-type"], backend["size"]) for backend in backends] == [("memory-backend-memfd", 96 << 20)]
    pid = libvirtd.qemu_pid("plain")
    owner = re.search(r"^Uid:\t(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert owner is not None
    assert owner[1] == libvirtd.run("id", "-u", "libvirt-qemu").stdout.strip()
    assert pid in descendants(libvirtd.keeper_pid)

    query = '{"execute": "query-status"}'
    assert json.loads(libvirtd.virsh("qemu-monitor-command", "plain", query))["return"]["running"]
    import libvirt_qemu

    with libvirtd.connection() as connection:
        domain = connection.lookupByName("plain")
        assert json.loads(libvirt_qemu.qemuMonitorCommand(domain, query, 0))["return"]["running"]


def test_what_runs_inside_has_folders_of_its_own(libvirtd: Libvirtd) -> None:
    install(libvirtd.inside / "usr/local/bin/of-a-test", "#!/bin/sh\necho $VMMBACK_RUNTIME_DIR $VMMBACK_BROKER; pwd\n")
    assert libvirtd.run("of-a-test").stdout.split() == [str(ROOT)]
    assert not Path("/usr/local/bin/of-a-test").exists()
    libvirtd.run("mkdir", "/run/vmmback", "/run/vmmback-broker", "/etc/vmmback-test", "/var/lib/vmmback-test")
    assert (libvirtd.inside / "run/vmmback-broker").is_dir()
    assert not [path for path in ("/etc/vmmback-test", "/var/lib/vmmback-test") if Path(path).exists()]
    assert libvirtd.run("virsh", "--connect", libvirtd.uri, "uri").stdout.strip() == libvirtd.uri
    as_qemu = ["setpriv", "--reuid=libvirt-qemu", "--regid=libvirt-qemu", "--init-groups"]
    assert libvirtd.run(*as_qemu, sys.executable, "-c", "import vmmback; print(vmmback.__name__)").stdout == "vmmback\n"
    ended = libvirtd.run("sh", "-c", "echo a word >&2; exit 3", check=False)
    assert (ended.returncode, ended.stderr) == (3, "a word\n")
    program = libvirtd.start("sh", "-c", "echo up; exec sleep 100")
    program.wait_for("up")


def test_hooks_are_called_in_order(recorded: Libvirtd) -> None:
    started = [f"qemu d {operation} begin" for operation in OPERATIONS]
    ended = ["qemu d stopped end", "qemu d release end"]
    inside = recorded.inside / "run"
    xml = recorded.domain_xml("d", ONE_CELL, *CAN_GROW, "--memorybacking=source.type=memfd")
    recorded.define(xml.replace("<memory>", f"{METADATA}<memory>", 1))
    assert calls(recorded) == []
    recorded.virsh("start", "d")
    assert calls(recorded) == started
    prepare = (inside / "prepare.xml").read_text()
    assert prepare.startswith("<domain type='qemu' id='1'>")
    assert ">kept</a:mark>" in prepare
    assert "<maxMemory slots='2' unit='KiB'>524288</maxMemory>" in prepare
    assert "<alias " not in prepare
    assert "<alias " in (inside / "start.xml").read_text()
    recorded.wait_for("d", READY)

    (recorded.inside / "run/dimm.xml").write_text(DIMM)
    recorded.run("virsh", "--connect", recorded.uri, "attach-device", "d", "/run/dimm.xml")
    assert "memdimm0" in recorded.log
    assert calls(recorded) == []
    for signum in (signal.SIGTERM, signal.SIGKILL):
        pid = recorded.qemu_pid("d")
        recorded.restart(signum)
        wait_for_calls(recorded, ["qemu d reconnect begin"])
        assert recorded.qemu_pid("d") == pid
        assert "<memory model='dimm'>" in (inside / "reconnect.xml").read_text()
    recorded.run("virsh", "--connect", recorded.uri, "detach-device", "d", "/run/dimm.xml")
    eventually(lambda: '"object-del"' in recorded.log, "the DIMM is gone")
    assert calls(recorded) == []

    recorded.virsh("save", "d", "/var/lib/libvirt/qemu/save/d")
    assert calls(recorded) == ended
    recorded.virsh("restore", "/var/lib/libvirt/qemu/save/d")
    assert calls(recorded) == ["qemu d restore begin", *started]
    assert ">kept</a:mark>" in (inside / "restore.xml").read_text()
    os.kill(recorded.qemu_pid("d"), signal.SIGKILL)
    wait_for_calls(recorded, ended)
    assert recorded.virsh("domstate", "d", "--reason") == "shut off (crashed)"


def test_who_fails_in_a_hook_decides_on_the_domain(recorded: Libvirtd) -> None:
    fails = recorded.inside / "run/fails"
    recorded.define(recorded.domain_xml("d"))
    for operation in OPERATIONS:
        fails.write_text(operation)
        tried = recorded.virsh_ended("start", "d")
        assert tried.returncode == 1
        assert f"hooks/qemu d {operation} begin -) unexpected exit status 3: the reason\n" in tried.stderr
        assert recorded.qemu_pid("d") == 0
        came = [line.split()[2] for line in calls(recorded)]
        assert came == [*OPERATIONS[: OPERATIONS.index(operation) + 1], "stopped", "release"]
    fails.write_text("stopped")
    recorded.virsh("start", "d")
    recorded.virsh("destroy", "d")
    assert recorded.virsh("domstate", "d") == "shut off"
    recorded.virsh("start", "d")
    calls(recorded)
    fails.write_text("reconnect")  # whoever fails here ends a domain that ran
    recorded.restart()
    wait_for_calls(recorded, ["qemu d reconnect begin", "qemu d stopped end", "qemu d release end"])
    assert recorded.virsh("domstate", "d", "--reason") == "shut off (daemon)"


def test_scripts_beside_the_hook_run_after_it_whether_it_fails_or_not(libvirtd: Libvirtd) -> None:
    for name in ("20-b", "10-a"):
        install(libvirtd.hooks / "qemu.d" / name, HOOK)
    libvirtd.restart()  # a folder alone will do
    libvirtd.define(libvirtd.domain_xml("d"))
    libvirtd.virsh("start", "d")
    assert [line.split()[::2] for line in calls(libvirtd)] == [
        [name, operation] for operation in OPERATIONS for name in ("10-a", "20-b")
    ]
    libvirtd.virsh("destroy", "d")
    install(libvirtd.hooks / "qemu", "#!/bin/sh\ncat >/dev/null\necho 'an earlier reason' >&2\nexit 1\n")
    calls(libvirtd)
    assert "an earlier reason" in libvirtd.virsh_ended("start", "d").stderr
    assert calls(libvirtd)[:2] == ["10-a d prepare begin", "20-b d prepare begin"]


def test_an_emulator_that_wraps_qemu_is_named_in_its_pid_file_when_it_starts(libvirtd: Libvirtd) -> None:
    install(libvirtd.inside / "usr/local/bin/emulator", EMULATOR)
    emulator = "--xml=./devices/emulator=/usr/local/bin/emulator"
    libvirtd.create(libvirtd.domain_xml("wrapped", emulator, "--memorybacking=source.type=memfd"))
    pid = libvirtd.qemu_pid("wrapped")
    user = libvirtd.run("id", "-u", "libvirt-qemu").stdout.strip()
    assert f"wrapper: pid {pid} known {pid} uid {user} cwd / marked no\n" in libvirtd.qemu_log("wrapped")


def test_two_of_them_run_beside_each_other_and_leave_nothing(tmp_path: Path, needs_libvirt: None) -> None:
    from integration.libvirtd import Libvirtd

    mounts = Path("/proc/self/mountinfo").read_text()
    with Libvirtd(tmp_path / "one") as one, Libvirtd(tmp_path / "other") as other:
        for daemon in (one, other):
            daemon.create(daemon.domain_xml("same"))
        pids = [one.pid, other.pid, one.keeper_pid, other.keeper_pid, one.qemu_pid("same"), other.qemu_pid("same")]
        assert len(set(pids)) == 6
        one.stop(signal.SIGKILL)
        assert Path(f"/proc/{one.qemu_pid('same')}").exists()
        sockets = [daemon.folder / "sockets/libvirt-sock" for daemon in (one, other)]
        assert [path.is_socket() for path in sockets] == [True, True]
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not [path for path in sockets if path.parents[1].exists()]
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_what_is_left_running_fails_the_test_and_is_ended(
    tmp_path: Path, needs_libvirt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from integration import libvirtd
    from integration.libvirtd import Libvirtd

    monkeypatch.setattr(libvirtd, "_ALL_ENDED_S", 1.0)
    detaches = "#!/bin/sh\ncat >/dev/null\nsetsid sleep 4711 >/dev/null 2>&1 </dev/null &\n"
    left: list[int] = []

    def leave() -> None:
        with Libvirtd(tmp_path / "libvirt") as daemon:
            install(daemon.hooks / "qemu", detaches)
            daemon.restart()
            daemon.create(daemon.domain_xml("d"))
            left.extend(pid for pid, line in descendants(daemon.keeper_pid).items() if "sleep 4711" in line)

    with pytest.raises(AssertionError, match="sleep 4711"):
        leave()
    assert left
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
