"""What test_guest_in_guest.py runs on a host whose kernel zones are small (debian_host.py). It is the first process."""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import vmmback.cli
from vmmback import admission, ram, runtime, tiny_guest
from vmmback.cli import detach  # noqa: F401 (what a launch imports is imported once, here, and not in each child)
from vmmback.errors import VmmbackError
from vmmback.host.budget import Budget
from vmmback.host.memory import HostMemory
from vmmback.linux import procfs, zones

MIB = 1 << 20
ROUNDS = 20
FIRST_GUEST = 24 * MIB
ROUND_GUEST = 4 * MIB
CONTROL_GUEST = 16 * MIB
SMALLEST_GUEST = 16 * MIB
ROUND_ROOM = 10 * MIB  # the work before the rounds leaves some slab, and the direct map in smaller pages

FOLDER = Path("/guests")

_PER_TABLE = 2 * MIB  # what a page of page table entries maps
_NORESERVE = 0x4000
_NO_HUGE_PAGES = 15
_CHUNK = MIB
_CONTROL_S = 120.0


class Work(NamedTuple):
    """What asks the kernel for memory: processes that live at once, page tables, a file's pages, inodes."""

    forks: int
    tables: int
    read: int
    files: int


WORK = Work(forks=100, tables=20 * MIB, read=256 * MIB, files=1000)
ROUND_WORK = Work(forks=5, tables=2 * MIB, read=8 * MIB, files=50)


def main() -> dict[str, Any]:
    """Fill the host by admission, work, go on at the brim, and at last fill it without."""
    gc.freeze()  # what is here stays: collecting it would copy its pages in each child
    FOLDER.mkdir()
    (FOLDER / "tiny.rom").write_bytes(tiny_guest.rom_with_canary())
    with (FOLDER / "large").open("wb") as file:
        file.truncate(WORK.read)
    began = _memory()
    told = {
        "began": began,
        **_timed("filled", _filled),
        **_timed("worked", lambda: _worked(WORK)),
        **_timed("rounds", _rounds),
        "ooms": _ooms(),
    }
    told |= _timed("released", _released)
    return told | _timed("control", _control) | {"log": _oom_words()}


def _timed(name: str, part: Callable[[], Any]) -> dict[str, Any]:
    """Do a part, and say on the console, whose log is kept, what came of it and how long it took."""
    started = time.monotonic()
    result = part()
    sys.stdout.write(f"inside: {name} took {time.monotonic() - started:.1f} s {json.dumps(result)}\n")
    sys.stdout.flush()
    return {name: result}


# --- What is told of the memory ---------------------------------------------------------------------------------------


def _memory() -> dict[str, int]:
    """Return what is free where secret pages can lie, and elsewhere, and what the kernel thinks is available."""
    found = [zone for node in zones.nodes() for zone in node.zones]
    return {
        "kernel": sum(zone.free for zone in found if zone.for_kernel) // MIB,
        "movable": sum(zone.free for zone in found if not zone.for_kernel) // MIB,
        "available": procfs.meminfo()["MemAvailable"] // MIB,
        "slab": sum(node.slab_reclaimable + node.slab_unreclaimable for node in zones.nodes()) // MIB,
        "tables": sum(node.page_tables for node in zones.nodes()) // MIB,
        "cache": sum(zone.file for zone in found if zone.for_kernel) // MIB,
    }


def _largest() -> int:
    return Budget.of(HostMemory.read(admission.promised())).largest_guest()


def _ooms() -> int:
    """Return how often the kernel has killed for want of memory."""
    return int(re.findall(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)[0])


def _oom_words() -> list[str]:
    """Return what the kernel said of it."""
    lines = []
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            lines.append(os.read(log, 8192).decode(errors="replace").partition(";")[2].partition("\n")[0])
    os.close(log)
    return [line for line in lines if re.search(r"oom-killer|oom-kill:|Out of memory|allocation failure", line)]


# --- Guests -----------------------------------------------------------------------------------------------------------


def _child(part: Callable[[int], None]) -> tuple[int, int]:
    """Fork a process that runs `part` with a descriptor to tell us by; return its pid and our end."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(ours)
            part(theirs)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 (nothing may return to what was forked)
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    os.close(theirs)
    return pid, ours


def _tell(descriptor: int, what: object) -> None:
    os.write(descriptor, json.dumps(what).encode() + b"\n")


def _told(descriptor: int) -> Any:
    """Return what a child told, None if it ended without a word."""
    with open(descriptor, "rb") as file:
        return json.loads(file.readline() or b"null")


def _vmmback(*arguments: str) -> dict[str, Any]:
    """Run `vmmback` with arguments, as a command, but for the time that its imports take; return its exit code."""

    def command(output: int) -> None:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.argv = ["vmmback", *arguments]
        vmmback.cli.main()

    pid, output = _child(command)
    with open(output, "rb") as file:
        said = file.read().decode(errors="replace")
    return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "said": said}


def _launch(name: str, size: int) -> dict[str, Any]:
    """Launch a guest with QEMU."""
    file = FOLDER / f"{name}.toml"
    file.write_text(
        f'name = "{name}"\n[memory]\nsize = "{size // MIB}MiB"\n'
        '[machine]\naccel = "tcg"\n[boot]\nfirmware = "tiny.rom"\n'
    )
    return _vmmback("launch", "--detach", "--no-validate", str(file)) | {"size": size // MIB, "memory": _memory()}


class Part:
    """A guest without QEMU: a supervisor of its own, with all that a launch does for the guest's RAM."""

    def __init__(self, name: str, size: int) -> None:
        self._stay, self._end = os.pipe()
        self.pid, told = _child(lambda tell: self._live(name, size, tell))
        self.said = _told(told)

    def _live(self, name: str, size: int, tell: int) -> None:
        os.close(self._end)
        with runtime.guest_folder(name) as folder:
            try:
                with asyncio.run(_ram(folder, size)):
                    _tell(tell, {"up": True})
                    os.read(self._stay, 1)
            except VmmbackError as error:
                _tell(tell, {"refused": error.message})

    def release(self) -> int:
        """Let it end; return its exit status."""
        os.write(self._end, b"x")  # guests that came later have copies of this end: to close it would not do
        os.close(self._end)
        os.close(self._stay)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


async def _ram(folder: Path, size: int) -> ram.SecretRam:
    promise = await admission.admit(folder, size, "secret")
    memory = ram.SecretRam(size)
    await memory.prefault(promise.touched)
    promise.settle([memory.inode])
    return memory


# --- The kernel's work ------------------------------------------------------------------------------------------------


def _worked(work: Work) -> dict[str, Any]:
    """Let the kernel work, all of it at once; return what memory was left after each part."""
    left = {"before": _memory()}
    stay, end = os.pipe()
    pids = []
    for _ in range(work.forks):
        pid = os.fork()
        if pid == 0:
            os.close(end)
            os.read(stay, 1)
            os._exit(0)
        pids.append(pid)
    left["forks"] = _memory()
    with mmap.mmap(
        -1, work.tables // mmap.PAGESIZE * _PER_TABLE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    ) as memory:
        memory.madvise(_NO_HUGE_PAGES)
        for start in range(0, len(memory), _PER_TABLE):
            memory[start] = 1
        left["tables"] = _memory()
        with (FOLDER / "large").open("rb", buffering=0) as file:
            buffer = bytearray(_CHUNK)
            read = 0
            while read < work.read:
                read += file.readinto(buffer)
        left["read"] = _memory()
        few = FOLDER / f"few-{os.getpid()}"
        few.mkdir()
        for number in range(work.files):
            (few / str(number)).touch()
        left["files"] = _memory()
    os.close(end)
    os.close(stay)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for number in range(work.files):
        (few / str(number)).unlink()
    few.rmdir()
    return {"left": left, "killed": sum(1 for code in ends if code), "ooms": _ooms()}


# --- The parts --------------------------------------------------------------------------------------------------------


def _filled() -> list[dict[str, Any]]:
    """Launch guests, the last as large as it may be to leave room for one of the rounds; one more is refused."""
    first = _launch("first", FIRST_GUEST)
    second = _launch("second", _largest() - ROUND_GUEST - ROUND_ROOM)
    return [first, second, _launch("third", SMALLEST_GUEST)]


def _rounds() -> list[dict[str, Any]]:
    return [_timed("round", partial(_round, number))["round"] for number in range(ROUNDS)]


def _round(number: int) -> dict[str, Any]:
    """Launch a guest and release it, while the kernel works."""
    pid, output = _child(lambda tell: _tell(tell, _worked(ROUND_WORK)))
    guest = Part(f"round-{number}", ROUND_GUEST)
    worked = _told(output)
    os.waitpid(pid, 0)
    return {"guest": guest.said, "end": guest.release(), "worked": worked}


def _released() -> dict[str, Any]:
    stopped = [_vmmback("stop", "--kill", name) for name in ("first", "second")]
    return {"stopped": stopped, "memory": _memory()}


def _control() -> dict[str, Any]:
    """Launch without admission until the kernel kills, and then let it work as before, until it kills again."""
    guests: list[Part] = []
    with mock.patch.object(Budget, "admit"):
        while not _ooms():
            before = _memory()
            guests.append(Part(f"control-{len(guests)}", CONTROL_GUEST))
    counted = _ooms()

    def work(tell: int) -> None:
        os.setpgid(0, 0)
        _tell(tell, _worked(WORK))

    pid, output = _child(work)
    deadline = time.monotonic() + _CONTROL_S
    while _ooms() == counted and time.monotonic() < deadline and not _has_ended(pid):
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(output)
    told = {"guests": [guest.said for guest in guests], "before": before, "ooms": [counted, _ooms()]}
    return told | {"ends": [guest.release() for guest in guests]}
