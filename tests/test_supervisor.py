"""A guest's life as it is told: to who watches, who asks, and who waits for its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.sample_reports import guest_report
from vmmback.config import GuestConfig
from vmmback.errors import HostUnfit, QemuFailed, VmmbackError
from vmmback.guest import SilentWatcher
from vmmback.lifecycle import State, Stop
from vmmback.supervisor import Life

CONFIG = GuestConfig.of(
    {"name": "demo", "memory": {"size": "16MiB"}, "boot": {"kernel": "vmlinuz"}, "console": {"log": "demo.log"}}
)
REPORT = guest_report()


class Recorder(SilentWatcher):
    def __init__(self) -> None:
        self.states: list[State] = []
        self.notes: list[str] = []

    def entered(self, state: State) -> None:
        self.states.append(state)

    def note(self, message: str) -> None:
        self.notes.append(message)


def play(scene: Callable[[Life, Stop, Recorder], Coroutine[Any, Any, None]], folder: Path) -> None:
    async def staged() -> None:
        stop, watcher = Stop(), Recorder()
        async with asyncio.timeout(20):
            await scene(Life(CONFIG, Path("/etc/demo.toml"), folder, watcher, stop), stop, watcher)

    asyncio.run(staged())


def test_a_guest_that_starts_says_how_far_it_is_and_cannot_be_examined(tmp_path: Path) -> None:
    async def scene(life: Life, stop: Stop, watcher: Recorder) -> None:
        with life:
            life.prefaulted(8 << 20, 16 << 20)
            status = life.status()
            assert (status.state, status.prefaulted_bytes, status.ram_bytes) == ("starting", 8 << 20, 16 << 20)
            assert (status.secret_bytes, status.verdict, status.qemu_pid) == (0, None, None)
            assert status.config_file == "/etc/demo.toml"
            for ask in (life.examine, life.frames):
                with pytest.raises(QemuFailed, match="the guest is starting"):
                    await ask()
            with pytest.raises(QemuFailed, match="the guest is starting"):
                life.canary_halves()

    play(scene, tmp_path)


def test_notes_and_states_go_to_the_watcher_and_to_the_log(tmp_path: Path) -> None:
    async def scene(life: Life, stop: Stop, watcher: Recorder) -> None:
        with life:
            life.note("said")
            life.entered(State.RUNNING)
            life.entered(State.RUNNING)
            life.ended(REPORT)
        assert watcher.states == [State.RUNNING, State.ENDED]
        assert watcher.notes == ["said"]
        lines = (tmp_path / "supervisor.log").read_text().splitlines()
        assert [line.partition(" ")[2] for line in lines] == ["said", "the guest is running", "the guest is ended"]

    play(scene, tmp_path)


def test_who_stops_it_gets_the_last_report_and_all_the_same(tmp_path: Path) -> None:
    async def scene(life: Life, stop: Stop, watcher: Recorder) -> None:
        with life:
            stops = [asyncio.create_task(life.stop(100, kill=False)) for _ in range(2)]
            await stop.asked(1)
            assert stop.patience_s == 100
            await asyncio.sleep(0)
            assert stop.times == 1  # the second is no further request
            life.ended(REPORT)
        assert await asyncio.gather(*stops) == [REPORT, REPORT]
        assert await life.stop(None, kill=True) == REPORT

    play(scene, tmp_path)


def test_the_shorter_patience_counts_and_kill_has_none(tmp_path: Path) -> None:
    async def scene(life: Life, stop: Stop, watcher: Recorder) -> None:
        with life:
            patient = asyncio.create_task(life.stop(100, kill=False))
            await stop.asked(1)
            hasty = asyncio.create_task(life.stop(0.01, kill=False))
            await stop.asked(2)
            killer = asyncio.create_task(life.stop(None, kill=True))
            await stop.asked(3)
            life.ended(REPORT)
        assert list(await asyncio.gather(patient, hasty, killer)) == [REPORT] * 3

    play(scene, tmp_path)


@pytest.mark.parametrize(
    ("error", "told"),
    [(HostUnfit("no", "yes"), HostUnfit("no")), (ZeroDivisionError("zero"), QemuFailed("the guest has ended: zero"))],
)
def test_who_stops_a_guest_that_fails_gets_its_error(tmp_path: Path, error: Exception, told: VmmbackError) -> None:
    async def scene(life: Life, stop: Stop, watcher: Recorder) -> None:
        stopped = asyncio.create_task(life.stop(None, kill=False))
        await stop.asked(1)
        with pytest.raises(type(error)), life:
            raise error
        with pytest.raises(type(told)) as caught:
            await stopped
        assert caught.value.message == told.message

    play(scene, tmp_path)
