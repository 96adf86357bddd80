"""qmp.sock with a monitor that is not QEMU's: clients of all kinds, and 100,000 messages that are none."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import stat
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmmback import qmp_socket
from vmmback.errors import CommandRefused, HostUnfit, QemuFailed
from vmmback.qmp_json import MAX_MESSAGE_BYTES
from vmmback.qmp_policy import Policy
from vmmback.qmp_socket import QmpSocket, serve

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "fake"}
NEGOTIATE = {"execute": "qmp_capabilities"}


class FakeMonitor:
    """Keeps what it is sent; answers with the command's name, or as `answers` says."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, object]] = []
        self.answers: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {}
        self.under_way = 0
        self.most_under_way = 0
        self.ended = asyncio.Event()
        self._receivers: list[Callable[[Mapping[str, object]], None]] = []

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        if command == "query-version":
            return VERSION
        self.sent.append((command, arguments))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(0)
            return await self.answers[command]() if command in self.answers else {"did": command}
        finally:
            self.under_way -= 1

    @contextmanager
    def listen(self, receive: Callable[[Mapping[str, object]], None]) -> Iterator[None]:
        self._receivers.append(receive)
        yield
        self._receivers.remove(receive)

    async def gone(self) -> None:
        await self.ended.wait()

    def event(self, name: str, **data: object) -> None:
        for receive in self._receivers:
            receive({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}})


class Client:
    """The other end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def connected(cls, path: Path, *, negotiate: bool = True) -> AsyncIterator[Client]:
        client = cls(*await asyncio.open_unix_connection(path, limit=1 << 24))
        try:
            assert await client.receive() == {"QMP": {"version": VERSION, "capabilities": []}}
            if negotiate:
                assert await client.ask(NEGOTIATE) == {"return": {}}
            yield client
        finally:
            client.writer.close()

    async def send(self, message: object) -> None:
        self.writer.write(message if isinstance(message, bytes) else json.dumps(message).encode())
        await self.writer.drain()

    async def receive(self) -> Any:
        async with asyncio.timeout(10):
            line = await self.reader.readline()
        return json.loads(line) if line else None

    async def ask(self, message: object) -> Any:
        await self.send(message)
        return await self.receive()


Scene = tuple[Path, FakeMonitor, QmpSocket, Policy, list[str]]


def play(folder: Path, scene: Callable[[Scene], Coroutine[Any, Any, None]], allow: tuple[str, ...] = ()) -> None:
    """Serve a socket on a fake monitor while `scene` plays; nothing may be left of it."""

    async def staged() -> None:
        path, monitor, policy, notes = folder / "qmp.sock", FakeMonitor(), Policy(allow), list[str]()
        mine = asyncio.all_tasks()
        async with serve(path, monitor, policy, notes.append) as served:
            await scene((path, monitor, served, policy, notes))
        assert not path.exists()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == mine

    before = os.listdir("/proc/self/fd")  # noqa: PTH208 (the listing's own descriptor is in both)
    asyncio.run(staged(), debug=False)
    gc.collect()
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


async def until(happens: Callable[[], bool], what: str) -> None:
    """Let others run until it happens."""
    try:
        async with asyncio.timeout(10):
            while not happens():  # noqa: ASYNC110 (whatever it is that happens)
                await asyncio.sleep(0.001)
    except TimeoutError:
        pytest.fail(f"waited in vain until {what}")


@pytest.fixture
def no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_socket, "MESSAGES_PER_S", float("inf"))


# --- One client -------------------------------------------------------------------------------------------------------


def test_the_socket_is_the_users_alone(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        status = scene[0].stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600

    play(tmp_path, scene)


def test_its_path_may_be_longer_than_an_address(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 120)
    folder.mkdir()

    async def scene(scene: Scene) -> None:
        assert stat.S_IMODE(scene[0].stat().st_mode) == 0o600
        (tmp_path / "short").symlink_to(folder)
        async with Client.connected(tmp_path / "short/qmp.sock"):
            pass

    play(folder, scene)


def test_a_socket_that_cannot_be_made(tmp_path: Path) -> None:
    async def scene(_: Scene) -> None:
        pytest.fail("it was made")

    with pytest.raises(HostUnfit, match=r"the socket .*/gone/qmp\.sock cannot be made: No such file or directory"):
        play(tmp_path / "gone", scene)
    (tmp_path / "qmp.sock").touch()
    with pytest.raises(HostUnfit, match="cannot be made: Address already in use"):
        play(tmp_path, scene)
    assert (tmp_path / "qmp.sock").exists()  # it is not ours


def test_negotiation(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        async with Client.connected(scene[0], negotiate=False) as client:
            early = await client.ask({"execute": "query-status", "id": 1})
            assert early == {
                "error": {
                    "class": "CommandNotFound",
                    "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
                },
                "id": 1,
            }
            for arguments in ({"enable": ["oob"]}, {"enable": 1}, {"x": 1}):
                refused = await client.ask({**NEGOTIATE, "arguments": arguments})
                assert refused["error"]["class"] == "GenericError"
            assert await client.ask({**NEGOTIATE, "arguments": {"enable": []}, "id": None}) == {
                "return": {},
                "id": None,
            }
            again = await client.ask(NEGOTIATE)
            assert again["error"]["class"] == "CommandNotFound"
            assert await client.ask({"execute": "query-status"}) == {"return": {"did": "query-status"}}
        assert scene[1].sent == [("query-status", {})]

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("message", "desc"),
    [
        ({}, "QMP input lacks member 'execute'"),
        ({"execute": 1}, "QMP input member 'execute' must be a string"),
        ({"execute": "stop", "arguments": []}, "QMP input member 'arguments' must be an object"),
        ({"execute": "stop", "arguments": None}, "QMP input member 'arguments' must be an object"),
        ({"execute": "stop", "control": {}}, "QMP input member 'control' is unexpected"),
        ({"exec-oob": "stop"}, "QMP input member 'exec-oob' is unexpected"),
        ({"execute": "stop", "exec-oob": "memsave"}, "QMP input member 'exec-oob' is unexpected"),
        ([], "QMP input must be a JSON object"),
        ([{"execute": "stop"}], "QMP input must be a JSON object"),
    ],
)
def test_a_request_of_a_wrong_form(tmp_path: Path, message: object, desc: str) -> None:
    async def scene(scene: Scene) -> None:
        async with Client.connected(scene[0]) as client:
            expected: dict[str, object] = {"error": {"class": "GenericError", "desc": desc}}
            if isinstance(message, dict):
                message["id"] = expected["id"] = [1]
            assert await client.ask(message) == expected
        assert scene[1].sent == []

    play(tmp_path, scene)


def test_denials_are_errors_and_are_counted(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        path, monitor, served, policy, notes = scene
        async with Client.connected(path) as client:
            for number in range(2):
                answer = await client.ask({"execute": "memsave", "arguments": {"val": 0}, "id": number})
                assert answer == {
                    "error": {
                        "class": "CommandNotFound",
                        "desc": "Command memsave has been disabled: it copies guest memory into a file",
                    },
                    "id": number,
                }
            assert (await client.ask({"execute": "stop", "arguments": {"x": 1}}))["error"]["class"] == "GenericError"
            policy.deny("cont", "the guest is exposed")
            assert "the guest is exposed" in (await client.ask({"execute": "cont"}))["error"]["desc"]
            for number in range(50):
                await client.ask({"execute": f"made-up-{number}"})
        assert monitor.sent == []
        assert served.denials == {"memsave": 2, "stop": 1, "cont": 1, "(unknown)": 50}
        assert len(notes) == 4
        assert notes[0] == "qmp.sock: Command memsave has been disabled: it copies guest memory into a file"

    play(tmp_path, scene)


def test_qemus_own_errors_are_passed_on(tmp_path: Path) -> None:
    async def refuse() -> object:
        error = CommandRefused("QEMU refused it")
        error.error_class, error.desc = "DeviceNotActive", "No balloon device has been activated"
        raise error

    async def vanish() -> object:
        raise QemuFailed("QEMU went away during query-name")

    async def scene(scene: Scene) -> None:
        scene[1].answers = {"query-balloon": refuse, "query-name": vanish}
        async with Client.connected(scene[0]) as client:
            assert await client.ask({"execute": "query-balloon", "id": 5}) == {
                "error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"},
                "id": 5,
            }
            assert (await client.ask({"execute": "query-name"}))["error"] == {
                "class": "GenericError",
                "desc": "QEMU went away during query-name",
            }
            assert "return" in await client.ask({"execute": "query-status"})

    play(tmp_path, scene)


def test_qemu_gets_what_was_judged(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        async with Client.connected(scene[0]) as client:
            for twice in (
                b'{"execute":"stop","execute":"memsave"}',
                b'{"execute":"memsave","\\u0065xecute":"stop"}',
                b'{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","driver":"pc-dimm"}}',
            ):
                assert (await client.ask(twice))["error"]["desc"] == "JSON parse error, duplicate key"
            # A number that is no integer for QEMU is none for the policy.
            too_large = {"driver": "virtio-rng-pci", "port": 1 << 64}
            assert "error" in await client.ask({"execute": "device_add", "arguments": too_large})
        assert scene[1].sent == []

    play(tmp_path, scene, allow=("device_add",))


def test_a_client_that_closes_its_end_gets_its_answers_and_the_end(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        async with Client.connected(scene[0], negotiate=False) as client:
            await client.send(b'{"execute":"qmp_capabilities"}{"execute":"stop","id":1}\n{"execute":"quit"}{"half')
            client.writer.write_eof()
            answers = [await client.receive() for _ in range(4)]
            assert answers == [
                {"return": {}},
                {"return": {"did": "stop"}, "id": 1},
                {"return": {"did": "quit"}},
                None,
            ]

    play(tmp_path, scene)


# Whatever a client sends: one answer to each message, in its order, with its id.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(-1e9, 1e9) | st.text("aü\0{"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
requests = st.fixed_dictionaries(
    {"execute": st.sampled_from(["stop", "memsave", "query-block", "x-y", "qmp_capabilities"]) | json_values},
    optional={"arguments": json_values, "id": json_values, "x": json_values},
)


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(requests | json_values.filter(lambda value: isinstance(value, list)), max_size=12))
def test_each_message_gets_one_answer_with_its_id(tmp_path: Path, no_pace: None, sent: list[Any]) -> None:
    async def scene(scene: Scene) -> None:
        async with Client.connected(scene[0]) as client:
            await client.send("".join(json.dumps(message) for message in sent).encode())
            for message in sent:
                answer = await client.receive()
                assert ("return" in answer) != ("error" in answer)
                assert answer.get("id", "none") == (message.get("id", "none") if isinstance(message, dict) else "none")
            assert await client.ask({"execute": "stop", "id": "last"}) == {"return": {"did": "stop"}, "id": "last"}

    play(tmp_path, scene)


# --- Several clients --------------------------------------------------------------------------------------------------


def test_clients_have_their_own_ids_and_take_turns(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        async def one(number: int) -> None:
            async with Client.connected(scene[0]) as client:
                await client.send(b"".join(b'{"execute":"query-status","id":%d}' % i for i in range(20)))
                assert [(await client.receive())["id"] for _ in range(20)] == list(range(20)), number

        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(one(number))
        assert len(scene[1].sent) == 160
        assert scene[1].most_under_way == 1

    play(tmp_path, scene)


def test_events_go_to_all_who_negotiated(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        path, monitor, served, *_ = scene
        async with (
            Client.connected(path) as one,
            Client.connected(path) as two,
            Client.connected(path, negotiate=False) as none,
        ):
            monitor.event("STOP", x=1)
            served.broadcast({"event": "__org.example_DRIFT", "data": {}})
            for client in (one, two):
                assert await client.receive() == {
                    "event": "STOP",
                    "data": {"x": 1},
                    "timestamp": {"seconds": 1, "microseconds": 2},
                }
                ours = await client.receive()
                assert ours["event"] == "__org.example_DRIFT"
                assert ours["timestamp"]["seconds"] > 1_700_000_000
                assert 0 <= ours["timestamp"]["microseconds"] < 1_000_000
            assert await none.ask(NEGOTIATE) == {"return": {}}

    play(tmp_path, scene)


def test_a_client_that_hangs_up_during_a_command_disturbs_nobody(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        path, monitor, *_ = scene
        go = asyncio.Event()

        async def slow() -> object:
            await go.wait()
            return "slow"

        monitor.answers["query-block"] = slow
        async with Client.connected(path) as stays:
            async with Client.connected(path) as leaves:
                await leaves.send({"execute": "query-block"})
                await until(lambda: monitor.under_way == 1, "QEMU has the command")
                leaves.writer.transport.abort()
            await stays.send({"execute": "query-status"})
            go.set()
            assert await stays.receive() == {"return": {"did": "query-status"}}

    play(tmp_path, scene)


def test_what_is_denied_while_it_waits_for_its_turn_does_not_pass(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        path, monitor, _, policy, _ = scene
        go = asyncio.Event()

        async def slow() -> object:
            await go.wait()
            return "slow"

        monitor.answers["query-block"] = slow
        async with Client.connected(path) as first, Client.connected(path) as second:
            await first.send({"execute": "query-block"})
            await until(lambda: monitor.under_way == 1, "QEMU has the command")
            await second.send({"execute": "cont"})
            await asyncio.sleep(0.05)  # long enough for it to be read; were it not, the test would pass all the same
            policy.deny("cont", "the guest is exposed")
            go.set()
            assert "the guest is exposed" in (await second.receive())["error"]["desc"]
        assert monitor.sent == [("query-block", {})]

    play(tmp_path, scene)


def test_qemus_end_reaches_all(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        path, monitor, *_ = scene

        async def quit_() -> object:
            monitor.event("SHUTDOWN", guest=False)
            monitor.ended.set()
            for _ in range(20):  # QEMU's answer is the last thing that is seen of it
                await asyncio.sleep(0)
            return {}

        monitor.answers["quit"] = quit_
        async with Client.connected(path) as asks, Client.connected(path) as watches:
            await asks.send({"execute": "quit", "id": 1})
            assert [(await asks.receive()) for _ in range(3)][1:] == [{"return": {}, "id": 1}, None]
            assert (await watches.receive())["event"] == "SHUTDOWN"
            assert await watches.receive() is None
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_unix_connection(path)

    play(tmp_path, scene)


def test_the_end_does_not_wait_for_a_qemu_that_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_socket, "_CLOSE_TIMEOUT_S", 0.05)

    async def scene(scene: Scene) -> None:
        async def never() -> object:
            return await asyncio.get_running_loop().create_future()

        scene[1].answers["query-block"] = never
        client = Client(*await asyncio.open_unix_connection(scene[0]))
        await client.send(NEGOTIATE)
        await client.send({"execute": "query-block"})
        await until(lambda: scene[1].under_way == 1, "QEMU has the command")
        client.writer.close()

    play(tmp_path, scene)


# --- Clients that behave badly ----------------------------------------------------------------------------------------


def test_a_client_that_never_negotiates_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_socket, "NEGOTIATION_TIMEOUT_S", 0.5)

    async def scene(scene: Scene) -> None:
        async with Client.connected(scene[0]) as good, Client.connected(scene[0], negotiate=False) as half_open:
            await half_open.send(b'{"execute":')
            assert await half_open.receive() is None
            assert "return" in await good.ask({"execute": "query-status"})

    play(tmp_path, scene)


def test_one_client_too_many_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_socket, "MAX_CLIENTS", 2)

    async def scene(scene: Scene) -> None:
        async with Client.connected(scene[0]) as one, Client.connected(scene[0]):
            reader, writer = await asyncio.open_unix_connection(scene[0])
            assert await reader.read() == b""
            writer.close()
            assert "return" in await one.ask({"execute": "query-status"})
        await until(lambda: not scene[2]._clients, "the places are free")
        async with Client.connected(scene[0]):
            pass

    play(tmp_path, scene)


def test_a_client_that_does_not_read_is_cut_off_and_others_miss_nothing(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        path, monitor, served, *_ = scene
        event = "x" * 10_000
        async with Client.connected(path) as reads, Client.connected(path) as sleeps:
            sleeps.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for number in range(300):
                monitor.event(event, number=number)
                assert (await reads.receive())["data"] == {"number": number}
                unread = [client.writer.transport.get_write_buffer_size() for client in served._clients]
                assert sum(unread) <= qmp_socket.MAX_UNREAD_BYTES + 11_000
            await until(lambda: len(served._clients) == 1, "the one that does not read is cut off")
            assert "return" in await reads.ask({"execute": "query-status"})

    play(tmp_path, scene)


def test_a_client_that_asks_and_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_socket, "WRITE_TIMEOUT_S", 0.2)

    async def scene(scene: Scene) -> None:
        path, monitor, served, *_ = scene

        async def much() -> object:
            return "x" * 300_000

        monitor.answers["query-block"] = much
        async with Client.connected(path) as asks:
            asks.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asks.send(b'{"execute":"query-block"}' * 1000)
            await until(lambda: not served._clients, "it is cut off")
        assert len(monitor.sent) < 10

    play(tmp_path, scene)


def test_a_client_has_so_many_messages_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_socket, "MESSAGES_PER_S", 100.0)
    monkeypatch.setattr(qmp_socket, "MESSAGES_AT_ONCE", 10.0)

    async def scene(scene: Scene) -> None:
        async with Client.connected(scene[0]) as client:
            started = time.monotonic()
            await client.send(b"{}" * 60)
            for _ in range(60):
                assert "error" in await client.receive()
            assert time.monotonic() - started > 0.45

    play(tmp_path, scene)


def test_what_qemu_works_for_a_client_is_on_that_clients_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_socket, "MESSAGES_AT_ONCE", 1.0)

    async def scene(scene: Scene) -> None:
        path, monitor, *_ = scene
        ended: list[float] = []

        async def slow() -> object:
            await asyncio.sleep(0.1)
            ended.append(time.monotonic())
            return {}

        monitor.answers["query-block"] = slow
        async with Client.connected(path) as greedy, Client.connected(path) as other:
            await greedy.send(b'{"execute":"query-block"}' * 2)
            assert await greedy.receive() == {"return": {}}
            assert "return" in await other.ask({"execute": "query-status"})
            assert time.monotonic() - ended[0] > 0.1  # QEMU was left alone for as long as it had worked
            assert len(ended) == 1  # and then it was not the greedy one's turn
            assert await greedy.receive() == {"return": {}}
            assert ended[1] - ended[0] > 9 * 0.1

    play(tmp_path, scene)


def test_clients_that_flood_hold_up_no_other(tmp_path: Path) -> None:
    async def scene(scene: Scene) -> None:
        path = scene[0]

        async def flood(data: bytes) -> None:
            async with Client.connected(path) as client:
                while True:
                    await client.send(data)

        floods = [b'{"execute":"query-status"}' * 2000, b"{}" * 30_000, b"\xff" * 60_000, b'{"a":"' + b"x" * 60_000]
        tasks = [asyncio.create_task(flood(data)) for data in floods]
        async with Client.connected(path) as client:
            loop = asyncio.get_running_loop()
            delays = []
            for _ in range(40):
                await asyncio.sleep(0.01)
                started = loop.time()
                assert "return" in await client.ask({"execute": "query-name"})
                delays.append(loop.time() - started)
            assert sorted(delays)[len(delays) // 2] < 1
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    play(tmp_path, scene)


# --- 100,000 messages that are none -----------------------------------------------------------------------------------

MESSAGES, CLIENTS, BATCH = 100_000, 8, 250
GOOD = [
    b'{"execute":"query-status","arguments":{},"id":1}',
    b'{"execute":"memsave","arguments":{"val":0,"size":4096,"filename":"/tmp/x"},"id":"a"}',
    b'{"execute":"qom-get","arguments":{"path":"/machine/peripheral/a","property":"type"}}',
    b'{"execute":"device_add","arguments":{"driver":"virtio-blk-pci","id":{"a":[1,2.5e3,null,true]}}}',
    '{"execute":"human-monitor-command","arguments":{"command-line":"xp /1x 0"},"id":"\\u00fcü😀"}'.encode(),
]
PIECES = [b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"\\u", b"\\ud800", b"\xff", b"\0", b"\n", b"1e999", b"NaN"]
PIECES += [b"'", b"-", b"null", b"\xc3", b"\xf0\x9f", b'"execute"', b'"arguments"', b'"id"', b" " * 50, b"[" * 70]


def malformed(dice: random.Random) -> bytes:
    """Return something near a message, cut, flipped or filled up with what a parser may stumble upon."""
    data = bytearray(dice.choice(GOOD))
    kind = dice.random()
    if kind < 0.1:
        data = bytearray(dice.randbytes(dice.randint(0, 60)))
    elif kind < 0.2:
        data = bytearray(b"".join(dice.choices(PIECES, k=dice.randint(1, 12))))
    elif kind < 0.21:
        data = bytearray(dice.choice(PIECES) * dice.choice([1000, 3000]))
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(data))
        match dice.randint(0, 3):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = dice.choice(PIECES)
            case 2 if at < len(data):
                data[at] = dice.randint(0, 255)
            case _:
                del data[at : at + dice.randint(1, 8)]
    return bytes(data) + b"\xff"  # no message holds that byte: so none of these is whole, and the next one starts anew


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_hundred_thousand_malformed_messages(tmp_path: Path, no_pace: None) -> None:
    async def scene(scene: Scene) -> None:
        path, monitor, served, policy, notes = scene
        policy.deny("stop", "never sent here")
        resident: list[int] = []

        async def one(number: int) -> int:
            dice = random.Random(number)
            errors = 0
            async with Client.connected(path) as client:
                for batch in range(MESSAGES // CLIENTS // BATCH):
                    sent = [malformed(dice) for _ in range(BATCH)]
                    data = b"".join(sent) + b'\n{"execute":"query-name","id":"batch %d"}' % batch
                    reading = asyncio.create_task(self_answers(client, f"batch {batch}"))
                    while data:  # cut anywhere
                        size = dice.randint(1, 20_000)
                        await client.send(data[:size])
                        data = data[size:]
                    answered = await reading
                    assert answered >= len(sent)  # each ends in 0xff, which is an error wherever it stands
                    errors += answered
                    if not number:
                        resident.append(resident_bytes())
            return errors

        async def self_answers(client: Client, last: str) -> int:
            """Count the answers up to the one with that id."""
            count = 0
            while (answer := await client.receive()).get("id") != last:
                assert ("return" in answer) != ("error" in answer)
                count += 1
            return count

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number)) for number in range(CLIENTS)]
        assert sum(task.result() for task in tasks) >= MESSAGES
        # A piece that happened to be a whole message was judged like any other.
        assert all(policy.check(command, arguments) is None for command, arguments in monitor.sent)  # type: ignore[arg-type]
        assert {command for command, _ in monitor.sent} <= {"query-name", "query-status", "qom-get"}
        assert len(served.denials) < 20
        assert len(notes) == len(served.denials)
        warm = resident[len(resident) // 5]
        assert max(resident) - warm < 8 << 20, f"grew from {warm} to {max(resident)} bytes"
        await until(lambda: not served._clients and not served._tasks, "all have left")

    play(tmp_path, scene)
    assert MAX_MESSAGE_BYTES < 1 << 20
