"""Other processes at a guest's console: none holds up another, the guest or the supervisor, and nothing of it stays."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback import console_clients
from vmmback.console import attach
from vmmback.console_clients import MAX_CLIENTS, SCROLLBACK_BYTES, TYPED_BYTES, Clients, Scrollback
from vmmback.errors import QemuFailed, UsageError
from vmmback.guest import SilentWatcher

DEADLINE_S = 20


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 16))
def test_the_scrollback_is_the_end_of_what_came(chunks: list[bytes], size: int) -> None:
    scrollback, came = Scrollback(size), b""
    for chunk in chunks:
        scrollback.feed(chunk)
        came += chunk
        assert (scrollback.start, scrollback.end) == (max(0, len(came) - size), len(came))
        for start in range(scrollback.start, scrollback.end + 1):
            got, position = b"", start
            while piece := bytes(scrollback.piece(position)):
                got += piece
                position += len(piece)
            assert got == came[start:]


class Stage:
    """Clients of a guest that is made up, and its end of the line."""

    def __init__(self, clients: Clients, guest: socket.socket) -> None:
        self.clients = clients
        self.guest = guest

    def client(self, *, scrollback: bool = True) -> socket.socket:
        connection = socket.socket(fileno=self.clients.attach(scrollback=scrollback))
        connection.setblocking(False)
        return connection


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    ours, guest = socket.socketpair()
    with ours, guest:
        ours.setblocking(False)
        guest.setblocking(False)
        clients = Clients(ours)
        try:
            yield Stage(clients, guest)
        finally:
            clients.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def play(scene: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), staged() as stage:
            await scene(stage)

    before = open_descriptors()
    asyncio.run(run())
    assert open_descriptors() == before


async def until(happens: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not happens():  # noqa: ASYNC110
                await asyncio.sleep(0)
    except TimeoutError:
        pytest.fail(f"waited in vain until {what}")


async def received(connection: socket.socket, size: int) -> bytes:
    """Receive exactly so many bytes."""
    loop, got = asyncio.get_running_loop(), b""
    while len(got) < size:
        got += (more := await loop.sock_recv(connection, size - len(got)))
        assert more, f"it ended after {got!r}"
    return got


def fill(connection: socket.socket, byte: bytes) -> int:
    """Send until nothing more is taken; return how much was."""
    sent = 0
    try:
        while True:
            sent += connection.send(byte * 65536)
    except BlockingIOError:
        return sent


def test_bytes_go_both_ways_and_the_scrollback_comes_first() -> None:
    async def scene(stage: Stage) -> None:
        stage.clients.feed(b"before\r\n")
        with stage.client() as first, stage.client(scrollback=False) as second:
            stage.clients.feed(b"after\x00\xff")
            assert await received(first, 15) == b"before\r\nafter\x00\xff"
            assert await received(second, 7) == b"after\x00\xff"
            first.send(b"un")
            assert await received(stage.guest, 2) == b"un"
            second.send(b"ame\r")
            assert await received(stage.guest, 4) == b"ame\r"
        assert stage.clients.bytes_typed == 6

    play(scene)


def test_a_client_that_does_not_read_holds_up_nobody_and_is_told_what_it_missed() -> None:
    async def scene(stage: Stage) -> None:
        printed = 0
        with stage.client() as slow, stage.client() as quick:
            for number in range(100):
                stage.clients.feed(bytes([number]) * 65536)
                printed += 65536
                assert await received(quick, 65536) == bytes([number]) * 65536
            got = b""
            while not got.endswith(bytes([99]) * 65536):
                got += await asyncio.get_running_loop().sock_recv(slow, 1 << 20)
            before, _, rest = got.partition(b"\r\n[vmmback: ")
            missed, told, after = rest.partition(b" bytes are left out: they were not read in time]\r\n")
            assert told
            assert len(before) + int(missed) + len(after) == printed
            assert int(missed) > printed // 2
            assert len(after) == SCROLLBACK_BYTES

    play(scene)


def test_what_is_typed_to_a_guest_that_does_not_read_waits_in_the_clients_own_socket() -> None:
    async def scene(stage: Stage) -> None:
        with stage.client() as client, stage.client() as other:
            in_its_way = fill(stage.clients._guest, b"-")
            typed = fill(client, b"x")
            await until(lambda: len(stage.clients._waiting) == 1, "what is typed waits for the guest")
            typed += fill(client, b"x")
            assert typed <= fill_of_a_pair() + TYPED_BYTES
            other.send(b"y")
            await until(lambda: len(stage.clients._waiting) == 2, "the other waits too")
            stage.clients.feed(b"the guest prints on")
            assert await received(client, 19) == await received(other, 19) == b"the guest prints on"
            got = await received(stage.guest, in_its_way + typed + 1)
            assert got.count(b"x") == typed
            assert got.index(b"y") <= in_its_way + 2 * TYPED_BYTES  # each has its turn
            client.send(b"z")
            assert await received(stage.guest, 1) == b"z"
            assert stage.clients.bytes_typed == typed + 2

    play(scene)


def fill_of_a_pair() -> int:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        return fill(one, b"x")


@pytest.mark.parametrize("state", ["idle", "unread", "typed", "half-closed", "guest-reads-nothing"])
def test_of_a_client_that_is_gone_nothing_is_left(state: str) -> None:
    async def scene(stage: Stage) -> None:
        descriptors = open_descriptors()
        client = stage.client()
        if state == "unread":
            stage.clients.feed(b"x" * SCROLLBACK_BYTES * 20)
        if state == "half-closed":
            client.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0)
            stage.clients.feed(b"still")
            assert await received(client, 5) == b"still"
        if state == "typed":
            client.send(b"poweroff\r" * 2000)
        if state == "guest-reads-nothing":
            fill(stage.clients._guest, b"-")
            fill(client, b"x")
            await until(lambda: bool(stage.clients._waiting), "what is typed waits for the guest")
        client.close()  # as the kernel does it for one that is killed
        await until(lambda: open_descriptors() == descriptors, "its descriptor is closed")
        assert stage.clients._clients == {}
        assert not stage.clients._waiting
        if state == "typed":
            assert await received(stage.guest, 18000) == b"poweroff\r" * 2000
        with stage.client() as another:
            stage.clients.feed(b"!")
            assert (await received(another, 1))[-1:] in {b"!", b"x", b"s"}

    play(scene)


def test_there_is_a_limit() -> None:
    async def scene(stage: Stage) -> None:
        all_clients = [stage.client() for _ in range(MAX_CLIENTS)]
        with pytest.raises(UsageError, match="16 clients"):
            stage.client()
        for client in all_clients:
            client.close()
        await until(lambda: not stage.clients._clients, "all are gone")
        stage.client().close()

    play(scene)


def ended(connection: socket.socket) -> tuple[bytes, int]:
    """Read to the end; return the bytes, and how many descriptors came with the last of them."""
    connection.settimeout(DEADLINE_S)
    got, numbers = b"", array.array("i")
    while True:
        data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(16))
        if not data:
            return got, len(numbers)
        got += data
        numbers = array.array("i", b"".join(payload for _, _, payload in ancillary))
        for number in numbers:
            os.close(number)


def test_the_guests_end_is_told_apart_from_all_that_it_can_print() -> None:
    async def scene(stage: Stage) -> None:
        with stage.client() as client:
            stage.clients.feed(b"last words\0")
            await stage.clients.end()
            assert ended(client) == (b"last words\0\0", 1)
        with pytest.raises(QemuFailed):
            stage.client()

    play(scene)


def test_who_does_not_read_the_last_words_holds_up_the_end_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_clients, "CLOSE_TIMEOUT_S", 0.05)

    async def scene(stage: Stage) -> None:
        with stage.client() as slow, stage.client() as quick:
            for _ in range(10):
                stage.clients.feed(b"x" * SCROLLBACK_BYTES)
                await received(quick, SCROLLBACK_BYTES)
            await stage.clients.end()
            assert ended(quick) == (b"\0", 1)
            assert ended(slow)[1] == 0  # not all of it came, and so no end of the guest

    play(scene)


def test_the_last_words_wait_for_a_client_that_reads_them() -> None:
    async def scene(stage: Stage) -> None:
        with stage.client() as client:
            for _ in range(4):  # more than a socket holds
                stage.clients.feed(b"x" * SCROLLBACK_BYTES)
            reading = asyncio.create_task(asyncio.to_thread(ended, client))
            await stage.clients.end()
            got, descriptors = await reading
            assert (len(got), descriptors) == (4 * SCROLLBACK_BYTES + 1, 1)

    play(scene)


def test_nothing_of_what_was_printed_or_typed_is_kept() -> None:
    async def scene(stage: Stage) -> None:
        fill(stage.clients._guest, b"-")
        with stage.client() as client:
            stage.clients.feed(b"secret" * 1000)
            client.send(b"password")
            await until(lambda: bool(stage.clients._waiting), "it is typed")
            ring, (waiting,) = stage.clients._scrollback._ring, stage.clients._waiting
            assert b"secret" in ring
            assert waiting._typed.startswith(b"password")
            stage.clients.close()
            assert not any(ring)
            assert not any(waiting._typed)

    play(scene)


def test_a_console_has_clients_until_its_end() -> None:
    async def run() -> None:
        ours, guest = socket.socketpair()
        with ours, guest:
            async with asyncio.timeout(DEADLINE_S), attach(ours, [], SilentWatcher(), b"") as console:
                guest.send(b"login: ")
                await console.ready.wait()
                client = socket.socket(fileno=console.attach_client(scrollback=True))
                client.send(b"root\r")
                guest.setblocking(False)
                assert await received(guest, 5) == b"root\r"
                await until(lambda: console.bytes_typed == 5, "it is counted")
                guest.send(b"bye")
            with client:
                assert ended(client) == (b"login: bye\0", 1)

    asyncio.run(run())
