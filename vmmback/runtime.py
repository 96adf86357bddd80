"""Runtime state: one folder for each live guest, mode 0700, removed by a keeper process of a few lines.

The supervisor makes the folder and locks it (flock(2)); the keeper inherits the descriptor, and with it the lock, which
belongs to their one open file description. So the lock is free only when both are gone, be they killed or not: a folder
that nobody has locked is what a power cut or two SIGKILLs left. The next guest of that name takes it over, and
`live_guests` removes it. QEMU never has the descriptor.

The keeper removes the folder as soon as the pipe on its standard input closes, be it that the supervisor released it or
that the supervisor was killed: there is one way of clean-up, and it always runs. (A supervisor that is killed in the
millisecond between the making of the folder and the start of the keeper leaves an empty folder without a lock.)

Files are overwritten with zeroes before they are removed: what a guest printed is in there, and the kernel clears a
freed page of a file only when a later owner needs it cleared (init_on_free=1 on its command line would change that).
This is about memory: a runtime folder that is not in a tmpfs leaves what was written to its disk before.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vmmback.errors import GuestNameTaken, HostUnfit, UsageError

_KEEPER = r"""
trap '' HUP INT PIPE TERM
wipe() {
    find "$1" -type f -links 1 -size +0 -exec sh -c '
        for file; do
            dd if=/dev/zero of="$file" bs=1M count="$(stat -c %s -- "$file")" iflag=count_bytes conv=notrunc,nocreat
        done' sh {} + 2>/dev/null
    :
}
# A new folder is empty: to start `find` twice would be most of what a guest's folder costs.
[ -z "$(ls -A -- "$1")" ] || { wipe "$1"; find "$1" -mindepth 1 -delete; } || exit
chmod 700 -- "$1" && echo kept && read -r _
wipe "$1"
rm -rf -- "$1"
"""
_KEEPERS_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

_LAST_WORDS_BYTES = 2000

# Whoever removes stale folders holds the lock of one for a moment, until it has another name (`live_guests`).
_MOMENT_S = 0.25
_STALE = ".stale-"

BROKER = ".broker"
"""The broker's folder beside those of guests, whose names never begin so."""

CONTROL_SOCKET = "control"
QMP_SOCKET = "qmp.sock"
SERIAL_LOG, QEMU_LOG, SUPERVISOR_LOG = "serial.log", "qemu.log", "supervisor.log"

# A Unix socket's address holds 108 bytes (unix(7)); `socket_address` is for the names of guests that make it longer.
_LONGEST_FOLDER = 80


def runtime_folder() -> Path:
    """Return the folder that holds one folder for each live guest; it need not exist yet.

    Raises UsageError when $VMMBACK_RUNTIME_DIR is not an absolute path that QEMU's options can carry.
    """
    if chosen := os.environ.get("VMMBACK_RUNTIME_DIR"):
        _check(chosen)
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/vmmback")
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "vmmback"
    raise UsageError(
        "there is no place for runtime state: XDG_RUNTIME_DIR is not set",
        "set VMMBACK_RUNTIME_DIR to an absolute path of a folder of yours",
    )


def _check(chosen: str) -> None:
    if not chosen.startswith("/"):
        problem = "is not an absolute path"
    elif not chosen.isprintable():  # surrogates, of bytes that are not UTF-8, are not printable either
        problem = "has characters that QEMU's JSON options cannot carry"
    elif len(os.fsencode(chosen)) > _LONGEST_FOLDER:
        problem = f"is longer than {_LONGEST_FOLDER} bytes"
    else:
        return
    raise UsageError(
        f"VMMBACK_RUNTIME_DIR {chosen!a} {problem}",
        f"set it to a short absolute path (at most {_LONGEST_FOLDER} bytes, printable), such as /run/vmmback",
    )


def check_owner(base: Path) -> None:
    """Raise HostUnfit where others could put their own files in the place of a guest's."""
    try:
        status = base.stat()
    except OSError:  # not there yet, or out of reach: the keeper will tell
        return
    if stat.S_ISDIR(status.st_mode) and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise HostUnfit(
            f"the runtime folder {base} belongs to another user, or others may write to it",
            "set VMMBACK_RUNTIME_DIR to a folder that is yours alone (mode 0700)",
        )


@contextmanager
def guest_folder(name: str) -> Iterator[Path]:
    """Hold the folder of guest `name`: empty on entry, gone on exit and also when this process is killed.

    Raises GuestNameTaken while another guest of that name lives, HostUnfit when the folder cannot be made.
    """
    folder = runtime_folder() / name
    check_owner(folder.parent)
    lock = _take(folder)
    try:
        with _started_keeper(folder, lock) as keeper:  # whose exit closes the pipe and waits
            try:
                yield folder
            finally:
                if keeper.poll() is not None:  # somebody has ended it: another one does its work
                    with _keeper(folder, lock, subprocess.DEVNULL):
                        pass
    finally:
        os.close(lock)


def _started_keeper(folder: Path, lock: int) -> subprocess.Popen[bytes]:
    """Return a keeper that has emptied the folder. Raises HostUnfit, OSError; an empty folder is gone then."""
    with ExitStack() as failed:
        failed.callback(_remove_empty, folder)
        keeper = _keeper(folder, lock, subprocess.PIPE)
        failed.enter_context(keeper)
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"kept\n":
            _, complaint = keeper.communicate()
            raise _cannot_be_made(folder, complaint.decode(errors="replace").strip())
        failed.pop_all()
        return keeper


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def live_guests() -> list[str]:
    """Return the names of the guests that live, in order, and remove what the supervisors of others left behind.

    A guest lives from the moment that its folder is locked until the folder is removed. Raises HostUnfit, UsageError.
    """
    base = runtime_folder()
    check_owner(base)
    live = []
    removals = []
    for folder in _folders_in(base):
        with suppress(OSError), _opened(folder) as descriptor:
            if not _lock(descriptor):
                live.append(folder.name)
            elif _is_at(descriptor, folder):  # and stays there: whoever moves or removes it must have the lock
                # Under another name at once, so that a guest of its name need not wait.
                stale = base / f"{_STALE}{os.fstat(descriptor).st_ino}"
                folder.rename(stale)
                removals.append(_keeper(stale, descriptor, subprocess.DEVNULL))  # which has the lock from now on
    for removal in removals:
        with removal:
            pass
    return sorted(name for name in live if not name.startswith("."))


def released(folder: Path, timeout_s: float) -> bool:
    """Wait until the folder of a guest is removed, or has another owner; False if that takes too long."""
    deadline = time.monotonic() + timeout_s
    with suppress(FileNotFoundError, NotADirectoryError), _opened(folder) as descriptor:
        while _is_at(descriptor, folder) and not _lock(descriptor):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)  # flock(2) would wait, but has no deadline
    return True


def _take(folder: Path) -> int:
    """Return the descriptor of a guest's folder with the lock on it. Raises GuestNameTaken, HostUnfit."""
    deadline = time.monotonic() + _MOMENT_S
    try:
        while True:
            for path in reversed((folder, *folder.parents)):
                with suppress(FileExistsError):  # exist_ok would look again, whether it is there still
                    path.mkdir(0o700)
            if folder.is_symlink():
                raise _cannot_be_made(folder, "it is a symbolic link")
            with suppress(FileNotFoundError):  # it was removed meanwhile
                descriptor = _open(folder)
                if _lock(descriptor) and _is_at(descriptor, folder):
                    return descriptor
                os.close(descriptor)
            if time.monotonic() > deadline:
                raise GuestNameTaken(
                    f"a guest named {folder.name} is running already",
                    'stop it, or give this guest another "name" in its file',
                )
            time.sleep(0.005)  # see _MOMENT_S
    except OSError as error:
        raise _cannot_be_made(folder, error.strerror or str(error)) from error


def _folders_in(base: Path) -> list[Path]:
    try:
        return list(base.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise HostUnfit(f"the runtime folder {base} cannot be read: {error.strerror}", "run as its owner") from error


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = _open(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    """Open a folder of ours. Raises OSError; what is there instead may be a link, or belong to another user."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(0, "it belongs to another user")
    return descriptor


def _lock(descriptor: int) -> bool:
    """Lock a folder; False if another open file description has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except FileNotFoundError:
        return False


def _keeper(folder: Path, lock: int, stdin: int) -> subprocess.Popen[bytes]:
    """Start a keeper, which empties the folder, and removes it at the end of its standard input."""
    return subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "vmmback-keeper", str(folder)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[lock],
        start_new_session=True,
        cwd="/",
        env=_KEEPERS_ENVIRONMENT,
    )


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Yield an address for bind(2) and connect(2) of a socket at any path: by way of its folder's descriptor.

    An address holds 108 bytes (unix(7)), and the path may be longer. Raises OSError.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


@contextmanager
def listening_socket(path: Path) -> Iterator[socket.socket]:
    """Bind a socket at `path`, mode 0600, gone on exit; it does not listen yet. Raises HostUnfit."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            with socket_address(path) as address:
                listening.bind(address)
        except OSError as error:
            problem = f"the socket {path} cannot be made: {error.strerror}"
            raise HostUnfit(problem, "is its folder there, and is there room in it?") from error
        try:
            path.chmod(0o600)  # nobody can have connected: it does not listen yet
            yield listening
        finally:
            path.unlink(missing_ok=True)


def _cannot_be_made(folder: Path, problem: str) -> HostUnfit:
    return HostUnfit(
        f"the folder {folder} cannot be made: {problem}",
        "run as root, or set VMMBACK_RUNTIME_DIR to a folder that you may write to",
    )


def last_words(log: Path) -> str:
    """Return the end of a log as one line: at most 2,000 bytes, without control characters."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_WORDS_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return " / ".join(
        "".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines() if line.strip()
    )
