"""The supervisor's socket: both sides of it, with a guest that is made up."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import stat
from array import array
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.sample_reports import guest_report
from vmmback import ask, control, control_client
from vmmback.control import SOCKET, GuestInterface, GuestStatus
from vmmback.control_client import Supervisor
from vmmback.errors import AdmissionRefused, HostUnfit, NoSuchGuest, QemuFailed, UsageError, VmmbackError
from vmmback.linux import page_file
from vmmback.report import IsolationReport
from vmmback.runtime import listening_socket

REPORT = guest_report()
FRAMES = array("Q", [1 << 63 | frame for frame in range(100_000)])
HALVES = b"a" * 64, b"b" * 64
DEADLINE_S = 20.0
STATUS = GuestStatus(
    name="demo",
    state="booting",
    pid=7,
    qemu_pid=None,
    started_at="2026-01-01T00:00:00+00:00",
    uptime_s=1.5,
    ram_bytes=16 << 20,
    prefaulted_bytes=8 << 20,
    secret_bytes=0,
    verdict=None,
    reasons=["it was not tried"],
    validated_after=None,
    unexamined=None,
    config_file="/etc/demo.toml",
    folder="/run/vmmback/demo",
    console_logs=[],
)


class Made:
    """A guest that is made up."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.halves: tuple[bytes, bytes] | None = HALVES
        self.audits = 0
        self.began = asyncio.Event()
        self.stands: asyncio.Event | None = None
        self.cancelled = False
        self.stops: list[tuple[float | None, bool]] = []
        self.asked, self.over = asyncio.Event(), asyncio.Event()

    async def examine(self) -> IsolationReport:
        self.audits += 1
        self.began.set()
        if self.stands:
            try:
                await self.stands.wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        if self.error:
            raise self.error
        return REPORT

    async def frames(self) -> array[int]:
        if self.error:
            raise self.error
        return FRAMES

    async def grow(self, size: int, progress: Callable[[int, int], None]) -> IsolationReport:
        for done in range(0, size + 1, size // 4):
            progress(done, size)
        return await self.examine()

    def attach_console(self, *, scrollback: bool) -> int:
        if self.error:
            raise self.error
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(b"all of it" if scrollback else b"what comes")
        return theirs.detach()

    def canary_halves(self) -> tuple[bytes, bytes] | None:
        return self.halves

    def status(self) -> GuestStatus:
        return STATUS

    async def stop(self, timeout_s: float | None, *, kill: bool) -> IsolationReport:
        self.stops.append((timeout_s, kill))
        if len(self.stops) == 2:
            self.asked.set()
        await self.over.wait()
        if self.error:
            raise self.error
        return REPORT

    @property
    def interface(self) -> GuestInterface:
        return GuestInterface(self)


def play(folder: Path, scene: Callable[[Made, Supervisor], Coroutine[Any, Any, None]]) -> None:
    async def staged() -> None:
        made = Made()
        async with (
            asyncio.timeout(DEADLINE_S),
            control.serve(folder, made.interface),
            control_client.connect(folder) as guest,
        ):
            await scene(made, guest)

    asyncio.run(staged())


def memfds() -> list[str]:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except FileNotFoundError:  # the descriptor of this listing
            continue
    return [link for link in links if "vmmback-frames" in link]


def test_a_report_comes_as_it_was_made(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        assert await guest.audit() == REPORT
        assert await guest.audit() == REPORT
        assert made.audits == 2

    play(tmp_path, scene)


def test_frames_come_as_they_are_and_no_descriptor_stays(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        assert await guest.frames() == FRAMES
        assert await guest.frames() == FRAMES  # of a file of its own, which is read from its beginning
        await asyncio.sleep(0)
        gc.collect()
        assert memfds() == []

    play(tmp_path, scene)


def test_frames_cannot_be_changed_by_who_gets_them() -> None:
    descriptor = page_file.sealed(FRAMES)
    try:
        with pytest.raises(PermissionError):
            os.write(descriptor, b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_growing_tells_its_progress_and_at_last_the_report(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    async def scene(made: Made, guest: Supervisor) -> None:
        assert await guest.grow(400, lambda *step: seen.append(step)) == REPORT
        assert seen == [(0, 400), (100, 400), (200, 400), (300, 400), (400, 400)]
        assert await guest.audit() == REPORT  # the connection goes on

    play(tmp_path, scene)


@pytest.mark.parametrize("kind", [UsageError, HostUnfit, AdmissionRefused, QemuFailed])
def test_an_error_of_growing_is_of_the_same_kind_here(tmp_path: Path, kind: type[VmmbackError]) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        made.error = kind("it does not fit", "take less")
        with pytest.raises(kind, match="it does not fit") as caught:
            await guest.grow(400, lambda *_: None)
        assert (type(caught.value), caught.value.hint) == (kind, "take less")
        made.error = OSError("out of descriptors")
        with pytest.raises(QemuFailed, match="could not grow, or not be examined: out of descriptors"):
            await guest.grow(400, lambda *_: None)

    play(tmp_path, scene)


# asyncvarlink does not await the generator's aclose(), which Python tells from 3.13 on.
@pytest.mark.filterwarnings("ignore:coroutine method 'aclose':RuntimeWarning")
def test_growing_is_cancelled_when_its_caller_goes_away_and_when_the_guest_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The supervisor finds out that the caller is gone when it next tells its progress."""

    class Slow(Made):
        def __init__(self) -> None:
            super().__init__()
            self.over = asyncio.Event()

        async def grow(self, size: int, progress: Callable[[int, int], None]) -> IsolationReport:
            self.began.set()
            try:
                while True:
                    progress(1, size)
                    await asyncio.sleep(0.001)
            finally:
                self.over.set()

    async def scene() -> None:
        made = Slow()
        async with asyncio.timeout(DEADLINE_S), control.serve(tmp_path, made.interface):
            async with control_client.connect(tmp_path) as guest:
                hasty = asyncio.create_task(guest.grow(400, lambda *_: None))
                await made.began.wait()
                hasty.cancel()
                await asyncio.wait({hasty})
            await made.over.wait()
        made = Slow()
        async with asyncio.timeout(DEADLINE_S), AsyncExitStack() as stack:
            async with control.serve(tmp_path, made.interface):
                guest = await stack.enter_async_context(control_client.connect(tmp_path))
                growing = asyncio.create_task(guest.grow(400, lambda *_: None))
                await made.began.wait()
            with pytest.raises(QemuFailed, match="the guest ended meanwhile"):
                await growing
            assert made.over.is_set()

    gc.disable()
    try:
        asyncio.run(scene())
    finally:
        gc.enable()
        gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING] == []


def test_the_halves_of_a_canary_and_none(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        assert await guest.canary_halves() == HALVES
        made.halves = None
        assert await guest.canary_halves() is None

    play(tmp_path, scene)


def test_the_console_is_a_socket_of_the_callers(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        for scrollback, printed in ((True, b"all of it"), (False, b"what comes")):
            with socket.socket(fileno=await guest.console(scrollback=scrollback)) as console:
                assert not console.get_inheritable()
                assert (console.recv(100), console.recv(100)) == (printed, b"")
        made.error = QemuFailed("there are too many", "wait")
        with pytest.raises(QemuFailed, match="there are too many"):
            await guest.console(scrollback=True)

    play(tmp_path, scene)


def test_an_error_of_the_guest_comes_with_its_hint_and_the_next_call_is_answered(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        made.error = QemuFailed("QEMU said nothing", "look at its log")
        with pytest.raises(QemuFailed, match="QEMU said nothing") as caught:
            await guest.audit()
        assert caught.value.hint == "look at its log"
        for error in (
            OSError(24, "Too many open files"),
            MemoryError("none left"),
            RuntimeError("can't start a thread"),
        ):
            made.error = error
            with pytest.raises(QemuFailed, match=r"the guest could not be examined: .*(files|left|thread)"):
                await guest.audit()
        made.error = OSError(2, "No such file or directory")
        with pytest.raises(QemuFailed, match="page tables cannot be read: No such file or directory"):
            await guest.frames()
        made.error = None
        assert await guest.audit() == REPORT

    play(tmp_path, scene)


def test_a_mistake_of_ours_is_a_refusal_and_no_end_of_the_supervisor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        made.error = ZeroDivisionError()
        with caplog.at_level(logging.CRITICAL), pytest.raises(QemuFailed, match="the guest's supervisor refused"):
            await guest.audit()
        made.error = None
        assert await guest.audit() == REPORT

    play(tmp_path, scene)


def test_the_end_of_the_guest_during_an_audit_is_told_and_ends_the_audit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def staged() -> None:
        made = Made()
        made.stands = asyncio.Event()
        async with asyncio.timeout(DEADLINE_S):
            async with control.serve(tmp_path, made.interface):
                asked = asyncio.create_task(audited(tmp_path))
                await made.began.wait()
            assert made.cancelled  # once the socket is closed, nobody looks at the guest any more
            with pytest.raises(QemuFailed, match="the guest ended meanwhile"):
                await asked

    asyncio.run(staged())
    assert caplog.text == ""  # an error of a callback would be a traceback among what the supervisor says


async def audited(folder: Path) -> IsolationReport:
    async with control_client.connect(folder) as guest:
        return await guest.audit()


def test_a_client_that_hangs_up_disturbs_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        made.stands = asyncio.Event()
        hasty = asyncio.create_task(audited(tmp_path))
        await made.began.wait()
        hasty.cancel()
        await asyncio.wait({hasty})
        made.stands.set()
        assert await guest.audit() == REPORT

    play(tmp_path, scene)
    assert caplog.text == ""


def test_a_call_that_is_cancelled_before_it_is_sent_is_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        hasty = asyncio.create_task(guest.audit())
        await asyncio.sleep(0)  # it began, and waits for the socket to take it
        hasty.cancel()
        await asyncio.wait({hasty})
        assert hasty.cancelled()
        assert await audited(tmp_path) == REPORT

    play(tmp_path, scene)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "noise", [b"", b"\0", b"x" * 100_000, b'{"method":1}\0', b'{"method":"org.vmmback.Guest.No"}\0']
)
def test_noise_on_the_socket_disturbs_nobody(tmp_path: Path, noise: bytes) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        _, writer = await asyncio.open_unix_connection(tmp_path / SOCKET)
        writer.write(noise)
        await writer.drain()
        assert await guest.audit() == REPORT
        writer.close()
        await writer.wait_closed()

    play(tmp_path, scene)


CALLS: list[Callable[[Supervisor], Coroutine[Any, Any, Any]]] = [
    Supervisor.audit,
    Supervisor.frames,
    Supervisor.canary_halves,
]


def refusal(folder: Path, answer: bytes, call: Callable[[Supervisor], Coroutine[Any, Any, Any]]) -> QemuFailed:
    """Return the error of a call to a socket at which this is the answer to whatever comes."""

    async def staged() -> QemuFailed:
        async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(answer)
            await reader.read()  # to the end of the client
            writer.close()
            over.set()

        over = asyncio.Event()
        with listening_socket(folder / SOCKET) as listening:
            server = await asyncio.start_unix_server(answered, sock=listening)
            async with asyncio.timeout(DEADLINE_S):
                async with control_client.connect(folder) as guest:
                    with pytest.raises(QemuFailed) as caught:
                        await call(guest)
                    await asyncio.sleep(0)
                await over.wait()
                server.close()
                await server.wait_closed()
        return caught.value

    return asyncio.run(staged())


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_supervisor_that_is_silent_keeps_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Supervisor], Coroutine[Any, Any, Any]]
) -> None:
    for name in ("_ANSWER_TIMEOUT_S", "_AUDIT_TIMEOUT_S"):
        monkeypatch.setattr(control_client, name, 0.05)
    error = refusal(tmp_path, b"", call)
    assert error.message.startswith("the guest's supervisor did not answer within 0.05 s: ")
    assert error.message.split()[-1].lower() == call.__name__.replace("_", "")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\0",
        b"\xff\xfe\0",
        b"[" * 100_000 + b"\0",
        b"[]\0",
        b"{}\0",
        b"{}\0{}\0{}\0",
        b'{"parameters":1}\0',
        b'{"parameters":{"report":{},"frames":"x","halves":["0"]}}\0',
        b'{"parameters":{"report":{"guest":"a"},"frames":7,"halves":["00"]}}\0',
        b'{"error":1}\0',
        b'{"error":"x"}\0',
        b'{"error":"org.vmmback.Guest.Failed","parameters":{}}\0',
    ],
    ids=lambda answer: answer[:50].decode(errors="replace"),
)
def test_an_answer_of_another_kind_is_an_error_without_a_traceback(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    answer: bytes,
    call: Callable[[Supervisor], Coroutine[Any, Any, Any]],
) -> None:
    error = refusal(tmp_path, answer, call)
    assert error.message == "the guest's supervisor answered in a way not known here"
    assert "another version" in error.hint
    assert caplog.text == ""


def test_several_clients_at_once(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        assert await asyncio.gather(*(audited(tmp_path) for _ in range(40))) == [REPORT] * 40

    play(tmp_path, scene)


def test_its_socket_is_the_users_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        status = (tmp_path / SOCKET).stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600

    play(tmp_path, scene)
    assert list(tmp_path.iterdir()) == []


def test_its_path_may_be_longer_than_an_address(tmp_path: Path) -> None:
    """A runtime folder of 80 bytes and a name of 63 are allowed; an address has 108 bytes."""
    folder = tmp_path / ("a" * 63) / ("b" * 63)
    folder.mkdir(parents=True)

    async def scene(made: Made, guest: Supervisor) -> None:
        assert await guest.audit() == REPORT

    play(folder, scene)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    async def staged() -> None:
        async with control.serve(tmp_path / "gone", Made().interface):
            pytest.fail("it was made")

    with pytest.raises(HostUnfit, match=r"the socket .*/gone/control cannot be made: No such file or directory"):
        asyncio.run(staged())


def connected_to(folder: Path) -> NoSuchGuest:
    with pytest.raises(NoSuchGuest) as caught:
        asyncio.run(audited(folder))
    return caught.value


def test_no_such_guest_names_those_that_run(tmp_path: Path) -> None:
    error = connected_to(tmp_path / "run/demo")
    assert (error.message, error.exit_code) == ("no guest named demo is running", 7)
    assert error.hint == f"running in {tmp_path}/run: none"
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SOCKET).touch()
    assert connected_to(tmp_path / "demo").hint.endswith(": a, b")


def test_what_a_guest_left_behind_is_no_guest(tmp_path: Path) -> None:
    """A folder without a socket, a file in the place of the folder, a socket that nobody listens at, a plain file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / SOCKET).touch()
    (tmp_path / "stale").mkdir()
    with listening_socket(tmp_path / "stale" / SOCKET):
        for name in ("empty", "file", "plain", "stale"):
            assert connected_to(tmp_path / name).message == f"no guest named {name} is running"


# --- Status and stop, with the light client of the commands -----------------------------------------------------------


async def asked(folder: Path, method: str, **parameters: object) -> dict[str, Any]:
    """Ask from a thread, as the commands do, which have no event loop."""
    answers = await asyncio.to_thread(ask.ask, folder, method, parameters, DEADLINE_S)
    assert isinstance(answers, dict)
    return answers


def test_the_status_comes_as_it_is(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        assert (await asked(tmp_path, "Status"))["status"] == asdict(STATUS)

    play(tmp_path, scene)


@pytest.mark.parametrize("parameters", [{}, {"timeout_s": 0.5}, {"timeout_s": 2, "kill": True}])
def test_the_last_word_reaches_who_asked_to_stop_though_the_socket_ends(
    tmp_path: Path, parameters: dict[str, Any]
) -> None:
    async def staged() -> None:
        made = Made()
        async with asyncio.timeout(DEADLINE_S):
            async with control.serve(tmp_path, made.interface):
                stops = [asyncio.create_task(asked(tmp_path, "Stop", **parameters)) for _ in range(2)]
                await made.asked.wait()
                made.over.set()
            for answer in await asyncio.gather(*stops):
                assert IsolationReport.of(answer["report"]) == REPORT
        assert made.stops == [(parameters.get("timeout_s"), parameters.get("kill", False))] * 2

    asyncio.run(staged())


def test_a_stop_of_a_guest_that_never_ran_says_why(tmp_path: Path) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        made.error = QemuFailed("stopped before the guest ran", "launch it again")
        made.over.set()
        with pytest.raises(QemuFailed, match="stopped before the guest ran") as caught:
            await asked(tmp_path, "Stop")
        assert caught.value.hint == "launch it again"

    play(tmp_path, scene)


@pytest.mark.parametrize("timeout_s", [-1, 1e9, "x"])
def test_a_stop_with_no_sense_is_refused(tmp_path: Path, timeout_s: object) -> None:
    async def scene(made: Made, guest: Supervisor) -> None:
        with pytest.raises(QemuFailed):
            await asked(tmp_path, "Stop", timeout_s=timeout_s)
        assert made.stops == []

    play(tmp_path, scene)
