"""The broker and programs that are not vmmback: another Varlink client, nonsense, and many leases."""

from __future__ import annotations

import json
import os
import random
import re
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import varlink

from bench.soak import Use, leases, settled
from integration import test_broker
from integration.conftest import MIB, ROOT, TINY_BYTES, eventually
from integration.test_broker import Brokers, acquire, client, descriptors_of, filled, pool, stats
from vmmback.linux import procfs

pytestmark = pytest.mark.usefixtures("needs_secretmem")

brokers = test_broker.brokers


class PassedOn:
    """A connection for a client that knows nothing of descriptors: it keeps those that come with what is read."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.sendall = connection.sendall
        self.descriptors: list[int] = []

    def recv(self, size: int) -> bytes:
        data, descriptors, _, _ = socket.recv_fds(self._connection, size, 8)
        self.descriptors += descriptors
        return data

    def close(self) -> None:
        self._connection.close()


DOCUMENTED = {"org.vmmback.Broker": "docs/BROKER.md", "org.vmmback.Domains": "docs/LIBVIRT.md"}


def definitions(text: str) -> set[str]:
    """Return the definitions of an interface, without comments and whatever their order."""
    lines = re.sub(r"#.*", "", text).splitlines()
    return {line for line in lines if line}


def test_another_implementation_of_varlink_calls_it_and_finds_the_documented_interface(brokers: Brokers) -> None:
    brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    with varlink.Client.new_with_address(f"unix:{brokers.socket}") as foreign:
        with foreign.open("org.varlink.service") as service:
            info = service.GetInfo()
            assert info["interfaces"] == ["org.varlink.service", "org.vmmback.Broker", "org.vmmback.Domains"]
            described = {name: service.GetInterfaceDescription(name)["description"] for name in DOCUMENTED}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(brokers.socket))
            passed = PassedOn(connection)
            with foreign.open("org.vmmback.Broker", connection=passed) as broker:
                assert broker.Stats()["pool"] == [{"size": TINY_BYTES, "ready": 1, "wanted": 1}]
                answer = broker.Acquire(TINY_BYTES, "a test")
                memory, frames = (passed.descriptors[answer[name]] for name in ("descriptor", "frames"))
                assert str(Path(f"/proc/self/fd/{memory}").readlink()) == procfs.SECRETMEM
                assert os.fstat(frames).st_size == TINY_BYTES // 4096 * 8
                (lease,) = broker.List()["leases"]
                assert (lease["lease"], lease["pid"]) == (answer["lease"], os.getpid())
                with pytest.raises(varlink.VarlinkError) as refused:
                    broker.Acquire(7, "a test")
                assert refused.value.error() == "org.vmmback.Broker.Refused"
                assert broker.Release(answer["lease"]) == {"ended": True}
                for descriptor in passed.descriptors:
                    os.close(descriptor)
    for name, page in DOCUMENTED.items():
        documented = re.search(rf"```\n(interface {re.escape(name)}\n.*?)```", (ROOT / page).read_text(), re.S)
        assert documented is not None
        assert definitions(described[name]) == definitions(documented[1])


# --- Nonsense ---------------------------------------------------------------------------------------------------------

MESSAGES = 100_000
A_CONNECTION = 250
SIZE = 3 * MIB  # of which none is ready: what is still a valid call gets nothing either
CALLS: list[dict[str, Any]] = [
    {"method": "org.vmmback.Broker.Acquire", "parameters": {"size": SIZE, "purpose": "a guest"}},
    {"method": "org.vmmback.Broker.Release", "parameters": {"lease": 1 << 40}},
    {"method": "org.vmmback.Broker.List", "parameters": {}},
    {"method": "org.varlink.service.GetInterfaceDescription", "parameters": {"interface": "org.vmmback.Broker"}},
    {"method": "org.varlink.service.GetInfo", "parameters": {}},
]
ODD: list[object] = [
    None, True, False, 0, -1, 1 << 31, 1 << 63, 1 << 64, 1 << 200, -(1 << 70), 0.5, 1e308, "", "\0", "\ud800",
    "x" * 3000, [], {}, [[]], {"": {}}, ["org.vmmback.Broker"], "org.vmmback.Broker.Acquire",
    "org.vmmback.Broker._broker", "org.vmmback.Broker.__init__", ".", "..", "org.vmmback.Broker.", "__class__",
    [None] * 200,
]  # fmt: skip


def mutant(chance: random.Random) -> dict[str, Any]:
    """Return a call with one or two things changed, still a JSON object, and one that wants its answer."""
    call = deepcopy(chance.choice(CALLS))
    for _ in range(chance.randint(1, 2)):
        where = chance.choice([call, call.get("parameters")])
        if not isinstance(where, dict):
            continue
        key = chance.choice(
            [*where, "method", "parameters", "more", "upgrade", "size", "lease", "", "\ud800", "x" * 300]
        )
        change = chance.randrange(3)
        if change == 0:
            where.pop(key, None)
        elif change == 1 and isinstance(where.get(key), str):
            text = where[key]
            cut = chance.randrange(len(text) + 1)
            where[key] = (
                text[:cut] + chance.choice(["", "\0", ".", "\x7f", "é", text]) + text[cut + chance.randrange(3) :]
            )
        else:
            where[key] = deepcopy(chance.choice(ODD))
    return call


def breakers(chance: random.Random) -> Iterator[bytes]:
    """Yield, without an end, what is no call; the broker hangs up."""
    whole = json.dumps(CALLS[0]).encode()
    while True:
        yield chance.randbytes(chance.randrange(1, 3000)).replace(b"{", b"x") + b"\0"
        yield whole[: chance.randrange(1, len(whole) - 1)] + b"\0"
        yield b'{"method":' * 60_000
        yield b'{"x":' + b"[" * chance.randrange(1000, 60_000) + b"\0"
        yield b"9" * chance.randrange(1, 60_000) + b"\0"
        yield b'{"size":' + b"9" * 50_000 + b"}\0"
        yield b"\0" * chance.randrange(1, 5000)
        yield json.dumps(CALLS[0] | {"oneway": True}).encode() + b"\0"
        yield chance.choice([b"[]", b'"x"', b"7", b"null", b"\xff{}"]) + b"\0"
        yield b"x" * 600_000


def send_descriptors(connection: socket.socket) -> None:
    """Send some along with a call: the kernel refuses, or an older one lets them through, and the broker hangs up."""
    with suppress(PermissionError, ConnectionResetError):
        socket.send_fds(connection, [json.dumps(CALLS[0]).encode() + b"\0"], [0, 1, 2])
        assert connection.recv(1 << 16) == b""


def answered(connection: socket.socket, data: bytes) -> int:
    """Send, and take the answers; return how many came until the broker hung up."""
    connection.setblocking(False)
    left, answers = memoryview(data), 0
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLOUT)
    while True:
        ready = poll.poll(60_000)
        assert ready, "the broker neither answered nor hung up"
        if left:
            try:
                left = left[connection.send(left) :]
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                left = left[:0]
            if not left:
                poll.modify(connection, select.POLLIN)
        with suppress(BlockingIOError, ConnectionResetError):  # it hung up on what it had not read
            received = connection.recv(1 << 16)
            if not received:
                return answers
            answers += received.count(b"\0")


def test_nonsense_is_answered_or_hung_up_on_and_leaves_nothing(brokers: Brokers) -> None:
    with ExitStack() as stack:
        send_nonsense(brokers, stack)


def send_nonsense(brokers: Brokers, stack: ExitStack) -> None:
    broker = brokers.start(pool(MIB))
    eventually(filled, "the pool is filled", timeout_s=60)
    chance = random.Random(20)
    ends = breakers(chance)
    half_open = [stack.enter_context(client()) for _ in range(20)]
    for connection in half_open:
        connection.sendall(b'{"method": "org.vmmback.Broker.Acq')

    def connections(count: int) -> None:
        for number in range(count):
            calls = [mutant(chance) for _ in range(A_CONNECTION - 1)]
            data = b"".join(json.dumps(call).encode() + b"\0" for call in calls)
            with client() as connection:
                assert answered(connection, data + next(ends)) == len(calls)
            if number % 4 == 0:
                with client() as connection:
                    send_descriptors(connection)
            half_open[number % len(half_open)].sendall(b"x")  # slow ones

    connections(20)
    resident, descriptors = Use.of(broker.pid).resident, descriptors_of(broker.pid)
    connections(MESSAGES // A_CONNECTION - 20)
    for connection in half_open:
        connection.close()
    eventually(lambda: descriptors_of(broker.pid) <= descriptors - len(half_open), "all is closed", timeout_s=60)
    # Python's memory swings by 2 MiB, with what waits for a full collection; 40 bytes of each message would be as much.
    assert Use.of(broker.pid).resident - resident < 4 * MIB
    assert (stats()["lent"], stats()["leases"]) == (0, 0)
    assert (brokers.file.parent / "broker.log").read_text() == ""
    with client() as connection:
        os.close(acquire(connection, MIB)[1])
    assert broker.poll() is None


# --- Many leases ------------------------------------------------------------------------------------------------------


def test_many_leases_leave_nothing_in_the_broker(brokers: Brokers) -> None:
    """`./dev bench broker-soak` has 10,000 of them, and the pages of the host; each takes a prefault."""
    broker = brokers.start(pool(MIB, 4))
    leases(10, 0)
    before = settled(broker.pid, 4)
    leases(30, 0)
    after = settled(broker.pid, 4)
    assert after.descriptors <= before.descriptors + 4  # connections that are being closed
    assert after.resident - before.resident < MIB
