"""What a guest prints: found in whatever pieces it comes, kept in logs, shown, and never an end to the guest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback import console
from vmmback.console import Console, attach
from vmmback.errors import UsageError

READY = b"GUEST READY"
FINGERPRINT = hashlib.sha256(b"canary").hexdigest()
HALVES = bytes(range(64)), bytes(range(64, 128))
HALVES_LINE = f"vmmback-canary halves:{HALVES[0].hex()}:{HALVES[1].hex()}\r\n".encode()
CANARY_LINE = f"vmmback-canary sha256:{FINGERPRINT}\r\n".encode()


class Seen:
    """A watcher that keeps what it is shown."""

    def __init__(self) -> None:
        self.data = b""
        self.notes: list[str] = []

    def console(self, data: bytes | memoryview) -> None:
        self.data += data

    def note(self, message: str) -> None:
        self.notes.append(message)


def fed(*chunks: bytes, ready: bytes = READY) -> Console:
    console = Console([], Seen(), ready)
    for chunk in chunks:
        console.feed(chunk)
    return console


def pieces(text: bytes) -> st.SearchStrategy[list[bytes]]:
    """Cut a text at any places."""

    def cut(places: list[int]) -> list[bytes]:
        bounds = [0, *sorted(places), len(text)]
        return [text[start:end] for start, end in pairwise(bounds)]

    return st.lists(st.integers(0, len(text)), max_size=8).map(cut)


@given(pieces(b"boot\r\n" + READY + b"\r\n"))
def test_the_ready_text_is_found_in_whatever_pieces_it_comes(chunks: list[bytes]) -> None:
    assert fed(*chunks).ready.is_set()


@given(pieces(b"\0" * 5000 + CANARY_LINE + b"\xff" * 5000))
def test_the_fingerprint_is_found_in_whatever_pieces_it_comes(chunks: list[bytes]) -> None:
    assert fed(*chunks).canary_fingerprint == FINGERPRINT


@given(pieces(b"\0" * 5000 + CANARY_LINE + HALVES_LINE + b"\xff" * 5000))
def test_the_halves_are_found_in_whatever_pieces_they_come(chunks: list[bytes]) -> None:
    assert fed(*chunks).canary_halves == HALVES


@pytest.mark.parametrize(
    "line",
    [
        b"",
        HALVES_LINE.replace(b"3f:", b":"),
        HALVES_LINE.replace(b"3f:", b"3f3f:"),
        HALVES_LINE.replace(b"7f\r", b"\r"),
        HALVES_LINE.replace(b"7f\r", b"7f7\r"),
        HALVES_LINE.replace(b"3f:", b"3f"),
        HALVES_LINE.replace(b"3f:", b"3F:"),
        HALVES_LINE.replace(b"halves", b"sha256"),
    ],
)
def test_what_is_no_pair_of_halves_is_not_taken_for_one(line: bytes) -> None:
    assert fed(line).canary_halves is None


def test_of_two_pairs_of_halves_the_last_one_counts() -> None:
    assert fed(HALVES_LINE.replace(b"00", b"01"), HALVES_LINE).canary_halves == HALVES


@pytest.mark.parametrize(
    ("chunks", "ready", "is_ready"),
    [
        ([], READY, False),
        ([b"GUEST\r\nREADY"], READY, False),
        ([b"GUEST REA"], READY, False),
        ([b"x" * 100_000, b"GUEST ", b"READY"], READY, True),
        ([b"GUEST ", b"x" * 10_000, b"READY"], READY, False),
        ([], b"", False),  # without a text, the first output is it
        ([b"\0"], b"", True),
    ],
)
def test_ready_is_set_by_the_text_alone(chunks: list[bytes], ready: bytes, is_ready: bool) -> None:
    console = fed(*chunks, ready=ready)
    assert console.ready.is_set() is is_ready
    assert console.bytes_seen == sum(map(len, chunks))


def test_a_long_ready_text_is_found_in_pieces() -> None:
    text = b"r" * 5000
    assert fed(text[:4500], text[4500:], ready=text).ready.is_set()


@pytest.mark.parametrize(
    "line",
    [
        b"vmmback-canary sha256:" + b"0" * 63,
        b"vmmback-canary sha256:" + b"0" * 65,
        b"vmmback-canary sha256:" + b"G" * 64,
        b"vmmback-canary: " + b"0" * 64,
    ],
)
def test_what_is_no_fingerprint_is_not_taken_for_one(line: bytes) -> None:
    assert fed(line + b"\n").canary_fingerprint is None


def test_a_log_that_fails_ends_with_a_note_and_all_else_goes_on() -> None:
    seen, whole = Seen(), BytesIO()
    with open("/dev/full", "wb", buffering=0) as full:  # every write to it is ENOSPC: full(4)
        console = Console([full, whole], seen, READY)
        console.feed(b"GUEST ")
        console.feed(b"READY\n")
    assert seen.notes == ["the console log /dev/full ends here: No space left on device"]
    assert seen.data == whole.getvalue() == b"GUEST READY\n"
    assert console.ready.is_set()


def attached(logs: list[Path], act: Callable[[socket.socket], None], *, until_ready: bool) -> tuple[Console, Seen]:
    """Attach a console, let the guest's end of its socket act, and leave once the guest is ready, or at once."""
    seen = Seen()

    async def run() -> Console:
        ours, guests = socket.socketpair()
        with ours, guests:
            async with attach(ours, logs, seen, READY) as console:
                act(guests)
                if until_ready:
                    async with asyncio.timeout(10):
                        await console.ready.wait()
            return console

    return asyncio.run(run()), seen


def test_what_the_guest_prints_goes_to_every_log_and_to_the_watcher(tmp_path: Path) -> None:
    logs = [tmp_path / "serial.log", tmp_path / "mine.log"]
    logs[0].write_bytes(b"an older guest's")
    console, seen = attached(logs, lambda guest: guest.sendall(b"\x1b[31m\xff GUEST READY"), until_ready=True)
    for log in logs:
        assert log.read_bytes() == seen.data == b"\x1b[31m\xff GUEST READY"
    assert console.bytes_seen == len(seen.data)


def test_what_is_there_at_the_end_is_read_still(tmp_path: Path) -> None:
    def die(guest: socket.socket) -> None:
        guest.sendall(b"last words" * 1000)
        guest.close()

    console, seen = attached([tmp_path / "log"], die, until_ready=False)
    assert seen.data == (tmp_path / "log").read_bytes() == b"last words" * 1000
    assert console.bytes_seen == 10_000


def test_a_log_that_cannot_be_made_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"console log .*/none/log cannot be written: No such file") as refused:
        attached([tmp_path / "fine.log", tmp_path / "none/log"], lambda _: None, until_ready=False)
    assert "[console] log" in refused.value.hint


@pytest.mark.parametrize("what", ["fifo", "link", "device"])
def test_a_log_that_is_no_regular_file_is_refused_and_nothing_is_lost(tmp_path: Path, what: str) -> None:
    """Nobody reads the FIFO: to open it as usual would wait for ever."""
    log, victim = tmp_path / "log", tmp_path / "victim"
    victim.write_text("precious")
    if what == "fifo":
        os.mkfifo(log)
    elif what == "link":
        log.symlink_to(victim)
    else:
        log = Path("/dev/null")
    with pytest.raises(UsageError, match="cannot be written"):
        console._open(log)
    assert victim.read_text() == "precious"


def test_a_log_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("of the last launch")
    console._open(tmp_path / "log").close()
    assert (tmp_path / "log").read_text() == ""


def test_of_two_fingerprints_the_last_one_counts() -> None:
    assert fed(b"vmmback-canary sha256:" + b"0" * 64 + b"\n" + CANARY_LINE).canary_fingerprint == FINGERPRINT


def test_nothing_of_what_was_printed_is_held_after_the_end() -> None:
    """Not in what the console keeps, not in what it reads into: the watcher keeps a view of that for this."""
    views: list[memoryview] = []
    seen = asyncio.Event()

    class Keeper(Seen):
        def console(self, data: bytes | memoryview) -> None:
            assert isinstance(data, memoryview)
            assert bytes(data) == b"a secret"
            views.append(data[:])
            seen.set()

    async def run() -> Console:
        ours, guests = socket.socketpair()
        with ours, guests:
            async with attach(ours, [], Keeper(), READY) as console, asyncio.timeout(10):
                guests.sendall(b"a secret")
                await seen.wait()
                assert b"secret" in console._recent
        return console

    console = asyncio.run(run())
    assert bytes(views[0]) == bytes(8)
    assert not any(console._recent)
