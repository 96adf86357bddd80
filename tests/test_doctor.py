"""The doctor's checks in each of their states, the host being a fake where it cannot be had otherwise."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_settings import HARDENED, SERVER
from vmmback import doctor, jail, runtime, uids
from vmmback.config.values import MIN_MEMORY_BYTES
from vmmback.doctor import kernel, kvm, places, programs, settings
from vmmback.doctor.finding import Check, Finding, checked
from vmmback.errors import HostUnfit
from vmmback.host import limits, qemu
from vmmback.isolation import settings as host_settings
from vmmback.linux import direct_map, memfd_secret, memlock, namespaces, procfs, seccomp, tap
from vmmback.linux.kvm import KvmAnswer

ROOT = Path(__file__).parents[1]
INFINITE = resource.RLIM_INFINITY


def raises(error: BaseException) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


UNFIT = HostUnfit("it is not there", "get it")


# --- All together -----------------------------------------------------------------------------------------------------


def test_a_check_that_cannot_be_made_is_a_note() -> None:
    check = checked("overcommit", lambda: kernel.overcommit(Path("/nowhere")))
    assert (check.name, check.state) == ("overcommit", "note")
    assert "could not be tried: " in check.evidence
    assert "/nowhere" in check.evidence
    assert check.remedy


def test_only_what_is_missing_makes_a_launch_fail() -> None:
    fine, worse = Check("a", "ok", "it is there", ""), Check("b", "note", "so so", "do this")
    assert not doctor.would_fail([fine, worse])
    assert doctor.would_fail([fine, Check("c", "missing", "gone", "get it"), worse])


def test_every_check_has_its_name_once_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "can_map_secret_ram", lambda: KvmAnswer(usable=False, reason="no"))
    threads = threading.active_count()
    checks = doctor.examine()
    assert threading.active_count() == threads
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert all(check.evidence for check in checks)
    assert [check for check in checks if (check.state == "ok") != (not check.remedy)] == []


def test_every_check_has_its_row_in_the_manual() -> None:
    rows = (ROOT / "docs/DOCTOR.md").read_text().splitlines()
    listed = {row.split("|")[1].strip(" `") for row in rows if row.startswith("| `")}
    assert listed == {check.name for check in doctor.examine()}


def test_nothing_slow_is_imported() -> None:
    """The command promises an answer in 200 ms in all; msgspec would take a tenth of that."""
    program = "import sys; from vmmback import doctor; doctor.examine(); print('msgspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "")


EXAMINE = """
import json, os, signal, sys
from vmmback import doctor
from vmmback.errors import HostUnfit
if sys.argv[1:]:
    doctor._waiting = lambda: os.kill(os.getpid(), signal.SIGKILL)
try:
    with doctor.examination() as checks:
        print(json.dumps([check.name for check in checks()]))
except HostUnfit as error:
    print(error.message)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print(sorted(os.listdir("/proc/self/fd")))
"""


def examined(*arguments: str) -> list[str]:
    command = [sys.executable, "-c", EXAMINE, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_process_of_its_own_makes_the_same_checks_and_leaves_nothing() -> None:
    names, left = examined()
    assert json.loads(names) == [check.name for check in doctor.examine()]
    assert left == "['0', '1', '2', '3']"  # the last one is what lists them


def test_checks_whose_process_was_killed_are_an_error() -> None:
    message, left = examined("killed")
    assert message == "the process that makes the checks was ended"
    assert left == "['0', '1', '2', '3']"


def test_leaving_early_ends_the_process_that_makes_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda _: ["1"])
    monkeypatch.setattr(doctor, "_waiting", lambda: time.sleep(600))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), doctor.examination():
        raise KeyboardInterrupt
    assert time.monotonic() - started < 300


# --- The kernel -------------------------------------------------------------------------------------------------------


def test_secret_memory_that_is_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enable").write_text("N\n")
    monkeypatch.setattr(memfd_secret, "ENABLE", tmp_path / "enable")
    off = memfd_secret._missing(tmp_path / "enable")
    monkeypatch.setattr(memfd_secret, "memfd_secret", raises(off))
    finding = kernel.secret_memory()
    assert finding.state == "missing"
    assert "secretmem.enable=1" in finding.remedy


def test_secret_memory_of_which_no_page_may_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd_secret, "SecretBuffer", raises(OSError(errno.EAGAIN, "Resource temporarily unavailable")))
    finding = kernel.secret_memory()
    assert finding.state == "missing"
    assert "a page of it cannot be had: Resource temporarily unavailable" in finding.evidence
    assert "ulimit -l" in finding.remedy


@pytest.mark.parametrize(
    ("capable", "hard", "state"),
    [
        (True, 0, "ok"),
        (False, INFINITE, "ok"),
        (False, MIN_MEMORY_BYTES - 1, "missing"),
        (False, MIN_MEMORY_BYTES, "note"),
        (False, 8 << 30, "note"),
    ],
)
def test_locked_memory(monkeypatch: pytest.MonkeyPatch, capable: bool, hard: int, state: str) -> None:
    calls: list[object] = []

    def prlimit(*arguments: object) -> tuple[int, int]:
        calls.append(arguments)
        return 0, hard

    monkeypatch.setattr(resource, "prlimit", prlimit)
    monkeypatch.setattr(procfs, "has_capability", lambda _: capable)
    finding = kernel.locked_memory()
    assert finding.state == state
    assert calls == [(0, resource.RLIMIT_MEMLOCK)], "it looks, and sets nothing"
    if state != "ok":
        assert f"at most {hard >> 10} KiB" in finding.evidence
        assert "LimitMEMLOCK" in finding.remedy
        assert memlock.most() == hard


def test_the_smallest_guest_is_the_configurations() -> None:
    assert kernel.SMALLEST_GUEST_BYTES == MIN_MEMORY_BYTES


def test_seccomp_without_a_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "install_listener", raises(OSError(errno.EBUSY, "Device or resource busy")))
    finding = kernel.seccomp_notification()
    assert finding.state == "missing"
    assert "Device or resource busy" in finding.evidence
    assert "CONFIG_SECCOMP_FILTER" in finding.remedy


def test_a_filter_stays_on_the_thread_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(*, memfds: bool) -> int:
        assert memfds
        asked.append(threading.get_native_id())
        return os.open(os.devnull, os.O_RDONLY)

    asked: list[int] = []
    before = threading.active_count()
    monkeypatch.setattr(seccomp, "install_listener", install)
    assert kernel.seccomp_notification().state == "ok"
    assert asked != [threading.get_native_id()]
    assert threading.active_count() == before


def test_a_direct_map_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_map, "find", raises(UNFIT))
    assert kernel.direct_map() == Finding("note", "audits are inconclusive: it is not there", "get it")


@pytest.mark.parametrize(("usable", "state"), [(True, "ok"), (False, "note")])
def test_kvm(monkeypatch: pytest.MonkeyPatch, usable: bool, state: str) -> None:
    monkeypatch.setattr(kvm, "can_map_secret_ram", lambda: KvmAnswer(usable=usable, reason="because"))
    finding = kvm.experiment()
    assert finding.state == state
    assert finding.evidence.startswith("because")
    assert bool(finding.remedy) is not usable


@pytest.mark.parametrize(("mode", "state"), [("0", "ok"), ("1", "ok"), ("2", "note")])
def test_overcommit(tmp_path: Path, mode: str, state: str) -> None:
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "sys/vm/overcommit_memory").write_text(mode + "\n")
    (tmp_path / "meminfo").write_text("CommitLimit:     4096 kB\nCommitted_AS:    1024 kB\n")
    finding = kernel.overcommit(tmp_path)
    assert finding.state == state
    if state == "note":
        assert "3 MiB can still be mapped" in finding.evidence
        assert "sysctl -w vm.overcommit_memory=0" in finding.remedy


# --- Programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def make(script: str) -> None:
        path = tmp_path / f"qemu-system-{os.uname().machine}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def test_qemu_tells_its_version(fake_qemu: Callable[[str], None]) -> None:
    fake_qemu('[ "$*" = -version ] && echo "QEMU emulator version 10.0.2" && echo "Copyright"')
    finding = programs.emulator()
    assert finding.state == "ok"
    assert finding.evidence.endswith(": QEMU emulator version 10.0.2")


@pytest.mark.parametrize("script", ["exit 127", "exec sleep 60"], ids=["it fails", "it is silent"])
def test_a_qemu_that_does_not_work_is_missing(
    fake_qemu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(programs, "_ANSWERS_S", 0.5)
    fake_qemu(script)
    finding = programs.emulator()
    assert finding.state == "missing"
    assert "cannot be asked for its version" in finding.evidence
    assert finding.remedy


def test_without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert programs.emulator().state == "missing"
    assert "apt-get install" in programs.emulator().remedy
    assert programs.secret_blocks().state == "note"


@pytest.mark.parametrize(("words", "state"), [("  aux-ram-share=<bool>", "ok"), ("  usb=<bool>", "note")])
def test_secret_blocks_are_asked_for(
    fake_qemu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, words: str, state: str
) -> None:
    monkeypatch.setattr(memlock, "allows", raises(AssertionError("it may change limits")))
    fake_qemu(f"echo '{words}'")
    assert programs.secret_blocks().state == state
    assert bool(programs.secret_blocks().remedy) is (state == "note")


def test_a_python_that_cannot_be_started_again_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A launch fails unless its guest is not to be prefaulted."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    finding = programs.helpers()
    assert (finding.state, "prefault = false" in finding.remedy) == ("note", True)


def test_helpers_that_are_gone_are_named_with_their_packages(tmp_path: Path) -> None:
    assert programs.helpers().state == "ok"
    finding = programs.helpers(str(tmp_path))
    assert finding.state == "missing"
    assert "prlimit, rm, setpriv" in finding.evidence
    assert "apt-get install coreutils dash findutils util-linux" in finding.remedy


@pytest.mark.parametrize(("program", "state"), [("/bin/true", "ok"), ("/nowhere/virtiofsd", "note")])
def test_virtiofsd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, state: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(qemu, "_VIRTIOFSDS", (program,))
    finding = programs.shares()
    assert finding.state == state
    assert bool(finding.remedy) is (state == "note")


# --- Folders, ids and devices -----------------------------------------------------------------------------------------


def test_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.descriptors().state == "ok"
    monkeypatch.setattr(limits, "check_descriptors", raises(UNFIT))
    assert places.descriptors() == Finding("missing", "it is not there", "get it")


def test_a_runtime_folder_is_looked_for_and_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime, "runtime_folder", lambda: tmp_path / "not/there")
    assert places.runtime_folder().state in ("ok", "note")  # a note where /tmp is on a disk
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "state"), [("tmpfs", "ok"), ("ext4", "note"), ("", "note")])
def test_a_runtime_folder_on_a_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, state: str) -> None:
    monkeypatch.setattr(runtime, "runtime_folder", lambda: tmp_path)
    monkeypatch.setattr(places, "_file_system", lambda _: kind)
    tmp_path.chmod(0o700)
    finding = places.runtime_folder()
    assert finding.state == state
    assert bool(finding.remedy) is (state == "note")


def test_the_deepest_mount_has_a_folder(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mounts").write_text(
        "overlay / overlay rw 0 0\ntmpfs /srv tmpfs rw 0 0\ntmpfs /srv/a ext4 rw 0 0\nx /srv/a xfs rw 0 0\n"
    )
    kinds = [places._file_system(Path(path), tmp_path) for path in ("/srv/ab", "/srv/a", "/srv/a/b", "/nowhere")]
    assert kinds == ["tmpfs", "xfs", "xfs", "overlay"]


def test_a_runtime_folder_that_is_open_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setattr(runtime, "runtime_folder", lambda: tmp_path)
    finding = places.runtime_folder()
    assert finding.state == "missing"
    assert "VMMBACK_RUNTIME_DIR" in finding.remedy


@pytest.mark.parametrize("place", ["relative", "/dev/null/run"], ids=["relative", "below a file"])
def test_a_runtime_folder_that_cannot_be(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", place)
    finding = places.runtime_folder()
    assert finding.state == "missing"
    assert "/run/vmmback" in finding.remedy or "VMMBACK_RUNTIME_DIR" in finding.remedy


def test_without_a_place_for_runtime_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "runtime_folder", raises(UNFIT))
    assert places.runtime_folder() == Finding("missing", "it is not there", "get it")


@pytest.fixture
def rightful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process with all rights, and a host in a folder."""
    monkeypatch.setattr(jail, "missing_rights", list)
    monkeypatch.setattr(uids, "LOCKS", tmp_path / "locks")
    (tmp_path / "etc").mkdir()
    return tmp_path


def test_uids_that_nobody_else_has(rightful: Path) -> None:
    (rightful / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n\nbroken\n")
    (rightful / "etc/subuid").write_text("a:100000:65536\n")
    assert places.uid_range(rightful).state == "ok"
    assert not (rightful / "locks").exists()


@pytest.mark.parametrize(
    ("file", "line", "user"),
    [
        ("passwd", "ann:x:1900000000:5::/:/bin/sh", "ann (/etc/passwd)"),
        ("group", "staff:x:1900065535:", "staff (/etc/group)"),
        ("subuid", "ann:1899999000:1001", "ann (/etc/subuid)"),
        ("subgid", "1000:1900065535:1", "1000 (/etc/subgid)"),
    ],
)
def test_uids_that_others_have(rightful: Path, file: str, line: str, user: str) -> None:
    (rightful / "etc" / file).write_text(line + "\n")
    finding = places.uid_range(rightful)
    assert finding.state == "note"
    assert user in finding.evidence
    assert "[process] uids" in finding.remedy


def test_uids_just_beside_the_range(rightful: Path) -> None:
    (rightful / "etc/subuid").write_text("ann:1899999000:1000\nbob:1900065536:10\n")
    assert places.uid_range(rightful).state == "ok"


def test_a_file_of_locks_that_is_a_link(rightful: Path) -> None:
    (rightful / "locks").symlink_to("/dev/null")
    finding = places.uid_range(rightful)
    assert finding.state == "missing"
    assert "cannot be opened" in finding.evidence


def test_a_file_of_locks_that_cannot_be_made(rightful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uids, "LOCKS", rightful / "no/folder/locks")
    assert places.uid_range(rightful).evidence.endswith("locks cannot be made")


def test_without_rights_there_is_neither_a_uid_nor_a_jail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "missing_rights", lambda: ["CAP_SETUID"])
    for finding in (places.uid_range(), places.walls()):
        assert finding.state == "note"
        assert "CAP_SETUID" in finding.evidence
        assert finding.remedy.startswith("run as root")


def test_a_jail_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "missing_rights", list)
    monkeypatch.setattr(namespaces, "unshare", raises(PermissionError(errno.EPERM, "Operation not permitted")))
    finding = places.walls()
    assert finding.state == "missing"
    assert "Operation not permitted" in finding.evidence
    assert "container" in finding.remedy


def test_taps_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "in_new_network", lambda function: function())
    monkeypatch.setattr(tap, "open_tap", raises(PermissionError(errno.EPERM, "Operation not permitted")))
    monkeypatch.setattr(places, "_TUN_LOADED", Path("/"))
    finding = places.taps()
    assert finding.state == "note"
    assert "[[nic]]" in finding.evidence
    assert "modprobe tun" in finding.remedy


def test_no_module_is_loaded_for_the_sake_of_a_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(places, "in_new_network", raises(AssertionError("opened")))
    monkeypatch.setattr(places, "_TUN_LOADED", tmp_path / "tun")
    monkeypatch.setattr(places, "_VSOCK_LOADED", tmp_path / "vsock")
    monkeypatch.setattr(places, "_TUN", tmp_path / "device")
    assert [places.taps().state, places.vsock(tmp_path / "device").state] == ["note", "note"]
    (tmp_path / "device").mkdir()  # which cannot be opened for writing
    assert [places.taps().state, places.vsock(tmp_path / "device").state] == ["ok", "ok"]


def test_bridges_are_listed(tmp_path: Path) -> None:
    assert "create = true" in places.bridges(tmp_path).evidence
    for name in ("vmm1/bridge", "vmm0/bridge", "eth0"):
        (tmp_path / name).mkdir(parents=True)
    assert places.bridges(tmp_path) == Finding("ok", "vmm0, vmm1, for [[nic]]")


def test_vsock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(places, "_VSOCK_LOADED", tmp_path)
    assert places.vsock(Path("/dev/null")).state == "ok"
    finding = places.vsock(tmp_path)
    assert finding.state == "note"
    assert "modprobe vhost_vsock" in finding.remedy


# --- Settings ---------------------------------------------------------------------------------------------------------


def settings_of(root: Path, files: dict[str, str]) -> dict[str, Check]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {check.name: check for check in settings.checks(root)}


def test_every_setting_that_is_a_note_somewhere_has_a_remedy(tmp_path: Path) -> None:
    """On a server with everything on, on one of which nothing is known, and with /dev/mem as it should never be."""
    server = settings_of(tmp_path / "server", SERVER)
    nothing = settings_of(tmp_path / "nothing", {})
    loose = settings_of(
        tmp_path / "loose",
        {"dev/mem": "", "boot/config-6": "CONFIG_DEVMEM=y\n", "proc/sys/kernel/osrelease": "6\n"},
    )
    noted = {name for checks in (server, nothing, loose) for name, check in checks.items() if check.state == "note"}
    assert noted == set(settings.REMEDIES)
    assert all(server[name].remedy == settings.REMEDIES[name] for name in noted & server.keys() - {"dev-mem"})


def test_no_setting_that_is_not_always_ok_lacks_a_remedy(tmp_path: Path) -> None:
    unreadable = {setting.name for setting in host_settings.read(tmp_path) if setting.name not in settings.REMEDIES}
    assert unreadable == {"transparent-huge-pages", "numa-nodes", "numa-balancing", "memory-hot-remove"}


def test_a_setting_that_cannot_be_read_is_a_note_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "sys/devices/system/node/online").mkdir(parents=True)
    check = {check.name: check for check in settings.checks(tmp_path)}["numa-nodes"]
    assert (check.state, check.remedy) == ("note", "run it as root, on the host itself")
    assert "EISDIR" in check.evidence


def test_a_hardened_host_needs_no_remedy(tmp_path: Path) -> None:
    assert [check for check in settings_of(tmp_path, HARDENED).values() if check.state != "ok" or check.remedy] == []
