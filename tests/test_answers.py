"""What a QEMU is promised for memory that is plugged in later; its calls are made up, and so are the answers' ways.

integration/test_promises.py and integration/test_libvirt.py have the kernel stop real ones.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmmback import answers
from vmmback.answers import Answers
from vmmback.linux import arch, procfs, seccomp

NAME = b"memory-backend-memfd"
PATH = b"/ram/plugged"
MIB = 1 << 20


class Room:
    """Has RAM of `left` bytes in all to give."""

    def __init__(self, left: int) -> None:
        self.left = left

    def has_room(self) -> bool:
        return self.left > 0

    def of_size(self, size: int) -> int:
        if size > self.left:
            raise OSError(errno.ENOMEM, "no room")
        self.left -= size
        return memory(size)


class Qemu:
    """This process in QEMU's place, with a listener: each of its calls is answered with a descriptor or an error."""

    def __init__(self, room: Room | None, patch: pytest.MonkeyPatch) -> None:
        self.answers = Answers(lambda tid: tid == os.getpid(), secret_memfds=False, more=room)
        self.answers.offer_memfd(NAME.decode(), -1)
        self.answers.offer(Path("/ram/offered"), -1)
        self.answers._memfds[NAME].clear()  # it was taken
        self.call: tuple[int, tuple[int, ...]] | None = None
        self.answer: object = None
        for name in ("receive", "is_waiting", "answer_descriptor", "replace_descriptor", "answer_continue",
                     "answer_error", "answer_success"):  # fmt: skip
            patch.setattr(seccomp, name, getattr(self, name))

    def made(self, number: int, *arguments: int) -> object:
        """Return what a call is answered with."""
        self.call, self.answer = (number, (*arguments, *[0] * 6)[:6]), None
        self.answers.answer_next(-1)
        return self.answer

    def memfd_create(self) -> object:
        name = ctypes.create_string_buffer(NAME)
        return self.made(arch.current().memfd_create, ctypes.addressof(name), os.MFD_CLOEXEC)

    def open(self) -> object:
        path = ctypes.create_string_buffer(PATH)
        return self.made(arch.current().openat, 0, ctypes.addressof(path), os.O_RDWR)

    def truncate(self, descriptor: int) -> object:
        return self.made(arch.current().ftruncate, descriptor, MIB)

    def mmap(self, descriptor: int) -> object:
        return self.made(arch.current().mmap, 0, MIB, 0, mmap.MAP_SHARED, descriptor)

    # --- In place of linux/seccomp.py ---

    def receive(self, _: int) -> seccomp.Notification:
        assert self.call
        return seccomp.Notification(1, os.getpid(), *self.call)

    def is_waiting(self, *_: object) -> bool:
        return True

    def answer_descriptor(self, _: int, __: object, descriptor: int) -> bool:
        self.answer = os.dup(descriptor)
        return True

    def replace_descriptor(self, _: int, __: object, descriptor: int, number: int) -> bool:
        os.dup2(descriptor, number)
        return True

    def answer_continue(self, *_: object) -> bool:
        self.answer = "continue"
        return True

    def answer_error(self, _: int, __: object, error: int) -> bool:
        self.answer = f"error {errno.errorcode[error]}"
        return True

    def answer_success(self, *_: object) -> bool:
        self.answer = "success"
        return True


def memory(size: int = 0) -> int:
    descriptor = os.memfd_create("secret")
    os.ftruncate(descriptor, size)
    return descriptor


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ordinary memory passes for secret."""
    monkeypatch.setattr(answers, "memfd_secret", memory)
    monkeypatch.setattr(procfs, "SECRETMEM", "/memfd:secret (deleted)")
    return monkeypatch


@pytest.fixture(params=["memfd_create", "open"])
def call(request: pytest.FixtureRequest) -> Iterator[str]:
    """The call that asks for memory to plug in."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield request.param
    assert len(list(Path("/proc/self/fd").iterdir())) == before  # all is closed, by both


def test_what_is_promised_gets_its_size_when_it_is_mapped(patch: pytest.MonkeyPatch, call: str) -> None:
    room = Room(MIB)
    qemu = Qemu(room, patch)
    promised = getattr(qemu, call)()
    assert qemu.truncate(promised) == "success"
    assert qemu.mmap(promised) == "continue"
    assert (os.fstat(promised).st_size, room.left) == (MIB, 0)
    os.close(promised)


@pytest.mark.parametrize(("room", "error"), [(None, "EACCES"), (Room(0), "ENOMEM")])
def test_without_room_nothing_is_promised(patch: pytest.MonkeyPatch, call: str, room: Room | None, error: str) -> None:
    assert getattr(Qemu(room, patch), call)() == f"error {error}"


def test_only_so_many_promises_are_kept_the_latest_ones(patch: pytest.MonkeyPatch, call: str) -> None:
    """A QEMU under attack could ask for ever, and close what it gets."""
    qemu = Qemu(Room(1 << 40), patch)
    promised = [getattr(qemu, call)() for _ in range(66)]
    assert [qemu.truncate(each) for each in promised] == ["continue"] * 2 + ["success"] * 64
    assert [qemu.mmap(each) for each in promised] == ["continue"] * 66
    assert [os.fstat(each).st_size for each in promised] == [0] * 2 + [MIB] * 64
    for each in promised:
        os.close(each)


def test_of_what_was_mapped_nothing_is_remembered(patch: pytest.MonkeyPatch, call: str) -> None:
    qemu = Qemu(Room(1 << 40), patch)
    kept = getattr(qemu, call)()
    for _ in range(100):
        promised = getattr(qemu, call)()
        without_size = os.dup(promised)
        assert qemu.mmap(promised) == "continue"
        assert [qemu.truncate(each) for each in (promised, without_size)] == ["continue"] * 2
        os.close(promised)
        os.close(without_size)
    assert qemu.truncate(kept) == "success"
    os.close(kept)
