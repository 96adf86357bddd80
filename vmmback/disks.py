"""A guest's disks: opened and locked here, handed to QEMU as descriptors; it needs no path and no right of its own.

A key goes from its file into a pipe inside the kernel (splice(2)): no process but QEMU ever has it in its memory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from vmmback.command import Device
from vmmback.config import GuestConfig
from vmmback.config.disk import MAX_KEY_BYTES, Disk, header_problem, key_problem, read_header
from vmmback.errors import UsageError
from vmmback.linux import byte_locks
from vmmback.report import Exposure

# QEMU locks a byte of an image for what it does with it, and one for what nobody else may do (block/file-posix.c:
# RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE). The locks belong to the open file (linux/byte_locks.py), which QEMU
# inherits from us: what we lock before it starts is what it would lock, and is released when QEMU is gone.
_DOES, _FORBIDS = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3  # include/block/block-common.h, BLK_PERM_*

_PLAIN_HOLDERS = "the host kernel, root, who reads the image or the disk that it is on"


def open_disks(config: GuestConfig, inherited: ExitStack, owner: tuple[int, int] | None = None) -> list[Device]:
    """Open and lock the images of a guest's disks; return what makes QEMU attach them.

    The descriptors are closed with `inherited`, right after QEMU has started. `owner` is the uid and gid that QEMU
    will have, if not ours: the pipe of a key must be its own. Raises UsageError for an image that cannot be opened, is
    in use, or is not what its format says.
    """
    return [_open(number, disk, inherited, owner) for number, disk in enumerate(config.disk)]


def _open(number: int, disk: Disk, inherited: ExitStack, owner: tuple[int, int] | None) -> Device:
    image = _open_image(number, disk)
    inherited.callback(os.close, image)
    if problem := header_problem(read_header(image), disk.format, encrypted=disk.encrypted):
        raise UsageError(f"disk[{number}].path: {disk.path}: {problem}")
    if not _lock(image, read_only=disk.read_only):
        raise UsageError(
            f"disk[{number}].path: {disk.path} is in use by another guest or program",
            f"end that first; `fuser -v {disk.path}` tells who it is",
        )
    key = None
    if disk.key_file:
        key = key_pipe(disk.key_file, owner)
        inherited.callback(os.close, key)
    is_device = stat.S_ISBLK(os.fstat(image).st_mode)
    return Device(
        argv(f"disk{number}", disk, image, key, is_device=is_device),
        (image,) if key is None else (image, key),
        (_exposure(disk),),
    )


def _open_image(number: int, disk: Disk) -> int:
    # Of a block device O_EXCL is a claim that fails where a part of it is mounted or claimed by others (open(2)).
    flags = os.O_CLOEXEC | (os.O_RDONLY if disk.read_only else os.O_RDWR)
    flags |= os.O_DIRECT if disk.direct else 0
    try:
        is_device = stat.S_ISBLK(disk.path.stat().st_mode)
        return os.open(disk.path, flags | (os.O_EXCL if is_device and not disk.read_only else 0))
    except OSError as error:
        hints = {
            errno.EINVAL: 'its file system may have no O_DIRECT; move it to a disk, or write cache = "writeback"',
            errno.EBUSY: "unmount it, and end what uses it",
        }
        hint = hints.get(error.errno or 0, "may you read and write it? a disk with read-only = true is only read")
        raise UsageError(f"disk[{number}].path: {disk.path}: {error.strerror}", hint) from error


def _lock(image: int, *, read_only: bool) -> bool:
    """Lock an image as QEMU does; tell whether nobody else uses it in a way that does not go with ours."""
    does = (_READ,) if read_only else (_READ, _WRITE)
    try:
        for byte in (*(_DOES + action for action in does), _FORBIDS + _WRITE):
            byte_locks.set_lock(image, fcntl.F_RDLCK, byte)
        theirs = [_FORBIDS + action for action in does] + [_DOES + _WRITE]
        return not any(
            byte_locks.is_locked(image, byte) for byte in (*theirs, *(() if read_only else (_DOES + _RESIZE,)))
        )
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # another has it for itself alone (fcntl(2))
            return False
        raise


def key_pipe(path: Path, owner: tuple[int, int] | None = None) -> int:
    """Return the read end of a pipe that holds a key file's contents, and that `owner` (uid, gid) may open anew.

    They never enter our memory: splice(2) puts the file's pages into the pipe. Raises UsageError.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        key = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if problem := key_problem(os.fstat(key)):
                raise UsageError(f"{path}: {problem}")
            while os.splice(key, writer, MAX_KEY_BYTES):
                pass
        finally:
            os.close(key)
        if owner:
            os.fchown(reader, *owner)
        os.set_blocking(reader, True)
    except BaseException as error:
        os.close(reader)
        if isinstance(error, OSError):
            raise UsageError(f"the key {path} cannot be passed on: {error.strerror}", "may you read it?") from error
        raise
    finally:
        os.close(writer)  # QEMU reads to the end of the pipe
    return reader


def argv(name: str, disk: Disk, image: int, key: int | None, *, is_device: bool = False) -> tuple[str, ...]:
    """Return QEMU's arguments for a disk whose image, and the pipe of whose key, are open with these descriptors."""
    cache = {"direct": disk.direct, "no-flush": False}
    discard = "unmap" if disk.discard else "ignore"
    common = {"read-only": disk.read_only, "cache": cache, "discard": discard}
    file = {
        "driver": "host_device" if is_device else "file",
        "node-name": f"{name}-file",
        "filename": f"/dev/fdset/{_fdset(name)}",  # util/osdep.c, qemu_open: a copy of the descriptor in that set
        "locking": "on",
        **common,
    }
    node: dict[str, object] = {"driver": disk.format, "node-name": f"{name}-image", "file": file, **common}
    if disk.format == "qcow2":
        node["backing"] = None  # whatever the image says by now
    arguments = ["-add-fd", f"fd={image},set={_fdset(name)}"]
    if key is not None:
        secret = f"{name}-key"
        # The pipe is opened anew, by its number: what reads it to its end needs no right but that of its owner.
        made = {"qom-type": "secret", "id": secret, "format": "raw", "file": f"/proc/self/fd/{key}"}
        arguments += ["-object", json.dumps(made)]
        if disk.format == "luks":
            node["key-secret"] = secret
        else:
            node["encrypt"] = {"format": "luks", "key-secret": secret}
    device: dict[str, object] = {
        "driver": "virtio-blk-pci",
        "id": name,
        "drive": f"{name}-image",
        "write-cache": "off" if disk.flushes else "on",
        # A discard, and zeroes that may be unmapped, would tell the host which blocks are free.
        "discard": disk.discard,
        "write-zeroes": disk.discard,
    }
    if disk.serial:
        device["serial"] = disk.serial
    if disk.boot_order is not None:
        device["bootindex"] = disk.boot_order
    return (*arguments, "-blockdev", json.dumps(node), "-device", json.dumps(device))


def _fdset(name: str) -> int:
    return int(name.removeprefix("disk"))


def _exposure(disk: Disk) -> Exposure:
    if not disk.encrypted:
        return Exposure(
            name="plaintext-disk",
            holders=_PLAIN_HOLDERS,
            detail=f"{disk.path} is not encrypted: what the guest writes to it and reads from it is in the host's "
            "page cache and on its disk",
        )
    return Exposure(
        name="encrypted-disk",
        holders="the host kernel, root, who reads the key file",
        detail=f"{disk.path} is encrypted by QEMU, whose heap holds its key, and up to some 96 KiB at a time of what "
        f"the guest writes and reads; the key is in {disk.key_file}",
    )


def key_refused(config: GuestConfig, words: str) -> UsageError | None:
    """Return what QEMU's last words say of a key, None if they are about something else."""
    found = re.search(r'"node-name": "disk(\d+)-image"', words)
    hint = "`vmmback disk create` made the disk with another file as its key; a line end is a part of a key, too"
    if found and "Invalid password" in words:  # crypto/block-luks.c
        problem = f"does not open {config.disk[int(found[1])].path}"
    elif found and "not valid UTF-8" in words:  # crypto/secret_common.c, qcrypto_secret_lookup_as_utf8
        problem, hint = "is not text, which QEMU wants a key to be", "write it in hexadecimal or base64, say"
    else:
        return None
    number = int(found[1])
    return UsageError(f"disk[{number}].key-file: {config.disk[number].key_file} {problem}", hint)


class DiskErrors:
    """Tells a guest's watcher of the errors of its disks: each once, however often QEMU says so."""

    def __init__(self, config: GuestConfig, qmp_socket: Path, note: Callable[[str], None]) -> None:
        self._paths = {f"disk{number}-image": disk.path for number, disk in enumerate(config.disk)}
        self._qmp_socket = qmp_socket
        self._note = note
        self._told: set[tuple[object, ...]] = set()

    def receive(self, event: Mapping[str, object]) -> None:
        """Take an event of QEMU's (qapi/block-core.json, BLOCK_IO_ERROR)."""
        data = event.get("data")
        if event.get("event") == "RESUME":
            self._told.clear()  # whoever let the guest go on is told if that was too early
        if event.get("event") != "BLOCK_IO_ERROR" or not isinstance(data, dict):
            return
        told = tuple(data.get(key) for key in ("node-name", "operation", "action", "reason"))
        if told in self._told:
            return
        self._told.add(told)
        path = self._paths.get(str(data.get("node-name")), data.get("node-name"))
        if data.get("nospace"):
            self._note(
                f"the file system of the disk {path} is full, and the guest stands still: free space there, then send "
                f"`cont` to {self._qmp_socket}"
            )
        else:
            after = "the guest stands still" if data.get("action") == "stop" else "the guest was told so"
            self._note(f"the disk {path} had an error, and {after}: {data.get('operation')}, {data.get('reason')}")
