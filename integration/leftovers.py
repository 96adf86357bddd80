"""What a launch must not leave behind, told apart from what runs beside it: by descent, by inode and by cgroup.

`Family` makes this process the one that orphans come to (PR_SET_CHILD_SUBREAPER, prctl(2)), so that every process that
a launch has started is found, whatever it is named and however its parent ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from integration import capabilities
from integration.conftest import MIB, eventually
from vmmback.host.qemu import find_qemu
from vmmback.linux import procfs

_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h

# The CPU's first instructions pulse the keyboard controller's reset line, and QEMU, run with -no-reboot, ends: a guest
# of a tenth of a second.
#     b0 fe  mov al, 0xfe;  e6 64  out 0x64, al;  f4  hlt;  eb fd  jmp hlt
RESETS = bytes(0xFFF0) + bytes.fromhex("b0fe e664 f4 ebfd") + bytes(9)


# --- Processes --------------------------------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    """Return the children of all threads of a process; none when it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def command_line(pid: int) -> str:
    """Return a process's arguments with spaces between them: "" for one that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> dict[int, str]:
    """Return the live processes below `pid`, as `description` has them."""
    found: dict[int, str] = {}
    for child in children_of(pid):
        if described := description(child):
            found[child] = described
        found |= descendants(child)
    return found


def description(pid: int) -> str:
    """Return the end of a process's command line and where in the kernel it waits: "" if there is none, or a zombie.

    A process amid execve(2) has no command line, and lives all the same.
    """
    try:
        status = procfs.status(pid)
        if status["State"][0] in "ZX":
            return ""
        return f"{command_line(pid)[-160:].strip() or status['Name']} ({Path(f'/proc/{pid}/wchan').read_text()})"
    except OSError:
        return ""


class Family:
    """All processes that this one starts, directly or not, from here on. A context manager."""

    def __enter__(self) -> Self:
        self._before = set(children_of(os.getpid()))
        _become_subreaper(True)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for pid in self.survivors():  # of a test that has failed already
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            eventually(lambda: not self.survivors(), "what the test has left is killed")
        finally:
            _become_subreaper(False)

    def survivors(self) -> dict[int, str]:
        """Return those that live, and reap the others: whoever wants a status must have waited for it before."""
        found: dict[int, str] = {}
        for pid in set(children_of(os.getpid())) - self._before:
            if described := description(pid):
                found[pid] = described
            elif not _reaped(pid):  # its main thread is a zombie, and others of it have not ended yet
                found[pid] = "ends"
            found |= descendants(pid)
        return found


def _become_subreaper(wanted: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _reaped(pid: int) -> bool:
    """Take a child's status; False if it has none to give yet."""
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:  # whoever started it was quicker
        return True


# --- Descriptors ------------------------------------------------------------------------------------------------------


def descriptors_of(pid: int) -> dict[str, str]:
    """Return what each descriptor of a process refers to; none when it is gone."""
    links: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links[entry.name] = str(entry.readlink())
    return links


def secret_inodes(pid: int) -> set[int]:
    """Return the inodes of the secret RAM that a process holds a descriptor of."""
    found: set[int] = set()
    for number, link in descriptors_of(pid).items():
        if link == procfs.SECRETMEM:
            with contextlib.suppress(OSError):
                found.add(Path(f"/proc/{pid}/fd/{number}").stat().st_ino)
    return found


def holders_of(inodes: set[int]) -> dict[int, str]:
    """Return the command lines of the processes, of all on this machine, that hold or map one of these inodes."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            pid = int(entry.name)
            if inodes & secret_inodes(pid) or inodes & _mapped_inodes(pid):
                found[pid] = command_line(pid)
    return found


def _mapped_inodes(pid: int) -> set[int]:
    try:
        return {mapping.inode for mapping in procfs.maps(pid) if mapping.path == procfs.SECRETMEM}
    except OSError:
        return set()


def named_sockets(folder: Path) -> list[str]:
    """Return the addresses of all Unix sockets that were bound below `folder`."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    return [address for line in lines if (address := line.partition(" /")[2]) and f"/{address}".startswith(str(folder))]


# --- Memory -----------------------------------------------------------------------------------------------------------


class SecretMemory:
    """How much secret RAM is in use: by a memory cgroup where there can be one of our own, else by the machine."""

    def __init__(self, group: Path | None) -> None:
        self._group = group
        self._before = self._unevictable()

    def used(self) -> int:
        """Return the bytes that have come since this object was made."""
        return self._unevictable() - self._before

    def is_back(self) -> bool:
        """Tell whether all is free again; where others count too, less than a small guest's RAM may be in use."""
        return self.used() < (MIB if self._group else 32 * MIB)

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` where it is counted."""
        if self._group is None:
            return list(argv)
        return ["sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec "$@"', str(self._group), *argv]

    def _unevictable(self) -> int:
        """Secret RAM is never swapped, and so on the list of what cannot be evicted (mm/secretmem.c)."""
        if self._group is None:
            return procfs.meminfo()["Unevictable"]
        lines = (self._group / "memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["unevictable"])


@contextmanager
def secret_memory() -> Iterator[SecretMemory]:
    """Count secret RAM while the block runs."""
    try:
        group = capabilities.new_memory_group()
    except OSError:
        group = None
    try:
        yield SecretMemory(group)
    finally:
        if group is not None:
            eventually(lambda: _removed(group), f"{group} can be removed")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


# --- A stand-in for QEMU ----------------------------------------------------------------------------------------------

_STAND_IN = """\
#!{python} -IS
import ctypes, json, mmap, os, socket, sys, time

def option(name):
    return sys.argv[sys.argv.index(name) + 1]

backend = json.loads(option("-object"))
path, size = backend["mem-path"], backend["size"]
numbers = [word for word in sys.argv if word.startswith("socket,id=qmp,fd=")]
VERSION = {{"qemu": {{"major": 9, "minor": 9, "micro": 9}}, "package": ""}}
monitor = socket.socket(fileno=int(numbers[0].rpartition("=")[2]))

def say(words):
    print(words, file=sys.stderr, flush=True)

def take():  # with QEMU's flags: os.open would add O_CLOEXEC
    number = ctypes.CDLL(None, use_errno=True).open(path.encode(), os.O_RDWR)
    return number if number >= 0 else os.strerror(ctypes.get_errno())

def greet():
    send({{"QMP": {{"version": VERSION, "capabilities": []}}}})

def send(message):
    monitor.sendall(json.dumps(message).encode() + b"\\r\\n")

def requests():  # which qemu.qmp does not end with a newline
    text = ""
    while data := monitor.recv(1 << 16):
        text += data.decode()
        while text:
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            text = text[end:].lstrip()
            yield request

def serve(hmp):
    greet()
    for request in requests():
        answer = {{}}
        if request["execute"] == "query-version":
            answer = VERSION
        elif request["execute"] == "human-monitor-command":
            answer = hmp(request["arguments"]["command-line"])
        elif request["execute"] == "cont":
            say("CONT WAS SENT")
        send({{"return": answer, "id": request.get("id")}})

def stay():
    while True:
        time.sleep(1000)

{body}
"""


def stand_in(folder: Path, python: str, body: str) -> Path:
    """Write a program named like QEMU whose `body` is Python; return its folder, for PATH."""
    folder.mkdir()
    program = folder / find_qemu().name
    program.write_text(_STAND_IN.format(python=python, body=body))
    program.chmod(0o755)
    return folder


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return this process's environment with these changes; None takes a variable away."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}
