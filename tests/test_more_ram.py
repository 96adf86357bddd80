"""What is plugged in later: no more than there is room for, and given back once its QEMU has it no more."""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmmback.broker import more_ram
from vmmback.broker.more_ram import More

MIB = 1 << 20


class Broker(threading.Thread):
    """Answers each call with a new memfd and the next number, or with an error; keeps what it was asked."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.calls, self.refuses = path, list[dict[str, Any]](), False
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(path))
        self.listening.listen()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:  # it ends
                return
            with connection:
                call = json.loads(connection.recv(1 << 16)[:-1])
                self.calls.append(call)
                if self.refuses:
                    connection.sendall(b'{"error": "org.vmmback.Broker.Refused", "parameters": {}}\0')
                elif call["method"] == "org.vmmback.Broker.Make":
                    memory = os.memfd_create("lent")
                    os.ftruncate(memory, call["parameters"]["size"])
                    answer = {"parameters": {"lease": len(self.calls), "descriptor": 0, "frames": 1}}
                    socket.send_fds(connection, [json.dumps(answer).encode() + b"\0"], [memory, memory])
                    os.close(memory)
                else:
                    connection.sendall(b'{"parameters": {"ended": true}}\0')

    @property
    def released(self) -> list[int]:
        return [call["parameters"]["lease"] for call in self.calls if call["method"].endswith("Release")]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    answering = Broker(tmp_path / "broker")
    answering.start()
    yield answering
    answering.listening.shutdown(socket.SHUT_RDWR)
    answering.join(30)
    answering.listening.close()


def made(broker: Broker, room: int) -> More:
    """For this process, in QEMU's place."""
    return More(os.getpid(), str(broker.path), "domain one", room)


def test_there_is_no_more_than_room(broker: Broker) -> None:
    more = made(broker, 100 * MIB)
    with pytest.raises(OSError) as refused:
        more.of_size(101 * MIB)
    assert refused.value.errno == errno.ENOMEM
    assert broker.calls == []  # nobody was asked
    assert more.has_room()
    first = more.of_size(60 * MIB)
    with pytest.raises(OSError):
        more.of_size(60 * MIB)
    assert more.has_room()
    second = more.of_size(40 * MIB)
    assert not more.has_room()
    os.close(first)
    more.has_room()  # at one look QEMU may not have it yet
    assert more.has_room()
    os.close(second)
    assert not made(broker, 0).has_room()
    assert [call["parameters"] for call in broker.calls if call["method"].endswith("Make")] == [
        {"size": 60 * MIB, "purpose": "domain one"},
        {"size": 40 * MIB, "purpose": "domain one"},
    ]


def test_it_is_given_back_when_it_is_neither_mapped_nor_open(broker: Broker) -> None:
    more = made(broker, 100 * MIB)
    assert more.look_again_ms is None
    memory = more.of_size(MIB)
    assert more.look_again_ms is not None
    mapping = mmap.mmap(memory, MIB)
    os.close(memory)
    for _ in range(3):
        more.release_unplugged()
    assert broker.released == []  # it is mapped
    held = os.dup(more.of_size(2 * MIB))
    mapping.close()
    more.release_unplugged()
    assert broker.released == []  # at one look it may not be mapped yet
    more.release_unplugged()
    assert broker.released == [1]
    for _ in range(3):
        more.release_unplugged()
    assert broker.released == [1]  # the other is open
    os.close(held)


def test_what_the_broker_refuses_is_out_of_memory(broker: Broker) -> None:
    broker.refuses = True
    more = made(broker, 100 * MIB)
    with pytest.raises(OSError) as refused:
        more.of_size(MIB)
    assert refused.value.errno == errno.ENOMEM
    assert more.look_again_ms is None


def test_a_broker_that_is_gone_is_waited_for_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(more_ram, "_RESTART_S", 0.3)
    more = More(os.getpid(), str(tmp_path / "broker"), "domain one", MIB)
    with pytest.raises(OSError) as refused:
        more.of_size(MIB)
    assert refused.value.errno == errno.ENOMEM
    monkeypatch.setattr(more_ram, "_RESTART_S", 30.0)
    started: list[Broker] = []

    def start() -> None:
        started.append(Broker(tmp_path / "broker"))
        started[0].start()

    threading.Timer(0.3, start).start()
    os.close(more.of_size(MIB))
    started[0].listening.shutdown(socket.SHUT_RDWR)
    started[0].join(30)
    started[0].listening.close()
