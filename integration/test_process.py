"""QEMU owns nothing: what the kernel shows of it, and what a program in its place can and cannot do."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import GONE_S, LiveGuest, Start, eventually, guest_file, prepared, qemu_of
from vmmback import config, handoff, jail, uids
from vmmback.config.process import Process
from vmmback.errors import HostUnfit
from vmmback.ids import DEFAULT_UIDS
from vmmback.isolation import owner, rights
from vmmback.isolation.probe import Target
from vmmback.linux import procfs
from vmmback.report import Verdict

pytestmark = pytest.mark.usefixtures("needs_qemu")

PYTHON = Path(sys.executable).resolve()
ALL_NAMESPACES = ("mnt", "net", "ipc", "uts", "cgroup")

# Each attempt is a line of what a program that took QEMU over would try. OUR, PIPE and PORT come from the test.
ATTEMPTS = """
import ctypes, json, os, signal, socket, sys
our, pipe, port, name, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
libc = ctypes.CDLL(None, use_errno=True)

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")

def connect(family, address):
    with socket.socket(family) as client:
        client.settimeout(5)
        client.connect(address)

ATTEMPTS = {
    "shadow": lambda: os.stat("/etc/shadow"),
    "log": lambda: open(path).close(),
    "state": lambda: os.listdir("/var"),
    "write": lambda: os.close(os.open("/tmp/vmmback-was-here", os.O_CREAT | os.O_WRONLY)),
    "write-usr": lambda: os.access("/usr", os.W_OK) or os.open("/usr", os.O_TMPFILE | os.O_WRONLY),
    "memory-device": lambda: os.mknod("/dev/shm/vmmback-null", 0o020600, os.makedev(1, 3)),
    "tcp": lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
    "abstract": lambda: connect(socket.AF_UNIX, chr(0) + name),
    "become-root": lambda: os.setresuid(0, 0, 0),
    "hostname": lambda: checked(libc.sethostname(b"x", -2) if os.geteuid() else 0),
    "mount": lambda: checked(libc.unshare(0x20000)),
    "kill": lambda: os.kill(our, 0),
    "see": lambda: os.stat(f"/proc/{our}"),
    "trace": lambda: checked(libc.ptrace(0x4206, our, 0, 0)),
    "own-memory": lambda: open("/proc/self/mem", "rb").close(),
    "pipe": lambda: open(f"/proc/self/fd/{pipe}", "rb").close(),
}
outcomes = {}
for name_of, attempt in ATTEMPTS.items():
    try:
        attempt()
        outcomes[name_of] = "done"
    except OSError as error:
        outcomes[name_of] = os.strerror(error.errno)
for left in ("/tmp/vmmback-was-here", "/dev/shm/vmmback-null"):
    try:
        os.unlink(left)
    except OSError:
        pass
print(json.dumps(outcomes), flush=True)
"""
# For the keys that come to it by a pipe.
ALLOWED = {"pipe"}


@pytest.fixture
def victim() -> Iterator[int]:
    """A process of root's that does nothing."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    yield pid
    os.close(theirs)
    os.waitpid(pid, 0)


def jail_for(root: Path, uid: int, program: Path = PYTHON) -> jail.Jail:
    return jail.Jail(uid, uid, root=root, program=program, locked=0)


def in_qemus_place(folder: Path, jailed: jail.Jail | None, arguments: Sequence[str], descriptors: Sequence[int]) -> str:
    """Run Python in QEMU's place, to its end, and return what it said."""
    log = folder / "qemu.log"

    async def run() -> str:
        argv = [str(PYTHON), "-I", "-S", *arguments]
        async with handoff.start(argv, {}, descriptors, log, jail=jailed) as qemu:
            await qemu.ended(30)
        return log.read_text()

    return asyncio.run(run())


def attempts(folder: Path, victim: int, jailed: jail.Jail | None) -> dict[str, str]:
    name = f"vmmback-test-{os.getpid()}"
    log = folder / "other.log"
    log.touch()
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{name}")
        abstract.listen()
        ours, theirs = os.pipe()
        stack.callback(os.close, ours)
        stack.callback(os.close, theirs)
        port = tcp.getsockname()[1]
        words = [str(word) for word in (victim, ours, port, name, log)]
        said = in_qemus_place(folder, jailed, ["-c", ATTEMPTS, *words], [ours])
    outcomes: dict[str, str] = json.loads(said)
    return outcomes


def test_from_inside_nothing_of_the_host_can_be_reached(tmp_path: Path, victim: int) -> None:
    with uids.claimed(Process()) as (uid, _):
        outcomes = attempts(tmp_path, victim, jail_for(tmp_path, uid))
    assert {name for name, outcome in outcomes.items() if outcome == "done"} == ALLOWED, outcomes


def test_without_the_jail_all_of_it_can(tmp_path: Path, victim: int) -> None:
    outcomes = attempts(tmp_path, victim, None)
    assert {name for name, outcome in outcomes.items() if outcome != "done"} == set(), outcomes


def test_a_pipe_that_was_not_given_cannot_be_opened_again(
    tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why `give` is needed: a pipe is its maker's."""
    monkeypatch.setattr(jail.Jail, "give", lambda *_: None)
    with uids.claimed(Process()) as (uid, _):
        assert attempts(tmp_path, victim, jail_for(tmp_path, uid))["pipe"] == "Permission denied"


def test_what_the_kernel_shows_of_qemu(guest_running: LiveGuest) -> None:
    report = guest_running.run(guest_running.guest.examine())
    seen = report.process
    assert seen is not None
    assert seen == owner.observe(guest_running.pid)
    assert seen.lacking == ()
    assert DEFAULT_UIDS[0] <= seen.uid == seen.gid <= DEFAULT_UIDS[1]
    assert (seen.groups, seen.no_new_privs, seen.seccomp_filtered) == ((), True, True)
    assert (seen.dumpable, seen.core) == (False, 0)
    assert seen.own_namespaces == ALL_NAMESPACES
    kept = () if seen.locks_by == "limit" else ("CAP_IPC_LOCK",)
    assert seen.capabilities == seen.bounding_set == kept
    status = procfs.status(guest_running.pid)
    assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {(1 << 14) * bool(kept)}
    (probe,) = [probe for probe in report.probes if probe.name == "unprivileged"]
    assert (probe.verdict, probe.control) == (Verdict.BLOCKED, Verdict.READABLE)


def test_without_the_jail_the_report_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a supervisor that may give QEMU nothing of its own."""
    monkeypatch.setattr(jail, "missing_rights", lambda: ["CAP_SYS_ADMIN"])
    with prepared(guest_file(tmp_path)) as guest:
        seen = owner.observe(guest.pid)
        report = guest.run(guest.guest.examine())
    words = " / ".join(seen.lacking)
    for wrong in ("as its supervisor does", "capabilities", "bounding set", "shares namespaces: mnt, net, ipc"):
        assert wrong in words
    (probe,) = [probe for probe in report.probes if probe.name == "unprivileged"]
    assert (probe.verdict, probe.missing) == (Verdict.INCONCLUSIVE, "uid of QEMU's own: it runs as vmmback does")


def test_qemu_has_the_descriptors_and_files_that_it_needs(guest_running: LiveGuest) -> None:
    """Its own eventfds and signalfd, two sockets, its log, /dev/null, /dev/urandom, and the guest's RAM."""
    kinds = sorted(re.sub(r"\d+", "N", link.path) for link in procfs.descriptors(guest_running.pid))
    log = str(guest_running.guest.folder / "qemu.log")
    expected = {"/dev/null": 1, "/dev/urandom": 1, re.sub(r"\d+", "N", log): 2, "socket:[N]": 2, procfs.SECRETMEM: 1}
    assert {kind: kinds.count(kind) for kind in kinds if not kind.startswith("anon_inode:")} == expected
    assert {kind for kind in kinds if kind.startswith("anon_inode:")} <= {
        "anon_inode:[eventfd]",
        "anon_inode:[signalfd]",
    }

    root = Path(f"/proc/{guest_running.pid}/root")
    known = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "etc", "dev", "proc", "boot"}
    assert {entry.name for entry in root.iterdir()} <= known
    assert {entry.name for entry in (root / "etc").iterdir()} <= {"ld.so.cache", "alternatives"}
    assert {entry.name for entry in (root / "dev").iterdir()} == {"null", "zero", "urandom"}
    assert {entry.name for entry in (root / "boot").iterdir()} == {"firmware"}
    mounts = [line.split() for line in Path(f"/proc/{guest_running.pid}/mounts").read_text().splitlines()]
    assert all({"ro", "nosuid"} <= set(mount[3].split(",")) for mount in mounts), mounts


@pytest.mark.parametrize("ids", ["a uid of the range", "an account with a group of another number"])
def test_a_process_of_qemus_uid_gets_at_it_where_it_is_dumpable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: str
) -> None:
    """The twin of the probe in test_what_the_kernel_shows_of_qemu: with a loader that QEMU may read, it is open."""
    if not jail.may_lock_by_limit(4 << 20):
        pytest.skip("the hard RLIMIT_MEMLOCK is less than 4 MiB")
    monkeypatch.setattr(jail.Jail, "_hide_loader", lambda _: None)
    # Not with CAP_IPC_LOCK: a tracer must have all capabilities of its tracee (security/commoncap.c).
    monkeypatch.setattr("vmmback.launch._shares_aux_ram", lambda *_: False)
    file = guest_file(tmp_path, size="4MiB")
    if ids.startswith("an account"):
        file.write_text(file.read_text() + f'[process]\nuser = "{unused_account(of_another_group=True).pw_name}"\n')
    with prepared(file) as guest:
        seen = owner.observe(guest.pid)
        observation = rights.UnprivilegedProbe().observe(guest.guest.target)
    assert seen.dumpable
    assert any("dumpable" in what for what in seen.lacking)
    assert (observation.target, observation.control) == (Verdict.READABLE, Verdict.READABLE)
    nobody, own = observation.detail.split("; ")
    assert "done" not in nobody
    assert own.endswith("pidfd_getfd done, /proc/PID/mem done, ptrace done")


def test_the_probe_needs_a_process_to_look_at() -> None:
    observation = rights.UnprivilegedProbe().observe(Target(2**22 - 1, {1: 4096}))
    assert (observation.target, observation.control) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE)


def test_where_the_limit_can_be_the_limit_it_is_exact(tmp_path: Path) -> None:
    """A guest so small that no one must raise the hard limit; QEMU maps its RAM without any capability."""
    if not jail.may_lock_by_limit(4 << 20):
        pytest.skip("the hard RLIMIT_MEMLOCK is less than 4 MiB")
    with prepared(guest_file(tmp_path, size="4MiB")) as guest:
        seen = owner.observe(guest.pid)
        guest.start()
        secret = guest.guest.proof.secret
    assert secret == 4 << 20
    if seen.locks_by == "limit":  # else QEMU's other blocks did not fit
        assert seen.memlock in (4 << 20, 36 << 20)
        assert (seen.capabilities, seen.bounding_set, seen.lacking) == ((), (), ())


def test_a_file_that_qemu_could_not_read_is_refused_first(tmp_path: Path, runtime_dir: Path) -> None:
    """Its folder is 0700, as every tmp_path is: that is no hindrance."""
    file = guest_file(tmp_path)
    rom = file.with_suffix(".rom")
    assert not tmp_path.stat().st_mode & stat.S_IXOTH
    rom.chmod(0o600)
    with (
        pytest.raises(HostUnfit, match=r"^boot.firmware: .* cannot be read by QEMU, which runs as uid \d+") as refused,
        prepared(file),
    ):
        pass
    assert refused.value.hint == f"let others read it: chmod o+r {rom}"
    assert not runtime_dir.exists() or list(runtime_dir.iterdir()) == []
    rom.chmod(0o604)
    with prepared(file):
        pass


def unused_account(*, of_another_group: bool = False) -> pwd.struct_passwd:
    """Return an account that no process runs as; its group has another number than it, if that is wanted."""
    running = set()
    for pid in procfs.processes():
        with suppress(FileNotFoundError):  # it has ended meanwhile
            running.add(Path(f"/proc/{pid}").stat().st_uid)
    unused = (a for a in pwd.getpwall() if a.pw_uid not in running and 0 < a.pw_uid < 1000)
    return next(a for a in unused if not of_another_group or a.pw_gid != a.pw_uid)


def test_an_account_of_the_guests_own(tmp_path: Path) -> None:
    account = unused_account()
    file = guest_file(tmp_path)
    file.write_text(file.read_text() + f'[process]\nuser = "{account.pw_name}"\n')
    with prepared(file) as guest:
        seen = owner.observe(guest.pid)
        assert (seen.uid, seen.gid, seen.lacking) == (account.pw_uid, account.pw_gid, ())
        taken = pytest.raises(HostUnfit, match=f"another process, runs as {account.pw_name}")
        with taken, uids.claimed(config.load(file).process):
            pass


def test_uids_are_claimed_once_also_when_all_want_one_at_once(tmp_path: Path) -> None:
    wanted = Process(uids=(1_950_000_000, 1_950_000_019))
    with ExitStack() as stack, ThreadPoolExecutor(20) as pool:
        claims = [uids.claimed(wanted, tmp_path / "locks") for _ in range(20)]
        found = list(pool.map(stack.enter_context, claims))
        assert {uid for uid, _ in found} == set(range(1_950_000_000, 1_950_000_020))
        taken = pytest.raises(HostUnfit, match="every uid from 1950000000 to 1950000019 is taken")
        with taken, uids.claimed(wanted, tmp_path / "locks"):
            pass
    with uids.claimed(wanted, tmp_path / "locks"):
        pass


def test_a_uid_that_a_process_has_is_left_alone(tmp_path: Path) -> None:
    """A QEMU that outlives its supervisor for a moment, or somebody else's process."""
    uid = 1_950_000_100
    ours, theirs = os.pipe()
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.setresuid(uid, uid, uid)
        os.write(done, b".")
        os.read(ours, 1)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(HostUnfit, match="is taken"), uids.claimed(Process(uids=(uid, uid)), tmp_path / "locks"):
        pass
    for descriptor in (ours, theirs, ready, done):
        os.close(descriptor)
    os.waitpid(pid, 0)
    with uids.claimed(Process(uids=(uid, uid)), tmp_path / "locks") as (claimed, _):
        assert claimed == uid


def test_after_sigkill_of_the_supervisor_all_is_free_again(start: Start, tmp_path: Path, runtime_dir: Path) -> None:
    """QEMU is gone though its uid changed, which clears the parent-death signal; and nothing is mounted here."""
    mounts = Path("/proc/self/mountinfo").read_text()
    running = [
        start(sys.executable, "-m", "vmmback", "launch", guest_file(tmp_path), "--json", "--no-validate")
        for _ in range(2)
    ]
    for each in running:
        each.wait_for("READY")
    qemus = qemu_of(runtime_dir)
    owners = {Path(f"/proc/{pid}").stat().st_uid for pid in qemus}
    assert len(qemus) == len(owners) == 2
    assert Path("/proc/self/mountinfo").read_text() == mounts
    for uid in owners:
        with pytest.raises(HostUnfit), uids.claimed(Process(uids=(uid, uid))):
            pass
    for each in running:
        each.signal(signal.SIGKILL)
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in qemus), "QEMU is gone", GONE_S)
    for uid in owners:
        with uids.claimed(Process(uids=(uid, uid))):
            pass
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_a_jail_that_cannot_be_made_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "_FOLDERS", (Path("/no/such/folder"),))
    says = r"QEMU's namespaces and mounts could not be made: .*mount\(2\).*/no/such/folder"
    with pytest.raises(HostUnfit, match=says), prepared(guest_file(tmp_path)):
        pass


def test_a_network_of_the_hosts_is_left_where_it_is_wanted(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, uids.claimed(Process()) as (uid, _):
        jailed = jail.Jail(uid, uid, root=Path(folder), program=PYTHON, locked=0, host_network=True)
        said: Any = in_qemus_place(tmp_path, jailed, ["-c", "import os; print(os.readlink('/proc/self/ns/net'))"], [])
    assert said.strip() == os.readlink("/proc/self/ns/net")  # noqa: PTH115
