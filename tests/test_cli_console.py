"""What is typed at `vmmback console`: parted into what is the guest's and what is ours, and kept nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vmmback.cli.console import Keys, _Buffer


def test_a_standard_output_that_is_closed_is_refused_before_anything_gets_its_number() -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m vmmback console demo >&-"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard output is closed" in done.stderr


def parted(*chunks: bytes) -> tuple[bytes, list[str]]:
    keys, typed, commands = Keys(), b"", []
    for chunk in chunks:
        for part in keys.parted(memoryview(chunk)):
            if isinstance(part, str):
                commands.append(part)
            else:
                typed += bytes(part)
    return typed, commands


def test_keys_after_the_escape_are_ours() -> None:
    assert parted(b"ls\r") == (b"ls\r", [])
    assert parted(b"ls\r\x1dq") == (b"ls\r", ["q"])
    assert parted(b"a\x1d?b\x1d.c") == (b"abc", ["?", "."])
    assert parted(b"a\x1d\x1db") == (b"a\x1db", [])
    assert parted(b"a\x1d") == (b"a", [])
    assert parted(b"\xff\x1d\xe9\x00") == (b"\xff\x00", ["\xe9"])


@given(st.binary(), st.data())
def test_in_whatever_pieces_keys_come_they_are_the_same(typed: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(typed)))
    assert parted(typed[:at], typed[at:]) == parted(typed)


@given(st.binary(max_size=200))
def test_doubled_escapes_let_every_byte_through(wanted: bytes) -> None:
    assert parted(wanted.replace(b"\x1d", b"\x1d\x1d")) == (wanted, [])


def test_a_buffer_makes_room_of_what_has_gone() -> None:
    buffer = _Buffer()
    size = len(buffer.data)
    assert buffer.append(memoryview(b"a" * (size - 10) + b"0123456789"))
    assert not buffer.append(memoryview(b"x"))
    buffer.gone(size - 5)
    assert buffer.append(memoryview(b"b" * 20))
    with buffer.next() as part:
        assert bytes(part) == b"56789" + b"b" * 20


@given(st.lists(st.one_of(st.binary(max_size=9000), st.integers(0, 9000)), max_size=20))
def test_a_buffer_is_a_queue_that_keeps_nothing(steps: list[bytes | int]) -> None:
    buffer, expected = _Buffer(), b""
    for step in steps:
        if isinstance(step, bytes):
            if buffer.append(memoryview(step)):
                expected += step
            else:
                assert len(expected) + len(step) > len(buffer.data)
        else:
            with buffer.next(step) as part:
                assert bytes(part) == expected[:step]
                count = len(part)
            buffer.gone(count)
            expected = expected[count:]
        assert buffer.is_empty is not bool(expected)
    with buffer.next() as part:
        count = len(part)
    buffer.gone(count)
    assert not any(buffer.data)
