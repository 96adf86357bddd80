"""Runtime state: one folder for each live guest, mode 0700, held and removed by a keeper process of a few lines.

The keeper makes the folder, holds a lock on it (flock(2)) and waits. It removes the folder as soon as the pipe on its
standard input closes, be it that the supervisor released it or that the supervisor was killed: there is one way of
clean-up, and it always runs. A folder without a lock on it is what a power cut or a killed keeper left; the next guest
of that name takes it over.

Files are overwritten with zeroes before they are removed: what a guest printed is in there, and the kernel clears a
freed page of a file only when a later owner needs it cleared (init_on_free=1 on its command line would change that).
This is about memory: a runtime folder that is not in a tmpfs leaves what was written to its disk before.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmmback.errors import GuestNameTaken, HostUnfit, UsageError

_KEEPER = r"""
trap '' HUP INT PIPE TERM
umask 077
wipe() {
    find "$1" -type f -links 1 -size +0 -exec sh -c '
        for file; do
            dd if=/dev/zero of="$file" bs=1M count="$(stat -c %s -- "$file")" iflag=count_bytes conv=notrunc,nocreat
        done' sh {} + 2>/dev/null
    :
}
command -v flock >/dev/null || { echo "flock (util-linux) is not installed" >&2; exit 2; }
until [ "$1" -ef /proc/self/fd/9 ]; do  # else the folder was removed between the steps below
    mkdir -p -- "$1" || exit 2
    [ ! -L "$1" ] || { echo "it is a symbolic link" >&2; exit 2; }
    exec 9<"$1"
    [ -O /proc/self/fd/9 ] || { echo "it belongs to another user" >&2; exit 2; }
    flock -n 9 || exit 3
done
wipe "$1"; find "$1" -mindepth 1 -delete && chmod 700 -- "$1" && echo kept && read -r _
wipe "$1"
rm -rf -- "$1"
"""
_NAME_TAKEN = 3

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


def _check_owner(base: Path) -> None:
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
    _check_owner(folder.parent)
    with subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "vmmback-keeper", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
    ) as keeper:  # whose exit closes the pipe and waits
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"kept\n":
            raise _refusal(keeper, name, folder)
        yield folder


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


def _refusal(keeper: subprocess.Popen[bytes], name: str, folder: Path) -> GuestNameTaken | HostUnfit:
    _, complaint = keeper.communicate()
    if keeper.returncode == _NAME_TAKEN:
        return GuestNameTaken(
            f"a guest named {name} is running already", 'stop it, or give this guest another "name" in its file'
        )
    return HostUnfit(
        f"the folder {folder} cannot be made: {complaint.decode(errors='replace').strip()}",
        "run as root, or set VMMBACK_RUNTIME_DIR to a folder that you may write to",
    )
