"""Measure vmmback on this host: `python -m bench [--rounds N] [--json] [WHAT ...]`, as root.

Each figure is the median of rounds in which vmmback and its rival take turns, so that both see the same host; the ratio
is made of the medians. Nothing here passes or fails: a goal stands beside the figure, and the reader judges.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import ctypes
import hashlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict
from pathlib import Path

import vmmback
from bench import broker
from bench import direct_map as bench_direct_map
from bench.figures import MIB, Figure, in_turn, run_s, say, show, timed
from bench.guests import bare_command, end, guest_file, supervised
from bench.libvirt import libvirt_starts
from bench.many import GUESTS, MORE_GUESTS, cost, many_guests
from bench.prefault import THREADS, linear, prefaults
from bench.soak import soak
from vmmback import config, ram, tiny_guest
from vmmback.guest import SilentWatcher
from vmmback.isolation.direct_map import pagemap_entries
from vmmback.isolation.hunt import hunt
from vmmback.isolation.needle import Needle
from vmmback.launch import prepare
from vmmback.linux import direct_map_use, procfs
from vmmback.linux.direct_map import DirectMap


def main() -> None:
    """Run all measurements and print them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each figure is taken (default 7)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "what", nargs="*", metavar="WHAT",
        help=f"measure these alone, of: {', '.join(_KINDS)} (default all but broker-soak, which takes 10 minutes)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if unknown := set(arguments.what) - set(_KINDS):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    # An installed package has its bytecode; one that runs from its sources may be kept from writing it.
    compileall.compile_dir(Path(vmmback.__file__).parent, quiet=1)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmmback-bench-"))
        # /run is a tmpfs (hier(7), file-hierarchy(7)), where a record is written in a fraction of a disk's time.
        run = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmmback-bench-", dir="/dev/shm"))
        os.environ |= {"VMMBACK_RUNTIME_DIR": f"{run}/run", "VMMBACK_BROKER": f"{folder}/broker"}
        figures = list(measure(Path(folder), arguments.rounds, arguments.what))
    if arguments.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
    else:
        show(figures)


def measure(folder: Path, rounds: int, what: Sequence[str]) -> Iterator[Figure]:
    """Take each figure in turn, all but the longest if none is named."""
    for kind in what or [kind for kind in _KINDS if kind != "broker-soak"]:
        yield from _KINDS[kind](folder, rounds)


def ready(folder: Path, rounds: int, *, fill: bool) -> Figure:
    """Start the tiny guest: vmmback from nothing to READY, less the prefault, against the bare QEMU on a memfd."""
    what = "tiny guest that fills its 64 MiB" if fill else "tiny guest that touches no RAM"
    say(f"start to READY of the {what}")
    guest = guest_file(folder, fill=fill)
    argv = bare_command(guest)
    steps: dict[str, list[float]] = {}

    def rival() -> float:
        started = time.perf_counter()
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
            assert qemu.stdout is not None
            while (line := qemu.stdout.readline()) and tiny_guest.READY not in line:
                pass
            seconds = time.perf_counter() - started
            qemu.kill()
        return seconds

    mine, theirs = in_turn(rounds, lambda: asyncio.run(launch_to_ready(guest, steps)), rival)
    rest = ", ".join(f"{name} {statistics.median(seconds) * 1000:.1f}" for name, seconds in steps.items())
    return Figure(
        f"{what}: start to READY without the prefault, against the same QEMU on a memfd",
        mine * 1000, theirs * 1000, "ms", mine / theirs, "< 1.5", rounds, f"ms: {rest}",
    )  # fmt: skip


async def launch_to_ready(guest: config.GuestConfig, steps: dict[str, list[float]]) -> float:
    """Return the seconds from nothing to READY without the prefault; add each step's seconds to `steps`."""
    async with AsyncExitStack() as stack:
        started = time.perf_counter()
        running = await prepare(guest, SilentWatcher(), stack)
        prepared = time.perf_counter()
        await running.monitor.cont()
        async with asyncio.timeout(60):
            await running.console.ready.wait()
        done = time.perf_counter()
        prefault_s, qmp_s = running.timings["prefault"], running.timings["qmp_ready"]
        parts = {
            "QEMU's start, handoff, QMP": qmp_s,
            "admission, folder, proof": prepared - started - prefault_s - qmp_s,
            "cont to READY": done - prepared,
        }
        for name, seconds in parts.items():
            steps.setdefault(name, []).append(seconds)
        return done - started - prefault_s


def direct_map(size: int, rounds: int) -> Figure:
    """Check every page of secret RAM, all of which fault once each. It has no rival."""
    say(f"direct-map check of {size // MIB} MiB")
    with ram.SecretRam(size) as secret, mmap.mmap(secret.fileno(), size) as memory:
        asyncio.run(secret.prefault(lambda _: None))
        for offset in range(0, size, procfs.PAGE_SIZE):
            memory[offset]  # a page table entry, which the prefault's process took with it
        entries = pagemap_entries(os.getpid(), secret.inode)
        with DirectMap.open() as reader:
            seconds = [timed(lambda: reader.check(entries)) for _ in range(rounds)]
            result = reader.check(entries)
    assert (result.checked, result.readable) == (size // procfs.PAGE_SIZE, 0), result
    return Figure(
        f"direct-map check of {size // MIB} MiB, all unreadable",
        result.checked / statistics.median(seconds) / 1e6, None, "million pages/s", None, ">= 2", rounds,
    )  # fmt: skip


def touched_regions(rounds: int) -> Iterator[Figure]:
    """Count the 2 MiB of the direct map that ways to prefault break up, against the fewest that could be."""
    size = 256 * MIB
    say(f"regions of the direct map that {size // MIB} MiB touch")
    for way, touched in bench_direct_map.ways(size, rounds, max(THREADS, 2)).items():
        per_mib = touched.splits_per_mib
        splits = "splits not counted" if per_mib is None else f"{per_mib:.2f} splits for each MiB"
        yield Figure(
            f"direct map: regions that {size // MIB} MiB touch, {way}", touched.regions, touched.ideal, "regions",
            touched.regions / touched.ideal, "stated", rounds, f"{touched.rate:.0f} MiB/s, {splits}",
        )  # fmt: skip


def kernel_reads(folder: Path, rounds: int) -> Iterator[Figure]:
    """Time what the kernel does in its own memory; an operator compares a host before and after (DIRECT-MAP.md)."""
    say("the kernel's own reads of memory")
    size, found = bench_direct_map.kernel_reads(folder, rounds)
    huge = direct_map_use.of().in_huge_pages
    share = "" if huge is None else f", {huge / MIB:.0f} MiB of the direct map in huge pages"
    for name, median in found.items():
        call, _, unit = name.rpartition(", ")
        yield Figure(call, median, None, unit, None, "stated", rounds, f"large: {size // MIB} MiB{share}")


def hunt_all(rounds: int) -> Figure:
    """Hunt needles that are nowhere through all RAM, against memmem() over ordinary memory on as many threads.

    The slowest needle counts. A bad one has pairs of bytes that memmem() takes for zeroes (isolation/needle.py).
    """
    size = min(4096 * MIB, procfs.meminfo()["MemAvailable"] // 4 // MIB * MIB)
    threads = min(THREADS, 2)
    say(f"hunt through all RAM, memmem over {size // MIB} MiB")
    libc = ctypes.CDLL(None)
    libc.memmem.restype = ctypes.c_void_p
    libc.memmem.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)
    plain = hashlib.shake_256(b"memmem").digest(64)
    total = sum(end - start for start, end in procfs.ram_ranges())
    hits = []

    # Two good ones, one with a bad end, one without a long good part, a short one.
    needles = [halves(64), halves(60), halves(64, *range(56, 64)), halves(64, *range(8, 64, 16)), halves(16, 13, 14)]

    def ours() -> float:
        slowest = 0.0
        for half_a, half_b in needles:
            with Needle.xor(half_a, half_b) as needle:
                found = hunt(needle, {}, lambda *_: None)
            hits.append(found.hits)
            slowest = max(slowest, found.seconds)
        return slowest

    # Zeroes, as most of a host's free memory is. MAP_POPULATE: all of it is backed.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    with mmap.mmap(-1, size, flags) as memory, ThreadPoolExecutor(threads) as pool:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        share = size // threads

        def rival() -> float:
            parts = [(start + number * share, share, plain, len(plain)) for number in range(threads)]
            return timed(lambda: list(pool.map(lambda part: libc.memmem(*part), parts)))

        mine, theirs = in_turn(rounds, ours, rival)
    return Figure(
        f"hunt through all {total // MIB} MiB of RAM, the slowest of {len(needles)} needles, {threads} threads, "
        f"against memmem over {size // MIB} MiB",
        total / mine / (1 << 30), size / theirs / (1 << 30), "GiB/s", (total / mine) / (size / theirs),
        ">= 5 GiB/s", rounds, f"{sum(hits)} hits",
    )  # fmt: skip


def halves(size: int, *bad: int) -> tuple[bytes, bytes]:
    """Return what XORed is a needle; its byte at each index of `bad` makes a pair that memmem() takes for zeroes."""
    half_a = bytearray(hashlib.shake_256(f"a{size}".encode()).digest(size))
    half_b = hashlib.shake_256(f"b{size}".encode()).digest(size)
    for index in bad:
        half_a[index] = ((half_a[index - 1] ^ half_b[index - 1]) << 3 & 0xFF) ^ half_b[index]
    return bytes(half_a), half_b


def audit(folder: Path, rounds: int) -> Figure:
    """Audit a live guest, from the start of the command to its end. It has no rival."""
    say("audit of a live guest of 256 MiB")
    guest_file(folder, fill=True, size="256MiB")
    program = str(Path(sys.executable).with_name("vmmback"))
    with supervised(folder) as supervisor:
        seconds = [run_s([program, "audit", "bench"]) for _ in range(rounds)]
        report = json.loads(
            subprocess.run([program, "audit", "bench", "--json"], check=True, capture_output=True).stdout
        )
        end(supervisor)
    inside = report["timings"]["audit"]
    return Figure(
        "vmmback audit of a live guest of 256 MiB, whole command", statistics.median(seconds) * 1000, None, "ms", None,
        "< 1000", rounds, f"{inside * 1000:.0f} ms of it in the supervisor",
    )  # fmt: skip


def start_up(rounds: int) -> Figure:
    """Start `vmmback --help`, against a Python that does nothing."""
    say("start of vmmback --help")
    program = Path(sys.executable).with_name("vmmback")
    mine, theirs = in_turn(rounds, lambda: run_s([str(program), "--help"]), lambda: run_s([sys.executable, "-c", ""]))
    return Figure(
        "vmmback --help, against bare Python", mine * 1000, theirs * 1000, "ms", mine / theirs,
        "< 150 ms over it", rounds, f"{(mine - theirs) * 1000:.0f} ms over it",
    )  # fmt: skip


def resident(folder: Path) -> Figure:
    """Read the resident memory of a supervisor whose guest runs, against a Python that does nothing."""
    say("resident memory of the supervisor")
    guest_file(folder, fill=False)
    with supervised(folder) as supervisor:
        mine = resident_bytes(supervisor.pid)
        end(supervisor)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as idle:
        assert idle.stdout is not None
        idle.stdout.readline()
        theirs = resident_bytes(idle.pid)
    return Figure(
        "resident memory of a supervisor, its guest validated, against bare Python",
        mine / MIB, theirs / MIB, "MiB", mine / theirs, "stated", 1,
    )  # fmt: skip


def many(folder: Path, rounds: int) -> Iterator[Figure]:
    """List fifty guests, and look at their host, against a Python that does nothing."""
    say(f"{GUESTS} guests at once")
    program = str(Path(sys.executable).with_name("vmmback"))
    with many_guests(program, folder):
        mine, theirs = in_turn(rounds, lambda: run_s([program, "ps"]), lambda: run_s([sys.executable, "-c", ""]))
        yield Figure(
            f"vmmback ps with {GUESTS} guests, against bare Python", mine * 1000, theirs * 1000, "ms", mine / theirs,
            "< 300 ms", rounds, f"{(mine - theirs) * 1000:.0f} ms over it",
        )  # fmt: skip
        mine, theirs = in_turn(
            rounds, lambda: run_s([program, "host", "--json"]), lambda: run_s([sys.executable, "-c", ""])
        )
        yield Figure(
            f"vmmback host --json with {GUESTS} guests, against bare Python", mine * 1000, theirs * 1000, "ms",
            mine / theirs, "< 200 ms", rounds, f"{(mine - theirs) * 1000:.0f} ms over it",
        )  # fmt: skip


def hundred(folder: Path, _: int) -> Iterator[Figure]:
    """Launch a hundred guests at once, until all are isolated; weigh one of their supervisors. Neither has a rival."""
    say(f"{MORE_GUESTS} guests at once")
    started = time.perf_counter()
    with many_guests(str(Path(sys.executable).with_name("vmmback")), folder, MORE_GUESTS) as pids:
        seconds, one = time.perf_counter() - started, cost(pids)
    yield Figure(
        f"{MORE_GUESTS} guests of 16 MiB launched at once, until all are isolated", seconds, None, "s", None, "all", 1
    )
    yield Figure(
        f"one supervisor of {MORE_GUESTS}, resident memory of its own", one.own_bytes / MIB, None, "MiB", None,
        "<= 30 MiB", 1, str(one),
    )  # fmt: skip


def resident_bytes(pid: int) -> int:
    """Return VmRSS in bytes."""
    return int(procfs.status(pid)["VmRSS"].removesuffix(" kB")) * 1024


_KINDS: dict[str, Callable[[Path, int], Iterable[Figure]]] = {
    "prefault": prefaults,
    "linear": linear,
    "libvirt": libvirt_starts,
    "broker-launch": broker.launches,
    "broker-acquire": broker.acquire,
    "broker-splits": broker.splits,
    "broker-soak": soak,
    "ready": lambda folder, rounds: [ready(folder, rounds, fill=fill) for fill in (False, True)],
    "direct-map": lambda _, rounds: [direct_map(size, rounds) for size in (256 * MIB, 1024 * MIB)],
    "regions": lambda _, rounds: touched_regions(rounds),
    "kernel-reads": kernel_reads,
    "hunt": lambda _, rounds: [hunt_all(rounds)],
    "audit": lambda folder, rounds: [audit(folder, rounds)],
    "help": lambda _, rounds: [start_up(rounds)],
    "resident": lambda folder, _: [resident(folder)],
    "many": many,
    "hundred": hundred,
}


if __name__ == "__main__":
    main()
