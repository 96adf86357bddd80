"""Starts QEMU and answers its open(2) of a mem-path with our descriptor, so that an unmodified QEMU maps secret RAM.

A memfd_secret descriptor cannot be opened again by any path, and memory-backend-file knows only paths. So QEMU runs
under a seccomp filter that stops its open of the mem-path until we answer it with a copy of the descriptor.

Where QEMU puts its other RAM blocks on memfds (aux-ram-share=on), its memfd_create(2) is answered with secret
descriptors as well: docs/RAM-BLOCKS.md.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from vmmback.errors import HandoffFailed, HostUnfit, QemuFailed
from vmmback.host.qemu import QEMU_ENVIRONMENT as _ENVIRONMENT
from vmmback.jail import Jail
from vmmback.linux import arch, cgroups, procfs, seccomp
from vmmback.linux.memfd_secret import memfd_secret
from vmmback.runtime import last_words

T = TypeVar("T")

_PATH_MAX = 4096  # with the NUL; limits.h

# Secretmem takes a size once, and lseek(2) tells none (mm/secretmem.c). QEMU truncates a new memfd to 0, asks lseek for
# its size to see whether it must grow, and maps it (system/physmem.c, qemu_ram_alloc_from_fd). So it gets one that is
# longer than any RAM block: only what is mapped counts as locked, and only what is touched takes memory.
_AUXILIARY_BYTES = 4 << 30

# How QEMU finds out what kinds of memfd there are (util/memfd.c); it maps none of these for a guest.
_MEMFD_PROBE = b"test"
# Other flags of memfd_create(2), such as those for huge pages, ask for what secretmem has not.
_MEMFD_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING


class Qemu:
    """A running QEMU and the handoff to it. Made by `start`."""

    def __init__(
        self,
        argv: Sequence[str],
        offers: Mapping[Path, int],
        log: Path,
        *,
        secret_memfds: bool,
        jail: Jail | None,
        group: Path | None,
    ) -> None:
        self.argv = list(argv)
        self.log = log
        self.pid = 0
        self._secret_memfds = secret_memfds
        self._jail = jail
        self._group = group
        self._auxiliary: set[int] = set()
        self._offers: dict[bytes, int] = {}
        self._folders: set[bytes] = set()
        self._listener = self._pidfd = -1
        loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[int] = loop.create_future()
        for path, descriptor in offers.items():
            self._offer(path, descriptor)

    @property
    def status(self) -> int | None:
        """QEMU's exit status (negative: the signal that ended it), or None while it runs."""
        return self._ended.result() if self._ended.done() else None

    @property
    def auxiliary_inodes(self) -> frozenset[int]:
        """The inodes of the secret descriptors that its memfd_create(2) was answered with so far; it alone has them."""
        return frozenset(self._auxiliary)

    @property
    def command_line(self) -> str:
        """What was executed, as a hint for an error."""
        return f"QEMU's command line was: {' '.join(self.argv)}"

    @contextmanager
    def offering(self, path: Path, descriptor: int) -> Iterator[None]:
        """Have one more path answered, once, by the rules of `start`; withdrawn on exit if QEMU has not taken it."""
        self._offer(path, descriptor)
        try:
            yield
        finally:
            self._offers.pop(os.fsencode(path), None)

    async def handed_over(self, timeout_s: float) -> None:
        """Wait until each descriptor offered was taken. Raises HandoffFailed, with QEMU's own words, if it was not."""
        await self._before_end(self._handed_over, timeout_s, "take the descriptor of its RAM", HandoffFailed)

    async def ended(self, timeout_s: float | None = None) -> int:
        """Wait for QEMU's end and return its exit status. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(self._ended)

    async def kill(self, timeout_s: float = 10) -> None:
        """End QEMU by SIGKILL and wait until it is gone. Raises QemuFailed when the kernel does not end it in time."""
        if self.status is None and self.pid:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)  # the pid may be another's by now
            try:
                await self.ended(timeout_s)
            except TimeoutError:
                raise QemuFailed(f"QEMU (pid {self.pid}) did not end {timeout_s} s after SIGKILL") from None

    def failure(self, what: str, kind: type[QemuFailed] = QemuFailed) -> QemuFailed:
        """Return an error that says `what` happened, with QEMU's exit status, last words and command line."""
        status = self.status
        if status is None:
            state = "it still runs"
        elif status < 0:
            state = f"it was ended by {signal.Signals(-status).name}"
        else:
            state = f"it exited with status {status}"
        words = last_words(self.log) or "nothing"
        return kind(f"QEMU did not {what}: {state}; it said: {words}", self.command_line)

    def _offer(self, path: Path, descriptor: int) -> None:
        self._offers[os.fsencode(path)] = descriptor
        self._folders.add(os.fsencode(path.parent) + b"/")
        self._handed_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def _before_end(
        self, future: asyncio.Future[None], timeout_s: float, what: str, kind: type[QemuFailed]
    ) -> None:
        waited: set[asyncio.Future[object]] = {future, self._ended}  # type: ignore[arg-type]
        await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise self.failure(what if self._ended.done() else f"{what} within {timeout_s} s", kind)
        future.result()

    def _run(self, loop: asyncio.AbstractEventLoop, descriptors: Sequence[int]) -> None:
        """Live as long as QEMU does, in a thread of its own.

        The filter belongs to a thread and to what it executes, so the supervisor stays without one. And the signal of
        PR_SET_PDEATHSIG (setpriv sets it) comes with the end of the *thread* that made the child (prctl(2)): this one
        ends with the supervisor, however that ends. A supervisor that dies before setpriv runs takes the listener
        with it: QEMU's open then fails with ENOSYS, and QEMU gives up by itself.

        The jail's namespaces are a thread's own as well. Behind its walls, this thread finds no module to import.
        """
        try:
            self._listener = seccomp.install_listener(memfds=self._secret_memfds)
            with self.log.open("xb") as log, cgroups.entrance(self._group) as put_into_group:
                command = ["setpriv", "--pdeathsig", "KILL", "--", *self.argv]
                if self._jail:
                    self._jail.give(descriptors)
                    command = self._jail.command(self.argv)
                    self._jail.enter()
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=descriptors,
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
                _or_end(process, lambda: put_into_group(process.pid))  # nothing is handed over before
            self._pidfd = pidfd_of(process)
        except Exception as error:  # noqa: BLE001 (handed to the task that waits for it)
            loop.call_soon_threadsafe(self._started.set_exception, error)
            return
        self.pid = process.pid
        loop.call_soon_threadsafe(self._started.set_result, None)
        status = process.wait()
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(self._finish, status)

    def _finish(self, status: int) -> None:
        # Without a task under the filter the listener polls as hung up for ever (kernel/seccomp.c).
        asyncio.get_running_loop().remove_reader(self._listener)
        self._ended.set_result(status)

    def _answer_next(self) -> None:
        notification = seccomp.receive(self._listener)
        if notification is None:
            return
        numbers = arch.current()
        if notification.number == numbers.openat:
            self._answer_open(notification)
        elif notification.number == numbers.memfd_create:
            self._answer_memfd_create(notification)
        elif self._is_auxiliary(notification):
            self._answer_change(notification)
        else:
            seccomp.answer_continue(self._listener, notification)

    def _answer_open(self, notification: seccomp.Notification) -> None:
        path = self._string(notification, 1)
        if not seccomp.is_waiting(self._listener, notification):
            return
        if path in self._offers and self._is_qemu(notification):
            # A signal may interrupt QEMU's open before the answer; the kernel then makes it again (seccomp_unotify(2)).
            if seccomp.answer_descriptor(self._listener, notification, self._offers[path]):
                del self._offers[path]
                if not self._offers:
                    self._handed_over.set_result(None)
        elif any(path.startswith(folder) for folder in self._folders):
            # QEMU would make an ordinary file of any mem-path that does not exist (system/physmem.c, file_ram_open).
            seccomp.answer_error(self._listener, notification, errno.EACCES)
        else:
            seccomp.answer_continue(self._listener, notification)

    def _answer_memfd_create(self, notification: seccomp.Notification) -> None:
        """Give QEMU secret memory for whatever it wants a memfd for: a RAM block, a picture of the guest's screen.

        What is not known here is secret too, rather than ordinary by oversight. A kind that secretmem cannot be
        (huge pages) is left to the kernel: the proof will find it to be ordinary.
        """
        name = self._string(notification, 0)
        if not seccomp.is_waiting(self._listener, notification):
            return
        if name == _MEMFD_PROBE or notification.arguments[1] & ~_MEMFD_FLAGS or not self._is_qemu(notification):
            seccomp.answer_continue(self._listener, notification)
            return
        try:
            with _long_secret_memory() as descriptor:
                inode = os.fstat(descriptor).st_ino
                if seccomp.answer_descriptor(self._listener, notification, descriptor):
                    self._auxiliary.add(inode)
        except OSError as error:  # no ordinary memory in its place: QEMU says what it wanted, and ends
            seccomp.answer_error(self._listener, notification, error.errno or errno.ENOMEM)

    def _answer_change(self, notification: seccomp.Notification) -> None:
        """Let ftruncate(2) and fcntl(2) with F_ADD_SEALS of a secret descriptor seem to succeed: it cannot do either.

        Nothing is lost: it is long enough already, and its size can never change. QEMU could point the descriptor's
        number elsewhere before the answer, and would deceive but itself.
        """
        if notification.number == arch.current().ftruncate and notification.arguments[1] > _AUXILIARY_BYTES:
            seccomp.answer_error(self._listener, notification, errno.EFBIG)
        else:
            seccomp.answer_success(self._listener, notification)

    def _is_auxiliary(self, notification: seccomp.Notification) -> bool:
        """Tell whether the call's first argument is one of the descriptors that memfd_create(2) was answered with."""
        link = Path(f"/proc/{notification.tid}/fd/{notification.arguments[0]}")
        try:
            return link.stat().st_ino in self._auxiliary and str(link.readlink()) == procfs.SECRETMEM
        except OSError:
            return False

    def _is_qemu(self, notification: seccomp.Notification) -> bool:
        try:
            return procfs.thread_group(notification.tid) == self.pid
        except OSError:
            return False

    @staticmethod
    def _string(notification: seccomp.Notification, argument: int) -> bytes:
        """Read the string that an argument points to: b"" if the caller is gone or gave a bad address."""
        try:
            with Path(f"/proc/{notification.tid}/mem").open("rb", buffering=0) as memory:
                return os.pread(memory.fileno(), _PATH_MAX, notification.arguments[argument]).partition(b"\0")[0]
        except (OSError, OverflowError):
            return b""

    async def _start(self, descriptors: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._run, args=(loop, descriptors), name="qemu", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # out of threads
            self._started.set_exception(OSError(errno.EAGAIN, str(error)))
        await asyncio.shield(self._started)
        loop.add_reader(self._listener, self._answer_next)

    async def _close(self) -> None:
        try:
            with suppress(Exception):
                await asyncio.shield(self._started)
            await self.kill()
        finally:
            if self._listener >= 0:
                asyncio.get_running_loop().remove_reader(self._listener)
                os.close(self._listener)
            if self._pidfd >= 0:
                os.close(self._pidfd)
            self._listener = self._pidfd = -1


def pidfd_of(process: subprocess.Popen[bytes]) -> int:
    """Return a pidfd of a child of ours. Raises OSError, without descriptors left, say: the child has ended then."""
    return _or_end(process, lambda: os.pidfd_open(process.pid))


def _or_end(process: subprocess.Popen[bytes], function: Callable[[], T]) -> T:
    """Return what the function does, which needs a child of ours; what it raises comes after the child's end."""
    try:
        return function()
    except BaseException:
        process.kill()
        process.wait()
        raise


@contextmanager
def _long_secret_memory() -> Iterator[int]:
    """Make secret memory for one RAM block of any size; yield its descriptor, which is closed then. Raises OSError."""
    descriptor = memfd_secret()
    try:
        os.ftruncate(descriptor, _AUXILIARY_BYTES)
        yield descriptor
    finally:
        os.close(descriptor)


@asynccontextmanager
async def start(
    argv: Sequence[str],
    offers: Mapping[Path, int],
    descriptors: Sequence[int],
    log: Path,
    *,
    secret_memfds: bool = False,
    jail: Jail | None = None,
    group: Path | None = None,
) -> AsyncIterator[Qemu]:
    """Start QEMU with `descriptors` inherited, its output in `log`; kill it on exit if it still runs.

    Each path of `offers` is answered once, with a copy of its descriptor, to this QEMU alone; any other path in the
    same folder is denied, and all else is left to the kernel. With `secret_memfds` each memfd that it makes is one of
    memfd_secret(2), of which no copy stays here. Without a jail, QEMU has all rights of this process. `group` is the
    folder of the memory cgroup that pays for what QEMU touches, None for this process's own. Raises OSError when it
    cannot be started, HostUnfit without setpriv, or where there can be no such jail, or QEMU may not be in that group.
    """
    qemu = Qemu(argv, offers, log, secret_memfds=secret_memfds, jail=jail, group=group)
    try:
        try:
            await qemu._start(descriptors)
        except FileNotFoundError as error:  # QEMU itself was found before
            raise HostUnfit("setpriv was not found on PATH", "install it: apt-get install util-linux") from error
        yield qemu
    finally:
        await qemu._close()
