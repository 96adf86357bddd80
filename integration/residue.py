"""What a guest's data leaves on the host: `./dev residue`, or `python -m integration.residue [--json]`, as root.

A Linux guest (guest/residue-init) makes a canary and writes it through its console, a disk or a network card. All of
the host's memory is searched for it while the guest writes and after its end; hits are counted by place.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from unittest import mock

from rich.console import Console
from rich.table import Table

from integration import capabilities
from integration.conftest import Backing, LiveGuest, MemoryGroup, prepared
from vmmback import command, disk_images
from vmmback.config import GuestConfig
from vmmback.host.qemu import kernel_release
from vmmback.isolation.hunt import hunt
from vmmback.isolation.needle import Needle
from vmmback.report import Hunt

ROOT = capabilities.ROOT
MODULES = ROOT / "build/guest/modules"
INIT = ROOT / "integration/guest/residue-init"

Way: TypeAlias = Literal["none", "serial", "disk-writeback", "disk-luks", "net-dgram", "net-user"]
End: TypeAlias = Literal["quit", "kill", "abort", "out-of-memory"]
WAYS: tuple[Way, ...] = get_args(Way)
ENDS: tuple[End, ...] = get_args(End)
BACKINGS: tuple[Backing, ...] = get_args(Backing)

PLACES = (
    "guest", "QEMU's heap", "QEMU's other", "supervisor", "process", "page cache", "shared memory",
    "slab", "kernel", "free", "gone",
)  # fmt: skip
"""Where hits are counted: the guest's frames (its former ones after its end), then as docs/HUNT.md names them."""

GUEST_BYTES = 128 << 20
DISK_BYTES = 32 << 20
_PORT = 5514  # the init's
_TRIED_WITH_ALL_ENDS: Way = "disk-luks"
_END_TIMEOUT_S = 20.0
# As a guest file's nic, without an option ROM.
_CARD = "virtio-net-pci,netdev=net,romfile="


@dataclass(frozen=True)
class Row:
    """One hunt: how much of the canary it found, by place; `when` is "running" or how the guest ended."""

    backing: Backing
    way: Way
    when: str
    hits: dict[str, int]
    seconds: float


# --- The guest --------------------------------------------------------------------------------------------------------


def pack_initrd(folder: Path, init: Path = INIT, task: str = "") -> Path:
    """Return an initrd: the demo guest's, and behind it what replaces its init and the modules that it lacks.

    It has the file /task besides, for an init that does what that says.

    The kernel unpacks archives one after the other (Documentation/driver-api/early-userspace/buffer-format.rst).
    """
    tree = folder / "initrd"
    modules = tree / "lib/modules"
    modules.mkdir(parents=True)
    for module in MODULES.glob("*.ko"):
        shutil.copy(module, modules)
    shutil.copy(init, tree / "init")
    (tree / "task").write_text(task)
    (tree / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    cpio = ["busybox", "cpio", "-o", "-H", "newc", "-R", "0:0"]
    packed = subprocess.run(cpio, cwd=tree, input=names.encode(), capture_output=True, check=True).stdout
    initrd = folder / f"{init.name}.img"
    initrd.write_bytes(capabilities.INITRD.read_bytes() + gzip.compress(packed, 1))
    return initrd


def guest_file(folder: Path, backing: Backing, way: Way, console_log: Path | None = None) -> Path:
    """Write the guest file of a residue guest into `folder`, and its initrd."""
    name = f"residue-{secrets.token_hex(4)}"
    kind = way.partition("-")[0]
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\n'
        f'[memory]\nsize = "{GUEST_BYTES >> 20}MiB"\nbacking = "{backing}"\n'
        f'[cpu]\nmodel = "max,-erms,-fsrm"\n'
        f'[machine]\naccel = "tcg"\n'
        f'[boot]\nkernel = "{capabilities.KERNEL}"\ninitrd = "{pack_initrd(folder)}"\n'
        f'cmdline = "console=ttyS0 quiet panic=-1 no_timer_check residue={kind}"\n'
        f'[isolation]\nready = "GUEST READY"\n'
        + (f'[console]\nlog = "{console_log}"\n' if console_log else "")
        + _disk(folder, way)
    )
    return path


def _disk(folder: Path, way: Way) -> str:
    """Make the guest's disk; return its table, "" if it has none."""
    if not way.startswith("disk-"):
        return ""
    kind: Literal["luks", "raw"] = "luks" if way == "disk-luks" else "raw"
    disk, key = folder / f"disk.{kind}", folder / "disk.key"
    disk_images.create(disk, DISK_BYTES, kind, *([key] if kind == "luks" else []), new_key=kind == "luks")
    keys = f'key-file = "{key}"\n' if kind == "luks" else 'plaintext = "allowed"\n'
    return f'[[disk]]\npath = "{disk}"\nformat = "{kind}"\n{keys}'


@contextmanager
def devices(folder: Path, way: Way) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Yield what QEMU's command line needs for this way, and the descriptors it inherits for it."""
    with ExitStack() as stack:
        match way:
            case "net-dgram":
                ours, qemus = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
                stack.enter_context(qemus)
                stack.enter_context(drained(ours))
                number = str(qemus.fileno())
                netdev = {"type": "dgram", "id": "net", "local": {"type": "fd", "str": number}}
                yield ["-netdev", json.dumps(netdev), "-device", _CARD], (qemus.fileno(),)
            case "net-user":
                receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                receiver.bind(("127.0.0.1", _PORT))
                stack.enter_context(drained(receiver))
                yield ["-netdev", "user,id=net", "-device", _CARD], ()
            case _:
                yield [], ()


@contextmanager
def drained(receiver: socket.socket) -> Iterator[None]:
    """Take datagrams from a socket as they come, of each a byte: the rest never enters our memory (recv(2)).

    The socket is closed on exit.
    """

    def drain() -> None:
        with contextlib.suppress(OSError):
            while True:
                receiver.recv(1, socket.MSG_TRUNC)
                if stop.is_set():
                    return

    stop = threading.Event()
    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        with contextlib.suppress(OSError):
            receiver.shutdown(socket.SHUT_RDWR)  # wakes the thread
        thread.join()
        receiver.close()


@contextmanager
def residue_guest(folder: Path, backing: Backing, way: Way, console_log: Path | None = None) -> Iterator[LiveGuest]:
    """Bring up a residue guest whose supervisor is this process, let it run until it has written; end it on exit."""
    build = command.build
    with devices(folder, way) as (more, descriptors):

        def build_more(*arguments: Any) -> command.QemuCommand:
            built = build(*arguments)
            return built._replace(argv=(*built.argv, *more), descriptors=(*built.descriptors, *descriptors))

        with (
            mock.patch.object(command, "build", build_more),
            mock.patch.object(GuestConfig, "needs_host_network", way == "net-user"),
            prepared(guest_file(folder, backing, way, console_log)) as live,
        ):
            live.watcher.console = lambda data: None  # type: ignore[method-assign]  # a recorder would keep it
            try:
                live.start()
            except TimeoutError:
                raise TimeoutError(f"the guest did not say GUEST READY in time: {_log(live)}") from None
            yield live


def _log(live: LiveGuest) -> str:
    return (live.guest.folder / "serial.log").read_text(errors="replace")[-500:]


def end(live: LiveGuest, how: End) -> None:
    """End the guest's QEMU; wait until it is gone. The supervisor holds the RAM still."""

    async def gone() -> None:
        await live.guest.qemu.ended(_END_TIMEOUT_S)

    match how:
        case "quit":
            live.run(live.guest.monitor.quit())
            live.run(gone())
        case "kill":
            live.run(live.guest.qemu.kill())
        case "abort":
            os.kill(live.pid, signal.SIGABRT)
            live.run(gone())
        case "out-of-memory":
            _starve(live)


def _starve(live: LiveGuest) -> None:
    """Let QEMU take more memory than its group has: the kernel then kills it (mm/oom_kill.c)."""
    group = MemoryGroup(capabilities.new_memory_group())
    try:
        group.limit(64 << 20)
        (group.folder / "cgroup.procs").write_text(str(live.pid))

        async def starve() -> None:
            backend = {"qom-type": "memory-backend-ram", "id": "more", "size": 256 << 20, "prealloc": True}
            asked = asyncio.ensure_future(live.guest.monitor.execute("object-add", backend))
            await live.guest.qemu.ended(_END_TIMEOUT_S)
            await asyncio.wait({asked})
            with contextlib.suppress(Exception):
                asked.result()  # it went away

        live.run(starve())
        assert live.guest.qemu.status == -signal.SIGKILL, live.guest.qemu.status
    finally:
        group.remove()


# --- The hunts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """What is searched for, and where the guest's frames are or were; `qemu` is its pid."""

    halves: tuple[bytes, bytes]
    frames: array[int]
    qemu: int

    @classmethod
    def of(cls, live: LiveGuest) -> Search:
        """Return what is to be searched for of a running guest."""
        halves = live.guest.console.canary_halves
        assert halves is not None
        frames: array[int] = live.run(live.guest.frames())
        return cls(halves, frames, live.pid)

    def counts(self) -> tuple[Counter[str], Hunt]:
        """Search all of the host's memory; return the hits by place, and all that the hunt says."""
        with Needle.xor(*self.halves) as needle:
            found = hunt(needle, {"guest": self.frames}, lambda *_: None)
        hits: Counter[str] = Counter()
        for place in found.places:
            hits[self._place(place.place, place.owner)] += place.hits
        return hits, found

    def _place(self, place: str, owner: str) -> str:
        if place != "process":
            return place
        if owner.startswith(f"{self.qemu} ("):
            return "QEMU's heap" if owner.endswith("[heap]") else "QEMU's other"
        return "supervisor" if owner.startswith(f"{os.getpid()} (") else "process"


@contextmanager
def frozen(live: LiveGuest) -> Iterator[None]:
    """Stop QEMU in the midst of what it does, by SIGSTOP: so no hit is gone before its owner is looked up."""
    os.kill(live.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(live.pid, signal.SIGCONT)


def measure(backing: Backing, way: Way, how: End) -> list[Row]:
    """Run one guest; hunt while it writes, and after its end, when the supervisor has released all it held of it."""
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="vmmback-residue-", dir=ROOT / "build") as place,
        mock.patch.dict(os.environ, VMMBACK_RUNTIME_DIR=str(Path(tempfile.mkdtemp(prefix="vmmback-run-", dir="/tmp")))),
    ):
        try:
            with residue_guest(Path(place), backing, way) as live:
                search = Search.of(live)
                with frozen(live):
                    rows.append(_row(backing, way, "running", search))
                end(live, how)
            rows.append(_row(backing, way, how, search))
        finally:
            shutil.rmtree(os.environ["VMMBACK_RUNTIME_DIR"], ignore_errors=True)
    return rows


def _row(backing: Backing, way: Way, when: str, search: Search) -> Row:
    hits, found = search.counts()
    return Row(backing, way, when, dict(hits), found.seconds)


def table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table, without columns that are zero in all of them."""
    places = [place for place in PLACES if any(row.hits.get(place) for row in rows)]
    made = Table("RAM", "way", "when", *places, title=f"Linux {kernel_release()}; frames with the canary, by place")
    for row in rows:
        made.add_row(row.backing, row.way, row.when, *(str(row.hits.get(place, 0)) for place in places))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each way and each end of a guest, on secret RAM and on ordinary memory."""
    parser = argparse.ArgumentParser(prog="./dev residue", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    as_json = parser.parse_args(arguments).json
    # Each way, and each end once more, where most is left in QEMU's heap.
    pairs = [*((way, ENDS[0]) for way in WAYS), *((_TRIED_WITH_ALL_ENDS, how) for how in ENDS[1:])]
    wanted = [(backing, way, how) for backing in BACKINGS for way, how in pairs]
    rows: list[Row] = []
    started = time.monotonic()
    for number, (backing, way, how) in enumerate(wanted, 1):
        print(
            f"{number} of {len(wanted)}, {time.monotonic() - started:.0f} s: {backing}, {way}, {how}", file=sys.stderr
        )
        rows += measure(backing, way, how)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        Console(width=160 if not sys.stdout.isatty() else None).print(table(rows))


if __name__ == "__main__":
    main()
