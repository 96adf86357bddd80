"""The broker on the real kernel: what it lends, to whom, and that nobody ever sees another's bytes."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import re
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from integration import capabilities
from integration.conftest import MIB, ROOT, TINY_BYTES, eventually, guest_file
from integration.test_memlock import unprivileged
from vmmback.admission import promises
from vmmback.broker import client as broker_client
from vmmback.broker.config import BrokerConfig
from vmmback.broker.pool import Pool
from vmmback.broker.run import run as run_broker
from vmmback.errors import HostUnfit
from vmmback.linux import dumpable, peer, procfs
from vmmback.linux.direct_map import DirectMap
from vmmback.ram import LentRam

PROGRAM = [sys.executable, "-m", "vmmback"]
NOBODY = 65534
SMALL_BYTES = 4 * MIB  # what a user may lock anyway: RLIMIT_MEMLOCK is 8 MiB by default

pytestmark = pytest.mark.usefixtures("needs_secretmem")


class Brokers:
    """Starts the broker of this test."""

    def __init__(self, folder: Path) -> None:
        self.file, self.socket = folder / "broker.toml", Path(os.environ["VMMBACK_BROKER"])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, text: str, *prefix: str, passed: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        """Start one whose file says `text`, by the program `prefix`, with a descriptor that it inherits."""
        self.file.write_text(text)
        with (self.file.parent / "broker.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *PROGRAM, "broker", str(self.file)], cwd=ROOT, stderr=log,
                pass_fds=passed,
            )  # fmt: skip
        eventually(self._answers, "the broker answers", timeout_s=60)
        return self.process

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.file.parent / "broker.log").read_text()
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(str(self.socket)) == 0

    def end(self, signum: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(60)


@pytest.fixture
def brokers(tmp_path: Path, runtime_dir: Path) -> Iterator[Brokers]:
    started = Brokers(tmp_path)
    yield started
    if started.process and started.process.poll() is None:
        assert started.end() == 0
    for written in runtime_dir.glob(".broker-leases"):  # for the next broker: this process has borrowed, and lives
        written.unlink()


def pool(size: int = TINY_BYTES, count: int = 1) -> str:
    return f'[[pool]]\nsize = "{size // MIB}MiB"\ncount = {count}\n'


Answer = dict[str, Any]


def call(connection: socket.socket, method: str, **parameters: object) -> tuple[Answer, list[int]]:
    """Call a method of the broker in Varlink's own words; return the answer and its descriptors."""
    name = method if "." in method else f"org.vmmback.Broker.{method}"
    connection.sendall(json.dumps({"method": name, "parameters": parameters}).encode() + b"\0")
    received, descriptors = b"", list[int]()
    while not received.endswith(b"\0"):
        data, passed, _, _ = socket.recv_fds(connection, 1 << 16, 8)
        assert data, "the broker hung up"
        received, descriptors = received + data, descriptors + passed
    answer: Answer = json.loads(received[:-1])
    return answer, descriptors


@contextmanager
def client() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(os.environ["VMMBACK_BROKER"])
        yield connection


def stats() -> Answer:
    with client() as connection:
        found: Answer = call(connection, "Stats")[0]["parameters"]
        return found


def filled(count: int = 1) -> bool:
    return all(entry["ready"] >= count for entry in stats()["pool"])


def acquire(connection: socket.socket, size: int = TINY_BYTES) -> tuple[int, int, array[int]]:
    """Return the lease, the descriptor of its memory, the caller's, and the pagemap entries."""
    answer, descriptors = call(connection, "Acquire", size=size, purpose="a test")
    assert "error" not in answer, answer
    memory, frames = (descriptors[answer["parameters"][name]] for name in ("descriptor", "frames"))
    entries = array("Q")
    entries.frombytes(os.pread(frames, os.fstat(frames).st_size, 0))
    os.close(frames)
    return answer["parameters"]["lease"], memory, entries


def launched(tmp_path: Path, *options: str) -> tuple[str, Answer]:
    """Launch a tiny guest in the background; return its name and its report."""
    file = guest_file(tmp_path)
    done = run("launch", str(file), "--json", "--detach", *options)
    assert done.returncode == 0, done.stderr
    return file.stem, json.loads(done.stdout)


def scraped(place: Path) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        eventually(lambda: connection.connect_ex(str(place)) == 0, "metrics are served")
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: broker\r\n\r\n")
        with connection.makefile("rb") as answer:
            return answer.read().decode()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=80)


@pytest.mark.usefixtures("needs_qemu", "needs_direct_map")
def test_a_guest_runs_isolated_on_ram_that_was_ready_and_it_is_counted_once(
    brokers: Brokers, tmp_path: Path, runtime_dir: Path
) -> None:
    brokers.start(f'metrics = "{tmp_path}/metrics"\n{pool()}')
    eventually(filled, "the pool is filled", timeout_s=60)
    (ready,) = promises()[".broker"].inodes
    name, report = launched(tmp_path)
    try:
        assert report["verdict"] == "isolated"
        assert report["memory"]["secret"] == report["memory"]["present_pages"] * 4096 == TINY_BYTES
        assert "prefault" not in report["timings"]
        assert promises()[name].inodes[:1] == [ready]
        assert promises()[name].touched == promises()[name].size == TINY_BYTES
        (lease,) = json.loads(run("pool", "--json").stdout)["leases"]
        assert 'vmmback_guests{verdict="isolated"} 1.0\n' in scraped(tmp_path / "metrics")
        assert (lease["size"], lease["uid"], lease["purpose"]) == (TINY_BYTES, 0, f"guest {name}")
        eventually(filled, "the pool is filled again", timeout_s=60)
        assert ready not in promises()[".broker"].inodes
        assert promises()[".broker"].lent == [ready]
    finally:
        assert run("stop", name, "--kill").returncode == 0
    eventually(lambda: stats()["leases"] == 0, "the lease has ended", timeout_s=60)
    eventually(lambda: promises()[".broker"].lent == [], "nothing is told as lent", timeout_s=60)
    assert stats()["lent"] == 1


@pytest.mark.usefixtures("needs_qemu")
def test_without_a_broker_or_without_ram_of_its_size_a_guest_gets_its_own(brokers: Brokers, tmp_path: Path) -> None:
    alone, report = launched(tmp_path)
    assert "prefault" in report["timings"]
    brokers.start(pool(2 * TINY_BYTES))
    eventually(filled, "the pool is filled", timeout_s=60)
    other, report = launched(tmp_path)
    assert "prefault" in report["timings"]
    assert stats()["lent"] == 0
    for name in (alone, other):
        assert run("stop", name, "--kill").returncode == 0


def test_what_comes_back_is_made_ready_at_once_and_the_next_lease_needs_no_other_frames(brokers: Brokers) -> None:
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    with client() as connection:
        for _ in range(2):
            lease, memory, _ = acquire(connection)
            eventually(filled, "the pool is filled again", timeout_s=60)
            os.close(memory)
            assert call(connection, "Release", lease=lease)[0]["parameters"]["ended"] is True
            eventually(lambda: filled(2), "one more is ready", timeout_s=60)
        # The first, one for the first lease, and one for each that came back.
        assert stats()["filled_bytes"] == 4 * TINY_BYTES
        os.close(acquire(connection)[1])
        assert stats()["pool"][0]["ready"] == 1
        os.close(acquire(connection)[1])
        eventually(filled, "the pool is filled again", timeout_s=60)
        assert stats()["filled_bytes"] == 5 * TINY_BYTES


Tenants = Callable[[], int]


def hostile(first: int, tenants: Tenants, connection: socket.socket, lease: int) -> bool:
    """Keep a copy and a mapping of what was lent, end the lease; tell whether the next tenant's secret shows there."""
    copy = os.dup(first)
    with mmap.mmap(first, TINY_BYTES) as kept:
        os.close(first)
        assert call(connection, "Release", lease=lease)[0]["parameters"]["ended"] is True
        eventually(filled, "the pool is filled again", timeout_s=60)
        secret = secrets.token_bytes(32)
        second = tenants()
        with mmap.mmap(second, TINY_BYTES) as theirs:
            theirs[:] = secret * (TINY_BYTES // len(secret))
            with mmap.mmap(copy, TINY_BYTES) as passed_on:
                shows = max(kept.find(secret), passed_on.find(secret)) >= 0
        os.close(second)
    os.close(copy)
    return shows


@pytest.mark.parametrize("lent_again", [False, True], ids=["the broker", "control: lent again"])
def test_who_keeps_what_was_lent_never_sees_a_later_tenants_bytes(brokers: Brokers, *, lent_again: bool) -> None:
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    with client() as borrower, client() as tenant:
        lease, memory, _ = acquire(borrower)
        again = os.dup(memory)
        try:
            tenants = (lambda: os.dup(again)) if lent_again else lambda: acquire(tenant)[1]
            assert hostile(memory, tenants, borrower, lease) is lent_again
        finally:
            os.close(again)


@pytest.mark.usefixtures("needs_direct_map")
def test_what_is_lent_is_zero_secret_and_where_the_broker_says(brokers: Brokers) -> None:
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    with client() as borrower:
        _, memory, entries = acquire(borrower)
    assert str(Path(f"/proc/self/fd/{memory}").readlink()) == procfs.SECRETMEM
    assert len(entries) * mmap.PAGESIZE == TINY_BYTES
    with mmap.mmap(memory, TINY_BYTES) as view:
        (mapping,) = procfs.secret_mappings(procfs.maps("self"), os.fstat(memory).st_ino)
        assert view[:] == bytes(TINY_BYTES)
        assert procfs.pagemap("self", mapping.start, mapping.size) == entries
        with DirectMap.open() as direct_map:
            assert direct_map.check(entries).readable == 0
            control = procfs.pagemap("self", procfs.maps("self")[0].start, mmap.PAGESIZE)
            assert direct_map.check(control).readable == 1
    os.close(memory)


def as_nobody(work: Callable[[], object]) -> Any:
    return as_user(work, NOBODY)


def as_user(work: Callable[[], object], uid: int) -> Any:
    """Do it in a child with this uid, and return what it returned; it must be fit for JSON."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


@pytest.fixture
def open_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A socket that other users can reach; pytest's own folders are closed to them."""
    with tempfile.TemporaryDirectory(prefix="vmmback-") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("VMMBACK_BROKER", f"{folder}/socket")
        yield


@pytest.mark.usefixtures("open_socket")
def test_another_user_gets_what_a_rule_gives_him_and_sees_only_his_own(
    tmp_path: Path, runtime_dir: Path, request: pytest.FixtureRequest
) -> None:
    brokers: Brokers = request.getfixturevalue("brokers")
    rule = f'[[allow]]\nuser = {NOBODY}\ntotal = "{SMALL_BYTES // MIB}MiB"\n'
    brokers.start(pool(SMALL_BYTES, count=2) + rule)
    eventually(lambda: filled(2), "the pool is filled", timeout_s=60)

    def borrow() -> object:
        with client() as connection:
            _, memory, entries = acquire(connection, SMALL_BYTES)
            with mmap.mmap(memory, SMALL_BYTES) as view:
                view[0] = 1
            refused = call(connection, "Acquire", size=SMALL_BYTES, purpose="more")[0]
            listed = call(connection, "List")[0]["parameters"]["leases"]
            return refused, [lease["uid"] for lease in listed], max(entry & procfs.PFN_MASK for entry in entries)

    with client() as connection:
        lease, memory, entries = acquire(connection, SMALL_BYTES)
        os.close(memory)
        assert min(entry & procfs.PFN_MASK for entry in entries) > 0
        eventually(lambda: filled(2), "the pool is filled", timeout_s=60)
        refused, uids, highest = as_nobody(borrow)
        assert refused["error"] == "org.vmmback.Broker.Refused"
        assert refused["parameters"]["exit_code"] == 4
        assert "4 of at most 4 MiB" in refused["parameters"]["message"]
        assert (uids, highest) == ([NOBODY], 0)
        eventually(lambda: stats()["leases"] == 1, "its lease ended with the process", timeout_s=60)

        def end_anothers() -> object:
            with client() as theirs:
                return call(theirs, "Release", lease=lease)[0]["parameters"]["ended"]

        assert as_nobody(end_anothers) is False
        assert stats()["leases"] == 1


BORROWS = """
import asyncio, contextlib
from pathlib import Path
from vmmback.guest import SilentWatcher
async def start():
    async with contextlib.AsyncExitStack() as stack:
        guest = await launch.prepare(config.load(Path(sys.argv[1])), SilentWatcher(), stack)
        await guest.monitor.cont()
        await asyncio.wait_for(guest.console.ready.wait(), 60)
        (memory,) = guest.ram
        mapped = [each for each in procfs.maps(guest.qemu.pid) if each.inode == memory.inode]
        (path,) = {each.path for each in mapped}
        print(json.dumps([type(memory).__name__, sum(each.size for each in mapped), path]))
asyncio.run(start())
"""


@pytest.mark.usefixtures("open_socket", "needs_qemu")
def test_a_user_without_rights_launches_a_guest_on_what_he_borrowed(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A prefault of his own would need a Python that he may start; what is borrowed is prefaulted."""
    brokers: Brokers = request.getfixturevalue("brokers")
    brokers.start(pool(SMALL_BYTES) + f'[[allow]]\nuser = {NOBODY}\ntotal = "1GiB"\n')
    eventually(filled, "the pool is filled", timeout_s=60)
    with tempfile.TemporaryDirectory(prefix="vmmback-") as folder:
        Path(folder).chmod(0o777)
        monkeypatch.setenv("VMMBACK_RUNTIME_DIR", f"{folder}/run")
        file = guest_file(Path(folder), size=f"{SMALL_BYTES // MIB}MiB")
        for path in Path(folder).iterdir():
            path.chmod(0o644)
        ended = unprivileged(BORROWS, 8 * MIB, 8 * MIB, str(file))
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout) == ["LentRam", SMALL_BYTES, procfs.SECRETMEM]
    eventually(lambda: stats()["leases"] == 0, "the lease has ended", timeout_s=60)
    assert stats()["lent"] == 1


@pytest.mark.usefixtures("open_socket")
def test_a_user_whom_no_rule_names_gets_nothing(request: pytest.FixtureRequest) -> None:
    brokers: Brokers = request.getfixturevalue("brokers")
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)

    def ask() -> object:
        with client() as connection:
            return call(connection, "Acquire", size=TINY_BYTES, purpose="a guest")[0]

    refused = as_nobody(ask)
    assert refused["parameters"]["message"] == f"uid {NOBODY} may not borrow secret RAM"
    assert (stats()["denied"], stats()["lent"]) == (1, 0)


def listed() -> list[Answer]:
    with client() as connection:
        found: list[Answer] = call(connection, "List")[0]["parameters"]["leases"]
        return found


def written(runtime_dir: Path) -> int:
    """Return how many leases the next broker would find in the file."""
    begun = ended = 0
    with suppress(FileNotFoundError):
        for line in (runtime_dir / ".broker-leases").read_text().splitlines():
            entry = json.loads(line)
            begun, ended = begun + ("ended" not in entry), ended + ("ended" in entry)
    return begun - ended


BORROWS_AND_WAITS = """
import socket, sys, json
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    connection.sendall(sys.argv[2].encode() + b"\\0")
    answer = socket.recv_fds(connection, 1 << 16, 8)[0]
print(answer[:-1].decode(), flush=True)
sys.stdin.read()
"""


@contextmanager
def borrower(size: int = TINY_BYTES) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Borrow in a process of its own, which lives until it is told; yield it, and its lease."""
    asked = json.dumps({"method": "org.vmmback.Broker.Acquire", "parameters": {"size": size, "purpose": "a test"}})
    with subprocess.Popen(
        [sys.executable, "-c", BORROWS_AND_WAITS, os.environ["VMMBACK_BROKER"], asked],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["parameters"]["lease"]
        process.kill()


def test_the_broker_after_one_that_was_killed_knows_the_leases_of_all_who_live(
    brokers: Brokers, runtime_dir: Path
) -> None:
    brokers.start(pool(count=3))
    eventually(lambda: filled(3), "the pool is filled", timeout_s=60)
    with borrower() as (_, kept), borrower() as (ends, _), borrower() as (lives, _):
        before = {entry["lease"]: entry for entry in listed()}
        eventually(lambda: len(promises()[".broker"].lent) == 3, "all is told as lent", timeout_s=60)
        lent = set(promises()[".broker"].lent)
        assert written(runtime_dir) == 3
        brokers.end(signal.SIGKILL)
        ends.kill()
        ends.wait()
        brokers.start(pool(count=3))
        after = {entry["lease"]: entry for entry in listed()}
        assert set(after) == {number for number, entry in before.items() if entry["pid"] != ends.pid}
        assert all(before[number] == entry for number, entry in after.items())
        eventually(lambda: filled(3), "the pool is filled", timeout_s=60)
        record = promises()[".broker"]
        assert set(record.lent) < lent
        assert len(record.lent) == 2
        assert not lent & set(record.inodes)
        assert record.touched == record.size == len(record.inodes) * TINY_BYTES
        with client() as connection:
            assert call(connection, "Release", lease=kept)[0]["parameters"]["ended"] is True
            assert call(connection, "Release", lease=kept)[0]["parameters"]["ended"] is False
        lives.kill()
        eventually(lambda: stats()["leases"] == 0, "the last lease has ended with its process", timeout_s=60)
    eventually(lambda: promises()[".broker"].lent == [], "nothing is told as lent", timeout_s=60)
    assert written(runtime_dir) == 0


@pytest.mark.usefixtures("open_socket")
def test_what_a_user_has_from_a_broker_that_was_killed_counts_with_the_next(
    runtime_dir: Path, request: pytest.FixtureRequest
) -> None:
    brokers: Brokers = request.getfixturevalue("brokers")
    rules = pool(MIB) + f'[[allow]]\nuser = {NOBODY}\ntotal = "1MiB"\n'
    brokers.start(rules)
    eventually(filled, "the pool is filled", timeout_s=60)
    begun, go_on = os.pipe(), os.pipe()

    def borrow_twice() -> object:
        with client() as connection:
            lease, memory, _ = acquire(connection, MIB)
        os.write(begun[1], b".")
        os.read(go_on[0], 1)
        os.close(memory)
        with client() as connection:
            refused = call(connection, "Acquire", size=MIB, purpose="more")[0]["parameters"]["message"]
            return refused, call(connection, "Release", lease=lease)[0]["parameters"]["ended"]

    def restart() -> None:
        os.read(begun[0], 1)
        assert written(runtime_dir) == 1
        brokers.end(signal.SIGKILL)
        brokers.start(rules)
        eventually(filled, "the pool is filled", timeout_s=60)
        os.write(go_on[1], b".")

    restarting = Thread(target=restart)
    restarting.start()
    refused, ended = as_user(borrow_twice, NOBODY)
    restarting.join()
    for descriptor in begun + go_on:
        os.close(descriptor)
    assert "it has 1 of at most 1 MiB" in refused
    assert ended is True


def test_who_borrowed_from_a_broker_that_was_killed_ends_the_lease_with_the_next(
    brokers: Brokers, runtime_dir: Path
) -> None:
    """Not by its own end: it lives on."""
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)

    async def scene() -> None:
        async with broker_client.connected() as lender:
            assert lender is not None
            async with lender.borrowed(TINY_BYTES, "a test") as memory:
                assert memory is not None
                assert written(runtime_dir) == 1
                brokers.end(signal.SIGKILL)
                brokers.start(pool())
                assert [entry["pid"] for entry in listed()] == [os.getpid()]
            assert listed() == []
            brokers.end(signal.SIGKILL)
            with pytest.raises(HostUnfit, match="the broker ended meanwhile"):
                async with lender.borrowed(TINY_BYTES, "a test"):
                    pass

    asyncio.run(scene())


class Manager:
    """Keeps descriptors for a service, as systemd does (sd_notify(3)), and passes them to its next process."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self.kept: list[tuple[str, int]] = []
        self.forgets = True

    def listen(self) -> dict[str, list[int]]:
        """Take up what was said since, and return what is kept."""
        with suppress(BlockingIOError):
            while True:
                text, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 16)
                said = dict(line.split("=", 1) for line in text.decode().splitlines())
                if "FDSTORE" in said:
                    self.kept += [(said["FDNAME"], descriptor) for descriptor in descriptors]
                if "FDSTOREREMOVE" in said and self.forgets:
                    self._close(said["FDNAME"])
        return {name: [descriptor for other, descriptor in self.kept if other == name] for name, _ in self.kept}

    def _close(self, name: str) -> None:
        for _, descriptor in [each for each in self.kept if each[0] == name]:
            os.close(descriptor)
        self.kept = [each for each in self.kept if each[0] != name]

    def inodes(self) -> set[int]:
        """Return those of the files of secret RAM that are kept."""
        return {
            os.fstat(descriptor).st_ino for descriptors in self.listen().values() for descriptor in descriptors
            if str(Path(f"/proc/self/fd/{descriptor}").readlink()) == procfs.SECRETMEM
        }  # fmt: skip

    def close(self) -> None:
        for name in self.listen():
            self._close(name)
        self._socket.close()


# sd_listen_fds(3): from 3 on, and for the process of this number.
PASSES = """
import fcntl, os, sys
names, numbers = sys.argv[1], [int(number) for number in sys.argv[2].split(",") if number]
held = [fcntl.fcntl(number, fcntl.F_DUPFD, 1000) for number in numbers]
for position, number in enumerate(held, 3):
    os.dup2(number, position)
    os.close(number)
os.environ |= {"LISTEN_FDS": str(len(held)), "LISTEN_FDNAMES": names, "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[3], sys.argv[3:])
"""


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield made
    made.close()


@pytest.mark.parametrize("forgets", [True, False], ids=["the manager", "control: one that forgets nothing"])
def test_what_a_manager_kept_and_nobody_had_is_ready_after_a_kill_and_what_was_lent_is_not(
    brokers: Brokers, manager: Manager, runtime_dir: Path, *, forgets: bool
) -> None:
    manager.forgets = forgets
    brokers.start(pool(count=2))
    eventually(lambda: filled(2), "the pool is filled", timeout_s=60)
    at_start = manager.inodes()
    assert at_start == set(promises()[".broker"].inodes)
    with client() as connection:
        lease, memory, _ = acquire(connection)
        had = os.fstat(memory).st_ino
        assert call(connection, "Release", lease=lease)[0]["parameters"]["ended"] is True
    eventually(lambda: filled(2), "the pool is filled again", timeout_s=60)
    assert (had in manager.inodes()) is not forgets
    assert written(runtime_dir) == 0
    brokers.end(signal.SIGKILL)
    manager.listen()
    names, numbers = ":".join(name for name, _ in manager.kept), ",".join(str(number) for _, number in manager.kept)
    kept = manager.inodes()
    brokers.start(
        pool(count=3), sys.executable, "-c", PASSES, names, numbers, passed=[number for _, number in manager.kept]
    )
    assert stats()["pool"][0]["ready"] >= 2
    eventually(lambda: filled(3), "the pool is filled", timeout_s=60)
    record = promises()[".broker"]
    assert len(kept & set(record.inodes)) >= 2
    assert record.touched == record.size == len(record.inodes) * TINY_BYTES
    got = []
    with client() as tenant, mmap.mmap(memory, TINY_BYTES) as kept_by_the_first:
        for _ in range(3):
            _, theirs, entries = acquire(tenant)
            assert min(entry & procfs.PFN_MASK for entry in entries) > 0
            with mmap.mmap(theirs, TINY_BYTES) as view:
                view[:32] = b"the second tenant's own secret, "
            got.append(os.fstat(theirs).st_ino)
            os.close(theirs)
        shows = kept_by_the_first[:32] != bytes(32)
    os.close(memory)
    assert (had in got) is shows is not forgets
    assert not set(got) & (manager.inodes() if forgets else set())


def test_no_manager_keeps_what_was_made_for_one_caller(brokers: Brokers, manager: Manager) -> None:
    """The next broker would have it ready, once its lease has ended."""
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    kept = manager.inodes()
    with client() as connection:
        answer, descriptors = call(connection, "Make", size=2 * TINY_BYTES, purpose="a test")
        assert "error" not in answer, answer
        assert len(kept) == 1
        assert manager.inodes() == kept
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.usefixtures("needs_qemu", "needs_direct_map")
def test_a_guest_outlives_the_broker_and_the_next_one_knows_its_lease(brokers: Brokers, tmp_path: Path) -> None:
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    name, report = launched(tmp_path)
    assert report["verdict"] == "isolated"
    brokers.end(signal.SIGKILL)
    assert run("pool").returncode == 3
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    audited = run("audit", name, "--json")
    assert json.loads(audited.stdout)["verdict"] == "isolated", audited.stderr
    assert [lease["purpose"] for lease in listed()] == [f"guest {name}"]
    assert run("stop", name, "--kill").returncode == 0
    eventually(lambda: stats()["leases"] == 0, "the lease has ended", timeout_s=60)


@pytest.mark.usefixtures("open_socket")
def test_another_users_broker_is_not_trusted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is made to say that it is: nobody but root can be whom this test's broker belongs to."""
    brokers: Brokers = request.getfixturevalue("brokers")
    brokers.start(pool())

    async def reached() -> bool:
        async with broker_client.connected() as lender:
            return lender is not None

    assert asyncio.run(reached())
    monkeypatch.setattr(peer, "of", lambda _: peer.Peer(1, NOBODY, NOBODY))
    with pytest.raises(HostUnfit, match=f"is a process of uid {NOBODY}, who could read the guest"):
        asyncio.run(reached())


def test_a_file_that_is_no_socket_stays_where_metrics_are_to_be_served(brokers: Brokers, tmp_path: Path) -> None:
    place = tmp_path / "notes"
    place.write_text("of mine")
    brokers.file.write_text(f'metrics = "{place}"\n')
    refused = run("broker", str(brokers.file))
    assert (refused.returncode, place.read_text()) == (3, "of mine")
    assert f"metrics cannot be served at {place}: there is something else than a socket" in refused.stderr


def test_a_second_broker_of_a_host_is_refused(brokers: Brokers) -> None:
    brokers.start(pool())
    second = run("broker", str(brokers.file))
    assert second.returncode == 3
    assert "another broker runs on this host" in second.stderr
    assert stats()["lent"] == 0


def test_a_broker_that_is_told_to_end_leaves_nothing(brokers: Brokers, runtime_dir: Path) -> None:
    brokers.start(pool(4 * TINY_BYTES, 2))  # it is ended in the midst of a prefault
    assert brokers.end(signal.SIGINT) == 0
    assert list(runtime_dir.iterdir()) == []
    assert not brokers.socket.exists()


def descriptors_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


UNITS = ROOT / "configs/systemd"


def test_it_works_with_the_rights_of_its_unit_and_at_the_socket_of_systemd(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = (UNITS / "vmmback-broker.service").read_text()
    (names,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    rights = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in names.split())
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        listening.bind(str(brokers.socket))
        listening.listen()
        limited = ["setpriv", f"--bounding-set=-all,{rights}", "--no-new-privs", sys.executable, "-c", PASSES]
        broker = brokers.start(pool(), *limited, "broker", str(listening.fileno()), passed=[listening.fileno()])
        manager.settimeout(60)
        assert manager.recv(100) == b"READY=1"
        eventually(filled, "the pool is filled", timeout_s=60)
        with client() as connection:
            _, memory, entries = acquire(connection)
            os.close(memory)
        assert min(entry & procfs.PFN_MASK for entry in entries) > 0
        status = procfs.status(broker.pid)
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16)
        assert 0 < int(status["CapEff"], 16).bit_count() <= len(names.split())
        assert status["NoNewPrivs"] == "1"
        assert procfs.maps(broker.pid)
        assert not [each for each in procfs.maps(broker.pid) if each.path == procfs.SECRETMEM]
        assert brokers.end() == 0
        assert brokers.socket.exists()  # it is systemd's


def test_systemd_finds_no_fault_with_its_units(tmp_path: Path) -> None:
    capabilities.require(capabilities.SYSTEMD_ANALYZE)
    program = Path(sys.executable).with_name("vmmback")
    for unit in UNITS.glob("vmmback-broker.*"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("ExecStart=vmmback ", f"ExecStart={program} "))
    service = tmp_path / "vmmback-broker.service"

    def verified() -> str:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *tmp_path.glob("vmmback-broker.*")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    assert verified() == ""
    service.write_text(service.read_text().replace("KillMode=process", "KillMode=mixt"))
    assert "mixt" in verified()


def test_malformed_and_silent_clients_harm_nobody_else(brokers: Brokers) -> None:
    broker = brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    before = descriptors_of(broker.pid)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(50)]
    for connection in silent:
        connection.connect(os.environ["VMMBACK_BROKER"])
    half = b'{"method": "org.vmmback.Broker.Acquire", "parameters": {"size"'
    wrong = (
        b"\0", b"{\0", b"[]\0", b"\xff\xfe\0", b"[" * 100_000 + b"\0", secrets.token_bytes(5000) + b"\0", half,
        b'{"method": 7}\0', b'{"method": "org.vmmback.Broker.Nothing"}\0',
        *(json.dumps({"method": "org.vmmback.Broker.Acquire", "parameters": parameters}).encode() + b"\0"
          for parameters in ({}, {"size": "x", "purpose": ""}, {"size": -1, "purpose": ""}, {"size": 1, "purpose": ""},
                             {"size": 1 << 70, "purpose": "x"}, {"size": TINY_BYTES, "purpose": 7})),
        json.dumps({"method": "org.vmmback.Broker.Release", "parameters": {"lease": 1 << 70}}).encode() + b"\0",
    )  # fmt: skip
    for message in wrong:
        with client() as connection:
            connection.sendall(message)
        assert stats()["lent"] == 0
    with client() as connection:
        _, memory, _ = acquire(connection)
        os.close(memory)
    for connection in silent:
        connection.close()

    def let_go() -> bool:
        return descriptors_of(broker.pid) <= before + 2  # the lease's process lives: this one

    eventually(let_go, "the connections are closed", timeout_s=60)
    assert broker.poll() is None


@pytest.mark.parametrize(
    "flood", [b"x", b"\0", b'{"method": "org.vmmback.Broker.Stats"}\0'], ids=["endless", "empty", "calls"]
)
def test_who_floods_is_heard_no_further_than_he_takes_his_answers(brokers: Brokers, flood: bytes) -> None:
    brokers.start("")
    piece, sent = flood * (MIB // 16 // len(flood)), 0
    with client() as connection:
        connection.setblocking(False)
        for _ in range(64):
            try:
                sent += connection.send(piece)
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                break
            assert stats()["lent"] == 0
    assert 0 < sent < MIB


def test_a_lease_whose_answer_nobody_can_take_ends_and_calls_of_who_is_gone_are_none(brokers: Brokers) -> None:
    broker = brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    acquiring = {"method": "org.vmmback.Broker.Acquire", "parameters": {"size": TINY_BYTES, "purpose": "a test"}}
    broker.send_signal(signal.SIGSTOP)  # so that the caller is gone before he is heard
    for oneway in ({}, {"oneway": True}):
        with client() as connection:
            connection.sendall((json.dumps(acquiring | oneway).encode() + b"\0") * 8)
    broker.send_signal(signal.SIGCONT)
    eventually(lambda: stats()["lent"] > 0, "it was lent", timeout_s=60)
    eventually(lambda: stats()["leases"] == 0, "the lease has ended", timeout_s=60)
    eventually(filled, "the pool is filled again", timeout_s=60)
    assert stats()["lent"] == 1
    assert (brokers.file.parent / "broker.log").read_text() == ""


def test_the_pool_is_filled_again_once_there_are_descriptors(brokers: Brokers) -> None:
    broker = brokers.start(pool(MIB, 40), "prlimit", "--nofile=36:4096")
    log = brokers.file.parent / "broker.log"
    eventually(lambda: "Too many open files" in log.read_text(), "it is out of descriptors", timeout_s=60)
    resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (4096, 4096))
    eventually(lambda: filled(40), "the pool is filled", timeout_s=60)
    assert log.read_text().count("\n") == 1


def test_a_size_without_room_and_a_prefault_that_was_killed_are_told_and_keep_no_other_size_from_being_ready(
    brokers: Brokers,
) -> None:
    broker = brokers.start(pool(1 << 40) + pool(128 * MIB))
    log = brokers.file.parent / "broker.log"

    def prefaults() -> list[int]:
        return [
            pid for pid in procfs.children(broker.pid)
            if b"prefault_worker" in Path(f"/proc/{pid}/cmdline").read_bytes() and procfs.status(pid)["State"][0] != "Z"
        ]  # fmt: skip

    def killed() -> bool:
        """As by the OOM killer, which chooses it."""
        found = prefaults()
        for prefault in found:
            os.kill(prefault, signal.SIGKILL)
        return bool(found)

    eventually(killed, "the pool is being filled", timeout_s=60)
    eventually(lambda: "the OOM killer ended the prefault" in log.read_text(), "it is told", timeout_s=60)
    ready = [{"size": 128 * MIB, "ready": 1, "wanted": 1}, {"size": 1 << 40, "ready": 0, "wanted": 1}]
    eventually(lambda: stats()["pool"] == ready, "the other size is ready", timeout_s=60)
    assert promises()[".broker"].size == promises()[".broker"].touched == 128 * MIB
    told = log.read_text().splitlines()
    assert sorted(line.split(":")[1] for line in told) == [
        " the pool cannot be filled with 1048576 MiB", " the pool cannot be filled with 128 MiB",
    ]  # fmt: skip


@pytest.mark.usefixtures("open_socket")
def test_no_user_can_take_all_connections(request: pytest.FixtureRequest) -> None:
    brokers: Brokers = request.getfixturevalue("brokers")
    brokers.start("")

    def is_answered(connection: socket.socket) -> bool:
        with suppress(ConnectionError, AssertionError):
            return "parameters" in call(connection, "List")[0]
        return False

    def answered() -> object:
        with ExitStack() as stack:
            connections = [stack.enter_context(client()) for _ in range(70)]
            return [is_answered(connection) for connection in connections]

    assert as_nobody(answered) == [True] * 64 + [False] * 6
    assert stats()["lent"] == 0


def test_a_broker_ends_with_its_tasks(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def add(*_: object) -> float:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(Pool, "_add", add)
    monkeypatch.setattr(dumpable, "forbid", lambda: None)
    monkeypatch.setattr("vmmback.linux.capabilities.keep", lambda _: None)
    with pytest.raises(KeyError, match="a mistake of ours"):
        asyncio.run(run_broker(BrokerConfig.of({"pool": [{"size": "1MiB"}]}), print))


def test_it_takes_no_socket_at_which_somebody_listens_and_whatever_the_umask_all_may_reach_its_own(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "socket"
    monkeypatch.setenv("VMMBACK_BROKER", str(path))
    brokers.socket = path
    brokers.start("", "sh", "-c", 'umask 077; exec "$@"', "sh")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o666, 0o755)
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(tmp_path / "run2"))
    second = run("broker", str(brokers.file))
    assert second.returncode == 3
    assert "another process listens at" in second.stderr
    assert stats()["lent"] == 0
    path.parent.chmod(0o777)
    third = run("broker", str(brokers.file))
    assert "others may write to it" in third.stderr


def test_what_was_lent_is_closed_where_it_is_not_what_it_should_be() -> None:
    descriptor = os.memfd_create("no-secret")
    with pytest.raises(HostUnfit, match="instead of"):
        LentRam(descriptor, TINY_BYTES, array("Q"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(descriptor)
