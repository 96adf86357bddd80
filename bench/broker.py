"""The broker: launches from its pool against QEMU on ordinary memory, Acquire under load, and what the pool splits."""

from __future__ import annotations

import asyncio
import fcntl
import json
import mmap
import os
import re
import resource
import select
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.figures import MIB, Figure, Seconds, all_in_turn, run_s, say
from bench.guests import bare_command, guest_file
from vmmback import ram, tiny_guest
from vmmback.linux import direct_map_use, page_file

_SIZE = 1024 * MIB
_SMALL = 1 * MIB
_SMALL_READY = 200
_CLIENTS = 20
_CYCLES = 100
_CYCLE_SIZE = 16 * MIB
_CYCLE_READY = 10
_VERDICT = re.compile(rb"vmmback: guest bench is (\w+) while it runs\n")


def launches(folder: Path, rounds: int) -> Iterator[Figure]:
    """Launch a guest on what is ready: to READY, and to the verdict, against a shell script that starts QEMU."""
    say(f"launches of {_SIZE // MIB} MiB from the pool")
    guest = guest_file(folder, fill=False, size=f"{_SIZE // MIB}MiB")
    prealloc, bare = folder / "prealloc.sh", folder / "bare.sh"
    prealloc.write_text(f"exec {shlex.join(bare_command(guest, prealloc=True))}\n")
    bare.write_text(f"exec {shlex.join(bare_command(guest))}\n")
    imports = [sys.executable, "-c", "import vmmback.cli.lead, vmmback.cli.launch"]
    steps: dict[str, list[float]] = {}
    verdicts: list[float] = []

    def beside_nothing(measure: Callable[[], float]) -> Callable[[], float]:
        """After a launch the pool makes one more than it is to have (docs/BROKER.md), and then nothing."""

        def measured() -> float:
            wait_until_filled(1 + bool(verdicts))
            return measure()

        return measured

    def ours() -> float:
        ready_s, verdict_s, timings = launched(folder / "bench.toml")
        verdicts.append(verdict_s)
        for name, seconds in timings.items():
            steps.setdefault(name, []).append(seconds)
        known_s = sum(timings[name] for name in ("borrow", "qmp_ready", "boot"))
        steps.setdefault("start, imports, admission, proof", []).append(ready_s - known_s)
        return ready_s

    with broker(folder, _SIZE, 1):
        ready, allocated, plain, imported = all_in_turn(
            rounds,
            *map(
                beside_nothing,
                (
                    ours,
                    lambda: until_ready(prealloc),
                    lambda: until_ready(bare),
                    lambda: run_s(imports),
                ),
            ),
        )
    verdict = Seconds(verdicts[1:])
    parts = {name: statistics.median(seconds[1:]) * 1000 for name, seconds in steps.items()}
    parts["start and imports alone"] = imported.median * 1000
    shown = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
    what = f"{_SIZE // MIB} MiB from the pool, from exec"
    yield Figure(
        f"{what} to READY, against QEMU by a shell script on a memfd with prealloc", ready.median * 1000,
        allocated.median * 1000, "ms", ready.median / allocated.median, "<= 0.5", rounds,
        f"vmmback {ready}; rival {allocated}",
    )  # fmt: skip
    yield Figure(
        f"{what} to the verdict, against READY of QEMU on a memfd with prealloc", verdict.median * 1000,
        allocated.median * 1000, "ms", verdict.median / allocated.median, "<= 1.0", rounds, f"vmmback {verdict}",
    )  # fmt: skip
    yield Figure(
        f"{what} to READY, against QEMU by a shell script on a memfd without prealloc", ready.median * 1000,
        plain.median * 1000, "ms", ready.median / plain.median, "<= 250 ms over it", rounds,
        f"{(ready.median - plain.median) * 1000:.0f} ms over it; rival {plain}; ms: {shown}",
    )  # fmt: skip


def until_ready(script: Path) -> float:
    """Return the seconds from the start of a shell script to READY on its output; it is killed then."""
    started = time.perf_counter()
    with subprocess.Popen(["sh", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout is not None
        _read_until(qemu.stdout, re.compile(tiny_guest.READY))
        seconds = time.perf_counter() - started
        qemu.kill()
    return seconds


def launched(file: Path) -> tuple[float, float, dict[str, float]]:
    """Launch a guest; return the seconds to its READY and to its verdict, and the timings of its report."""
    argv = [str(Path(sys.executable).with_name("vmmback")), "launch", "--json", str(file)]
    started = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stderr is not None
        _read_until(supervisor.stderr, re.compile(tiny_guest.READY))
        ready_s = time.perf_counter() - started
        verdict = _read_until(supervisor.stderr, _VERDICT)
        verdict_s = time.perf_counter() - started
        assert verdict[1] == b"isolated", verdict
        for _ in range(2):  # it has no power button
            supervisor.send_signal(signal.SIGINT)
        timings: dict[str, float] = json.loads(supervisor.stdout.read())["timings"]
    assert "prefault" not in timings, "the broker lent nothing"
    return ready_s, verdict_s, timings


def _read_until(stream: Any, wanted: re.Pattern[bytes]) -> re.Match[bytes]:
    said = []
    for line in stream:
        if match := wanted.search(line):
            return match
        said.append(line)
    raise ValueError(f"no {wanted.pattern!r} in {b''.join(said)!r}")


def acquire(folder: Path, rounds: int) -> Iterator[Figure]:
    """Let 20 clients ask at the same moment, again and again, until the pool is used up; it has no rival.

    They are connected before.
    """
    say(f"{_CLIENTS} clients at once")
    waits: list[float] = []
    spent: list[float] = []
    with broker(folder, _SMALL, _SMALL_READY) as pid:
        for _ in range(rounds):
            wait_until_filled(_SMALL_READY)
            with ExitStack() as stack:
                clients = [stack.enter_context(client()) for _ in range(_CLIENTS)]
                for connection in clients:
                    call(connection, "Stats")  # so that it is accepted
                for _ in range(_SMALL_READY // _CLIENTS):
                    before = _ran_s(pid)
                    waits += _all_at_once(clients, stack)
                    spent.append((_ran_s(pid) - before) / _CLIENTS)
    found = statistics.quantiles((wait * 1000 for wait in waits), n=100)
    for name, value, goal in (("median", found[49], "stated"), ("99th percentile", found[98], "< 5 ms")):
        yield Figure(
            f"Acquire of {_SMALL // MIB} MiB, {_CLIENTS} clients at once, {name}", value, None, "ms", None, goal,
            rounds, f"{len(waits)} leases, the slowest {max(waits) * 1000:.1f} ms; the broker's own time for each, ms: "
            f"least {min(spent) * 1000:.2f}, median {statistics.median(spent) * 1000:.2f}",
        )  # fmt: skip


def _ran_s(pid: int) -> float:
    """Return how long a process was on a processor (Documentation/scheduler/sched-stats.rst)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _all_at_once(clients: Sequence[socket.socket], stack: ExitStack) -> list[float]:
    """Return how long each had to wait for its descriptors, which `stack` keeps, as a guest does."""
    waiting = select.poll()
    started = {}
    for connection in clients:
        waiting.register(connection, select.POLLIN)
        started[connection.fileno()] = time.perf_counter()
        connection.sendall(_message("Acquire", size=_SMALL, purpose="bench"))
    waits = []
    by_number = {connection.fileno(): connection for connection in clients}
    while by_number:
        for number, _ in waiting.poll():
            answer, descriptors = _answer(by_number.pop(number))
            waits.append(time.perf_counter() - started[number])
            waiting.unregister(number)
            assert "error" not in answer, answer
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
    return waits


def splits(folder: Path, _: int) -> Iterator[Figure]:
    """Borrow, touch and release from the pool 100 times, against 100 cold prefaults: what each adds to what is split.

    After each release others take as much kernel memory as was released, and keep it, as on a host where more goes on:
    alone, a cold prefault would be given the frames of the one before, and neither way would touch anything new.
    A region that is touched for the first time is a split, where nobody has split it before; splits themselves are
    counted for the whole host alone, and not on arm64 (direct_map_use.py).
    """
    say(f"splits of {_CYCLES} leases")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ExitStack() as others:
            with broker(folder, _CYCLE_SIZE, _CYCLE_READY):
                wait_until_filled(_CYCLE_READY)
                pooled, by_pool = _newly_touched(_borrowed, others)
            cold, by_cold = _newly_touched(_prefaulted, others)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    yield Figure(
        f"direct map: new regions of {_CYCLES} leases of {_CYCLE_SIZE // MIB} MiB from the pool, against cold ones",
        pooled, cold, "regions", pooled / cold if cold else None, "near 0", 1,
        f"splits of the whole host meanwhile: {by_pool}, against {by_cold}",
    )  # fmt: skip


def _newly_touched(cycle: Callable[[], set[int]], others: ExitStack) -> tuple[int, int]:
    """Return how many regions of 2 MiB cycles touched that none did before, and the host's splits meanwhile.

    Those of the first cycles, which use up what was ready at the start, do not count.
    """
    seen = set[int]().union(*(cycle() for _ in range(_CYCLE_READY + 2)))
    known, before = len(seen), direct_map_use.of().splits_2m or 0
    for _ in range(_CYCLES):
        _take_kernel_memory(_CYCLE_SIZE, others)
        seen |= cycle()
    return len(seen) - known, (direct_map_use.of().splits_2m or 0) - before


def _borrowed() -> set[int]:
    with client() as connection:
        answer, descriptors = call(connection, "Acquire", size=_CYCLE_SIZE, purpose="bench")
        assert "error" not in answer, answer
        with mmap.mmap(descriptors[answer["parameters"]["descriptor"]], _CYCLE_SIZE) as memory:
            for offset in range(0, _CYCLE_SIZE, mmap.PAGESIZE):
                memory[offset] = 1
        frames = page_file.entries_in(descriptors[answer["parameters"]["frames"]])
        wait_until_filled(_CYCLE_READY)  # a guest lives longer than that takes
        for descriptor in descriptors:
            os.close(descriptor)
        call(connection, "Release", lease=answer["parameters"]["lease"])
    wait_until_filled(_CYCLE_READY + 1)  # one more, of what came back: docs/BROKER.md
    return direct_map_use.region_numbers(frames)


def _prefaulted() -> set[int]:
    with ram.SecretRam(_CYCLE_SIZE) as secret:
        asyncio.run(secret.prefault(lambda _: None))
        return set(secret.regions)


def _take_kernel_memory(size: int, others: ExitStack) -> None:
    """Fill pipes, whose pages the kernel takes from where it takes secret ones: neither can be moved."""
    for _ in range(0, size, MIB):
        reading, writing = os.pipe()
        others.callback(os.close, reading)
        others.callback(os.close, writing)
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, MIB)
        assert os.write(writing, bytes(MIB)) == MIB


@contextmanager
def broker(folder: Path, size: int, count: int) -> Iterator[int]:
    """Run a broker that keeps `count` files of `size` bytes ready; yield its pid."""
    file = folder / "broker.toml"
    file.write_text(f'[[pool]]\nsize = "{size // MIB}MiB"\ncount = {count}\n')
    with subprocess.Popen([str(Path(sys.executable).with_name("vmmback")), "broker", str(file)]) as process:
        try:
            _wait_for(_is_there, "the broker answers")
            yield process.pid
        finally:
            process.terminate()


def _is_there() -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(os.environ["VMMBACK_BROKER"]) == 0


def wait_until_filled(count: int = 1) -> None:
    """Wait until so many files are ready."""

    def filled() -> bool:
        with client() as connection:
            answer, _ = call(connection, "Stats")
        return all(entry["ready"] >= count for entry in answer["parameters"]["pool"])

    _wait_for(filled, "the pool is filled")


def _wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextmanager
def client() -> Iterator[socket.socket]:
    """Connect to the broker."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(os.environ["VMMBACK_BROKER"])
        yield connection


def call(connection: socket.socket, method: str, **parameters: object) -> tuple[dict[str, Any], list[int]]:
    """Call a method of the broker in Varlink's own words; return the answer and its descriptors."""
    connection.sendall(_message(method, **parameters))
    return _answer(connection)


def _message(method: str, **parameters: object) -> bytes:
    return json.dumps({"method": f"org.vmmback.Broker.{method}", "parameters": parameters}).encode() + b"\0"


def _answer(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    received, descriptors = b"", list[int]()
    while not received.endswith(b"\0"):
        data, passed, _, _ = socket.recv_fds(connection, 1 << 16, 8)
        assert data, "the broker hung up"
        received, descriptors = received + data, descriptors + passed
    answer: dict[str, Any] = json.loads(received[:-1])
    return answer, descriptors
