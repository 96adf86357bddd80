"""Sudden ends: SIGKILL of each process of a launch at any moment, and a failure of each step. Nothing may be left.

The supervisor is killed at two kinds of moments. `MILESTONES` are seen from outside, in /proc: the command is killed as
soon as each is seen, and once more halfway from there to the next (a first run, which is timed, tells how far that is).
`EVENTS` are Python's audit events: the supervisor kills itself right before the system call that each stands for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from integration.capabilities import INITRD, KERNEL
from integration.conftest import (
    GONE_S,
    MIB,
    ROOT,
    Recorder,
    children,
    eventually,
    guest_file,
    open_descriptors,
    processes_of,
)
from integration.leftovers import (
    RESETS,
    Family,
    SecretMemory,
    children_of,
    command_line,
    descriptors_of,
    holders_of,
    named_sockets,
    secret_inodes,
    secret_memory,
)
from vmmback import admission, command, config, console, control, handoff, launch, monitor, qmp_socket, ram, runtime
from vmmback import guest as guest_module
from vmmback.isolation import audit, qmp_proof
from vmmback.lifecycle import Stop
from vmmback.linux import procfs

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_direct_map")

GUEST_MIB = 64
DEADLINE_S = 30.0
POLL_S = 0.0003


# --- A launch that is watched from outside ----------------------------------------------------------------------------


class Launch:
    """A `vmmback launch` of a guest, all of whose processes and secret RAM are known; nothing else is looked at."""

    def __init__(self, folder: Path, runtime_dir: Path, family: Family, memory: SecretMemory, file: Path) -> None:
        self._family, self._memory, self._runtime_dir = family, memory, runtime_dir
        self._log = folder / f"{file.stem}.stderr.log"
        self._report = folder / f"{file.stem}.stdout.log"
        self.inodes: set[int] = set()
        self.folder = runtime_dir / file.stem
        self.process: subprocess.Popen[bytes]
        self._argv = [sys.executable, "-m", "vmmback", "launch", str(file), "--json"]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log, self._report.open("wb") as report:
            self.process = subprocess.Popen(
                self._memory.command(self._argv),
                stdin=subprocess.DEVNULL,
                stdout=report,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        self._ended = os.pidfd_open(self.process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ended)
        self.process.kill()
        self.process.wait()

    def prefix(self, argv: list[str]) -> None:
        """Run `argv` instead of `python -m vmmback`, with the same arguments."""
        self._argv[:3] = argv

    # What is seen of it

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def stdout(self) -> str:
        return self._report.read_text(errors="replace")

    def memory_used(self) -> int:
        """Return how much secret RAM there is."""
        return self._memory.used()

    def is_over(self, timeout_s: float = 0) -> bool:
        """Tell whether the supervisor has ended, after waiting for that for so long."""
        return bool(select.select([self._ended], [], [], timeout_s)[0])

    def child(self, word: str) -> int:
        """Return the supervisor's child whose command line has `word` in it, 0 if there is none."""
        return next((pid for pid in children_of(self.pid) if word in command_line(pid)), 0)

    @property
    def keeper(self) -> int:
        return self.child("vmmback-keeper")

    @property
    def worker(self) -> int:
        return self.child("prefault_worker")

    @property
    def qemu(self) -> int:
        """QEMU itself, no longer setpriv or prlimit before it becomes QEMU."""
        pid = self.child("memory-backend-file")
        return pid if pid and not command_line(pid).startswith(("setpriv ", "prlimit ")) else 0

    def holds(self, link: str) -> bool:
        """Tell whether the supervisor has a descriptor of this kind."""
        return any(link in other for other in descriptors_of(self.pid).values())

    def remember(self) -> None:
        """Note the secret RAM that it has now, to look for it after its end."""
        self.inodes |= secret_inodes(self.pid)

    def wait_until(self, happens: Callable[[], bool], what: str) -> None:
        """Wait for it; the supervisor must not end before."""
        deadline = time.monotonic() + DEADLINE_S
        while not happens():
            assert not self.is_over() or happens(), f"ended before {what}: {self.stderr}"
            assert time.monotonic() < deadline, f"waited {DEADLINE_S} s in vain until {what}: {self.stderr}"
            time.sleep(POLL_S)

    # Its end

    def kill(self) -> None:
        """Kill the supervisor, and nothing else."""
        self.remember()
        self.process.kill()
        self.process.wait()

    def strike(self, pid: int, signum: signal.Signals) -> None:
        """Send a signal to a process of the launch; 0, which would be all of this process's own group, is none."""
        assert pid > 0, f"it is not there: {self.stderr}"
        self.remember()
        os.kill(pid, signum)

    def leftovers(self) -> dict[str, object]:
        """Return what is left of it: processes, holders of its secret RAM, files, sockets, memory."""
        found: dict[str, object] = {
            "processes": processes_of(self._runtime_dir) | self._family.survivors(),
            "holders": holders_of(self.inodes) if self.inodes else {},
            "files": sorted(path.name for path in self._runtime_dir.iterdir()) if self._runtime_dir.exists() else [],
            "sockets": named_sockets(self._runtime_dir),
            "bytes": 0 if self._memory.is_back() else self._memory.used(),
        }
        return {kind: things for kind, things in found.items() if things}

    def must_be_gone(self) -> None:
        """Nothing may be left, at once."""
        deadline = time.monotonic() + GONE_S
        while left := self.leftovers():
            assert time.monotonic() < deadline, left
            time.sleep(POLL_S)


Begin = Callable[[Path], Launch]


@pytest.fixture
def begin(tmp_path: Path, runtime_dir: Path) -> Iterator[Begin]:
    """Make a launch of a guest file; it begins as a context manager."""
    with secret_memory() as memory, Family() as family:  # a group cannot be removed before its processes are
        yield lambda file: Launch(tmp_path, runtime_dir, family, memory, file)


# --- SIGKILL of the supervisor: milestones ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Milestone:
    """A moment of a launch that can be seen from outside; it stays seen."""

    name: str
    seen: Callable[[Launch], bool]


def has_mapped(pid: int) -> bool:
    """Tell whether a process maps secret RAM."""
    with contextlib.suppress(OSError):
        return any(mapping.path == procfs.SECRETMEM for mapping in procfs.maps(pid))
    return False


def file_size(path: Path) -> int:
    """Return the size of a file, -1 when it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


MILESTONES = (
    Milestone("python", lambda run: command_line(run.pid).startswith(sys.executable)),
    Milestone("event-loop", lambda run: run.holds("eventpoll")),
    Milestone("keeper", lambda run: bool(run.keeper)),
    Milestone("folder", lambda run: run.folder.exists()),
    Milestone("secret-ram", lambda run: run.holds("/secretmem")),
    Milestone("worker", lambda run: bool(run.worker)),
    Milestone("worker-maps", lambda run: has_mapped(run.worker)),
    Milestone("half-prefaulted", lambda run: run.memory_used() > GUEST_MIB // 2 * MIB),
    Milestone("prefaulted", lambda run: (run.folder / "serial.log").exists()),
    Milestone("setpriv", lambda run: bool(run.child("memory-backend-file"))),
    Milestone("qemu", lambda run: bool(run.qemu)),
    Milestone("qemu-holds", lambda run: bool(secret_inodes(run.qemu))),
    Milestone("qemu-maps", lambda run: has_mapped(run.qemu)),
    Milestone("runs", lambda run: file_size(run.folder / "serial.log") > 0),
    Milestone("ready", lambda run: "READY" in run.stderr),
    Milestone("probes", lambda run: run.holds("bpf-prog")),
    Milestone("validated", lambda run: "is isolated while it runs" in run.stderr),
    Milestone("quit", lambda run: "did not end within 0.2 s of powerdown" in run.stderr),
    Milestone("qemu-ended", lambda run: "did not end within" in run.stderr and not run.qemu),
    Milestone("released", lambda run: "did not end within" in run.stderr and not run.holds("/secretmem")),
)
NAMES = [milestone.name for milestone in MILESTONES]
# All is over so soon after these that they may be missed.
LAST = {"qemu-ended", "released"}


def reach(run: Launch, name: str) -> None:
    """Wait until a milestone is seen, or a later one, should this process have slept meanwhile."""
    wanted, *later = MILESTONES[NAMES.index(name) :]
    polls = itertools.count(1)

    def reached() -> bool:
        if wanted.seen(run) or (name in LAST and run.is_over()):
            return True
        return next(polls) % 20 == 0 and any(milestone.seen(run) for milestone in later)

    run.wait_until(reached, name)


# The tiny guest ignores its power button: QEMU is told to quit after so long.
IMPATIENT = "from vmmback import cli, launch; launch._POWERDOWN_TIMEOUT_S = 0.2; cli.main()"
ENDS = 'after-validation = "powerdown"'


def tiny(begin: Begin, folder: Path) -> Launch:
    """Make a launch of the tiny guest that goes through all milestones by itself."""
    run = begin(guest_file(folder, size=f"{GUEST_MIB}MiB", isolation=ENDS))
    run.prefix([sys.executable, "-c", IMPATIENT])
    return run


@pytest.fixture(scope="module")
def known_times() -> dict[str, float]:
    return {}


@pytest.fixture
def times(known_times: dict[str, float], begin: Begin, tmp_path: Path) -> dict[str, float]:
    """Return when each milestone is seen in a launch that nobody disturbs, in seconds from its start."""
    if not known_times:
        started = time.monotonic()
        with tiny(begin, tmp_path) as run:
            for name in NAMES:
                reach(run, name)
                run.remember()
                known_times[name] = time.monotonic() - started
            assert run.process.wait(DEADLINE_S) == 0, run.stderr
            known_times["end"] = time.monotonic() - started
            run.must_be_gone()
    return known_times


@pytest.mark.parametrize("halfway", [False, True], ids=["at-once", "halfway-to-the-next"])
@pytest.mark.parametrize("name", NAMES)
def test_supervisor_killed_at(begin: Begin, tmp_path: Path, times: dict[str, float], name: str, halfway: bool) -> None:
    following = [*NAMES, "end"][NAMES.index(name) + 1]
    with tiny(begin, tmp_path) as run:
        reach(run, name)
        if halfway:
            run.remember()
            run.is_over((times[following] - times[name]) / 2)
        run.kill()
        if name in ("event-loop", "folder"):  # there may be an empty one without a lock, which is no guest to anyone
            eventually(lambda: runtime.live_guests() == [], "the folder is nobody's", GONE_S)
        run.must_be_gone()


@pytest.mark.usefixtures("needs_guest_kernel")
@pytest.mark.parametrize("words", ["Linux version", "Run /init as init process", "power button pressed"])
def test_supervisor_of_linux_killed_at(begin: Begin, tmp_path: Path, words: str) -> None:
    file = tmp_path / "linux.toml"
    file.write_text(
        f'name = "linux"\n[memory]\nsize = "96MiB"\n[cpu]\nmodel = "max,-erms,-fsrm"\n[machine]\naccel = "tcg"\n'
        f'[boot]\nkernel = "{KERNEL}"\ninitrd = "{INITRD}"\ncmdline = "console=ttyS0 panic=-1 no_timer_check"\n'
        f'[isolation]\nready = "GUEST READY"\n{ENDS}\n'
    )
    with begin(file) as run:
        run.wait_until(lambda: words in run.stderr, words)
        run.kill()
        run.must_be_gone()


# --- SIGKILL of the supervisor: events --------------------------------------------------------------------------------

# The supervisor kills itself before the system call that an audit event (docs.python.org/3/library/audit_events.html)
# stands for, or at the next event: argv gives the event, a word in its arguments, which of these, and 0 or 1.
KILLS_ITSELF = """
import os, signal, sys
from vmmback import cli, launch
launch._POWERDOWN_TIMEOUT_S = 0.1
wanted, word, nth, later = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
del sys.argv[1:5]
def kill(event, arguments):
    global nth
    if event == "os.kill":  # the last one
        return
    if nth:
        if event != wanted or word not in str(arguments):
            return
        nth -= 1
        if nth or later:
            return
    os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
cli.main()
"""
# linux/seccomp.py
RECEIVE, IS_WAITING, GIVE = "3226476800", "1074274562", "1075323139"


@dataclass(frozen=True)
class Event:
    """An audit event of a launch."""

    what: str
    name: str
    word: str = ""
    nth: int = 1


EVENTS = (
    Event("keeper", "subprocess.Popen", "vmmback-keeper"),
    Event("size-of-ram", "os.truncate"),
    Event("worker", "subprocess.Popen", "prefault_worker"),
    Event("console-log", "open", "/serial.log"),
    Event("qemu-log", "open", "/qemu.log"),
    Event("setpriv", "subprocess.Popen", "setpriv"),
    Event("handoff-received", "fcntl.ioctl", RECEIVE),
    Event("handoff-checked", "fcntl.ioctl", IS_WAITING),
    Event("handoff-given", "fcntl.ioctl", GIVE),
    Event("proof", "open", "/maps"),
    Event("control-socket", "socket.bind", "/control"),
    Event("qmp-socket", "socket.bind", "/qmp.sock"),
    Event("probes", "open", "/proc/iomem"),
    Event("freed-frames", "open", "/proc/iomem", 2),
)


@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.what)
def test_supervisor_killed_around(begin: Begin, tmp_path: Path, event: Event, later: bool) -> None:
    run = begin(guest_file(tmp_path, isolation=ENDS))
    run.prefix([sys.executable, "-c", KILLS_ITSELF, event.name, event.word, str(event.nth), str(int(later))])
    with run:
        assert run.process.wait(DEADLINE_S) == -signal.SIGKILL, run.stderr
        if event.what == "keeper" and not later:  # an empty folder without a lock, which is no guest to anyone
            assert run.leftovers() == {"files": [run.folder.name]}
            assert runtime.live_guests() == []
        run.must_be_gone()


# --- SIGKILL of the others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", ["READY", "NEVER"], ids=["after-validation", "before"])
def test_qemu_killed(begin: Begin, tmp_path: Path, ready: str) -> None:
    """Its end is no end of the guest: an error, whatever was measured before."""
    with begin(guest_file(tmp_path, ready=ready)) as run:
        run.wait_until(lambda: ("while it runs" if ready == "READY" else "READY") in run.stderr, "the guest runs")
        run.strike(run.qemu, signal.SIGKILL)
        assert run.process.wait(DEADLINE_S) == 6
        assert run.leftovers() == {}
        assert run.stderr.count("vmmback: error: ") == 1
        assert "error: QEMU did not run to the guest's end: it was ended by SIGKILL; it said: nothing\n" in run.stderr
        assert "Traceback" not in run.stderr
        assert run.stdout == ""


def test_qemu_killed_before_it_has_taken_its_ram(begin: Begin, tmp_path: Path) -> None:
    pid = 0

    def starts() -> bool:
        """It has no command line for a moment, while it executes: who looks twice may not see it again."""
        nonlocal pid
        pid = run.qemu
        return pid > 0

    with begin(guest_file(tmp_path)) as run:
        run.wait_until(starts, "QEMU starts")
        run.remember()
        run.strike(pid, signal.SIGKILL)
        assert run.process.wait(DEADLINE_S) == 6
        assert run.leftovers() == {}
        assert "it was ended by SIGKILL" in run.stderr
        assert "Traceback" not in run.stderr


def test_worker_killed(begin: Begin, tmp_path: Path) -> None:
    """As the OOM killer does."""
    with begin(guest_file(tmp_path, size="512MiB")) as run:
        run.wait_until(lambda: has_mapped(run.worker), "the worker prefaults")
        run.strike(run.worker, signal.SIGKILL)
        assert run.process.wait(DEADLINE_S) == 4
        assert run.leftovers() == {}
        assert "the OOM killer ended the prefault" in run.stderr
        assert "Traceback" not in run.stderr


def test_keeper_killed(begin: Begin, tmp_path: Path) -> None:
    """The guest goes on, its name stays taken, and at its end the supervisor has another keeper do the work."""
    file = guest_file(tmp_path)
    with begin(file) as run:
        run.wait_until(lambda: "is isolated while it runs" in run.stderr, "the guest runs")
        run.strike(run.keeper, signal.SIGKILL)
        eventually(lambda: not run.keeper, "the keeper is gone")
        with begin(file) as second:
            assert second.process.wait(DEADLINE_S) == 2, second.stderr
            assert "is running already" in second.stderr
        for signum in (signal.SIGTERM, signal.SIGINT):
            run.process.send_signal(signum)
        assert run.process.wait(DEADLINE_S) == 0, run.stderr
        assert json.loads(run.stdout)["verdict"] == "isolated"
        assert run.leftovers() == {}


def test_keeper_killed_and_the_supervisor_after_it(begin: Begin, tmp_path: Path) -> None:
    """QEMU is bound to the supervisor, not to the keeper; the folder without a keeper is the next launch's."""
    file = guest_file(tmp_path)
    with begin(file) as run:
        run.wait_until(lambda: "is isolated while it runs" in run.stderr, "the guest runs")
        run.strike(run.keeper, signal.SIGKILL)
        run.kill()
        eventually(lambda: run.leftovers().keys() <= {"files"}, "all but the folder is gone", GONE_S)
    file.with_suffix(".rom").write_bytes(RESETS)
    with begin(file) as following:
        assert following.process.wait(DEADLINE_S) == 8, following.stderr
        following.must_be_gone()


# --- QEMU that does not run, and guests side by side ------------------------------------------------------------------


def test_stopped_qemu_is_ended_by_three_requests(begin: Begin, tmp_path: Path) -> None:
    """It answers nothing, and there is no end of patience with it. Each further request saves the rest of it."""
    run = begin(guest_file(tmp_path))
    longer = "launch._POWERDOWN_TIMEOUT_S = launch._QUIT_TIMEOUT_S = 1000"
    run.prefix([sys.executable, "-c", f"from vmmback import cli, launch; {longer}; cli.main()"])
    with run:
        run.wait_until(lambda: "is isolated while it runs" in run.stderr, "the guest runs")
        run.strike(run.qemu, signal.SIGSTOP)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the same one twice may arrive as one
            run.process.send_signal(signum)
        assert run.process.wait(DEADLINE_S) == 0, run.stderr
        assert run.leftovers() == {}
        assert json.loads(run.stdout)["verdict"] == "isolated"


def test_stopped_qemu_is_ended_by_one_request_and_the_deadlines(begin: Begin, tmp_path: Path) -> None:
    run = begin(guest_file(tmp_path))
    shorter = "launch._POWERDOWN_TIMEOUT_S = 0.5; launch._QUIT_TIMEOUT_S = 0.25"
    run.prefix([sys.executable, "-c", f"from vmmback import cli, launch; {shorter}; cli.main()"])
    with run:
        run.wait_until(lambda: "is isolated while it runs" in run.stderr, "the guest runs")
        run.strike(run.qemu, signal.SIGSTOP)
        started = time.monotonic()
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(DEADLINE_S) == 0, run.stderr
        assert time.monotonic() - started >= 0.75
        assert run.leftovers() == {}
        notes = [line for line in run.stderr.splitlines() if "did not end within" in line]
        assert [note.rpartition(" within ")[2] for note in notes] == ["0.5 s of powerdown", "0.25 s of quit"]


def test_the_other_guest_is_not_touched(begin: Begin, tmp_path: Path, runtime_dir: Path) -> None:
    """Two guests of one runtime folder: the end of one, sudden or not, is nothing to the other."""
    with begin(guest_file(tmp_path)) as stays, begin(guest_file(tmp_path)) as goes:
        for run in (stays, goes):
            run.wait_until(lambda now=run: "is isolated while it runs" in now.stderr, "both run")  # type: ignore[misc]
            run.remember()
        goes.kill()
        eventually(lambda: not goes.folder.exists(), "its folder is gone", GONE_S)
        eventually(lambda: not holders_of(goes.inodes), "its secret RAM is gone", GONE_S)
        assert sorted(path.name for path in stays.folder.iterdir()) == [
            "control",
            "promise.json",
            "qemu.log",
            "qmp.sock",
            "serial.log",
            "supervisor.log",
        ]
        assert holders_of(stays.inodes).keys() == {stays.pid, stays.qemu}
        assert [path.name for path in runtime_dir.iterdir()] == [stays.folder.name]
        for signum in (signal.SIGTERM, signal.SIGINT):
            stays.process.send_signal(signum)
        assert stays.process.wait(DEADLINE_S) == 0, stays.stderr
        assert json.loads(stays.stdout)["verdict"] == "isolated"
        stays.must_be_gone()


# --- Each step fails, or is cancelled ---------------------------------------------------------------------------------


class Broken(Exception):
    """What a step that is made to fail raises."""


@dataclass(frozen=True)
class Step:
    """A step of a launch: a function (maybe a coroutine), or a context manager that acquires something."""

    owner: Any
    name: str
    nth: int = 1

    @property
    def label(self) -> str:
        of = f"{self.owner.__name__.rpartition('.')[2]}-" if self.name == "serve" else ""
        return of + self.name.strip("_") + (f"-{self.nth}" if self.nth > 1 else "")

    @property
    def acquires(self) -> bool:
        """Tell whether it is a context manager."""
        return self.name in CONTEXTS | ASYNC_CONTEXTS


CONTEXTS = {"guest_folder"}
ASYNC_CONTEXTS = {"attach", "start", "connect", "serve"}
STEPS = (
    Step(launch, "find_qemu"),
    Step(launch, "choose_accel"),
    Step(admission, "admit"),
    Step(launch, "guest_folder"),
    Step(ram, "allocate"),
    Step(ram.Ram, "prefault"),
    Step(launch, "_socket_pair"),
    Step(launch, "_socket_pair", 2),
    Step(console, "attach"),
    Step(command, "build"),
    Step(handoff, "start"),
    Step(handoff.Qemu, "handed_over"),
    Step(monitor, "connect"),
    Step(monitor.Monitor, "version"),
    Step(qmp_proof, "observe"),
    Step(guest_module, "confirm"),
    Step(monitor.Monitor, "cont"),
    Step(launch, "_booted"),
    Step(control, "serve"),
    Step(qmp_socket, "serve"),
    Step(audit, "audit"),
    Step(guest_module.Guest, "report"),
    Step(launch, "_supervise"),
    Step(launch, "_shut_down"),
    Step(monitor.Monitor, "powerdown"),
    Step(guest_module.Guest, "observe_freed_frames"),
    Step(guest_module.Guest, "report", 2),
)


class Strike:
    """Lets a step fail, or cancels the launch in it, when it is called for the nth time."""

    def __init__(self, step: Step, way: str, task: Callable[[], asyncio.Task[Any]]) -> None:
        self.struck = False
        self._step, self._way, self._task = step, way, task
        self._calls = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(self._step.owner, self._step.name)
        if self._step.name in CONTEXTS:
            broken = self._context(original)
        elif self._step.name in ASYNC_CONTEXTS:
            broken = self._async_context(original)
        elif asyncio.iscoroutinefunction(original):
            broken = self._coroutine(original)
        else:
            broken = self._function(original)
        monkeypatch.setattr(self._step.owner, self._step.name, broken)

    def _strikes(self) -> bool:
        self._calls += 1
        return self._calls == self._step.nth

    def _now(self) -> None:
        self.struck = True
        if "raises" in self._way:
            raise Broken
        task = self._task()
        task.get_loop().call_soon_threadsafe(task.cancel)

    async def _now_async(self) -> None:
        self._now()
        await asyncio.Event().wait()  # until the cancellation comes

    def _function(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> Any:
            if self._strikes():
                self._now()
            return original(*arguments, **options)

        return broken

    def _coroutine(self, original: Callable[..., Any]) -> Callable[..., Any]:
        async def broken(*arguments: Any, **options: Any) -> Any:
            strikes = self._strikes()
            if strikes and "before" in self._way:
                await self._now_async()
            result = await original(*arguments, **options)
            if strikes:
                await self._now_async()
            return result

        return broken

    def _context(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def broken(*arguments: Any, **options: Any) -> Iterator[Any]:
            if "before" in self._way:
                self._now()
            with original(*arguments, **options) as value:
                if "after" in self._way:
                    self._now()
                yield value

        return broken

    def _async_context(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @asynccontextmanager
        async def broken(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
            if "before" in self._way:
                await self._now_async()
            async with original(*arguments, **options) as value:
                if "after" in self._way:
                    await self._now_async()
                yield value

        return broken


def folders_in(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


WAYS = ("raises before", "raises after", "is cancelled before", "is cancelled after")
# The result of a plain function has no owner between it and the next step, so there is no moment after it.
CASES = [
    pytest.param(step, way, id=f"{step.label}-{way}")
    for step in STEPS
    for way in WAYS
    if step.acquires or "before" in way or asyncio.iscoroutinefunction(getattr(step.owner, step.name))
]


@pytest.mark.parametrize(("step", "way"), CASES)
def test_step(step: Step, way: str, tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Release is the reverse of acquisition: at the moment that the error is out, all is gone."""
    monkeypatch.setattr(launch, "_POWERDOWN_TIMEOUT_S", 0.05)
    guest = config.load(guest_file(tmp_path, isolation=ENDS))
    before = open_descriptors(), children(), threading.active_count()
    running: list[asyncio.Task[Any]] = []
    strike = Strike(step, way, lambda: running[0])
    strike.install(monkeypatch)

    async def run() -> None:
        running.append(asyncio.create_task(launch.launch(guest, Recorder(), Stop())))
        try:
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.wait(running)
        finally:
            assert strike.struck
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert folders_in(runtime_dir) == []
        assert children() == before[1]
        assert processes_of(runtime_dir) == {}
        await running[0]

    with pytest.raises(Broken if "raises" in way else asyncio.CancelledError):
        asyncio.run(run())
    gc.collect()  # what was not closed says so now
    assert (open_descriptors(), children(), threading.active_count()) == before
