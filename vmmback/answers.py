"""What the calls that a QEMU's seccomp filter stops are answered with: who may have which descriptor, and who none.

A memfd_secret descriptor cannot be opened again by any path, and memory-backend-file knows only paths. So QEMU runs
under a filter that stops its open of the mem-path until whoever holds the listener (linux/seccomp.py) answers it with
a copy of the descriptor. The same goes for memfd_create(2): of memory-backend-memfd, which gets a descriptor that is
offered by the memfd's name, and of QEMU's other RAM blocks where it puts them on memfds (aux-ram-share=on, see
docs/RAM-BLOCKS.md), which get new secret memory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from vmmback.linux import arch, procfs, seccomp
from vmmback.linux.memfd_secret import memfd_secret

_PATH_MAX = 4096  # with the NUL; limits.h

# Secretmem takes a size once, and lseek(2) tells none (mm/secretmem.c). QEMU truncates a new memfd to 0, asks lseek for
# its size to see whether it must grow, and maps it (system/physmem.c, qemu_ram_alloc_from_fd). So it gets one that is
# longer than any RAM block: only what is mapped counts as locked, and only what is touched takes memory.
_AUXILIARY_BYTES = 4 << 30
_ANY_BYTES = 1 << 63

# QEMU maps what it gets before it asks for more, so it has one at a time. One under attack could ask for ever.
_MOST_PROMISES = 64

# How QEMU finds out what kinds of memfd there are (util/memfd.c); it maps none of these for a guest.
_MEMFD_PROBE = b"test"
# Other flags of memfd_create(2), such as those for huge pages, ask for what secretmem has not.
_MEMFD_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING


class More(Protocol):
    """Where there is RAM for memory that is plugged in while the guest runs (broker/more_ram.py)."""

    def has_room(self) -> bool:
        """Tell whether anything can still be plugged in."""

    def of_size(self, size: int) -> int:
        """Return a descriptor of so many bytes of secret RAM, to be closed here; raises OSError if there is none."""


class Answers:
    """What one listener's notifications are answered with. It owns neither the listener nor what is offered."""

    def __init__(self, is_qemu: Callable[[int], bool], *, secret_memfds: bool, more: More | None = None) -> None:
        """Answer with descriptors the threads that `is_qemu` tells by their ids, and nobody else.

        With `secret_memfds` every memfd that it makes is one of memfd_secret(2), of which no copy stays here. Without
        `more` no memory can be plugged in while the guest runs.
        """
        self._is_qemu = is_qemu
        self._secret_memfds = secret_memfds
        self._more = more
        self._promised: list[int] = []
        """The inodes of files without a size that stand for memory which is not mapped yet, the oldest first."""
        self._offers: dict[bytes, int] = {}
        self._folders: set[bytes] = set()
        self._memfds: dict[bytes, list[int]] = {}
        self._longest: dict[int, int] = {}
        """By inode: as how long, in bytes, the file may be used that a memfd_create(2) was answered with."""
        self._auxiliary: set[int] = set()

    @property
    def auxiliary_inodes(self) -> frozenset[int]:
        """The inodes of the new secret files that memfd_create(2) was answered with so far."""
        return frozenset(self._auxiliary)

    @property
    def taken(self) -> bool:
        """Whether each path that was offered was answered with its descriptor."""
        return not self._offers

    @property
    def on_offer(self) -> frozenset[int]:
        """The descriptors that were not taken yet."""
        return frozenset(self._offers.values()).union(*self._memfds.values())

    def offer(self, path: Path, descriptor: int) -> None:
        """Answer one open of `path` with a copy of the descriptor; all else in its folder is denied from now on."""
        self._offers[os.fsencode(path)] = descriptor
        self._folders.add(os.fsencode(path.parent) + b"/")

    def withdraw(self, path: Path) -> None:
        """Deny this path, too, if it was not taken."""
        self._offers.pop(os.fsencode(path), None)

    def offer_memfd(self, name: str, descriptor: int) -> None:
        """Answer one memfd_create(2) of this name with a copy of the descriptor: the first with the first of them.

        Once there is none left, such calls are denied.
        """
        self._memfds.setdefault(os.fsencode(name), []).append(descriptor)

    def answer_next(self, listener: int) -> None:
        """Answer the next notification, if one waits. May wait for the task's memory, which can take for ever.

        Raises OSError.
        """
        notification = seccomp.receive(listener)
        if notification is None:
            return
        numbers = arch.current()
        if notification.number == numbers.openat:
            self._answer_open(listener, notification)
        elif notification.number == numbers.memfd_create:
            self._answer_memfd_create(listener, notification)
        elif notification.number == numbers.mmap:
            self._answer_mmap(listener, notification)
        elif (inode := _secret_inode(notification, 0)) in self._longest:
            self._answer_change(listener, notification, self._longest[inode])
        else:
            seccomp.answer_continue(listener, notification)

    def _answer_open(self, listener: int, notification: seccomp.Notification) -> None:
        path = _string(notification, 1)
        if not seccomp.is_waiting(listener, notification):
            return
        if path in self._offers and self._is_qemu(notification.tid):
            # A signal may interrupt QEMU's open before the answer; the kernel then makes it again (seccomp_unotify(2)).
            if _give(listener, notification, self._offers[path]):
                del self._offers[path]
        elif self._is_in_our_folders(path) and self._is_qemu(notification.tid):
            self._promise(listener, notification)
        elif self._is_in_our_folders(path):
            # QEMU would make an ordinary file of any mem-path that does not exist (system/physmem.c, file_ram_open).
            seccomp.answer_error(listener, notification, errno.EACCES)
        else:
            seccomp.answer_continue(listener, notification)

    def _is_in_our_folders(self, path: bytes) -> bool:
        return any(path.startswith(folder) for folder in self._folders)

    def _promise(self, listener: int, notification: seccomp.Notification) -> None:
        """Give QEMU a file without a size: what it is to hold, QEMU says when it maps it (_answer_mmap)."""
        if not self._more or not self._more.has_room():
            seccomp.answer_error(listener, notification, errno.ENOMEM if self._more else errno.EACCES)
            return
        try:
            descriptor = memfd_secret()
            try:
                inode = os.fstat(descriptor).st_ino
                if _give(listener, notification, descriptor):
                    self._promised.append(inode)
                    self._longest[inode] = _ANY_BYTES
            finally:
                os.close(descriptor)
        except OSError as error:
            seccomp.answer_error(listener, notification, error.errno or errno.ENOMEM)
        if len(self._promised) > _MOST_PROMISES:
            self._forget(self._promised[0])

    def _forget(self, inode: int) -> None:
        self._promised.remove(inode)
        del self._longest[inode]

    def _answer_mmap(self, listener: int, notification: seccomp.Notification) -> None:
        """Put RAM of the size that is mapped in the place of a file without one, and let it be mapped.

        A file without a size would end QEMU at the first touch (SIGBUS). QEMU does not look at the size that a
        secretmem file has (lseek is ESPIPE), nor at its inode, so it does not notice that it has another one.
        """
        inode = _secret_inode(notification, 4)
        if inode not in self._promised or not self._more or not self._is_qemu(notification.tid):
            seccomp.answer_continue(listener, notification)
            return
        try:
            descriptor = self._more.of_size(notification.arguments[1])
        except OSError as error:
            seccomp.answer_error(listener, notification, error.errno or errno.ENOMEM)
            return
        try:
            if seccomp.replace_descriptor(listener, notification, descriptor, notification.arguments[4]):
                self._forget(inode)
                seccomp.answer_continue(listener, notification)
        except OSError as error:
            seccomp.answer_error(listener, notification, error.errno or errno.EMFILE)
        finally:
            os.close(descriptor)

    def _answer_memfd_create(self, listener: int, notification: seccomp.Notification) -> None:
        """Give QEMU secret memory for whatever it wants a memfd for: a RAM block, a picture of the guest's screen.

        What is not known here is secret too, rather than ordinary by oversight. A kind that secretmem cannot be
        (huge pages) is left to the kernel: the proof will find it to be ordinary.
        """
        name = _string(notification, 0)
        if not seccomp.is_waiting(listener, notification):
            return
        if name in self._memfds:
            self._answer_offered_memfd(listener, notification, self._memfds[name])
            return
        fits = name != _MEMFD_PROBE and not notification.arguments[1] & ~_MEMFD_FLAGS
        if not self._secret_memfds or not fits or not self._is_qemu(notification.tid):
            seccomp.answer_continue(listener, notification)
            return
        try:
            with _long_secret_memory() as descriptor:
                inode = os.fstat(descriptor).st_ino
                if _give(listener, notification, descriptor):
                    self._auxiliary.add(inode)
                    self._longest[inode] = _AUXILIARY_BYTES
        except OSError as error:  # no ordinary memory in its place: QEMU says what it wanted, and ends
            seccomp.answer_error(listener, notification, error.errno or errno.ENOMEM)

    def _answer_offered_memfd(self, listener: int, notification: seccomp.Notification, offers: list[int]) -> None:
        """Give QEMU the next of the descriptors that are offered for memfds of this name; it is of no other kind."""
        if notification.arguments[1] & ~_MEMFD_FLAGS or not self._is_qemu(notification.tid):
            seccomp.answer_error(listener, notification, errno.EACCES)
            return
        if not offers:
            self._promise(listener, notification)
            return
        status = os.fstat(offers[0])
        if _give(listener, notification, offers[0]):
            del offers[0]
            self._longest[status.st_ino] = status.st_size

    @staticmethod
    def _answer_change(listener: int, notification: seccomp.Notification, longest: int) -> None:
        """Let ftruncate(2) and fcntl(2) with F_ADD_SEALS of a secret descriptor seem to succeed: it cannot do either.

        Nothing is lost: it is long enough already, and its size can never change. QEMU could point the descriptor's
        number elsewhere before the answer, and would deceive but itself.
        """
        if notification.number == arch.current().ftruncate and notification.arguments[1] > longest:
            seccomp.answer_error(listener, notification, errno.EFBIG)
        else:
            seccomp.answer_success(listener, notification)


def _give(listener: int, notification: seccomp.Notification, descriptor: int) -> bool:
    """Answer with a copy of the descriptor; False, and the kernel's error for the caller, where it can have none."""
    try:
        return seccomp.answer_descriptor(listener, notification, descriptor)
    except OSError as error:  # EMFILE, say: the caller is out of descriptors
        seccomp.answer_error(listener, notification, error.errno or errno.EMFILE)
        return False


def _secret_inode(notification: seccomp.Notification, argument: int) -> int:
    """Return the inode of the secret file that an argument of the call is a descriptor of, 0 if it is none."""
    link = Path(f"/proc/{notification.tid}/fd/{notification.arguments[argument]}")
    try:
        return link.stat().st_ino if str(link.readlink()) == procfs.SECRETMEM else 0
    except OSError:
        return 0


def _string(notification: seccomp.Notification, argument: int) -> bytes:
    """Read the string that an argument points to: b"" if the caller is gone or gave a bad address."""
    try:
        with Path(f"/proc/{notification.tid}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), _PATH_MAX, notification.arguments[argument]).partition(b"\0")[0]
    except (OSError, OverflowError):
        return b""


@contextmanager
def _long_secret_memory() -> Iterator[int]:
    """Make secret memory for one RAM block of any size; yield its descriptor, which is closed then. Raises OSError."""
    descriptor = memfd_secret()
    try:
        os.ftruncate(descriptor, _AUXILIARY_BYTES)
        yield descriptor
    finally:
        os.close(descriptor)
