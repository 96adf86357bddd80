"""Starts QEMU and answers its open(2) of a mem-path with our descriptor, so that an unmodified QEMU maps secret RAM.

A memfd_secret descriptor cannot be opened again by any path, and memory-backend-file knows only paths. So QEMU runs
under a seccomp filter that stops its open of the mem-path until we answer it with a copy of the descriptor.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from vmmback.errors import HandoffFailed, HostUnfit, QemuFailed
from vmmback.linux import procfs, seccomp

# QEMU never sees the user's environment: only what programs need to run at all.
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

_LAST_WORDS_BYTES = 2000
_PATH_MAX = 4096  # with the NUL; limits.h


class Qemu:
    """A running QEMU and the handoff to it. Made by `start`."""

    def __init__(self, argv: Sequence[str], offers: Mapping[Path, int], log: Path) -> None:
        self.argv = list(argv)
        self.log = log
        self.pid = 0
        self._offers = {os.fsencode(path): descriptor for path, descriptor in offers.items()}
        self._folders = {os.path.dirname(path) + b"/" for path in self._offers}  # noqa: PTH120
        self._listener = self._pidfd = -1
        loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = loop.create_future()
        self._handed_over: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[int] = loop.create_future()

    @property
    def status(self) -> int | None:
        """QEMU's exit status (negative: the signal that ended it), or None while it runs."""
        return self._ended.result() if self._ended.done() else None

    @property
    def command_line(self) -> str:
        """What was executed, as a hint for an error."""
        return f"QEMU's command line was: {' '.join(self.argv)}"

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
        """
        try:
            self._listener = seccomp.install_open_listener()
            with self.log.open("xb") as log:
                process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *self.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=descriptors,
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
        except Exception as error:  # noqa: BLE001 (handed to the task that waits for it)
            loop.call_soon_threadsafe(self._started.set_exception, error)
            return
        self.pid = process.pid
        self._pidfd = os.pidfd_open(process.pid)
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
        path = self._path(notification)
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

    def _is_qemu(self, notification: seccomp.Notification) -> bool:
        try:
            return procfs.thread_group(notification.tid) == self.pid
        except OSError:
            return False

    @staticmethod
    def _path(notification: seccomp.Notification) -> bytes:
        """Read the path that openat(2) was called with: b"" if the caller is gone or gave a bad address."""
        try:
            with Path(f"/proc/{notification.tid}/mem").open("rb", buffering=0) as memory:
                return os.pread(memory.fileno(), _PATH_MAX, notification.arguments[1]).partition(b"\0")[0]
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


@asynccontextmanager
async def start(
    argv: Sequence[str], offers: Mapping[Path, int], descriptors: Sequence[int], log: Path
) -> AsyncIterator[Qemu]:
    """Start QEMU with `descriptors` inherited, its output in `log`; kill it on exit if it still runs.

    Each path of `offers` is answered once, with a copy of its descriptor, to this QEMU alone; any other path in the
    same folder is denied, and all else is left to the kernel. Raises OSError when it cannot be started,
    HostUnfit without setpriv.
    """
    qemu = Qemu(argv, offers, log)
    try:
        try:
            await qemu._start(descriptors)
        except FileNotFoundError as error:  # QEMU itself was found before
            raise HostUnfit("setpriv was not found on PATH", "install it: apt-get install util-linux") from error
        yield qemu
    finally:
        await qemu._close()


def last_words(log: Path) -> str:
    """Return the end of a log as one line: at most 2,000 bytes, without control characters."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_WORDS_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return " / ".join(
        "".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines() if line.strip()
    )
