"""The monitor: on a real QEMU, and on peers that are none."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from integration.conftest import LiveGuest, eventually
from vmmback import monitor
from vmmback.errors import CommandRefused, QemuFailed
from vmmback.host.qemu import find_qemu
from vmmback.linux import procfs
from vmmback.monitor import Monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}


def test_version_is_what_the_program_says_itself(guest_paused: LiveGuest) -> None:
    said = subprocess.run([find_qemu(), "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    version = guest_paused.run(guest_paused.guest.monitor.version())
    assert re.match(r"\d+\.\d+\.\d+( \(.+\))?$", version)
    assert f"version {version}" in said


def state(guest: LiveGuest) -> str:
    return str(guest.run(guest.guest.monitor.hmp("info status"))).strip()


def test_a_guest_runs_from_cont_on_and_not_before(guest_paused: LiveGuest) -> None:
    assert state(guest_paused) == "VM status: paused (prelaunch)"
    assert guest_paused.watcher.printed == b""
    guest_paused.run(guest_paused.guest.monitor.cont())
    assert state(guest_paused) == "VM status: running"


def test_a_line_of_the_human_monitor(guest_paused: LiveGuest) -> None:
    answer = guest_paused.run(guest_paused.guest.monitor.hmp("info ramblock"))
    assert "ram0" in answer
    assert "\r" not in answer
    assert "unknown command" in guest_paused.run(guest_paused.guest.monitor.hmp("no-such-command"))


def test_a_command_that_qemu_refuses(guest_paused: LiveGuest) -> None:
    with pytest.raises(QemuFailed, match=r"^QEMU refused no-such-command: .+"):
        guest_paused.run(guest_paused.guest.monitor.execute("no-such-command"))
    assert state(guest_paused) == "VM status: paused (prelaunch)"  # and goes on


def test_a_refusal_keeps_qemus_class_and_words(guest_paused: LiveGuest) -> None:
    for command, error_class, desc in (
        ("no-such-command", "CommandNotFound", "The command no-such-command has not been found"),
        ("query-balloon", "DeviceNotActive", "No balloon device has been activated"),
    ):
        with pytest.raises(CommandRefused, match=desc) as caught:
            guest_paused.run(guest_paused.guest.monitor.execute(command))
        assert (caught.value.error_class, caught.value.desc) == (error_class, desc)


def test_events_are_heard_in_their_order_up_to_qemus_end(guest_paused: LiveGuest) -> None:
    heard: list[str] = []

    async def lifetime() -> None:
        qemu_monitor = guest_paused.guest.monitor
        await qemu_monitor.cont()
        with qemu_monitor.listen(lambda event: heard.append(str(event["event"]))):
            await qemu_monitor.execute("stop")
            assert heard == ["STOP"]  # before the answer
            await qemu_monitor.cont()
            await qemu_monitor.quit()
            async with asyncio.timeout(10):
                await qemu_monitor.gone()
            # Nothing is kept: a guest that runs for a year has many events.
            assert [listener.history for listener in qemu_monitor._client._listeners] == [(), ()]
        assert heard == ["STOP", "RESUME", "SHUTDOWN"]

    guest_paused.run(lifetime())


def test_what_is_asked_first_is_done_first(guest_running: LiveGuest) -> None:
    """A stop of the supervisor comes after the cont of a client that was sent before it."""

    async def race() -> Any:
        qemu_monitor = guest_running.guest.monitor
        commands = ["cont", "stop"] * 20
        await asyncio.gather(*(qemu_monitor.execute(command) for command in commands))
        return await qemu_monitor.execute("query-status")

    assert guest_running.run(race())["status"] == "paused"


def test_powerdown_is_delivered_and_does_not_end_a_guest_that_ignores_it(guest_running: LiveGuest) -> None:
    guest_running.run(guest_running.guest.monitor.powerdown())
    assert state(guest_running) == "VM status: running"


def test_quit_ends_qemu(guest_running: LiveGuest) -> None:
    guest_running.run(guest_running.guest.monitor.quit())
    assert guest_running.run(guest_running.guest.qemu.ended(30)) == 0


def test_quit_of_a_qemu_that_is_gone_is_no_error(guest_paused: LiveGuest) -> None:
    guest_paused.run(guest_paused.guest.qemu.kill())
    guest_paused.run(guest_paused.guest.monitor.quit())


def freeze(guest: LiveGuest) -> None:
    os.kill(guest.pid, signal.SIGSTOP)
    eventually(lambda: procfs.status(guest.pid)["State"].startswith("T"), "QEMU is stopped")


def test_qemu_that_is_killed_in_the_middle_of_a_command(guest_paused: LiveGuest) -> None:
    async def killed() -> None:
        freeze(guest_paused)
        asking = asyncio.create_task(guest_paused.guest.monitor.version())
        done, _ = await asyncio.wait({asking}, timeout=0.1)
        assert not done
        os.kill(guest_paused.pid, signal.SIGKILL)
        await asking

    started = time.monotonic()
    with pytest.raises(QemuFailed, match="QEMU went away during query-version"):
        guest_paused.run(killed())
    assert time.monotonic() - started < 20


def test_a_command_after_its_end(guest_paused: LiveGuest) -> None:
    guest_paused.run(guest_paused.guest.qemu.kill())
    with pytest.raises(QemuFailed, match="QEMU went away during cont"):
        guest_paused.run(guest_paused.guest.monitor.cont())


def test_qemu_that_is_silent_meets_the_deadline(guest_paused: LiveGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_COMMAND_TIMEOUT_S", 0.2)
    freeze(guest_paused)
    with pytest.raises(QemuFailed, match=r"QEMU did not answer query-version within 0\.2 s"):
        guest_paused.run(guest_paused.guest.monitor.version())


# --- Peers that are no QEMU -------------------------------------------------------------------------------------------


def talk(peer: Callable[[socket.socket], Any], timeout_s: float = 0.2) -> str:
    """Connect to a peer of ours; return the version that it says it has."""

    async def connect() -> str:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            peer(theirs)
            async with monitor.connect(ours, timeout_s) as connected:
                assert isinstance(connected, Monitor)
                return await connected.version()

    return asyncio.run(connect())


def test_a_peer_that_never_greets() -> None:
    started = time.monotonic()
    with pytest.raises(QemuFailed, match=r"QEMU did not greet over QMP within 0\.2 s"):
        talk(lambda peer: None)
    assert time.monotonic() - started < 20


def test_a_peer_that_greets_but_never_answers() -> None:
    with pytest.raises(QemuFailed, match=r"QEMU did not greet over QMP within 0\.2 s"):
        talk(lambda peer: peer.sendall(json.dumps(GREETING).encode() + b"\n"))


@pytest.mark.parametrize(
    "garbage",
    [b"hello\n", b"{}\n", b'{"QMP": 1}\n', b"[]\n", b"\xff\xfe\n", b"{" * 100 + b"\n", b"\0" * 70000 + b"\n"],
    ids=["words", "empty", "number", "list", "no-utf8", "nested", "long"],
)
def test_a_peer_that_greets_with_garbage(garbage: bytes) -> None:
    with pytest.raises(QemuFailed, match="QEMU did not greet over QMP: "):
        talk(lambda peer: peer.sendall(garbage), timeout_s=30)


def test_a_peer_that_hangs_up() -> None:
    with pytest.raises(QemuFailed, match="QEMU did not greet over QMP: "):
        talk(socket.socket.close, timeout_s=30)
