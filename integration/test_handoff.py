"""The handoff: who gets the descriptor, who does not, and what is left of QEMU in each case.

In most tests a small program of ours stands in QEMU's place: it opens what its arguments say, as QEMU does, and writes
what came of it to the log.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest

from integration.conftest import (
    GONE_S,
    LiveGuest,
    Start,
    children,
    eventually,
    guest_file,
    open_descriptors,
    prepared,
    processes_of,
    qemu_of,
)
from vmmback import answers, command, handoff, ram
from vmmback.command import QemuCommand
from vmmback.errors import HandoffFailed, HostUnfit
from vmmback.handoff import Qemu
from vmmback.linux import procfs, seccomp
from vmmback.runtime import last_words
from vmmback.threads import in_thread

pytestmark = pytest.mark.usefixtures("needs_secretmem", "needs_seccomp")

T = TypeVar("T")

# Each argument is a step: `open PATH`, `fork PATH` (a child opens), `thread PATH`, `memfd NAME` (and what QEMU does to
# one), `fork-memfd NAME`, `huge-memfd NAME`, `long-memfd NAME`, `full` (no descriptor more), `say WORDS`,
# `exit STATUS`, `kill`, or `stay`, which waits for ever.
STAND_IN = """
import ctypes, fcntl, json, mmap, os, resource, signal, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, False)  # SA_RESTART
def attempt(who, path):
    descriptor = libc.open(path.encode(), os.O_RDWR)
    result = {"who": who, "path": path}
    if descriptor < 0:
        result["errno"] = ctypes.get_errno()
    else:
        result["inode"] = os.fstat(descriptor).st_ino
        result["cloexec"] = fcntl.fcntl(descriptor, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    print(json.dumps(result), flush=True)
def make_memfd(who, name, size=8192, flags=os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING):
    result = {"who": who, "path": name}
    try:
        memfd = os.memfd_create(name, flags)
        os.ftruncate(memfd, 0)
        os.ftruncate(memfd, size)
        result["size"] = os.fstat(memfd).st_size
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        with mmap.mmap(memfd, 8192) as memory:
            memory[4096] = 1
        result["inode"] = os.fstat(memfd).st_ino
        result["link"] = os.readlink(f"/proc/self/fd/{memfd}")
        result["cloexec"] = fcntl.fcntl(memfd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    except OSError as error:
        result["errno"] = error.errno
    print(json.dumps(result), flush=True)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1} if "await" in sys.argv else ())
for step in sys.argv[1:]:
    verb, _, argument = step.partition(" ")
    if verb == "memfd":
        make_memfd("program", argument)
    elif verb == "huge-memfd":
        make_memfd("program", argument, flags=os.MFD_CLOEXEC | os.MFD_HUGETLB)
    elif verb == "long-memfd":
        make_memfd("program", argument, size=(4 << 30) + 1)
    elif verb == "full":
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    elif verb == "fork-memfd":
        if (child := os.fork()) == 0:
            make_memfd("child", argument)
            os._exit(0)
        os.waitpid(child, 0)
    elif verb == "open":
        attempt("program", argument)
    elif verb == "thread":
        thread = threading.Thread(target=attempt, args=("thread", argument))
        thread.start()
        thread.join()
    elif verb == "fork":
        if (child := os.fork()) == 0:
            attempt("child", argument)
            os._exit(0)
        os.waitpid(child, 0)
    elif verb == "say":
        print(argument, file=sys.stderr, flush=True)
    elif verb == "exit":
        os._exit(int(argument))
    elif verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "await":
        signal.sigwait({signal.SIGUSR1})
    elif verb == "stay":
        print("stays", flush=True)
        signal.pause()
"""

Body: TypeAlias = Callable[[Qemu], Coroutine[Any, Any, T]]


class Place:
    """Where QEMU stands in these tests: its log, and the folder of its mem-path, in which it could make files."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "qemu.log"
        self.folder = folder / "ram"
        self.folder.mkdir()
        self.mem_path = self.folder / "ram0"
        self.auxiliary: frozenset[int] = frozenset()

    def run(
        self,
        memory: ram.Ram,
        steps: Sequence[str],
        body: Body[T],
        descriptors: Sequence[int] = (),
        *,
        secret_memfds: bool = False,
    ) -> T:
        """Start the program in QEMU's place with `memory` on offer, and await `body` while it runs."""

        async def go() -> T:
            argv = [sys.executable, "-I", "-S", "-c", STAND_IN, *steps]
            offers = {self.mem_path: memory.fileno()}
            async with handoff.start(argv, offers, descriptors, self.log, secret_memfds=secret_memfds) as qemu:
                return await body(qemu)

        return asyncio.run(go())

    def results(self, memory: ram.Ram, *steps: str, secret_memfds: bool = False) -> list[dict[str, Any]]:
        """Let the program take these steps and end; return what its attempts came to."""

        async def end(qemu: Qemu) -> None:
            assert await qemu.ended(20) == 0, last_words(self.log)
            self.auxiliary = qemu.auxiliary_inodes

        self.run(memory, [*steps, "exit 0"], end, secret_memfds=secret_memfds)
        return lines(self)


def descriptors_of(pid: int) -> dict[str, str]:
    return {link.name: str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_program_gets_the_descriptor_close_on_exec(place: Place, secret_ram: ram.Ram) -> None:
    (opened,) = place.results(secret_ram, f"open {place.mem_path}")
    assert (opened["inode"], opened["cloexec"]) == (secret_ram.inode, True)


def test_a_thread_of_the_program_is_the_program(place: Place, secret_ram: ram.Ram) -> None:
    (opened,) = place.results(secret_ram, f"thread {place.mem_path}")
    assert opened["inode"] == secret_ram.inode


def test_it_is_handed_over_once(place: Place, secret_ram: ram.Ram) -> None:
    first, second = place.results(secret_ram, f"open {place.mem_path}", f"open {place.mem_path}")
    assert first["inode"] == secret_ram.inode
    assert second["errno"] == errno.EACCES


@pytest.mark.parametrize("other", ["ram1", "ram0 ", "ram", "ram00", "deeper/ram0", "./ram0"])
def test_another_file_of_the_same_folder_is_denied(place: Place, secret_ram: ram.Ram, other: str) -> None:
    """QEMU answers "no such file" by making one, of ordinary memory: a DIMM plugged in later, for one."""
    denied, opened = place.results(secret_ram, f"open {place.folder}/{other}", f"open {place.mem_path}")
    assert denied["errno"] == errno.EACCES
    assert opened["inode"] == secret_ram.inode
    assert list(place.folder.iterdir()) == []


def test_a_file_that_is_there_already_is_denied_too(place: Place, secret_ram: ram.Ram) -> None:
    place.mem_path.with_name("ram1").write_bytes(bytes(4096))
    (denied,) = place.results(secret_ram, f"open {place.folder}/ram1")
    assert denied["errno"] == errno.EACCES


def test_a_file_at_the_mem_path_itself_does_not_stand_in(place: Place, secret_ram: ram.Ram) -> None:
    place.mem_path.write_bytes(bytes(4096))
    (opened,) = place.results(secret_ram, f"open {place.mem_path}")
    assert opened["inode"] == secret_ram.inode


def test_other_opens_are_the_kernels_own(place: Place, secret_ram: ram.Ram, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    # A neighbour whose name only begins like the folder's is another folder.
    neighbour = tmp_path / "ram-of-another"
    neighbour.write_text("x")
    found, next_door, missing = place.results(secret_ram, f"open {plain}", f"open {neighbour}", "open /no/such/file")
    assert found["inode"] == plain.stat().st_ino
    assert next_door["inode"] == neighbour.stat().st_ino
    assert missing["errno"] == errno.ENOENT


def test_a_child_of_the_program_does_not_get_it(place: Place, secret_ram: ram.Ram) -> None:
    """It is under the same filter, and opens the very path; the program itself still gets it."""
    child, program = place.results(secret_ram, f"fork {place.mem_path}", f"open {place.mem_path}")
    assert (child["who"], child["errno"]) == ("child", errno.EACCES)
    assert program["inode"] == secret_ram.inode


def test_an_open_that_a_signal_interrupts_gets_it_at_the_next_try(
    place: Place, secret_ram: ram.Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel restarts the open, as a new notification (seccomp_unotify(2)). On a loaded host this is what becomes
    of one launch in some hundred; here the signal comes right before the answer.
    """
    answer = seccomp.answer_descriptor
    answers: list[bool] = []

    def interrupt_first(listener: int, notification: seccomp.Notification, descriptor: int) -> bool:
        if not answers:
            os.kill(notification.tid, signal.SIGUSR1)
            eventually(lambda: not seccomp.is_waiting(listener, notification), "the open is interrupted")
        answers.append(answer(listener, notification, descriptor))
        return answers[-1]

    monkeypatch.setattr(seccomp, "answer_descriptor", interrupt_first)
    (opened,) = place.results(secret_ram, f"open {place.mem_path}")
    assert opened.get("inode") == secret_ram.inode, opened
    assert answers == [False, True]


def lines(place: Place) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.log.read_text().splitlines() if line.startswith("{")]


def test_a_path_is_offered_while_the_program_runs_once_and_to_it_alone(
    place: Place, secret_ram: ram.Ram, ordinary_ram: ram.Ram
) -> None:
    """The second memory is ordinary, so that the two cannot be taken for each other."""
    second = place.folder / "ram1"
    opens = [f"open {second}", f"fork {second}", f"open {place.folder}/ram2", f"open {second}", f"open {second}"]

    async def body(qemu: Qemu) -> None:
        await qemu.handed_over(20)
        await in_thread(lambda: eventually(lambda: len(lines(place)) == 2, "the first two opens are over"))
        with qemu.offering(second, ordinary_ram.fileno()):
            os.kill(qemu.pid, signal.SIGUSR1)
            await qemu.handed_over(20)
        assert await qemu.ended(20) == 0

    place.run(secret_ram, [f"open {place.mem_path}", opens[0], "await", *opens[1:], "exit 0"], body)
    first, early, child, other, taken, again = lines(place)
    assert (first["inode"], early["errno"]) == (secret_ram.inode, errno.EACCES)
    assert (child["who"], child["errno"], other["errno"]) == ("child", errno.EACCES, errno.EACCES)
    assert taken["inode"] == ordinary_ram.inode
    assert again["errno"] == errno.EACCES


def test_an_offer_that_is_not_taken_is_withdrawn(place: Place, secret_ram: ram.Ram, ordinary_ram: ram.Ram) -> None:
    async def body(qemu: Qemu) -> None:
        await qemu.handed_over(20)
        with (
            pytest.raises(HandoffFailed, match="take the descriptor"),
            qemu.offering(place.folder / "ram1", ordinary_ram.fileno()),
        ):
            await qemu.handed_over(0.01)
        os.kill(qemu.pid, signal.SIGUSR1)
        assert await qemu.ended(20) == 0

    place.run(secret_ram, [f"open {place.mem_path}", "await", f"open {place.folder}/ram1", "exit 0"], body)
    assert lines(place)[1]["errno"] == errno.EACCES
    assert list(place.folder.iterdir()) == []


def test_the_handoff_is_awaited(place: Place, secret_ram: ram.Ram) -> None:
    async def body(qemu: Qemu) -> int | None:
        await qemu.handed_over(20)
        return qemu.status

    assert place.run(secret_ram, [f"open {place.mem_path}", "stay"], body) is None


def test_a_program_that_never_opens_it_misses_the_deadline(place: Place, secret_ram: ram.Ram) -> None:
    async def body(qemu: Qemu) -> None:
        eventually(lambda: b"stays" in place.log.read_bytes(), "the program runs")
        await qemu.handed_over(0.1)

    with pytest.raises(HandoffFailed) as caught:
        place.run(secret_ram, ["say I would rather not", "stay"], body)
    assert caught.value.exit_code == 6
    assert caught.value.message == (
        "QEMU did not take the descriptor of its RAM within 0.1 s: it still runs; it said: I would rather not / stays"
    )
    assert sys.executable in caught.value.hint


@pytest.mark.parametrize(
    ("last", "state"), [("exit 7", "it exited with status 7"), ("kill", "it was ended by SIGKILL")]
)
def test_a_program_that_dies_at_once_says_why(place: Place, secret_ram: ram.Ram, last: str, state: str) -> None:
    started = time.monotonic()
    with pytest.raises(HandoffFailed) as caught:
        place.run(secret_ram, ["say cannot\x07 set up", "say guest memory", last], lambda qemu: qemu.handed_over(20))
    assert caught.value.message == (
        f"QEMU did not take the descriptor of its RAM: {state}; it said: cannot  set up / guest memory"
    )
    assert time.monotonic() - started < 10


def test_without_a_descriptor_left_for_what_was_started_it_is_ended(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptors can run out right behind the start: this must not be waited for in vain."""
    started: list[int] = []

    def none_left(pid: int, flags: int = 0) -> int:
        started.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", none_left)

    async def start() -> None:
        async with asyncio.timeout(10), handoff.start(["sleep", "99"], {}, (), place.log):
            pass

    with pytest.raises(OSError, match="Too many open files"):
        asyncio.run(start())
    assert not Path(f"/proc/{started[0]}").exists()


def test_a_program_that_is_not_there(place: Place, secret_ram: ram.Ram) -> None:
    async def go() -> None:
        offers = {place.mem_path: secret_ram.fileno()}
        async with handoff.start(["/no/such/qemu"], offers, (), place.log) as qemu:
            await qemu.handed_over(20)

    with pytest.raises(HandoffFailed, match=r"it exited with status 127; it said: .*/no/such/qemu"):
        asyncio.run(go())


def test_without_setpriv_it_says_what_to_install(
    place: Place, secret_ram: ram.Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, "_ENVIRONMENT", {"PATH": "/no/such/folder"})
    with pytest.raises(HostUnfit, match="setpriv was not found") as caught:
        place.run(secret_ram, ["stay"], lambda qemu: qemu.handed_over(20))
    assert "util-linux" in caught.value.hint


def test_leaving_kills_it_and_its_log_stays(place: Place, secret_ram: ram.Ram) -> None:
    async def body(qemu: Qemu) -> int:
        await qemu.handed_over(20)
        return qemu.pid

    pid = place.run(secret_ram, ["say hello", f"open {place.mem_path}", "stay"], body)
    assert not Path(f"/proc/{pid}").exists()
    assert place.log.read_text().startswith("hello\n")


def test_kill_ends_it_and_may_be_repeated(place: Place, secret_ram: ram.Ram) -> None:
    async def body(qemu: Qemu) -> int | None:
        await qemu.kill()
        await qemu.kill()
        return qemu.status

    assert place.run(secret_ram, ["stay"], body) == -signal.SIGKILL


def test_ended_has_a_deadline(place: Place, secret_ram: ram.Ram) -> None:
    with pytest.raises(TimeoutError):
        place.run(secret_ram, ["stay"], lambda qemu: qemu.ended(0.05))


def test_cancelled_while_it_waits_it_leaves_nothing(place: Place, secret_ram: ram.Ram) -> None:
    before = children()

    async def body(qemu: Qemu) -> None:
        waiting = asyncio.create_task(qemu.handed_over(20))
        await asyncio.sleep(0)
        waiting.cancel()
        await waiting

    with pytest.raises(asyncio.CancelledError):
        place.run(secret_ram, ["stay"], body)
    assert children() == before


def test_it_inherits_the_descriptors_it_needs_and_no_others(place: Place, secret_ram: ram.Ram) -> None:
    ours, theirs = socket.socketpair()
    stray = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(stray, True)

    async def body(qemu: Qemu) -> dict[str, str]:
        eventually(lambda: b"stays" in place.log.read_bytes(), "the program runs")
        return descriptors_of(qemu.pid)

    with ours, theirs:
        held = place.run(secret_ram, ["stay"], body, [theirs.fileno()])
        assert held == {
            "0": "/dev/null",
            "1": str(place.log),
            "2": str(place.log),
            str(theirs.fileno()): f"socket:[{os.fstat(theirs.fileno()).st_ino}]",
        }
    os.close(stray)


def test_it_does_not_see_the_users_environment(
    place: Place, secret_ram: ram.Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD_OF_THE_USER", "secret")

    async def body(qemu: Qemu) -> bytes:
        eventually(lambda: b"stays" in place.log.read_bytes(), "the program runs")
        return environment_of(qemu.pid)

    assert b"LD_PRELOAD_OF_THE_USER" not in place.run(secret_ram, ["stay"], body)


# --- memfds -----------------------------------------------------------------------------------------------------------


def test_its_memfds_are_secret(place: Place, secret_ram: ram.Ram) -> None:
    """It truncates, seals, maps and touches them, as QEMU does, and none of this fails."""
    first, second = place.results(secret_ram, "memfd pc.bios", "memfd 0000:00:01.0/vga.vram", secret_memfds=True)
    for made in (first, second):
        assert "errno" not in made, made
        assert (made["link"], made["cloexec"]) == (procfs.SECRETMEM, True)
    assert place.auxiliary == {first["inode"], second["inode"]}
    assert len(place.auxiliary | {secret_ram.inode}) == 3


def test_no_copy_of_its_memfds_stays_here(place: Place, secret_ram: ram.Ram) -> None:
    async def body(qemu: Qemu) -> tuple[int, list[str]]:
        await qemu.handed_over(20)
        links = list(open_descriptors().values())
        return len(qemu.auxiliary_inodes), [link for link in links if link == procfs.SECRETMEM]

    steps = ["memfd pc.bios", "memfd pc.rom", f"open {place.mem_path}", "stay"]
    assert place.run(secret_ram, steps, body, secret_memfds=True) == (2, [procfs.SECRETMEM])  # that of the RAM


def test_its_memfds_are_the_kernels_own_where_that_is_not_asked_for(place: Place, secret_ram: ram.Ram) -> None:
    (made,) = place.results(secret_ram, "memfd pc.bios")
    assert made["link"] == "/memfd:pc.bios (deleted)"
    assert place.auxiliary == frozenset()


@pytest.mark.parametrize(
    ("step", "who"), [("memfd test", "program"), ("huge-memfd pc.bios", "program"), ("fork-memfd pc.bios", "child")]
)
def test_a_probe_a_kind_that_secret_memory_cannot_be_and_a_childs_memfd_are_the_kernels_own(
    place: Place, secret_ram: ram.Ram, step: str, who: str
) -> None:
    made, secret = place.results(secret_ram, step, "memfd pc.rom", secret_memfds=True)
    assert made["who"] == who
    assert made.get("link", "").startswith("/memfd:") or "huge" in step, made  # a host may have no huge pages
    assert secret["link"] == procfs.SECRETMEM
    assert place.auxiliary == {secret["inode"]}


def test_a_memfd_that_must_be_longer_than_its_secret_stand_in_is_refused(place: Place, secret_ram: ram.Ram) -> None:
    (refused,) = place.results(secret_ram, "long-memfd pc.bios", secret_memfds=True)
    assert refused["errno"] == errno.EFBIG


def test_a_program_that_can_have_no_descriptor_more_is_told_so(place: Place, secret_ram: ram.Ram) -> None:
    (refused,) = place.results(secret_ram, "full", "memfd pc.bios", secret_memfds=True)
    assert refused["errno"] == errno.EMFILE
    assert place.auxiliary == frozenset()


def test_without_secret_memory_a_memfd_fails_and_is_not_ordinary(
    place: Place, secret_ram: ram.Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(answers, "memfd_secret", refuse)
    (refused,) = place.results(secret_ram, "memfd pc.bios", secret_memfds=True)
    assert refused["errno"] == errno.EMFILE
    assert place.auxiliary == frozenset()


def test_a_memfd_that_a_signal_interrupts_is_secret_at_the_next_try(
    place: Place, secret_ram: ram.Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = seccomp.answer_descriptor
    answers: list[bool] = []

    def interrupt_first(listener: int, notification: seccomp.Notification, descriptor: int) -> bool:
        if not answers:
            os.kill(notification.tid, signal.SIGUSR1)
            eventually(lambda: not seccomp.is_waiting(listener, notification), "the call is interrupted")
        answers.append(answer(listener, notification, descriptor))
        return answers[-1]

    monkeypatch.setattr(seccomp, "answer_descriptor", interrupt_first)
    (made,) = place.results(secret_ram, "memfd pc.bios", secret_memfds=True)
    assert answers == [False, True]
    assert place.auxiliary == {made["inode"]}


# --- QEMU itself ------------------------------------------------------------------------------------------------------


def test_qemus_descriptors(guest_running: LiveGuest) -> None:
    """Log, random numbers, secret RAM, the two sockets, and what it makes for itself, which leads nowhere."""
    folder = Path(f"/proc/{guest_running.pid}")
    links = descriptors_of(guest_running.pid)
    log = str(guest_running.guest.qemu.log)
    assert (links.pop("0"), links.pop("1"), links.pop("2")) == ("/dev/null", log, log)
    kinds = sorted(re.sub(r"\d+", "", link) for link in links.values() if not link.startswith("anon_inode:"))
    secret = ["/secretmem (deleted)"] * (1 + len(guest_running.guest.qemu.auxiliary_inodes))
    assert kinds == ["/dev/urandom", *secret, "socket:[]", "socket:[]"]
    own = {link for link in links.values() if link.startswith("anon_inode:")}
    assert own <= {"anon_inode:[eventfd]", "anon_inode:[eventpoll]", "anon_inode:[signalfd]"}
    for number, link in links.items():
        flags = re.search(r"^flags:\s*(\d+)$", (folder / "fdinfo" / number).read_text(), re.MULTILINE)
        assert flags
        # The sockets were inherited; that is why they are not close-on-exec.
        assert link.startswith("socket:") or int(flags[1], 8) & os.O_CLOEXEC, (number, link)


def test_qemu_is_under_the_filter_and_this_process_is_not(guest_paused: LiveGuest) -> None:
    assert procfs.status(guest_paused.pid)["NoNewPrivs"] == "1"
    assert procfs.status(guest_paused.pid)["Seccomp"] == "2"
    assert procfs.status("self")["Seccomp"] == "0"


def test_qemu_that_cannot_take_its_mem_path_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words reach the user: here its command line is wrong."""
    build = command.build

    def with_an_unknown_option(*arguments: Any) -> QemuCommand:
        made = build(*arguments)
        return QemuCommand((*made.argv, "-no-such-option"), made.descriptors)

    monkeypatch.setattr(command, "build", with_an_unknown_option)
    words = r"it exited with status 1; it said: .*no-such-option: invalid option"
    with pytest.raises(HandoffFailed, match=words), prepared(guest_file(tmp_path)):
        pass


@pytest.fixture
def supervised(start: Start, tmp_path: Path, runtime_dir: Path) -> Iterator[int]:
    """Start `vmmback launch` as a process, and return the pid of that once its guest runs."""
    running = start(sys.executable, "-m", "vmmback", "launch", guest_file(tmp_path, ready="NEVER"), "--json")
    running.wait_for("READY")
    yield running.process.pid
    running.process.wait()


def test_qemu_ends_with_a_supervisor_that_is_killed(supervised: int, runtime_dir: Path) -> None:
    assert qemu_of(runtime_dir)
    os.kill(supervised, signal.SIGKILL)
    eventually(lambda: not qemu_of(runtime_dir), "QEMU is gone", GONE_S)
    eventually(lambda: not processes_of(runtime_dir), "all its processes are gone", GONE_S)
    eventually(lambda: list(runtime_dir.iterdir()) == [], "its folder is gone", GONE_S)


# A supervisor whose QEMU is not yet bound to its life: in setpriv's place stands a script that waits for a line in a
# pipe, and then starts QEMU without --pdeathsig.
KILLED_EARLY = """
import sys
from pathlib import Path
from vmmback import cli, handoff, jail
programs = sys.argv.pop(1)
handoff._ENVIRONMENT = {"PATH": programs + ":" + handoff._ENVIRONMENT["PATH"]}
jail._FOLDERS = (*jail._FOLDERS, Path(programs).parent)
cli.main()
"""
WAITS = """#!/bin/sh
case "$*" in *" --pdeathsig KILL -- "*) ;; *) exit 99 ;; esac
while [ "$1" != -- ]; do shift; done
shift
read -r _ <{fifo}
exec "$@"
"""


def test_qemu_that_starts_after_its_supervisor_was_killed_ends_by_itself(
    start: Start, tmp_path: Path, runtime_dir: Path
) -> None:
    """The gap between fork and setpriv: the listener was the supervisor's, so QEMU's open of the mem-path fails."""
    fifo, programs = tmp_path / "fifo", tmp_path / "programs"
    os.mkfifo(fifo)
    programs.mkdir()
    (programs / "setpriv").write_text(WAITS.format(fifo=fifo))
    (programs / "setpriv").chmod(0o755)
    running = start(sys.executable, "-c", KILLED_EARLY, str(programs), "launch", guest_file(tmp_path), "--json")

    def waiting() -> list[int]:
        return [pid for pid, line in processes_of(runtime_dir).items() if str(programs / "setpriv") in line]

    running.wait_until(lambda: bool(waiting()), "QEMU's stand-in waits")
    (pid,) = waiting()
    log = os.open(f"/proc/{pid}/fd/2", os.O_RDONLY)  # its folder is going to be removed
    qemu = os.pidfd_open(pid)
    running.process.kill()
    running.process.wait()
    assert waiting() == [pid]
    with fifo.open("w") as pipe:
        pipe.write("go\n")
    # By the process itself: amid execve(2) it has no command line that it could be found by.
    assert select.select([qemu], [], [], GONE_S)[0], "QEMU has not ended by itself"
    os.close(qemu)
    eventually(lambda: not processes_of(runtime_dir), "nothing is left", GONE_S)
    words = os.pread(log, 1 << 16, 0).decode()
    os.close(log)
    assert os.strerror(errno.ENOSYS) in words
    assert "ram0" in words


def test_after_its_end_nobody_listens_any_more(place: Place, secret_ram: ram.Ram) -> None:
    """The listener of nobody polls as hung up for ever: the event loop would spin until the last frame was read."""

    async def body(qemu: Qemu) -> int:
        await qemu.handed_over(20)
        await qemu.ended(20)
        return int(qemu._listener in asyncio.get_running_loop()._selector.get_map())  # type: ignore[attr-defined]

    assert place.run(secret_ram, [f"open {place.mem_path}"], body) == 0


def test_without_a_thread_for_it_qemu_is_not_waited_for(
    place: Place, secret_ram: ram.Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(OSError, match="can't start new thread"):
            place.run(secret_ram, ["stay"], lambda qemu: qemu.handed_over(20))
