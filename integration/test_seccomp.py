"""Seccomp user notification on the real kernel: a program of our own opens, and this process answers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import eventually
from vmmback.linux import arch, procfs, seccomp
from vmmback.linux.memfd_secret import memfd_secret

pytestmark = pytest.mark.usefixtures("needs_seccomp")

# Opens what its standard input says, by openat(2) with exactly these flags: os.open adds O_CLOEXEC.
CALLER = """
import ctypes, fcntl, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for line in sys.stdin:
    flags, _, path = line.rstrip("\\n").partition(" ")
    descriptor = libc.open(path.encode(), int(flags), 0o600)
    if descriptor < 0:
        print(json.dumps({"errno": ctypes.get_errno()}), flush=True)
    else:
        cloexec = fcntl.fcntl(descriptor, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        status = os.fstat(descriptor)
        print(json.dumps({"inode": status.st_ino, "device": status.st_dev, "cloexec": cloexec}), flush=True)
"""


# Makes a memfd and deals with it as QEMU does, or makes it a file of its own first.
MEMFD_CALLER = """
import fcntl, json, os, sys
memfd = -1
for line in sys.stdin:
    verb, _, argument = line.rstrip("\\n").partition(" ")
    try:
        if verb == "create":
            memfd = os.memfd_create(argument)
        elif verb == "truncate":
            os.ftruncate(memfd, int(argument))
        elif verb == "seal":
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        elif verb == "flags":
            fcntl.fcntl(memfd, fcntl.F_GETFL)
        status = os.fstat(memfd)
        print(json.dumps({"inode": status.st_ino, "size": status.st_size}), flush=True)
    except OSError as error:
        print(json.dumps({"errno": error.errno}), flush=True)
"""


class Caller:
    """A program under the filter, and the listener that answers it."""

    def __init__(self, process: subprocess.Popen[str], listener: int) -> None:
        self.process = process
        self.listener = listener

    def ask(self, path: Path | str, flags: int = os.O_RDWR) -> None:
        self.tell(f"{flags} {path}")

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], 10)
        assert readable, "waited 10 s in vain until the caller's open is over"
        return json.loads(self.process.stdout.readline())

    def notification(self) -> seccomp.Notification:
        found: list[seccomp.Notification] = []

        def arrived() -> bool:
            if notification := seccomp.receive(self.listener):
                found.append(notification)
            return bool(found)

        eventually(arrived, "the caller's open is reported")
        return found[0]

    def blocked(self) -> None:
        """Wait until the program sleeps inside openat(2): proc_pid_syscall(5) says so, "running" while it does not."""
        file, number = Path(f"/proc/{self.process.pid}/syscall"), str(arch.current().openat)
        eventually(lambda: file.read_text().split()[0] == number, "the caller waits for an answer")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def filtered(program: str = CALLER, *, memfds: bool = False) -> Iterator[Caller]:
    made: list[tuple[subprocess.Popen[str], int]] = []

    def begin() -> None:  # in a thread of its own: the filter stays with it
        listener = seccomp.install_listener(memfds=memfds)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        made.append((process, listener))

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    process, listener = made[0]
    caller = Caller(process, listener)
    try:
        yield caller
    finally:
        process.kill()
        with contextlib.suppress(BrokenPipeError), process:
            pass
        if caller.listener >= 0:
            os.close(caller.listener)


@pytest.fixture
def caller() -> Iterator[Caller]:
    with filtered() as caller:
        yield caller


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("x")
    return path


def test_the_caller_gets_the_descriptor_that_we_give(caller: Caller, needs_secretmem: None) -> None:
    descriptor = memfd_secret()
    caller.ask("/nowhere/ram0")
    notification = caller.notification()
    assert notification.tid == caller.process.pid
    assert seccomp.is_waiting(caller.listener, notification)
    assert seccomp.answer_descriptor(caller.listener, notification, descriptor)
    status = os.fstat(descriptor)
    assert caller.result() == {"inode": status.st_ino, "device": status.st_dev, "cloexec": True}
    assert not seccomp.is_waiting(caller.listener, notification)
    os.close(descriptor)


def test_a_continued_open_is_the_kernels_own(caller: Caller, file: Path) -> None:
    for path, expected in ((file, file.stat().st_ino), ("/nowhere/at/all", None)):
        caller.ask(path)
        assert seccomp.answer_continue(caller.listener, caller.notification())
        result = caller.result()
        assert result.get("inode") == expected
        assert result.get("errno") == (None if expected else errno.ENOENT)


def test_an_error_is_what_the_caller_sees(caller: Caller, file: Path) -> None:
    caller.ask(file)
    assert seccomp.answer_error(caller.listener, caller.notification(), errno.EACCES)
    assert caller.result() == {"errno": errno.EACCES}


@pytest.mark.parametrize(
    "flags",
    [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CLOEXEC, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_NONBLOCK],
)
def test_other_flags_are_not_caught(caller: Caller, file: Path, flags: int) -> None:
    caller.ask(file, flags)
    assert caller.result()["inode"] == file.stat().st_ino  # nobody answered
    assert seccomp.receive(caller.listener) is None


def test_a_caller_that_was_killed_while_it_waits_is_answered_by_nothing(caller: Caller, file: Path) -> None:
    caller.ask(file)
    notification = caller.notification()
    caller.kill()
    assert not seccomp.is_waiting(caller.listener, notification)
    with file.open() as descriptor:
        assert not seccomp.answer_descriptor(caller.listener, notification, descriptor.fileno())
    assert not seccomp.answer_continue(caller.listener, notification)
    assert not seccomp.answer_error(caller.listener, notification, errno.EACCES)


def test_a_caller_that_was_killed_before_we_looked_is_no_notification(caller: Caller, file: Path) -> None:
    caller.ask(file)
    caller.blocked()
    caller.kill()
    started = time.monotonic()
    assert seccomp.receive(caller.listener) is None
    assert time.monotonic() - started < 20


def test_receive_does_not_block_without_a_notification_or_without_anybody_left(caller: Caller) -> None:
    started = time.monotonic()
    assert seccomp.receive(caller.listener) is None
    caller.kill()
    assert seccomp.receive(caller.listener) is None
    assert time.monotonic() - started < 20


def test_once_the_listener_is_closed_opens_fail(caller: Caller, file: Path) -> None:
    """What becomes of a QEMU whose supervisor was killed: also of an open that waits at that moment."""
    caller.ask(file)
    caller.blocked()
    os.close(caller.listener)
    caller.listener = -1
    assert caller.result() == {"errno": errno.ENOSYS}
    caller.ask(file)
    assert caller.result() == {"errno": errno.ENOSYS}
    caller.ask(file, os.O_RDONLY)
    assert caller.result()["inode"] == file.stat().st_ino


def test_the_caller_is_filtered_and_its_notification_names_it(caller: Caller, file: Path) -> None:
    assert procfs.status(caller.process.pid)["Seccomp"] == "2"
    assert procfs.status(caller.process.pid)["NoNewPrivs"] == "1"
    caller.ask(file)
    notification = caller.notification()
    assert procfs.thread_group(notification.tid) == caller.process.pid
    assert notification.arguments[2] == os.O_RDWR
    seccomp.answer_continue(caller.listener, notification)
    caller.result()


def test_this_process_is_not_filtered(caller: Caller, file: Path) -> None:
    status = procfs.status(os.getpid())  # of the main thread: the one that installed the filter may be ending still
    assert status["Seccomp"] == "0"
    assert status["NoNewPrivs"] == "0"
    with filtered() as other:  # nor is a program that is started meanwhile filtered twice
        assert procfs.status(other.process.pid)["Seccomp_filters"] == "1"
    assert seccomp.receive(caller.listener) is None


def test_the_caller_does_not_hold_the_listener(caller: Caller, file: Path) -> None:
    """One that did would wait for ever for its own answer."""
    caller.ask(file, os.O_RDONLY)
    caller.result()
    links = [str(link.readlink()) for link in Path(f"/proc/{caller.process.pid}/fd").iterdir()]
    assert not [link for link in links if "seccomp" in link]
    assert not os.get_inheritable(caller.listener)


# --- memfds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memfd_caller() -> Iterator[Caller]:
    with filtered(MEMFD_CALLER, memfds=True) as caller:
        yield caller


def test_a_memfd_is_what_we_give_and_what_follows_seems_to_succeed(memfd_caller: Caller, needs_secretmem: None) -> None:
    numbers = arch.current()
    descriptor = memfd_secret()
    os.ftruncate(descriptor, 1 << 32)
    inode = os.fstat(descriptor).st_ino
    memfd_caller.tell("create pc.bios")
    notification = memfd_caller.notification()
    assert notification.number == numbers.memfd_create
    assert seccomp.answer_descriptor(memfd_caller.listener, notification, descriptor)
    os.close(descriptor)
    assert memfd_caller.result() == {"inode": inode, "size": 1 << 32}

    for step, number, argument in (
        ("truncate 0", numbers.ftruncate, 0),
        ("truncate 4096", numbers.ftruncate, 4096),
        ("seal", numbers.fcntl, fcntl.F_ADD_SEALS),
    ):
        memfd_caller.tell(step)
        notification = memfd_caller.notification()
        assert (notification.number, notification.arguments[1]) == (number, argument)
        assert seccomp.answer_success(memfd_caller.listener, notification)
        assert memfd_caller.result() == {"inode": inode, "size": 1 << 32}  # nothing was done


@pytest.mark.parametrize("step", ["truncate 0", "truncate 4096", "seal"])
def test_the_kernel_refuses_what_qemu_does_to_a_memfd_on_secret_memory(
    memfd_caller: Caller, needs_secretmem: None, step: str
) -> None:
    """The twin, and the reason why these calls are answered: a size that is set stays, and there are no seals."""
    descriptor = memfd_secret()
    os.ftruncate(descriptor, 1 << 32)
    memfd_caller.tell("create pc.bios")
    seccomp.answer_descriptor(memfd_caller.listener, memfd_caller.notification(), descriptor)
    os.close(descriptor)
    memfd_caller.result()
    memfd_caller.tell(step)
    assert seccomp.answer_continue(memfd_caller.listener, memfd_caller.notification())
    assert memfd_caller.result() == {"errno": errno.EINVAL}


def test_a_continued_memfd_is_the_kernels_own(memfd_caller: Caller) -> None:
    for step, size in (("create test", 0), ("truncate 5000", 5000)):
        memfd_caller.tell(step)
        assert seccomp.answer_continue(memfd_caller.listener, memfd_caller.notification())
        assert memfd_caller.result()["size"] == size


def test_other_commands_of_fcntl_are_not_caught(memfd_caller: Caller) -> None:
    memfd_caller.tell("create test")
    seccomp.answer_continue(memfd_caller.listener, memfd_caller.notification())
    memfd_caller.result()
    memfd_caller.tell("flags")
    assert "inode" in memfd_caller.result()  # nobody answered
    assert seccomp.receive(memfd_caller.listener) is None


def test_where_memfds_are_not_asked_for_none_of_it_is_caught() -> None:
    with filtered(MEMFD_CALLER) as caller:
        for step in ("create pc.bios", "truncate 4096", "seal", "flags"):
            caller.tell(step)
            caller.result()
        assert seccomp.receive(caller.listener) is None


def test_opens_are_caught_beside_memfds(file: Path) -> None:
    with filtered(memfds=True) as caller:
        caller.ask(file, os.O_RDONLY)
        assert caller.result()["inode"] == file.stat().st_ino
        caller.ask(file)
        assert seccomp.answer_error(caller.listener, caller.notification(), errno.EACCES)
        assert caller.result() == {"errno": errno.EACCES}
