"""qmp.sock on a real QEMU: nothing that can be asked of it yields or unprotects the guest's memory."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import Backing, LiveGuest, guest_file, prepared
from integration.qmp_sweep import ENDING, RAM, Needles, Plausible
from vmmback import jail, qmp_socket, tiny_guest
from vmmback.errors import CommandRefused
from vmmback.linux import procfs
from vmmback.qmp_commands import NEVER_ALLOWED
from vmmback.qmp_policy import Policy, is_known
from vmmback.qmp_socket import QmpSocket, serve


class Client:
    """A client of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.events: list[str] = []

    async def receive(self) -> Any:
        async with asyncio.timeout(20):
            line = await self.reader.readline()
        return json.loads(line) if line else None

    async def ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Return the answer to a command; events that come before it are kept."""
        self.writer.write(json.dumps({"execute": command, "arguments": arguments or {}, "id": command}).encode())
        while "event" in (answer := await self.receive() or {"id": command}):
            self.events.append(answer["event"])
        assert answer.pop("id") == command
        return answer


@asynccontextmanager
async def client_of(path: Path) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_unix_connection(path, limit=1 << 24))
    try:
        assert "QMP" in await client.receive()
        assert await client.ask("qmp_capabilities") == {"return": {}}
        yield client
    finally:
        client.writer.close()


Scene = Callable[[QmpSocket, Path], Coroutine[Any, Any, Any]]


def play(live: LiveGuest, folder: Path, scene: Scene, policy: Policy | None = None) -> None:
    """Serve qmp.sock for a guest while `scene` plays."""

    async def staged() -> None:
        path = folder / "qmp.sock"
        async with serve(path, live.guest.monitor, policy or Policy(), live.watcher.note) as served:
            await scene(served, path)

    live.run(staged())


@contextmanager
def guest_with_known_canary(folder: Path, backing: Backing = "secret") -> Iterator[tuple[LiveGuest, Needles]]:
    halves = tiny_guest.new_halves()
    with prepared(guest_file(folder, backing=backing, rom=tiny_guest.rom(halves))) as live:
        live.start()
        yield live, Needles(tiny_guest.canary(halves))


async def protection(live: LiveGuest) -> object:
    """Return all that keeps the guest's RAM as it is: its mappings with their flags, its backend's properties."""
    mappings = procfs.memory_mappings(procfs.smaps(live.pid), live.guest.ram[0].inode)
    execute = live.guest.monitor.execute
    properties: Any = await execute("qom-list", {"path": RAM})
    values = {}
    for name in sorted(entry["name"] for entry in properties):
        try:
            values[name] = await execute("qom-get", {"path": RAM, "property": name})
        except CommandRefused as error:  # some can be written only
            values[name] = error.desc
    objects: Any = await execute("qom-list", {"path": "/objects"})
    chardevs: Any = await execute("query-chardev")
    return (
        sorted((mapping.start, mapping.end, sorted(mapping.flags)) for mapping in mappings),
        values,
        sorted(entry["name"] for entry in objects),
        sorted(entry["label"] for entry in chardevs),
        await execute("query-memdev"),
    )


# --- Every command ----------------------------------------------------------------------------------------------------


def test_every_command_of_this_qemu_is_known(guest_paused: LiveGuest) -> None:
    commands: Any = guest_paused.run(guest_paused.guest.monitor.execute("query-commands"))
    names = {entry["name"] for entry in commands}
    assert len(names) > 150
    assert [name for name in names if not is_known(name) and not name.startswith("x-")] == []


@pytest.mark.usefixtures("needs_qemu")
@pytest.mark.parametrize("allow", [(), ("*",)], ids=["default", "all-that-may-be-allowed"])
def test_no_command_yields_memory_or_changes_a_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow: tuple[str, ...]
) -> None:
    monkeypatch.setattr(qmp_socket, "MESSAGES_PER_S", float("inf"))
    monkeypatch.setattr(qmp_socket, "REST_FACTOR", 0.0)
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.chdir(files)  # QEMU's folder, too
    with guest_with_known_canary(tmp_path) as (live, needles):

        async def scene(served: QmpSocket, path: Path) -> None:
            schema: Any = await live.guest.monitor.execute("query-qmp-schema")
            commands: Any = await live.guest.monitor.execute("query-commands")
            plausible = Plausible(schema, files)
            before = await protection(live)
            passed, sent = set(), 0
            async with client_of(path) as client:
                for command in sorted({entry["name"] for entry in commands} - {*ENDING, "qmp_capabilities"}):
                    for arguments in plausible.of(command):
                        answer = await client.ask(command, arguments)
                        sent += 1
                        assert not needles.in_text(json.dumps(answer, ensure_ascii=False)), (command, arguments)
                        if "return" in answer:
                            passed.add(command)
                        if command in NEVER_ALLOWED or command.startswith("x-"):
                            assert "has been disabled: it " in answer["error"]["desc"]
            assert await protection(live) == before
            assert {"query-status", "query-block", "query-qmp-schema", "qom-list", "stop", "cont"} <= passed
            assert ("qom-list-types" in passed) == bool(allow)
            assert passed.isdisjoint(NEVER_ALLOWED)
            assert sent > 600
            assert sum(served.denials.values()) > 300
            assert live.guest.qemu.status is None

        play(live, tmp_path, scene, Policy(allow))
    assert needles.in_files(tmp_path) == []
    assert list(files.iterdir()) == []  # no command made any


async def over_the_full_connection(live: LiveGuest, plausible: Plausible, command: str) -> list[str]:
    """Send what the sweep sends for a command, but to QEMU itself."""
    answers = []
    for arguments in plausible.of(command):
        try:
            answers.append(json.dumps(await live.guest.monitor.execute(command, arguments), ensure_ascii=False))
        except CommandRefused as error:
            answers.append(error.desc)
    return answers


@pytest.mark.usefixtures("needs_qemu")
def test_the_same_over_the_full_connection_leaks_and_unprotects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backing: Backing
) -> None:
    """The control: the arguments would do it and the search would find it, on secret RAM as on ordinary.

    QEMU's jail, where no file can be written, is left out: it is the policy that is tried here.
    """
    monkeypatch.setattr(jail, "missing_rights", lambda: ["CAP_SYS_ADMIN"])
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.chdir(files)
    with guest_with_known_canary(tmp_path, backing) as (live, needles):

        async def control() -> None:
            schema: Any = await live.guest.monitor.execute("query-qmp-schema")
            for command in ("memsave", "pmemsave", "dump-guest-memory"):
                folder = files / command
                folder.mkdir()
                await over_the_full_connection(live, Plausible(schema, folder), command)
                assert needles.in_files(folder), command
            before = await protection(live)
            assert "'dd'" in str(before)
            answers = await over_the_full_connection(live, Plausible(schema, files), "human-monitor-command")
            assert any(needles.in_text(answer) for answer in answers)
            assert await protection(live) == before
            for command in ("qom-set", "object-add", "chardev-add"):
                before = await protection(live)
                await over_the_full_connection(live, Plausible(schema, files), command)
                assert await protection(live) != before, command
            mappings = procfs.memory_mappings(procfs.smaps(live.pid), live.guest.ram[0].inode)
            assert not any("dd" in mapping.flags for mapping in mappings)  # qom-set took it off

        live.run(control())


@pytest.mark.parametrize("command", ["quit", "system_reset"])
def test_what_ends_the_guest_is_answered_and_its_last_event_is_heard(
    tmp_path: Path, guest_running: LiveGuest, command: str
) -> None:
    async def scene(_: QmpSocket, path: Path) -> None:
        async with client_of(path) as asks, client_of(path) as watches:
            assert await asks.ask(command) == {"return": {}}
            assert (await watches.receive())["event"] == "SHUTDOWN"
            assert await watches.receive() is None
            while await asks.receive():
                pass
            assert await guest_running.guest.qemu.ended(30) == 0
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_unix_connection(path)

    play(guest_running, tmp_path, scene)


def test_what_passes_never_breaks_the_connection_to_qemu(tmp_path: Path, guest_paused: LiveGuest) -> None:
    """QEMU answers what is no JSON to it without an id, and then its client gives up: it must never get there."""
    texts = ["\0", "ü😀", "\\", '"', "\x7f", "\u2028", "x" * 10_000, "%s%n", "\ufffd"]
    odd: list[dict[str, Any]] = [{"name": text} for text in texts]
    odd += [{"name": "a", "\0": 1}, {"ü" * 9: [[{}]]}, {"name": 1 << 63}, {"a": 1 << 80}, {"a": -1.5e300}, {"a": None}]
    odd += [{"a": [[[[[[[[[[{}]]]]]]]]]]}]

    async def scene(_: QmpSocket, path: Path) -> None:
        async with client_of(path) as client:
            for arguments in odd:  # announce-self may have any arguments here, so they get as far as QEMU
                assert (await client.ask("announce-self", arguments))["error"]["class"] == "GenericError"
            for text in ("\ud800", "\uffff", "\ufdd0"):  # which QEMU takes for no JSON
                client.writer.write(json.dumps({"execute": "announce-self", "arguments": {"a": text}}).encode())
                assert (await client.receive())["error"]["desc"].startswith("JSON parse error")
            assert (await client.ask("query-status"))["return"]["running"] is False

    play(guest_paused, tmp_path, scene, Policy(["announce-self"]))


# --- Clients ----------------------------------------------------------------------------------------------------------


def test_events_go_to_all_and_a_pause_can_be_held(tmp_path: Path, guest_running: LiveGuest) -> None:
    policy = Policy()

    async def scene(served: QmpSocket, path: Path) -> None:
        async with client_of(path) as asks, client_of(path) as watches:
            for command, event in (("stop", "STOP"), ("cont", "RESUME")):
                assert await asks.ask(command) == {"return": {}}
                assert (await watches.receive())["event"] == event
            policy.deny("cont", "the guest is no longer isolated")
            await guest_running.guest.monitor.execute("stop")
            assert "no longer isolated" in (await asks.ask("cont"))["error"]["desc"]
            assert (await asks.ask("query-status"))["return"]["status"] == "paused"
            served.broadcast({"event": "__org.vmmback_DRIFT", "data": {"reason": "test"}})
            heard = [await watches.receive() for _ in range(2)]
            assert [event["event"] for event in heard] == ["STOP", "__org.vmmback_DRIFT"]

    play(guest_running, tmp_path, scene, policy)
    assert guest_running.watcher.notes == ["qmp.sock: Command cont is denied for now: the guest is no longer isolated"]


def test_clients_that_hang_up_do_not_break_the_monitor(tmp_path: Path, guest_running: LiveGuest) -> None:
    async def scene(_: QmpSocket, path: Path) -> None:
        for number in range(100):
            with socket.socket(socket.AF_UNIX) as rude:
                rude.connect(str(path))
                rude.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-qmp-schema"}{"execute":' * (number % 3))
            await asyncio.sleep(0)
        async with client_of(path) as client:
            assert (await client.ask("query-status"))["return"]["running"] is True
        assert await guest_running.guest.monitor.version()

    play(guest_running, tmp_path, scene)


def test_qmp_shell_works_on_it(tmp_path: Path, guest_running: LiveGuest) -> None:
    lines = [
        "query-status",
        "stop",
        "query-status",
        "cont",
        "memsave val=0 size=4096 filename=/dev/null",
        "made-up",
        "",
    ]

    async def shell(path: Path, *options: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", *options, str(path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "HOME": str(tmp_path)},  # where it keeps its history
        )
        async with asyncio.timeout(30):
            stdout, stderr = await process.communicate("\n".join(lines).encode() + b"\n")
        return process.returncode, stdout.decode(), stderr.decode()

    async def scene(_: QmpSocket, path: Path) -> None:
        for options in ((), ("-v", "-p")):
            code, stdout, stderr = await shell(path, *options)
            assert (code, stderr) == (0, "")
            assert "Connected to QEMU " in stdout
            said = " ".join(stdout.split())
            assert said.count('"status": "running"') == 1
            assert said.count('"status": "paused"') == 1
            assert "Command memsave has been disabled: it copies guest memory into a file" in said
            assert "Command made-up has been disabled: vmmback does not know it" in said
            assert "'event': 'STOP'" in said
            assert "'event': 'RESUME'" in said
            assert ('"execute": "stop"' in said) == ("-v" in options)

    play(guest_running, tmp_path, scene)


# Clients that flood, in a process of their own: they write what they are told, over and over, and read or do not; and
# others connect and hang up.
FLOOD = """
import json, selectors, socket, sys
path, *floods = sys.argv[1:]
selector = selectors.DefaultSelector()
for flood in floods:
    piece, times, reads = json.loads(flood)
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.sendall(b'{"execute":"qmp_capabilities"}')
    client.setblocking(False)
    events = selectors.EVENT_WRITE | (selectors.EVENT_READ if reads else 0)
    selector.register(client, events, piece.encode() * times)
print("ready", flush=True)
while True:
    with socket.socket(socket.AF_UNIX) as one_more:
        one_more.setblocking(False)
        one_more.connect_ex(path)
    for key, events in selector.select(0.001):
        try:
            if events & selectors.EVENT_READ and not key.fileobj.recv(1 << 16):
                selector.unregister(key.fileobj)
            elif events & selectors.EVENT_WRITE:
                key.fileobj.send(key.data)
        except BlockingIOError:
            pass
        except OSError:
            selector.unregister(key.fileobj)
"""
FLOODS = [
    ('{"execute":"query-cpu-definitions"}', 100, True),  # 20 ms each in QEMU
    ('{"execute":"query-qmp-schema"}', 100, True),  # 40 ms each, and 200 KB
    ('{"execute":"query-qmp-schema"}', 100, False),
    ('{"execute":"query-rx-filter","arguments":{"name":"' + "x" * 16_000 + '"}}', 10, True),  # the longest message
    ('{"execute":"stop"}{"execute":"cont"}', 100, True),  # events for all
    ("{}", 30_000, True),
    ("[", 60_000, False),
    ('{"execute":"', 1, False),
]

# How long a quick command may take while all those flood: twenty times of what is seen, as other tests run beside it.
PATIENCE_S = {"client": 8.0, "supervisor": 1.0, "event loop": 0.5}


@asynccontextmanager
async def flooded(path: Path) -> AsyncIterator[None]:
    """Let clients flood the socket, and ten more connect and say nothing."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FLOOD, str(path), *(json.dumps(flood) for flood in FLOODS)),
        stdout=asyncio.subprocess.PIPE,
    )
    silent = [await asyncio.open_unix_connection(path) for _ in range(10)]
    try:
        assert process.stdout
        assert await process.stdout.readline() == b"ready\n"
        yield
        assert process.returncode is None
    finally:
        for _, writer in silent:
            writer.transport.abort()
        process.kill()
        await process.communicate()


def test_clients_that_behave_badly_hold_up_nobody(tmp_path: Path, guest_paused: LiveGuest) -> None:
    """Not another client, not the supervisor, and not the guest, which boots and fills its RAM meanwhile."""
    qemu_monitor, ready = guest_paused.guest.monitor, guest_paused.guest.console.ready

    async def scene(_: QmpSocket, path: Path) -> None:
        delays: dict[str, list[float]] = {"client": [], "supervisor": [], "event loop": []}
        async with client_of(path) as client, flooded(path):
            started = time.monotonic()
            booted_after = 0.0
            await qemu_monitor.cont()
            while not booted_after or len(delays["client"]) < 20:
                assert time.monotonic() - started < 60
                for who, ask in (
                    ("client", lambda: client.ask("query-name")),
                    ("supervisor", lambda: qemu_monitor.execute("query-name")),
                    ("event loop", lambda: asyncio.sleep(0)),
                ):
                    asked = time.monotonic()
                    await ask()
                    delays[who].append(time.monotonic() - asked)
                if ready.is_set() and not booted_after:
                    booted_after = time.monotonic() - started
        assert {who: slowest for who, times in delays.items() if (slowest := max(times)) > PATIENCE_S[who]} == {}

    play(guest_paused, tmp_path, scene)
