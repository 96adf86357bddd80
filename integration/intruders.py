"""Guests that run in a process of their own, and those who get at their RAM in ways that secret RAM does not close."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.conftest import ROOT, Ended, Start, Supervisor, guest_file
from integration.leftovers import children_of, command_line
from integration.test_launch import probes_of, report_of
from vmmback.isolation import access
from vmmback.isolation.probe import Target
from vmmback.linux import procfs

# `vmmback` with little patience with a guest that ignores its power button, and with what a test changes.
LAUNCHES = """
import json, os, socket, sys
from vmmback import cli, command, guest, handoff, launch
launch._POWERDOWN_TIMEOUT_S = 0.1

def change_command(change, descriptors=()):
    build = command.build
    def changed(*arguments):
        built = build(*arguments)
        argv = tuple(change(list(built.argv)))
        return built._replace(argv=argv, descriptors=(*built.descriptors, *descriptors))
    command.build = changed

{change}
cli.main()
"""

# QEMU gets ordinary RAM of its own making, and nothing looks after that before the guest runs.
WITHOUT_HANDOFF = """
def plain(argv):
    at = argv.index("-object") + 1
    size = json.loads(argv[at])["size"]
    argv[at] = json.dumps({"qom-type": "memory-backend-ram", "id": command.RAM_ID, "size": size})
    return argv
change_command(plain)
async def handed_over(self, timeout_s): pass
handoff.Qemu.handed_over = handed_over
guest.confirm = lambda guest_ram, proof: None
"""

# QEMU has a second full QMP connection. The socket is at argv[1]: bound here, since QEMU sees no such folder.
WITH_FULL_QMP = """
full = socket.socket(socket.AF_UNIX)
full.bind(sys.argv.pop(1))
full.listen()
chardev = f"socket,id=full,fd={full.fileno()},server=on,wait=off"
change_command(lambda argv: [*argv, "-chardev", chardev, "-mon", "chardev=full,mode=control"], [full.fileno()])
"""

# The audit says that it is under way (by the file argv[1]), and waits for the guest's end.
SLOW_AUDIT = """
began = sys.argv.pop(1)
from vmmback.guest import Guest
examine = Guest.examine
async def slow(self):
    if self.evidence:
        open(began, "w").close()
        await self.qemu.ended()
    return await examine(self)
Guest.examine = slow
"""

# argv: what, QEMU's pid, the number of its descriptor. It says "ready", and stays until it is killed.
INTRUDER = """
import mmap, os, sys
from vmmback.linux import ptrace
from vmmback.linux.pidfd import pidfd_getfd
what, pid, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if what == "traces":
    ptrace._request(ptrace._SEIZE, pid)
else:
    copy = pidfd_getfd(os.pidfd_open(pid), number)
    if what == "maps":
        memory = mmap.mmap(copy, 1 << 20)
        os.closerange(3, 1000)  # the mapping stays; Python's own copy of the descriptor goes too
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass
class Launched:
    """A tiny guest that runs, launched by a process of its own, and the QEMU that runs it."""

    name: str
    process: Supervisor
    folder: Path
    qemu: int
    vmmback: Start

    def audit(self, *options: str | Path) -> Ended:
        """Run `vmmback audit` of it; a hunt reads all of the host's memory, the first time slowly (docs/HUNT.md)."""
        return self.vmmback("audit", self.name, "--json", *options).ended(240)

    def end(self) -> Ended:
        """Ask for its end, and wait for that."""
        if self.process.process.poll() is None:
            self.process.process.send_signal(signal.SIGTERM)
        return self.process.ended()

    def inode(self) -> int:
        """Return that of the RAM, the largest file of secret memory that QEMU maps."""
        secret = [m for m in procfs.maps(self.qemu) if m.path == procfs.SECRETMEM]
        return max(secret, key=lambda m: m.size).inode

    def descriptor(self) -> int:
        """Return the number of QEMU's descriptor of the RAM."""
        return access.descriptors_of(Target(self.qemu, {self.inode(): 0}))[0]


Launches = Callable[..., Launched]


def launches(start: Start, vmmback: Start, runtime_dir: Path, folder: Path) -> Launches:
    """Return a function that launches a tiny guest and waits until it is validated; ends it if it still runs."""

    def begin(change: str = "", *arguments: str | Path, **options: Any) -> Launched:
        file = guest_file(folder, **options)
        argv = [sys.executable, "-c", LAUNCHES.replace("{change}", change), *arguments, "launch", file, "--json"]
        process = start(*argv)
        process.wait_for("while it runs")
        (qemu,) = [pid for pid in children_of(process.process.pid) if "qemu-system-" in command_line(pid)]
        return Launched(file.stem, process, runtime_dir / file.stem, qemu, vmmback)

    return begin


@contextmanager
def intruder(what: str, guest: Launched) -> Iterator[int]:
    """Let another process hold, map or trace while the block runs; yield its pid."""
    argv = [sys.executable, "-c", INTRUDER, what, str(guest.qemu), str(guest.descriptor())]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def unprotect(full_qmp: Path, guest: Launched) -> None:
    """Take the protection from core dumps off, as whoever has a full QMP connection can."""
    command = {"path": "/objects/ram0", "property": "dump", "value": True}
    assert qmp(full_qmp, "qom-set", command) == {"return": {}}
    mappings = procfs.memory_mappings(procfs.smaps(guest.qemu), guest.inode())
    assert not any("dd" in mapping.flags for mapping in mappings)


def qmp(path: Path, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """Return the answer to one command."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:
        connection.settimeout(20)
        connection.connect(str(path))
        lines.readline()
        for name, given in (("qmp_capabilities", {}), (command, arguments or {})):
            lines.write(json.dumps({"execute": name, "arguments": given, "id": 1}))
            lines.flush()
            while "id" not in (answer := json.loads(lines.readline())):
                pass
        del answer["id"]
        return answer


def readable(report: Any) -> set[str]:
    """Return the names of the probes that read the guest."""
    return {name for name, probe in probes_of(report).items() if probe["verdict"] == "readable"}


__all__ = [
    "SLOW_AUDIT",
    "WITHOUT_HANDOFF",
    "WITH_FULL_QMP",
    "Launched",
    "Launches",
    "intruder",
    "launches",
    "probes_of",
    "qmp",
    "readable",
    "report_of",
    "unprotect",
]
