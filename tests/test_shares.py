"""Shares: what is asked of a daemon, and what is said of none. Nothing here needs virtiofsd."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from vmmback import shares, vhost_user
from vmmback.config.share import Share
from vmmback.errors import HostUnfit, UsageError
from vmmback.host import qemu

SHARE = Share(path=Path("/srv"), tag="t")
HEADER = struct.Struct("=III")


def serve(daemon: socket.socket, answers: Mapping[int, int]) -> list[tuple[int, int, bytes, list[int]]]:
    """Answer these requests with a number each, as a daemon does, until the other end closes; return all that came."""
    came = []
    with daemon:
        while True:
            header, rights, _, _ = daemon.recvmsg(HEADER.size, 64)
            if not header:
                break
            request, flags, length = HEADER.unpack(header)
            data = daemon.recv(length) if length else b""
            numbers = array.array("i", rights[0][2]) if rights else array.array("i")
            came.append((request, flags, data, [os.fstat(number).st_ino for number in numbers]))
            for number in numbers:
                os.close(number)
            if request in answers:
                daemon.sendall(HEADER.pack(request, 5, 8) + struct.pack("=Q", answers[request]))
            elif flags & 8:
                break
    return came


def give(answers: Mapping[int, int]) -> tuple[bool, list[tuple[int, int, bytes, list[int]]], int]:
    """Give a daemon with these answers memory of 8 MiB; return what was concluded, what it got, and the inode."""

    async def talk() -> tuple[bool, list[tuple[int, int, bytes, list[int]]], int]:
        ours, daemons = socket.socketpair()
        memory = os.memfd_create("vmmback-test")
        with ours:
            ours.setblocking(False)
            came = asyncio.get_running_loop().run_in_executor(None, serve, daemons, answers)
            try:
                taken = await vhost_user.give_memory(ours, memory, 8 << 20)
            finally:
                inode = os.fstat(memory).st_ino
                os.close(memory)
                ours.close()
                got = await came
            return taken, got, inode

    return asyncio.run(talk())


def test_a_daemon_that_maps_the_memory() -> None:
    taken, came, inode = give({1: 1 << 30, 15: 0b1001, 5: 0})
    assert taken
    assert [request for request, *_ in came] == [1, 15, 16, 3, 5]
    assert came[2][2] == struct.pack("=Q", 8)
    assert came[-1][1:] == (9, struct.pack("=IIQQQQ", 1, 0, 0, 8 << 20, 0, 0), [inode])


def test_a_daemon_that_says_that_it_cannot_map_it() -> None:
    assert not give({1: 1 << 30, 15: 0b1001, 5: 1})[0]


@pytest.mark.parametrize("answers", [{1: 1 << 30, 15: 0b1001}, {1: 1 << 30, 15: 0}])
def test_a_daemon_that_ends_instead_of_an_answer_or_cannot_give_one(answers: Mapping[int, int]) -> None:
    with pytest.raises(EOFError):
        give(answers)


def test_a_host_without_virtiofsd_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "_VIRTIOFSDS", (str(tmp_path / "virtiofsd"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostUnfit, match=r"\[\[share\]\] needs virtiofsd, which was not found") as caught:
        asyncio.run(shares.usable_program(SHARE, tmp_path, "secret", 1 << 20))
    assert "apt-get install" in caught.value.hint


def test_a_folder_that_virtiofsds_options_cannot_carry(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a comma or a backslash"):
        asyncio.run(shares.usable_program(SHARE, tmp_path / "a,b", "secret", 1 << 20))


def test_a_launcher_that_may_make_no_namespaces_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "_VIRTIOFSDS", ("/bin/true",))
    monkeypatch.setattr("vmmback.linux.procfs.has_capability", lambda _: False)
    with pytest.raises(HostUnfit, match=r"\[\[share\]\] t: .* without CAP_SYS_ADMIN") as caught:
        asyncio.run(shares.usable_program(Share(path=tmp_path, tag="t"), tmp_path, "ordinary", 4096))
    assert "run as root" in caught.value.hint
