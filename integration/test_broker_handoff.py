"""The broker answers the calls of a QEMU that others start: who gets what, and that nobody can keep it from others."""

from __future__ import annotations

import errno
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from integration import hung_file
from integration.conftest import READY, ROOT, eventually, tiny_rom
from integration.leftovers import children_of, command_line
from integration.test_broker import (
    NOBODY,
    SMALL_BYTES,
    Brokers,
    brokers,
    call,
    client,
    filled,
    open_socket,
    pool,
    stats,
)
from integration.test_handoff import STAND_IN
from vmmback import ram
from vmmback.host.qemu import find_qemu
from vmmback.linux import procfs, seccomp
from vmmback.linux.own_thread import in_own_thread

__all__ = ["brokers", "open_socket"]  # fixtures

pytestmark = pytest.mark.usefixtures("needs_secretmem", "needs_seccomp", "open_socket")

RULE = f'[[allow]]\nuser = {NOBODY}\ntotal = "1GiB"\n'

# What a hypervisor's own launcher does: borrow, put itself under the filter, have that answered, execute. Everything is
# imported as root: the interpreter may lie where another uid cannot read.
WRAPPER = """
import asyncio, contextlib, json, os, sys
from pathlib import Path
from vmmback.broker import client, handoff_interface
from vmmback.errors import VmmbackError
from vmmback.linux import memfd_secret, seccomp
plan = json.loads(sys.argv[1])
before = {}
exec(plan["before"], before)
if plan["uid"]:
    os.setgroups([])
    os.setresgid(plan["uid"], plan["uid"], plan["uid"])
    os.setresuid(plan["uid"], plan["uid"], plan["uid"])
def descriptor_of(what, memory):
    if what == "borrowed":
        return memory.fileno()
    if what == "unsized":
        return memfd_secret.memfd_secret()
    if what == "null":
        return os.open("/dev/null", os.O_RDWR)
    ordinary = os.memfd_create("ordinary", os.MFD_CLOEXEC)
    os.ftruncate(ordinary, 4096)
    return ordinary
async def start():
    async with client.connected() as lender, contextlib.AsyncExitStack() as stack:
        memory = None
        if plan["size"]:
            memory = await stack.enter_async_context(lender.borrowed(plan["size"], "a wrapper"))
            print(json.dumps({"borrowed": memory.inode}), flush=True)
        offers = [(call, name, descriptor_of(what, memory)) for call, name, what in plan["offers"]]
        paths = {Path(name): descriptor for call, name, descriptor in offers if call == "open"}
        memfds = [(name, descriptor) for call, name, descriptor in offers if call == "memfd_create"]
        if plan["listener"] == "own":
            listener = seccomp.install_listener(memfds=plan["memfds"])
        else:
            listener = descriptor_of(plan["listener"], memory)
        try:
            await lender.serve(listener, paths, memfds, secret_memfds=plan["secret_memfds"])
        except VmmbackError as error:
            print(json.dumps({"refused": error.message, "code": error.exit_code}), flush=True)
            return
        os.close(listener)
        if plan["argv"]:
            os.execv(plan["argv"][0], plan["argv"])
        sys.argv[1:] = plan["steps"]
        exec(plan["program"], before)
asyncio.run(start())
"""


class Wrapped:
    """A wrapper, and then what it has become."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.pid = process, process.pid
        self._read = b""

    def output_until(self, wanted: bytes) -> bytes:
        """Return its output up to what is wanted."""
        assert self.process.stdout is not None
        while wanted not in self._read:
            assert select.select([self.process.stdout], [], [], 20)[0], f"{wanted!r} does not come: {self._read!r}"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, f"it ended: {self._read!r}"
            self._read += data
        found, _, self._read = self._read.partition(wanted)
        return found

    def said(self) -> Any:
        return json.loads(self.output_until(b"\n"))

    def rest(self) -> list[Any]:
        """Wait for its end, and return the lines that it wrote."""
        assert self.process.stdout is not None
        lines = (self._read + self.process.stdout.read()).splitlines()
        self.process.wait(20)
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)


Wrap = Callable[..., Wrapped]


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    """Start wrappers; those that still run at the end are killed."""
    with ExitStack() as stack:

        def begin(
            offers: Sequence[tuple[str, str, str]] = (),
            *,
            size: int = SMALL_BYTES,
            steps: Sequence[str] = (),
            argv: Sequence[str] = (),
            uid: int = NOBODY,
            listener: str = "own",
            memfds: bool = False,
            secret_memfds: bool = False,
            before: str = "",
            program: str = STAND_IN,
        ) -> Wrapped:
            plan = {
                "offers": offers, "size": size, "steps": steps, "argv": argv, "uid": uid, "listener": listener,
                "memfds": memfds, "secret_memfds": secret_memfds, "before": before, "program": program,
            }  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, "-c", WRAPPER, json.dumps(plan)], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(_end, process)
            return Wrapped(process)

        yield begin


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def ready(brokers: Brokers) -> Brokers:
    """A broker that has a file of SMALL_BYTES ready, and lends it to nobody, the user."""
    brokers.start(pool(SMALL_BYTES) + RULE)
    eventually(filled, "the pool is filled", timeout_s=60)
    return brokers


def workers(broker: subprocess.Popen[bytes] | None) -> list[int]:
    assert broker is not None
    return [pid for pid in children_of(broker.pid) if "handoff_worker" in command_line(pid)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can use; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="vmmback-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


# --- QEMU -------------------------------------------------------------------------------------------------------------


def qemu_argv(folder: Path, backend: str) -> list[str]:
    rom = folder / "tiny.rom"
    rom.write_bytes(tiny_rom())
    rom.chmod(0o644)
    size = SMALL_BYTES
    return [
        str(find_qemu()), "-nodefaults", "-display", "none", "-vga", "none", "-accel", "tcg",
        "-machine", "q35,memory-backend=ram0", "-m", f"{size}B", "-object", f"{backend},id=ram0,size={size}B,share=on",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-bios", str(rom), "-serial", "stdio",
    ]  # fmt: skip


def backings(folder: Path) -> dict[str, tuple[str, tuple[str, str, str]]]:
    mem_path = str(folder / "ram0")
    return {
        "open": (f"memory-backend-file,mem-path={mem_path}", ("open", mem_path, "borrowed")),
        "memfd": ("memory-backend-memfd", ("memfd_create", "memory-backend-memfd", "borrowed")),
    }


def guest_ram(pid: int) -> list[tuple[str, int, int]]:
    """Return the mappings of files that are a guest's RAM, or could be: path, inode, size."""
    return [
        (each.path, each.inode, each.size)
        for each in procfs.maps(pid)
        if each.path.startswith((procfs.SECRETMEM, "/memfd:")) or "/ram0" in each.path
    ]


@pytest.mark.usefixtures("needs_qemu")
@pytest.mark.parametrize("handoff", ["open", "memfd"])
def test_qemu_of_another_user_runs_on_what_he_borrowed(ready: Brokers, wrap: Wrap, folder: Path, handoff: str) -> None:
    backend, offer = backings(folder)[handoff]
    qemu = wrap([offer], argv=qemu_argv(folder, backend), memfds=handoff == "memfd")
    inode = qemu.said()["borrowed"]
    qemu.output_until(READY)
    assert Path(f"/proc/{qemu.pid}/exe").samefile(find_qemu())
    assert procfs.status(qemu.pid)["Uid"].split() == [str(NOBODY)] * 4
    assert guest_ram(qemu.pid) == [(procfs.SECRETMEM, inode, SMALL_BYTES)]
    (lease,) = call_list()
    assert (lease["pid"], lease["size"]) == (qemu.pid, SMALL_BYTES)
    assert not (folder / "ram0").exists()
    (worker,) = workers(ready.process)
    eventually(lambda: procfs.SECRETMEM not in descriptors_of(worker), "no copy of it is left with who handed it over")


@pytest.mark.usefixtures("needs_qemu")
@pytest.mark.parametrize("handoff", ["open", "memfd"])
def test_control_the_same_qemu_without_a_broker_is_found_on_ordinary_memory(folder: Path, handoff: str) -> None:
    backend, _ = backings(folder)[handoff]
    argv = qemu_argv(folder, backend)
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        Wrapped(process).output_until(READY)
        ((path, _, size),) = guest_ram(process.pid)
        assert (path.startswith("/memfd:") or path == str(folder / "ram0"), size) == (True, SMALL_BYTES)
        process.kill()


def call_list() -> list[dict[str, Any]]:
    with client() as connection:
        found: list[dict[str, Any]] = call(connection, "List")[0]["parameters"]["leases"]
        return found


@pytest.mark.usefixtures("needs_qemu")
def test_qemu_gets_no_ordinary_ram_beside(ready: Brokers, wrap: Wrap, folder: Path) -> None:
    """A second backend, as of a module plugged in later: QEMU would make a file of its own."""
    backend, offer = backings(folder)["open"]
    more = ["-object", f"memory-backend-file,id=ram1,size=1M,share=on,mem-path={folder}/ram1"]
    qemu = wrap([offer], argv=[*qemu_argv(folder, backend), *more])
    qemu.rest()
    assert qemu.process.returncode == 1
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.rom"]


# --- Who gets what ----------------------------------------------------------------------------------------------------


def test_the_path_is_answered_once_to_the_caller_and_others_of_its_folder_are_denied(
    ready: Brokers, wrap: Wrap, folder: Path
) -> None:
    path, plain = str(folder / "ram0"), folder.with_name(folder.name + "-plain")
    plain.write_text("x")
    plain.chmod(0o666)
    opens = [f"open {folder}/ram1", f"fork {path}", f"thread {path}", f"open {path}", f"open {plain}"]
    try:
        borrowed, other, child, thread, again, ordinary = wrap([("open", path, "borrowed")], steps=opens).rest()
    finally:
        plain.unlink()
    assert (other["errno"], child["who"], child["errno"]) == (errno.EACCES, "child", errno.EACCES)
    assert (thread["inode"], thread["cloexec"]) == (borrowed["borrowed"], True)
    assert again["errno"] == errno.EACCES
    assert "inode" in ordinary
    assert list(folder.iterdir()) == []


def test_a_memfd_is_answered_by_its_name_once_and_no_longer_than_it_is(ready: Brokers, wrap: Wrap) -> None:
    offer = ("memfd_create", "ram", "borrowed")
    steps = ["fork-memfd ram", "memfd ram", "memfd ram", "memfd test", "memfd other"]
    borrowed, child, first, again, probe, other = wrap([offer], memfds=True, steps=steps).rest()
    assert (child["who"], child["errno"]) == ("child", errno.EACCES)
    assert (first["inode"], first["link"], first["cloexec"]) == (borrowed["borrowed"], procfs.SECRETMEM, True)
    assert again["errno"] == errno.EACCES
    assert probe["link"].startswith("/memfd:")
    assert other["link"].startswith("/memfd:")
    eventually(filled, "the pool is filled again", timeout_s=60)
    _, longer = wrap([offer], memfds=True, steps=["long-memfd ram"]).rest()
    assert longer["errno"] == errno.EFBIG


def test_all_other_memfds_are_secret_where_that_is_asked_for(ready: Brokers, wrap: Wrap) -> None:
    made, probe = wrap(size=0, memfds=True, secret_memfds=True, steps=["memfd pc.bios", "memfd test"]).rest()
    assert (made["link"], probe["link"].startswith("/memfd:")) == (procfs.SECRETMEM, True)


@pytest.mark.parametrize(
    ("listener", "offered", "problem"),
    [
        ("null", ("open", "/ram/ram0", "borrowed"), "not the listener of a seccomp filter"),
        ("ordinary", ("open", "/ram/ram0", "borrowed"), "not the listener of a seccomp filter"),
        ("own", ("open", "/ram/ram0", "ordinary"), "offered for /ram/ram0 is no secret RAM"),
        ("own", ("open", "/ram/ram0", "unsized"), "offered for /ram/ram0 is no secret RAM"),
        ("own", ("open", "ram0", "borrowed"), "the parameters are not those of"),
    ],
)
def test_what_is_no_handoff_is_refused(
    ready: Brokers, wrap: Wrap, listener: str, offered: tuple[str, str, str], problem: str
) -> None:
    _, refused = wrap([offered], listener=listener).rest()
    assert problem in refused["refused"]
    assert refused["code"] == 2
    eventually(lambda: not workers(ready.process), "no process is left")
    assert (ready.file.parent / "broker.log").read_text() == ""


def test_of_who_sends_nonsense_to_a_channel_nothing_is_left(brokers: Brokers, secret_ram: ram.Ram) -> None:
    broker = brokers.start("")
    answer = {"method": "org.vmmback.Handoff.Answer"}
    offer = {"call": "open", "name": "/ram/ram0", "descriptor": 1}
    parameters = {"listener": 0, "offers": [], "secret_memfds": False}
    wrong: list[object] = [
        7, {}, {"method": 7}, answer, answer | {"parameters": []}, answer | {"parameters": {}},
        *(answer | {"parameters": parameters | more} for more in (
            {"listener": -1}, {"listener": 1 << 70}, {"listener": True}, {"offers": 7}, {"offers": [7]},
            {"offers": [offer | {"name": "/ram/\ud800"}]}, {"offers": [offer | {"name": "/ram0"}]},
            {"offers": [offer | {"call": "read"}]}, {"offers": [offer, offer]},
        )),
    ]  # fmt: skip
    texts = [json.dumps(each).encode() + b"\0" for each in wrong]
    texts += [b"\xff\0", b"[" * 60_000 + b"\0", b"x" * (1 << 17), b"half"]
    with client() as connection, ExitStack() as stack:
        listener = in_own_thread(seccomp.install_listener)
        stack.callback(os.close, listener)
        for text in texts:
            _, (channel,) = call(connection, "Serve")
            sending = stack.enter_context(socket.socket(fileno=channel))
            with suppress(BlockingIOError, BrokenPipeError):
                socket.send_fds(sending, [text], [listener, secret_ram.fileno()], socket.MSG_DONTWAIT)
        eventually(lambda: len(workers(broker)) <= 1, "all but one that waits for the rest are gone", timeout_s=30)
    eventually(lambda: not workers(broker), "that is gone as well")
    assert (brokers.file.parent / "broker.log").read_text() == ""


def test_who_may_borrow_nothing_or_has_as_many_as_he_may_is_refused_and_root_is_not(
    brokers: Brokers, wrap: Wrap
) -> None:
    broker = brokers.start(RULE + "count = 1\nper-minute = 2\n")
    (refused,) = wrap(size=0, uid=NOBODY - 1).rest()
    assert f"uid {NOBODY - 1} may not borrow secret RAM" in refused["refused"]
    first = wrap(size=0, steps=["stay"])
    first.output_until(b"stays")
    (refused,) = wrap(size=0).rest()
    assert "those of 1 of its programs are" in refused["refused"]
    assert refused["code"] == 4
    roots = [wrap(size=0, uid=0, steps=["stay"]) for _ in range(2)]
    for root in roots:
        root.output_until(b"stays")
    first.process.kill()
    eventually(lambda: len(workers(broker)) == 2, "the user's is gone, root's are not")
    assert wrap(size=0, steps=["exit 0"]).rest() == []
    eventually(lambda: len(workers(broker)) == 2, "the user's is gone")
    (refused,) = wrap(size=0).rest()
    assert "within a minute it asked for 2 programs" in refused["refused"]


# --- Its end ----------------------------------------------------------------------------------------------------------


def descriptors_of(pid: int) -> list[str]:
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(link.readlink()))
    return sorted(links)


def test_of_a_caller_who_is_killed_nothing_is_left(brokers: Brokers, wrap: Wrap, folder: Path) -> None:
    broker = brokers.start(RULE)
    before = descriptors_of(broker.pid)
    program = wrap([], size=0, steps=["stay"])
    program.output_until(b"stays")
    (worker,) = workers(broker)
    assert "anon_inode:seccomp notify" in descriptors_of(worker)
    assert "anon_inode:seccomp notify" not in descriptors_of(broker.pid)
    program.process.kill()
    eventually(lambda: not workers(broker), "its worker is gone")
    eventually(lambda: set(descriptors_of(broker.pid)) <= set(before), "its descriptors are closed")


def test_they_end_with_the_caller_though_a_child_of_his_lives(brokers: Brokers, wrap: Wrap) -> None:
    broker = brokers.start(RULE)
    forks = """
import json, signal
child = os.fork()
if child:
    print(json.dumps({"child": child}), flush=True)
signal.pause()
"""
    program = wrap(size=0, before="import os", program=forks)
    child = program.said()["child"]
    try:
        assert len(workers(broker)) == 1
        program.process.kill()
        eventually(lambda: not workers(broker), "its worker is gone")
        assert command_line(child), "the child lives"
    finally:
        os.kill(child, signal.SIGKILL)


def test_answers_go_on_without_the_broker_and_end_with_the_worker(ready: Brokers, wrap: Wrap, folder: Path) -> None:
    path = str(folder / "ram0")
    other = f"open {folder}/other"
    program = wrap([("open", path, "borrowed")], steps=["memfd ready", "await", other, "await", other, "exit 0"])
    for _ in ("borrowed", "ready"):
        program.said()
    (worker,) = workers(ready.process)
    ready.end(signal.SIGKILL)
    program.go_on()
    assert program.said()["errno"] == errno.EACCES
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: not command_line(worker), "the worker is gone")
    program.go_on()
    assert [said["errno"] for said in program.rest()] == [errno.ENOSYS]


# --- Those who never answer -------------------------------------------------------------------------------------------

# Opens the path that lies in the memory of a file whose server is silent.
OPENS_HUNG = """
import ctypes
from vmmback.linux import arch
print(json.dumps({"address": address, "server": server}), flush=True)
ctypes.CDLL(None).syscall(ctypes.c_long(arch.current().openat), -100, ctypes.c_void_p(address), os.O_RDWR)
"""


def waits_for_fuse(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return any(
            (task / "wchan").read_text() == "request_wait_answer" for task in Path(f"/proc/{pid}/task").iterdir()
        )
    return False


@contextmanager
def reading(pid: int, address: int) -> Iterator[subprocess.Popen[bytes]]:
    """Read that memory as the worker does."""
    program = "import os, sys; os.pread(os.open(f'/proc/{sys.argv[1]}/mem', os.O_RDONLY), 1, int(sys.argv[2]))"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", program, str(pid), str(address)]) as process:
        yield process


def mounting(place: Path, silent: int, *, stop: bool = False) -> str:
    """Return what maps such a file; with `stop` its server takes no request any more."""
    place.touch()
    return f"""
import json, mmap, os, signal
from pathlib import Path
from integration import hung_file
place = Path({str(place)!r})
server = hung_file.mount(place, [{silent}])
file = os.open(place, os.O_RDONLY)
memory = mmap.mmap(file, 8192, prot=mmap.PROT_READ)
address = int(next(line.split("-")[0] for line in open("/proc/self/maps") if str(place) in line), 16)
if {stop}:
    os.close(file)
    os.kill(server, signal.SIGSTOP)
"""


@pytest.mark.parametrize("taken", [True, False], ids=["the request is taken", "the request is not taken"])
def test_a_path_that_cannot_be_read_stops_nobody_else(
    brokers: Brokers, wrap: Wrap, folder: Path, *, taken: bool
) -> None:
    """SIGKILL ends who waits for the server to take his request, and not who waits for the answer to it."""
    broker = brokers.start(RULE)
    before = mounting(folder / "hung", hung_file.READ, stop=not taken)
    hostile = wrap(size=0, before=before, program=OPENS_HUNG)
    said = hostile.said()
    (worker,) = workers(broker)
    other_page = said["address"] + mmap.PAGESIZE  # which nobody waits for yet
    with ended(said["server"]) as end_server, reading(hostile.pid, other_page) as control:
        eventually(lambda: waits_for_fuse(control.pid), "who reads the caller's memory himself is stuck")
        eventually(lambda: waits_for_fuse(worker), "the worker is stuck")
        assert stats()["leases"] == 0
        other = wrap(size=0, steps=["stay"])
        other.output_until(b"stays")
        hostile.process.kill()
        assert stats()["leases"] == 0
        if taken:
            assert worker in workers(broker)
            end_server()
        control.kill()
        eventually(lambda: worker not in workers(broker), "its worker is gone, with what it waited for")
        assert len(workers(broker)) == 1


@contextmanager
def ended(server: int) -> Iterator[Callable[[], None]]:
    """Yield what ends the server of a file, and with it all waiting; at the end at the latest."""
    pidfd = os.pidfd_open(server)

    def end() -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    try:
        yield end
    finally:
        end()
        os.close(pidfd)


# Sends a descriptor that cannot be closed along with a call, and then closes it itself.
SENDS_HUNG = """
import socket
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.environ["VMMBACK_BROKER"])
    try:
        socket.send_fds(connection, [b'{"method": "org.vmmback.Broker.Stats"}\\0'], [file])
        answer = connection.recv(4096).decode()
    except PermissionError:
        answer = None
    except ConnectionResetError:
        answer = ""
    print(json.dumps({"server": server, "answer": answer}), flush=True)
os.close(file)
"""

# A socket that waits, as it is closed, for a peer that reads nothing.
LINGERS = """
import json, os, socket, struct
listening = socket.create_server(("127.0.0.1", 0))
lingers = socket.create_connection(listening.getsockname())
peer, _ = listening.accept()
lingers.setblocking(False)
try:
    while True:
        lingers.send(bytes(1 << 16))
except BlockingIOError:
    pass
lingers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
file, server = lingers.detach(), os.getpid()
"""

# A broker for which the kernel drops no descriptors: as before Linux 6.16, whatever this one is.
OLDER = [
    sys.executable, "-c",
    "import sys; from vmmback import cli; from vmmback.broker import server; server._SO_PASSRIGHTS = 1 << 20\n"
    "sys.argv = ['vmmback', *sys.argv[4:]]; cli.main()",
]  # fmt: skip


@pytest.mark.parametrize("prefix", [[], OLDER], ids=["this kernel", "an older kernel"])
@pytest.mark.parametrize("lingers", [False, True], ids=["FUSE", "SO_LINGER"])
def test_a_descriptor_that_cannot_be_closed_stops_nobody(
    brokers: Brokers, folder: Path, prefix: list[str], *, lingers: bool
) -> None:
    brokers.start("", *prefix)
    program = (LINGERS if lingers else mounting(folder / "hung", hung_file.FLUSH)) + SENDS_HUNG
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        said = Wrapped(process).said()
        with ended(said["server"]):
            assert said["answer"] in ([""] if prefix else ["", None]), "the broker hangs up, or the kernel refuses"
            if not lingers:
                eventually(lambda: waits_for_fuse(process.pid), "who closes it himself is stuck")
            for _ in range(3):
                assert stats()["leases"] == 0
            assert process.poll() is None, "who closes it himself is stuck"
            assert brokers.end() == 0
