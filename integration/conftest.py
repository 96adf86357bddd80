"""Fixtures for tests on the real kernel and the real QEMU.

They are a ladder, and each step has its twin on ordinary memory, without which "blocked" would prove nothing:

    secret_ram      guest_paused            guest_running
    ordinary_ram    ordinary_guest_paused   ordinary_guest_running

Each is made by the product's own code. The guest is the tiny ROM guest (tiny_guest.py), unless a test says otherwise.
After every test nothing of it may be left: `nothing_is_left` looks for processes, descriptors and runtime folders.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import pytest

from integration import capabilities
from vmmback import config, launch, ram, tiny_guest
from vmmback.guest import Guest
from vmmback.isolation.residue import holds_canary
from vmmback.lifecycle import State
from vmmback.linux.direct_map import DirectMap
from vmmback.report import Drift, IsolationReport

if TYPE_CHECKING:
    from integration.libvirtd import Libvirtd

ROOT = capabilities.ROOT
FAILURES = ROOT / "build/test-failures"
MIB = 1 << 20
TINY_BYTES = 16 * MIB
READY = tiny_guest.READY

# An end that the product promises "at once" may take so long on a loaded machine.
GONE_S = 10.0

# Ignored in a shell's background job, and under nohup(1); what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Ten times what the longest test takes where nobody else is busy, but for those that say how long they may take:
# `timeout_s` in pyproject.toml.
TEST_TIMEOUT_S = 240.0

Backing: TypeAlias = Literal["secret", "ordinary"]
T = TypeVar("T")


def eventually(happens: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Poll until it happens; fail, naming `what` was waited for, when it does not.

    Half of the time is left to what is waited for: a look may start a program.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        began = time.monotonic()
        if happens():
            return
        looked = time.monotonic()
        assert looked < deadline, f"waited {timeout_s} s in vain until {what}"
        time.sleep(max(0.002, looked - began))


# --- What a test leaves behind ----------------------------------------------------------------------------------------


def open_descriptors() -> dict[str, str]:
    """Return what each descriptor of this process refers to."""
    links = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this listing
            links[entry.name] = str(entry.readlink())
    return links


def children() -> set[int]:
    """Return the children of all threads of this process."""
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            found.update(int(pid) for pid in (thread / "children").read_text().split())
    return found


def processes_of(mark: Path) -> dict[int, str]:
    """Return the command lines of the live processes whose command line or environment names `mark`.

    A test's own runtime folder marks them: all that it starts inherits VMMBACK_RUNTIME_DIR, and QEMU, which does not,
    has the folder in its mem-path.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile; a zombie has neither
            line = (entry / "cmdline").read_bytes()
            if os.fsencode(mark) in line + (entry / "environ").read_bytes():
                found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace")
    return found


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime folder that is this test's alone, so that tests can run beside each other."""
    folder = tmp_path / "run"
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("VMMBACK_BROKER", str(tmp_path / "broker.socket"))
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(runtime_dir: Path) -> Iterator[None]:
    """Fail the test that leaves a process, a descriptor or a guest's folder."""
    before = open_descriptors(), children()
    yield
    with contextlib.suppress(AssertionError):  # the comparison below says it better
        eventually(lambda: (open_descriptors(), children()) == before and not processes_of(runtime_dir), "all is gone")
    left = processes_of(runtime_dir)
    for pid in left:  # so that a test that failed disturbs no other
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == {}
    assert (open_descriptors(), children()) == before
    assert not runtime_dir.exists() or list(runtime_dir.iterdir()) == []


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest, share_of_the_machine: object) -> Iterator[None]:
    """Fail the test that hangs, be it in a system call, instead of letting it stop all others."""
    marker = request.node.get_closest_marker("timeout_s")
    timeout_s: float = marker.args[0] if marker else TEST_TIMEOUT_S

    def bark(*_: object) -> None:
        pytest.fail(f"the test did not end within {timeout_s:g} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the logs of a test that failed: QEMU's, the guest's console and the kernel's; screenshots too."""
    report = yield
    if report.failed and isinstance(tmp_path := getattr(item, "funcargs", {}).get("tmp_path"), Path):
        folder = FAILURES / re.sub(r"[^\w.-]+", "_", item.nodeid)
        kept = keep_logs(tmp_path, folder / call.when)
        report.sections.append(("kept for you", "\n".join(str(path) for path in kept)))
    return report


def keep_logs(tmp_path: Path, folder: Path) -> list[Path]:
    """Copy all logs and screenshots below `tmp_path`, and the kernel's last lines, into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for log in [path for name in ("*.log", "*.toml", "*.png") for path in tmp_path.rglob(name)]:
        with contextlib.suppress(OSError):  # its guest ended meanwhile
            (folder / "_".join(log.relative_to(tmp_path).parts)).write_bytes(log.read_bytes())
    kernel = subprocess.run(["dmesg"], capture_output=True, check=False)
    (folder / "dmesg.log").write_bytes(b"\n".join((kernel.stdout + kernel.stderr).splitlines()[-200:]))
    return sorted(folder.iterdir())


# --- Capabilities -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def needs_secretmem() -> None:
    capabilities.require(capabilities.SECRETMEM)


@pytest.fixture(scope="session")
def needs_seccomp() -> None:
    capabilities.require(capabilities.SECCOMP_NOTIFICATION)


@pytest.fixture(scope="session")
def needs_direct_map() -> None:
    capabilities.require(capabilities.DIRECT_MAP)


@pytest.fixture(scope="session")
def needs_qemu(needs_secretmem: None, needs_seccomp: None) -> None:
    """A guest on secret RAM needs all three."""
    capabilities.require(capabilities.QEMU)


@pytest.fixture(scope="session")
def needs_aux_ram_share(needs_qemu: None) -> None:
    capabilities.require(capabilities.AUX_RAM_SHARE)


@pytest.fixture(scope="session")
def other_blocks(needs_qemu: None) -> Literal["secretmem", "ordinary"]:
    """What QEMU's RAM blocks beside the guest's RAM are on this machine, if that RAM is secret."""
    return "secretmem" if capabilities.has(capabilities.AUX_RAM_SHARE) else "ordinary"


@pytest.fixture(scope="session")
def needs_guest_kernel() -> None:
    capabilities.require(capabilities.GUEST_KERNEL)


@pytest.fixture(scope="session")
def needs_virtiofsd() -> None:
    capabilities.require(capabilities.VIRTIOFSD)


@pytest.fixture(scope="session")
def needs_chromium() -> None:
    capabilities.require(capabilities.CHROMIUM)


@pytest.fixture(scope="session")
def needs_libvirt(needs_guest_kernel: None) -> None:
    capabilities.require(capabilities.LIBVIRT)
    capabilities.require(capabilities.QEMU)


class MemoryGroup:
    """A memory cgroup: what runs in it is counted apart from the rest of the machine, and can be limited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._v1 = folder.parent == capabilities.CGROUP_V1

    def limit(self, size: int) -> None:
        """Let what runs in it have `size` bytes."""
        (self.folder / ("memory.limit_in_bytes" if self._v1 else "memory.max")).write_text(str(size))

    def used(self) -> int:
        """Return how many bytes it holds, the cache of its files among them."""
        return int((self.folder / ("memory.usage_in_bytes" if self._v1 else "memory.current")).read_text())

    def secret(self) -> int:
        """Return how many bytes of secret memory it pays for: nothing else of a test's cannot be evicted."""
        lines = (line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(dict(lines)["unevictable"])

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """Return the command that runs `argv` in it."""
        enter = 'echo $$ >"$0"/cgroup.procs && exec "$@"'
        return ["sh", "-c", enter, str(self.folder), *(str(argument) for argument in argv)]

    def remove(self) -> None:
        """End what a test that failed left in it, and remove it; for a moment after that the kernel refuses still."""
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        eventually(self._removed, f"{self.folder} can be removed")

    def _removed(self) -> bool:
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        return not self.folder.exists()


@pytest.fixture
def memory_group() -> Iterator[MemoryGroup]:
    capabilities.require(capabilities.MEMORY_GROUP)
    group = MemoryGroup(capabilities.new_memory_group())
    yield group
    group.remove()


@pytest.fixture
def other_group(memory_group: MemoryGroup) -> Iterator[MemoryGroup]:
    """A second one."""
    group = MemoryGroup(capabilities.new_memory_group())
    yield group
    group.remove()


# --- RAM --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["secret", "ordinary"])
def backing(request: pytest.FixtureRequest, needs_secretmem: None) -> Backing:
    """Both kinds: a test with it is a test and its twin."""
    kind: Backing = request.param
    return kind


@pytest.fixture
def secret_ram(needs_secretmem: None) -> Iterator[ram.Ram]:
    """16 MiB of secret RAM; no page of it is present."""
    with ram.allocate("secret", TINY_BYTES) as memory:
        yield memory


@pytest.fixture
def ordinary_ram() -> Iterator[ram.Ram]:
    """The twin of secret_ram."""
    with ram.allocate("ordinary", TINY_BYTES) as memory:
        yield memory


def frames_with(fingerprint: str, entries: array[int]) -> int:
    """Return how many of the frames in these pagemap entries hold the canary with this SHA-256 (hex)."""
    with DirectMap.open() as direct_map:
        return sum(
            frame is not None and holds_canary(frame, fingerprint) for _, frame in direct_map.read_frames(entries)
        )


# --- Guests in this process -------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """A watcher that keeps what it is shown."""

    printed: bytes = b""
    notes: list[str] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    reports: list[IsolationReport] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def console(self, data: bytes | memoryview) -> None:
        self.printed += data

    def note(self, message: str) -> None:
        self.notes.append(message)

    def prefaulted(self, done: int, size: int) -> None:
        self.progress.append((done, size))

    def validated(self, report: IsolationReport) -> None:
        self.reports.append(report)

    def drifted(self, drift: Drift) -> None:
        self.drifts.append(drift)

    def entered(self, state: State) -> None:
        self.states.append(state)


@dataclass
class LiveGuest:
    """A guest that `launch.prepare` brought up, and `run`, which runs a coroutine on its event loop."""

    guest: Guest
    watcher: Recorder
    run: Callable[[Coroutine[Any, Any, Any]], Any]

    @property
    def pid(self) -> int:
        return self.guest.qemu.pid

    def start(self) -> None:
        """Let the guest run until it says READY."""

        async def ready() -> None:
            await self.guest.monitor.cont()
            async with asyncio.timeout(60):
                await self.guest.console.ready.wait()

        self.run(ready())


def tiny_rom(*, fingerprint: bool = True) -> bytes:
    """Return a tiny guest's ROM with a canary of its own; it prints the fingerprint and the halves, then READY.

    With the fingerprint (console.py) the guest's former frames can be told from those that others have filled
    meanwhile, with the halves all memory can be searched.
    """
    return tiny_guest.rom_with_canary() if fingerprint else tiny_guest.rom(tiny_guest.new_halves())


def guest_file(
    folder: Path,
    *,
    backing: Backing = "secret",
    size: str = "16MiB",
    rom: bytes | None = None,
    ready: str | None = "READY",
    memory: str = "",
    isolation: str = "",
    process: str = "",
) -> Path:
    """Write the guest file of a tiny guest with a name that no other test has; tables that are given add lines."""
    name = f"tiny-{secrets.token_hex(4)}"
    (folder / f"{name}.rom").write_bytes(rom or tiny_rom())
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\n'
        f'[memory]\nsize = "{size}"\nbacking = "{backing}"\n{memory}\n'
        f'[machine]\naccel = "tcg"\n'
        f'[boot]\nfirmware = "{name}.rom"\n'
        f'[console]\nlog = "{name}.serial.log"\n'
        + (f"[process]\n{process}\n" if process else "")
        + f"[isolation]\n{isolation}\n"
        + (f'ready = "{ready}"\n' if ready else "")
    )
    return path


@contextmanager
def prepared(file: Path) -> Iterator[LiveGuest]:
    """Bring a guest up to the moment before its first instruction; end it on exit."""
    watcher = Recorder()
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            guest = runner.run(launch.prepare(config.load(file), watcher, stack))
            yield LiveGuest(guest, watcher, runner.run)
        finally:
            runner.run(stack.aclose())


@pytest.fixture
def guest_paused(tmp_path: Path, needs_qemu: None) -> Iterator[LiveGuest]:
    """A tiny guest on secret RAM that has not run yet."""
    with prepared(guest_file(tmp_path)) as guest:
        yield guest


@pytest.fixture
def ordinary_guest_paused(tmp_path: Path, needs_qemu: None) -> Iterator[LiveGuest]:
    """The twin of guest_paused."""
    with prepared(guest_file(tmp_path, backing="ordinary")) as guest:
        yield guest


@pytest.fixture
def guest_running(guest_paused: LiveGuest) -> LiveGuest:
    """A tiny guest on secret RAM whose RAM is full of its canary."""
    guest_paused.start()
    return guest_paused


@pytest.fixture
def ordinary_guest_running(ordinary_guest_paused: LiveGuest) -> LiveGuest:
    """The twin of guest_running."""
    ordinary_guest_paused.start()
    return ordinary_guest_paused


# --- Launches in a process of their own -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str

    def has_one_error(self) -> bool:
        """Tell whether it wrote one error for people, and no traceback."""
        return self.stderr.count("vmmback: error: ") == 1 and "Traceback" not in self.stderr


class Supervisor:
    """A supervisor as a process, leader of a group of its own, whose output goes to files."""

    def __init__(self, argv: Sequence[str | Path], output: Path) -> None:
        self.argv = [str(argument) for argument in argv]
        self._stdout, self._stderr = output.with_suffix(".stdout.log"), output.with_suffix(".stderr.log")
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True, cwd=ROOT
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def wait_until(self, happens: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Wait, but not longer than the supervisor lives."""
        ended = False

        def over() -> bool:
            nonlocal ended
            ended = self.process.poll() is not None
            return happens() or ended

        eventually(over, what, timeout_s)
        assert happens(), f"ended with {self.process.returncode} before {what}: {self.stderr}"
        assert not ended, f"ended with {self.process.returncode} as soon as {what}: {self.stderr}"

    def wait_for(self, text: str) -> None:
        """Wait until it wrote `text`."""
        self.wait_until(lambda: text in self.stdout + self.stderr, f"{text!r} is written")

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to its process group, as a terminal does."""
        os.killpg(self.process.pid, signum)

    def ended(self, timeout_s: float = 60.0) -> Ended:
        """Wait for its end."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end within {timeout_s} s: {self.argv}; it said: {self.stderr}")
        return Ended(code, self.stdout, self.stderr)

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait()


Start: TypeAlias = Callable[..., Supervisor]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start programs in the background; those that still run at the end of the test are killed."""
    with ExitStack() as stack:

        def begin(*argv: str | Path) -> Supervisor:
            supervisor = Supervisor(argv, tmp_path / f"program-{secrets.token_hex(4)}")
            stack.callback(supervisor.close)
            return supervisor

        yield begin


@pytest.fixture
def vmmback(start: Start) -> Start:
    """Start `vmmback` with arguments."""
    return lambda *arguments: start(sys.executable, "-m", "vmmback", *arguments)


@pytest.fixture
def libvirtd(tmp_path: Path, needs_libvirt: None) -> Iterator[Libvirtd]:
    """A libvirtd of the test's own."""
    from integration.libvirtd import Libvirtd  # it needs what is above

    with Libvirtd(tmp_path / "libvirt") as daemon:
        yield daemon


def qemu_of(runtime_dir: Path) -> list[int]:
    """Return the pids of the QEMUs of a runtime folder."""
    return [pid for pid, line in processes_of(runtime_dir).items() if re.match(r"\S*qemu-system-\S+ ", line)]


def worker_of(runtime_dir: Path) -> list[int]:
    """Return the pids of the prefault workers that a runtime folder's supervisors started."""
    return [pid for pid, line in processes_of(runtime_dir).items() if "prefault_worker.py" in line]


def stopped_workers(runtime_dir: Path) -> list[int]:
    """Stop those workers, so that none of them is done before the test is; return their pids."""
    found = worker_of(runtime_dir)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    return found
