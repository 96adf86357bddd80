"""Starts QEMU and answers its open(2) of a mem-path with our descriptor, so that an unmodified QEMU maps secret RAM.

QEMU runs under a seccomp filter whose listener is ours; answers.py has what its calls are answered with, and why.
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

from vmmback.answers import Answers
from vmmback.errors import HandoffFailed, HostUnfit, QemuFailed
from vmmback.host.qemu import QEMU_ENVIRONMENT as _ENVIRONMENT
from vmmback.jail import Jail
from vmmback.linux import cgroups, procfs, seccomp
from vmmback.runtime import last_words

T = TypeVar("T")


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
        self._answers = Answers(self._is_qemu, secret_memfds=secret_memfds)
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
        return self._answers.auxiliary_inodes

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
            self._answers.withdraw(path)

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
        self._answers.offer(path, descriptor)
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
        awaited = not self._answers.taken
        self._answers.answer_next(self._listener)
        if awaited and self._answers.taken:
            self._handed_over.set_result(None)

    def _is_qemu(self, tid: int) -> bool:
        try:
            return procfs.thread_group(tid) == self.pid
        except OSError:
            return False

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
