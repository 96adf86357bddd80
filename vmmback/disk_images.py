"""Makes disk images, with qemu-img: whole or not at all.

An image has no name until it is done (O_TMPFILE of open(2)), and then gets one that was free (linkat(2)): whatever ends
this before leaves nothing, and nothing is overwritten.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, TypeAlias

from vmmback.config.disk import key_problem
from vmmback.disks import key_pipe
from vmmback.errors import HostUnfit, UsageError
from vmmback.host.qemu import QEMU_ENVIRONMENT

Format: TypeAlias = Literal["luks", "qcow2", "raw"]

# A key of 256 random bits cannot be guessed, however fast one can try, and each open of the image costs so long.
# Measured: the open takes 0.04 s, and 2.2 s with the 2 s that QEMU takes by default and that a passphrase needs.
_RANDOM_KEY_ITER_MS = 10
_RANDOM_KEY_BYTES = 32

# QEMU counts the iterations that fit into a time, and gives up if its clock shows none (crypto/pbkdf.c).
_NO_TIME = b"Unable to get accurate CPU usage"
_ATTEMPTS = 20

# As text, which is what QEMU takes for a key (crypto/secret_common.c, qcrypto_secret_lookup_as_utf8).
_HEX = b"0123456789abcdef"


def create(
    path: Path,
    size: int,
    kind: Format,
    key_file: Path | None = None,
    *,
    new_key: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Make an image of `size` bytes for the guest at `path`, mode 0600; with `new_key` also its key, in `key_file`.

    `note` is told of what takes long. Raises UsageError, also when one of them is there already, and HostUnfit.
    """
    _check(path, kind, key_file, new_key=new_key)
    with ExitStack() as stack:
        image = _unnamed(path, stack)
        key = None
        if key_file and new_key:
            key = _unnamed(key_file, stack)
            _write_random_key(key)
        if key_file:
            note(f"making {path}: to measure how fast this host derives keys takes some seconds")
        if kind == "raw":
            _resize(path, image, size)
        else:
            used = Path(f"/proc/self/fd/{key}") if key is not None else key_file
            _format(image, size, kind, used, [f"iter-time={_RANDOM_KEY_ITER_MS}"] if new_key else [])
        for made in (image, key):
            if made is not None:
                os.fsync(made)
        _name(path, image, key_file, key)


def _check(path: Path, kind: Format, key_file: Path | None, *, new_key: bool) -> None:
    if kind == "raw" and key_file:
        raise UsageError("--key-file does not go with --format raw, which is not encrypted", "write --format luks")
    if kind == "luks" and not key_file:
        raise UsageError(
            "--format luks needs --key-file", f"--key-file {path.with_suffix('.key')} --new-key makes a key, too"
        )
    if new_key and not key_file:
        raise UsageError("--new-key needs --key-file, the place for the key", "add --key-file FILE")
    for new in (path, key_file if new_key else None):
        if new and os.path.lexists(new):
            raise UsageError(f"{new} is there already, and is not overwritten", "name another file, or remove it")
    if key_file and not new_key:
        try:
            status = key_file.stat()
        except OSError as error:
            raise UsageError(f"{key_file}: {error.strerror}", "--new-key makes a key there") from error
        if problem := key_problem(status) if stat.S_ISREG(status.st_mode) else "is not a regular file":
            raise UsageError(f"{key_file}: {problem}")


def _unnamed(path: Path, stack: ExitStack) -> int:
    """Open a new file without a name in the folder of `path`."""
    try:
        file = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = "write the path of a file in a folder that is there and that you may write to"
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):  # what file systems without O_TMPFILE say
            hint = "its file system cannot make files without a name; name a folder on another"
        raise UsageError(f"{path} cannot be made: {error.strerror}", hint) from error
    stack.callback(os.close, file)
    return file


def _write_random_key(file: int) -> None:
    """Write a random key as hexadecimal digits, and keep no copy of it."""
    key, text = bytearray(_RANDOM_KEY_BYTES), bytearray(2 * _RANDOM_KEY_BYTES)
    with open("/dev/urandom", "rb", buffering=0) as source:
        source.readinto(key)
    for place, byte in enumerate(key):
        text[2 * place], text[2 * place + 1] = _HEX[byte >> 4], _HEX[byte & 15]
    try:
        os.write(file, text)
    finally:
        key[:], text[:] = bytes(len(key)), bytes(len(text))


def _resize(path: Path, image: int, size: int) -> None:
    try:
        os.ftruncate(image, size)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}", "choose a smaller --size") from error


def _format(image: int, size: int, kind: Format, key_file: Path | None, iterations: Sequence[str]) -> None:
    program = shutil.which("qemu-img")
    if program is None:
        raise HostUnfit("qemu-img was not found on PATH", "install it: apt-get install qemu-utils")
    prefix = "" if kind == "luks" else "encrypt."
    options = [f"{prefix}key-secret=key", *(prefix + option for option in iterations)] if key_file else []
    if kind == "qcow2" and key_file:
        options.append("encrypt.format=luks")
    for _ in range(_ATTEMPTS):
        os.ftruncate(image, 0)
        argv = [program, "create", "-q", "-f", kind]
        if options:
            argv += ["-o", ",".join(options)]
        problem = _run(argv, image, size, key_file)
        if _NO_TIME not in problem:
            break
    if problem:
        words = " / ".join(problem.decode(errors="replace").split("\n")).strip(" /")
        raise HostUnfit(f"qemu-img could not make the image: {words}", "is there room for it?")


def _run(argv: Sequence[str], image: int, size: int, key_file: Path | None) -> bytes:
    """Run qemu-img; return what it said if it failed."""
    with ExitStack() as stack:
        arguments, inherited = list(argv), [image]
        if key_file:
            key = key_pipe(key_file)
            stack.callback(os.close, key)
            arguments += ["--object", f"secret,id=key,format=raw,file=/proc/self/fd/{key}"]
            inherited.append(key)
        done = subprocess.run(
            ["setpriv", "--pdeathsig", "KILL", "--", *arguments, f"/proc/self/fd/{image}", str(size)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=inherited,
            env=QEMU_ENVIRONMENT,
            start_new_session=True,  # a Ctrl-C on the terminal is for us to handle
            check=False,
        )
    return b"" if done.returncode == 0 else done.stderr or b"nothing"


def _name(path: Path, image: int, key_file: Path | None, key: int | None) -> None:
    """Give the image and its key their names, both or none; no signal comes between."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        if key_file and key is not None:
            _link(key, key_file)
        try:
            _link(image, path)
        except UsageError:
            if key_file and key is not None:
                with suppress(OSError):
                    key_file.unlink()
            raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _link(file: int, path: Path) -> None:
    try:
        # With a folder's descriptor Python calls linkat(2), which alone follows the link of /proc.
        os.link(f"/proc/self/fd/{file}", path, src_dir_fd=file, follow_symlinks=True)
    except FileExistsError as error:
        raise UsageError(f"{path} is there by now, and is not overwritten", "name another file") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}", "name another file") from error
