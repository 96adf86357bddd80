"""What the broker may do, and what it lets others do: its own capabilities, and how much borrowers may lock."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import MIB, ROOT, TINY_BYTES, eventually, guest_file, processes_of, qemu_of
from integration.leftovers import command_line, descendants
from integration.test_broker import (
    NOBODY,
    UNITS,
    Brokers,
    acquire,
    as_user,
    brokers,
    call,
    client,
    filled,
    open_socket,
    pool,
    scraped,
    stats,
)
from vmmback.broker.run import RIGHTS
from vmmback.linux import capabilities as linux_capabilities
from vmmback.linux import procfs

__all__ = ["brokers", "open_socket"]  # fixtures

pytestmark = pytest.mark.usefixtures("needs_secretmem")


def sets(task: Path) -> dict[str, set[str] | str]:
    status = procfs.status(task.name, task.parent)
    found: dict[str, set[str] | str] = {
        name: set(linux_capabilities.names(int(status[name], 16)))
        for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")
    }
    return found | {"NoNewPrivs": status["NoNewPrivs"]}


def tasks_of(pid: int) -> list[dict[str, set[str] | str]]:
    """Return the sets of each thread of a process; nothing for what has ended meanwhile."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                found.append(sets(task))
    return found


def test_the_broker_keeps_the_rights_that_are_named_and_no_process_of_its_has_more(
    brokers: Brokers, tmp_path: Path
) -> None:
    """With a thread beside its own, which looks for figures, while the pool is being filled."""
    broker = brokers.start(f'metrics = "{tmp_path}/metrics"\n' + pool(4 * MIB, 64))
    assert "vmmback" in scraped(tmp_path / "metrics")
    own = linux_capabilities.names(int(procfs.status("self")["CapPrm"], 16))
    kept = set(RIGHTS) & set(own)
    expected = {
        "CapPrm": kept, "CapEff": kept, "CapInh": set(), "CapBnd": kept, "CapAmb": set(), "NoNewPrivs": "1",
    }  # fmt: skip
    assert kept < set(own)
    threads = tasks_of(broker.pid)
    assert len(threads) > 1
    assert [found for found in threads if found != expected] == []

    others: list[dict[str, set[str] | str]] = []

    def filling() -> bool:
        workers = [pid for pid in descendants(broker.pid) if "prefault_worker.py" in command_line(pid)]
        others.extend(found for pid in workers for found in tasks_of(pid))
        return bool(others)

    eventually(filling, "the pool is being filled")
    assert [found for found in others if found != expected] == []


def test_its_unit_names_the_same_rights() -> None:
    (names,) = re.findall(r"^CapabilityBoundingSet=(.*)$", (UNITS / "vmmback-broker.service").read_text(), re.MULTILINE)
    assert names.split() == list(RIGHTS)


def test_what_is_lent_is_mapped_by_no_process_of_the_brokers(brokers: Brokers) -> None:
    broker = brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    with client() as borrower:
        _, memory, _ = acquire(borrower)
        inode = os.fstat(memory).st_ino
        for pid in (broker.pid, *descendants(broker.pid)):
            mapped = procfs.maps(pid)
            assert mapped
            assert not [each for each in mapped if each.inode == inode and each.path == procfs.SECRETMEM]
        os.close(memory)


# --- What borrowers may lock ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("open_socket")
@pytest.mark.parametrize("uid", [0, NOBODY], ids=["the broker's own user", "another one"])
def test_who_borrows_may_lock_that_much_if_the_broker_may_raise_the_limit(
    uid: int, request: pytest.FixtureRequest
) -> None:
    """The soft limit of a process of one's own user anybody may raise as far as the hard one (prlimit(2))."""
    brokers: Brokers = request.getfixturevalue("brokers")
    brokers.start(pool(2 * MIB, count=3) + f'[[allow]]\nuser = {NOBODY}\ntotal = "1GiB"\n')
    eventually(lambda: filled(3), "the pool is filled", timeout_s=60)

    def borrow() -> object:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 * MIB, 8 * MIB))
        seen = []
        with client() as connection:
            for _ in range(2):
                acquire(connection, 2 * MIB)
                seen.append(resource.getrlimit(resource.RLIMIT_MEMLOCK))
        return seen

    may_raise = uid == 0 or "CAP_SYS_RESOURCE" in own_rights()
    raised = [[2 * MIB, 8 * MIB], [4 * MIB, 8 * MIB]]
    with client() as other:  # whose lease is none of theirs
        os.close(acquire(other, 2 * MIB)[1])
        assert as_user(borrow, uid) == (raised if may_raise else [[1 * MIB, 8 * MIB]] * 2)


def own_rights() -> tuple[str, ...]:
    return linux_capabilities.names(int(procfs.status("self")["CapPrm"], 16))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may write to."""
    with tempfile.TemporaryDirectory(prefix="vmmback-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


AS_NOBODY = [
    "prlimit", f"--memlock={8 * MIB}:{8 * MIB}",
    "setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--",
    "env",  # until it executes something, setpriv has its old capabilities, by which it could execute anything
]  # fmt: skip


@pytest.fixture(scope="module")
def anybodys_vmmback() -> tuple[list[str], dict[str, str]]:
    """Return what starts vmmback as another user, and its environment: our Python may lie where only root can read."""
    packages = os.pathsep.join([str(ROOT), sysconfig.get_paths()["purelib"]])
    for python in (sys.executable, "/usr/bin/python3"):
        environment = {"PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1"}
        tried = [*AS_NOBODY, python, "-c", "import vmmback.cli.launch, asyncvarlink, msgspec, qemu.qmp"]
        if not subprocess.run(tried, env=os.environ | environment, capture_output=True, cwd="/").returncode:
            return [python, "-m", "vmmback"], environment
    said = "needs a Python that other users can start, with our packages"
    if os.environ.get("CI") == "true":  # every machine of CI has one in /usr/bin
        pytest.fail(said)
    pytest.skip(said)


def launch_as_nobody(
    program: list[str], environment: Mapping[str, str], *prefix: str, file: Path
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment | {"VMMBACK_RUNTIME_DIR": str(file.parent / "own")}
    return subprocess.run(
        [*AS_NOBODY, *prefix, *program, "launch", str(file), "--json", "--detach", "--no-validate"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def launcher(open_folder: Path) -> list[str]:
    """A program with the file capability CAP_IPC_LOCK, for the members of a group, and how to pass it on."""
    program = Path(shutil.copy(shutil.which("setpriv") or "setpriv", open_folder / "launcher"))
    os.chown(program, 0, NOBODY)
    program.chmod(0o750)
    subprocess.run(["setcap", "cap_ipc_lock+eip", str(program)], check=True)
    return [str(program), "--inh-caps", "+ipc_lock", "--ambient-caps", "+ipc_lock", "--"]


@pytest.mark.usefixtures("open_socket", "needs_qemu")
def test_a_user_launches_more_than_his_limit_by_a_launcher_with_the_right_to_lock(
    open_folder: Path, launcher: list[str], anybodys_vmmback: tuple[list[str], dict[str, str]],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    brokers: Brokers = request.getfixturevalue("brokers")
    brokers.start(pool(TINY_BYTES) + f'[[allow]]\nuser = {NOBODY}\ntotal = "1GiB"\n')
    eventually(filled, "the pool is filled", timeout_s=60)
    file = guest_file(open_folder)
    for path in open_folder.glob("tiny-*"):
        path.chmod(0o644)

    done = launch_as_nobody(*anybodys_vmmback, *launcher, file=file)
    assert done.returncode == 0, done.stderr
    (qemu,) = qemu_of(open_folder)
    (lease,) = leases()
    try:
        mapped = [each for each in procfs.maps(qemu) if each.path == procfs.SECRETMEM]
        assert sum(each.size for each in mapped) == TINY_BYTES
        assert (lease["size"], lease["uid"]) == (TINY_BYTES, NOBODY)
        assert procfs.status(qemu)["Uid"].split() == [str(NOBODY)] * 4
        lock = {"CAP_IPC_LOCK"}
        found = sets(Path(f"/proc/{qemu}"))
        assert [found[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")] == [lock] * 4
    finally:
        os.kill(lease["pid"], signal.SIGKILL)  # with which QEMU ends
    eventually(lambda: stats()["leases"] == 0 and not processes_of(open_folder / "own"), "the guest has ended")


def leases() -> list[dict[str, Any]]:
    with client() as connection:
        found: list[dict[str, Any]] = call(connection, "List")[0]["parameters"]["leases"]
        return found


@pytest.mark.usefixtures("open_socket", "needs_qemu")
def test_without_the_launcher_it_is_one_refusal_with_both_remedies(
    open_folder: Path, anybodys_vmmback: tuple[list[str], dict[str, str]], request: pytest.FixtureRequest
) -> None:
    brokers: Brokers = request.getfixturevalue("brokers")
    if "CAP_SYS_RESOURCE" in own_rights():
        pytest.skip("needs a broker that cannot raise the limit; this one does")
    brokers.start(pool(TINY_BYTES) + f'[[allow]]\nuser = {NOBODY}\ntotal = "1GiB"\n')
    eventually(filled, "the pool is filled", timeout_s=60)
    file = guest_file(open_folder)
    for path in open_folder.glob("tiny-*"):
        path.chmod(0o644)
    done = launch_as_nobody(*anybodys_vmmback, file=file)
    assert done.returncode == 3
    assert (done.stderr.count("vmmback:"), "Traceback" in done.stderr) == (2, False), done.stderr
    assert "error: RLIMIT_MEMLOCK is 8192 KiB, too small to map 16384 KiB of secret RAM" in done.stderr
    assert "ulimit -l 16384" in done.stderr
    assert "a launcher that has it (docs/BROKER.md)" in done.stderr
    eventually(lambda: stats()["leases"] == 0, "the lease has ended", timeout_s=30)
