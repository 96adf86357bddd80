"""`vmmback launch --detach`: a supervisor in the background, and who waits until its guest was validated.

The supervisor is a child, forked before there is an event loop or a thread. What a launch would show goes over a pair
of sockets, one JSON object a line, to the command that the user started; that one ends when the guest runs. If it ends
before, for whatever reason, nobody would know of the guest: then the launch is stopped.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from vmmback.cli.files import ReportFiles
from vmmback.cli.lead import STOP_SIGNALS, lead, stop_signals
from vmmback.cli.output import as_user_error, exit_code_of, finish, print_result
from vmmback.cli.screen import Screen
from vmmback.config import GuestConfig
from vmmback.errors import QemuFailed, VmmbackError
from vmmback.lifecycle import State, Stop
from vmmback.report import Drift, IsolationReport

_LAST_WORD_TIMEOUT_S = 5.0
_FIRST_OTHER = 3  # the lowest descriptor that is no standard stream's


def detached(guest: GuestConfig, screen: Screen, *, validate: bool, file: Path, files: ReportFiles) -> NoReturn:
    """Start a guest in the background, show its start, and end this process with the verdict's exit code."""
    ours, theirs = _channel()
    wishes: list[int] = []
    file = file.absolute()
    # Until there is a child that can be told, and until that one has handlers (lead.py), none is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child = os.fork()
    if child == 0:
        ours.close()
        _supervise(guest, theirs, validate=validate, file=file)
    theirs.close()

    def pass_on(signum: int, _: object) -> None:
        wishes.append(signum)
        os.kill(child, signum)  # it is not reaped before this process ends: the number is its own

    for signum in stop_signals():
        signal.signal(signum, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        report, runs = _followed(ours, child, screen, wishes)
    finally:
        screen.close()
    counts = report is not None and (validate or report.verdict == "exposed")
    code = exit_code_of(report.verdict) if report and counts else 0

    def last_word() -> None:
        if not runs:
            assert report is not None
            screen.finished(report)
            return
        if screen.as_json:
            print_result(report.as_json() if report else "null\n")
        how = "" if report else " and was not validated"
        screen.note(f"guest {guest.name} runs in the background{how}: vmmback status {guest.name}")

    finish(code, last_word, *(files.outputs(report) if report else []))


def _channel() -> tuple[socket.socket, socket.socket]:
    """Return a pair of sockets with numbers that no standard stream has, also where those were closed."""
    pair = []
    for end in socket.socketpair():
        with end:
            number = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FIRST_OTHER)
        pair.append(socket.socket(fileno=number))
    ours, theirs = pair
    return ours, theirs


def _followed(
    channel: socket.socket, child: int, screen: Screen, wishes: list[int]
) -> tuple[IsolationReport | None, bool]:
    """Show what the supervisor tells, until its guest runs or has ended; return its report, and whether it runs.

    Raises VmmbackError: what the launch has raised.
    """
    report: IsolationReport | None = None
    with channel, channel.makefile("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):  # the supervisor was killed while it told this
                break
            told = json.loads(line)
            if "error" in told:
                error = VmmbackError(told["error"], told["hint"])
                error.exit_code = told["exit_code"]
                raise error
            if "validated" in told:
                report = IsolationReport.of(told["validated"])
                screen.validated(report)
            elif "ended" in told:
                return IsolationReport.of(told["ended"]), False
            elif told.get("state") == State.RUNNING.value and not _stopping(wishes):
                return report, True
            else:
                _show(screen, told)
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it is not reaped: see `pass_on`
    assert ended is not None
    killed = ended.si_code != os.CLD_EXITED
    how = f"by {signal.Signals(ended.si_status).name}" if killed else "without a word"
    raise QemuFailed(f"the supervisor in the background was ended {how}", "the guest is gone with it")


def _stopping(wishes: list[int]) -> bool:
    """Tell whether the user wants the guest to end; if not, that wish comes too late from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if not wishes:
        return False
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return True


def _show(screen: Screen, told: dict[str, Any]) -> None:
    if "note" in told:
        screen.note(told["note"])
    elif "prefaulted" in told:
        screen.prefaulted(told["prefaulted"], told["size"])
    elif "drift" in told:
        screen.drifted(Drift.of(told["drift"]))


def _supervise(guest: GuestConfig, channel: socket.socket, *, validate: bool, file: Path) -> NoReturn:
    """Be the supervisor. This never returns to what the fork has copied."""
    try:
        _leave(channel)
        teller = Teller(channel)
        try:
            report = lead(guest, teller, validate=validate, file=file, begun=teller.begun)
            teller.tell(ended=report.as_tables())
        except (VmmbackError, OSError, MemoryError, RuntimeError) as caught:
            error = as_user_error(caught)
            if error is None:
                raise
            teller.tell(error=error.message, hint=error.hint, exit_code=error.exit_code)
    except BaseException:  # noqa: BLE001 (there is nobody else to tell)
        with suppress(OSError, UnboundLocalError):
            teller.tell(error=f"a mistake in vmmback: {traceback.format_exc()}", hint="report it", exit_code=1)
    finally:
        with suppress(OSError, UnboundLocalError):
            teller.close()
        os._exit(0)


def _leave(channel: socket.socket) -> None:
    """Cut all ties with the terminal and whoever started us, but for the channel."""
    os.setsid()  # no controlling terminal, whose end would be ours
    os.chdir("/")  # the file system that we were started in can be unmounted
    os.umask(0o077)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(_FIRST_OTHER):
        os.dup2(null, descriptor)
    # What else was inherited, a pipe that somebody reads to its end, say, is closed; Python has opened nothing yet.
    os.closerange(_FIRST_OTHER, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    os.environ.pop("NOTIFY_SOCKET", None)  # the service is whoever started us, and ends


class Teller:
    """A watcher that tells another process, and never waits for it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._channel.setblocking(False)
        self._unsent = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heard = True
        self._percent = -1

    def begun(self, stop: Stop) -> None:
        """Stop the guest if the other process ends before it runs."""
        self._loop = asyncio.get_running_loop()

        def gone() -> None:
            self._hang_up()
            stop.insist(2)  # QEMU quits, without the patience of a power button

        self._loop.add_reader(self._channel, gone)

    def tell(self, **message: object) -> None:
        """Send a message, or keep it until there is room."""
        if self._heard:
            self._unsent += json.dumps(message).encode() + b"\n"
            self._send()

    def close(self) -> None:
        """Send what is left, unless that takes too long."""
        self._loop = None
        if self._heard:
            self._channel.settimeout(_LAST_WORD_TIMEOUT_S)
            self._channel.sendall(self._unsent)

    def console(self, data: bytes | memoryview) -> None:
        """Drop it: the guest's log has it."""

    def note(self, message: str) -> None:
        """See Watcher."""
        self.tell(note=message)

    def prefaulted(self, done: int, size: int) -> None:
        """See Watcher; each percent once."""
        if done * 100 // size != self._percent:
            self._percent = done * 100 // size
            self.tell(prefaulted=done, size=size)

    def validated(self, report: IsolationReport) -> None:
        """See Watcher."""
        self.tell(validated=report.as_tables())

    def drifted(self, drift: Drift) -> None:
        """See Watcher."""
        self.tell(drift=drift.as_tables())

    def entered(self, state: State) -> None:
        """See Watcher; from the first moment that it runs, the guest needs the other process no more."""
        self.tell(state=state.value)
        if state is State.RUNNING and self._loop and self._heard:
            self._loop.remove_reader(self._channel)
            self._loop.add_reader(self._channel, self._hang_up)

    def _send(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._channel.send(self._unsent)]
        except BlockingIOError:
            if self._loop and not self._loop.is_closed():
                self._loop.add_writer(self._channel, self._send)
            return
        except OSError:  # nobody is there any more; what follows from that is said by `begun`
            self._unsent.clear()
        if self._loop and not self._loop.is_closed():
            self._loop.remove_writer(self._channel)

    def _hang_up(self) -> None:
        if self._heard and self._loop:
            self._loop.remove_reader(self._channel)
            self._loop.remove_writer(self._channel)
        self._heard = False
        self._channel.close()
