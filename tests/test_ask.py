"""Asking supervisors without an event loop: many at once, and those that hang or answer nonsense."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vmmback import cli
from vmmback.ask import ask, ask_all, folder_of
from vmmback.errors import NoSuchGuest, QemuFailed, VmmbackError
from vmmback.runtime import CONTROL_SOCKET, guest_folder, listening_socket

ANSWER = b'{"parameters":{"status":{"name":"a"}}}\0'


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def supervisor(stack: ExitStack, folder: Path, *parts: bytes) -> Path:
    """Answer the first call at a guest's socket with these packets, then close; without any, say nothing."""
    folder.mkdir()
    listening = stack.enter_context(listening_socket(folder / CONTROL_SOCKET))
    listening.listen(1)
    if parts:
        thread = threading.Thread(target=answer, args=(listening, parts))
        thread.start()
        stack.callback(thread.join)
    return folder


def answer(listening: socket.socket, parts: tuple[bytes, ...]) -> None:
    connection, _ = listening.accept()
    with connection:
        assert connection.recv(4096) == b'{"method": "org.vmmback.Guest.Status", "parameters": {}}\0'
        for part in parts:
            connection.sendall(part)


def test_an_answer_in_pieces(tmp_path: Path, stack: ExitStack) -> None:
    folder = supervisor(stack, tmp_path / "a", ANSWER[:5], ANSWER[5:])
    assert ask(folder, "Status", {}, 5) == {"status": {"name": "a"}}


def test_those_that_hang_or_are_gone_hold_up_nobody(tmp_path: Path, stack: ExitStack) -> None:
    well = [supervisor(stack, tmp_path / f"well{number}", ANSWER) for number in range(20)]
    hangs = supervisor(stack, tmp_path / "hangs")
    (tmp_path / "starts").mkdir()
    started = time.monotonic()
    answers = ask_all([hangs, tmp_path / "starts", *well], "Status", {}, 1.0)
    assert time.monotonic() - started < 20
    assert answers[2:] == [{"status": {"name": "a"}}] * 20
    silent, early = answers[:2]
    assert isinstance(silent, VmmbackError)
    assert silent.message == "the supervisor of hangs did not answer within 1 s"
    assert isinstance(early, VmmbackError)
    assert "has only begun, or is about to end" in early.message


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"", "the guest a ended meanwhile"),
        (b'{"parameters":', "the guest a ended meanwhile"),
        (b"[]\0", "in a way not known here"),
        (b"\xff\0", "in a way not known here"),
        (b"[" * 100_000 + b"\0", "in a way not known here"),
        (b'{"parameters":[]}\0', "in a way not known here"),
        (ANSWER * 2, "in a way not known here"),
        (b'{"error":"org.varlink.service.MethodNotFound"}\0', "refused: org.varlink.service.MethodNotFound"),
        (b'{"error":"org.vmmback.Guest.Failed","parameters":{"message":"no","hint":"yes"}}\0', "^no$"),
        (b'{"error":"org.vmmback.Guest.Failed"}\0', "in a way not known here"),
    ],
)
def test_an_answer_of_another_kind_is_an_error(tmp_path: Path, stack: ExitStack, said: bytes, problem: str) -> None:
    folder = supervisor(stack, tmp_path / "a", said)
    with pytest.raises(QemuFailed, match=problem):
        ask(folder, "Status", {}, 5)


def test_only_live_guests_have_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with TemporaryDirectory(prefix="vmmback-", dir="/tmp") as runtime:
        monkeypatch.setenv("VMMBACK_RUNTIME_DIR", runtime)
        (Path(runtime) / "stale").mkdir(mode=0o700)
        with guest_folder("demo") as folder:
            assert folder_of("demo") == folder
            for name in ("stale", "..", "", "demo/", "/etc"):
                with pytest.raises(NoSuchGuest) as caught:
                    folder_of(name)
                assert caught.value.hint == f"running in {runtime}: demo"
        with pytest.raises(NoSuchGuest):
            folder_of("demo")


def test_ps_lists_a_guest_of_another_version_beside_the_others(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(stack.enter_context(TemporaryDirectory()))
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(base))
    for name, said in (("other", ANSWER), ("strange", b'{"parameters":{}}\0')):
        folder = stack.enter_context(guest_folder(name))
        listening = stack.enter_context(listening_socket(folder / CONTROL_SOCKET))
        listening.listen(2)
        for _ in range(2):
            threading.Thread(target=answer, args=(listening, (said,)), daemon=True).start()
    cli.commands.main(["ps"], standalone_mode=False)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "other    no answer  -    -       -       -",
        "strange  no answer  -    -       -       -",
    ]
    for name in ("other", "strange"):
        with pytest.raises(QemuFailed, match="in a way not known here"):
            cli.commands.main(["status", name], standalone_mode=False)
