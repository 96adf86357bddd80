"""Namespaces and mounts of one thread: unshare(2), mount(2), mount_setattr(2), pivot_root(2). All raise OSError."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from vmmback.linux import arch
from vmmback.linux.syscall import libc, syscall

# include/uapi/linux/sched.h
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWNET = 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x40000000

# include/uapi/linux/mount.h
NOSUID, NODEV, NOEXEC = 1 << 1, 1 << 2, 1 << 3
_RDONLY, _BIND, _REC, _PRIVATE = 1 << 0, 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000


class _MountAttr(ctypes.Structure):
    """struct mount_attr: 32 bytes."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def unshare(flags: int) -> None:
    """Give the calling thread, and what it starts, namespaces of its own; with NEWNS a root and a cwd as well."""
    libc("unshare", flags)


def stop_propagation() -> None:
    """Let no mount of this mount namespace reach another one."""
    _mount("none", "/", None, _REC | _PRIVATE)


def mount_new(kind: str, target: Path, flags: int, options: str) -> None:
    """Mount a new file system of this kind."""
    _mount(kind, str(target), kind, flags, options)


def bind_read_only(source: Path, target: Path, flags: int) -> None:
    """Show a file, or a folder with all that is mounted below it, at `target`: read-only, and with `flags`."""
    _mount(str(source), str(target), None, _BIND | _REC)
    make_read_only(target, flags)


def make_read_only(target: Path, flags: int, *, below: bool = True) -> None:
    """Let nobody write through the mount at `target` (with `below`: nor those below it), and add `flags`.

    MOUNT_ATTR_RDONLY, NOSUID, NODEV, NOEXEC are the same bits as those of mount(2). Linux 5.12.
    """
    attributes = _MountAttr(attr_set=_RDONLY | flags)
    recursive = _AT_RECURSIVE if below else 0
    size = ctypes.sizeof(attributes)
    syscall(arch.current().mount_setattr, _AT_FDCWD, _text(str(target)), recursive, attributes, size)


def enter_root(root: Path) -> None:
    """Make the mount `root` the root of the calling thread, and leave nothing of the old one.

    pivot_root(2), "pivot_root(".", ".")": the old root comes to lie on the new one, and is taken off.
    """
    os.chdir(root)
    syscall(arch.current().pivot_root, _text("."), _text("."))
    libc("umount2", _text("."), _MNT_DETACH)
    os.chdir("/")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    try:
        libc("mount", _text(source), _text(target), _text(kind) if kind else None, flags, _text(options))
    except OSError as error:
        raise OSError(error.errno, f"mount(2): {error.strerror}", source, None, target) from error


def _text(value: str) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(os.fsencode(value))
