"""Memory cgroups: which group a process is in, what still fits into it, and how one puts a process there.

Sources: cgroups(7), cgroup_namespaces(7), Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst. A page is
charged to the group of whoever touches it first, and stays there when that process moves or ends, until it is freed.

`root` is another folder in place of /, for tests of the parsers.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from vmmback.errors import HostUnfit
from vmmback.linux.procfs import PAGE_SIZE

ROOT = Path("/")
PROCS = "cgroup.procs"

# proc_pid_mountinfo(5): the group that is at the mount point, the mount point, the file system and its options.
_MOUNT = re.compile(r"\S+ \S+ \S+ (\S+) (\S+) .* - (cgroup2?) \S+ (\S+)")
_ESCAPE = re.compile(r"\\([0-7]{3})")

# What version 1 shows where nothing limits: PAGE_COUNTER_MAX pages (include/linux/page_counter.h).
_V1_NO_LIMIT = ((1 << 63) - 1) // PAGE_SIZE * PAGE_SIZE

# For each version, limit and usage of each counter that a charge must pass. Version 1's second one counts swap, too;
# beyond memory.high, who allocates is held up until enough was reclaimed, and of secret RAM nothing can be.
_COUNTERS = {
    1: (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    ),
    2: (("memory.max", "memory.current"), ("memory.high", "memory.current")),
}

_REMEDIES = {
    errno.EBUSY: "write a group below it: version 2 lets no process into one whose cgroup.subtree_control is not empty",
    errno.EROFS: "mount it writable; in a systemd unit that takes ProtectControlGroups=no",
}
_MAY_NOT = "run as root, or let this user write to it, on version 2 also to that of the group above both"


class MemoryCgroup(NamedTuple):
    """A memory cgroup as it is now; bytes. `path` is as /proc/PID/cgroup shows it, `folder` is where it is mounted.

    `limit` and `high` (memory.high of version 2) are its own, None for none. `usage` is None where the kernel does not
    tell it (the root of version 2). `reclaimable` is file cache that can be dropped. `room` is what still fits below
    both, and below those of all groups above it that are mounted; None where none limits.
    """

    path: str
    folder: Path
    version: Literal[1, 2]
    limit: int | None
    high: int | None
    usage: int | None
    reclaimable: int
    room: int | None


class _Mount(NamedTuple):
    """A mount of the hierarchy that has the memory controller; `top` is the path of the group at the mount point."""

    version: Literal[1, 2]
    point: Path
    top: tuple[str, ...]

    def folder(self, group: str) -> Path | None:
        """Return where a group is, None if this mount does not show it.

        A mount from outside of a cgroup namespace has a `top` like `/..`, and a group that is outside a path like
        `/../other`: these are names as others (cgroup_namespaces(7)).
        """
        names = _names(group)
        below = names[len(self.top) :]
        if names[: len(self.top)] != self.top or ".." in below:
            return None
        return self.point.joinpath(*below)


def of(pid: int | Literal["self"] = "self", root: Path = ROOT) -> MemoryCgroup | None:
    """Return the group that a process's memory is charged to, None if there is none, or it is not mounted here.

    Raises OSError when the process is gone.
    """
    place = _place_of(pid, root)
    return place and _read(*place)


def named(path: str, root: Path = ROOT) -> MemoryCgroup:
    """Return the group with this path. Raises HostUnfit where there is none that counts memory."""
    return _read(*_place_named(path, root))


def room(path: str | None, root: Path = ROOT) -> int | None:
    """Return how many bytes still fit into a group, or into this process's own; None where nothing limits them.

    Raises HostUnfit where there is no such group.
    """
    place = _place_of("self", root) if path is None else _place_named(path, root)
    return place and _least_room(place[0], place[2])


def path_of(pid: int | Literal["self"], version: Literal[1, 2] | None = None, root: Path = ROOT) -> str:
    """Return the path of a process's memory cgroup, as /proc/PID/cgroup shows it; "" if there is none.

    Without `version`, that of the first version if the controller is there. Raises OSError when the process is gone.
    """
    paths: dict[int, str] = {}
    for line in (root / f"proc/{pid}/cgroup").read_text(errors="surrogateescape").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            paths[1] = path
        elif number == "0" and not controllers:
            paths[2] = path
    return paths.get(version or min(paths, default=1), "")


@contextmanager
def entrance(folder: Path | None) -> Iterator[Callable[[int], None]]:
    """Open a group, and yield what puts a process with all its threads into it, also where its folder is out of sight.

    The kernel asks for the rights and the cgroup namespace of whoever opened it (kernel/cgroup/cgroup.c,
    __cgroup_procs_write). Without a folder it does nothing. Both raise HostUnfit where the kernel refuses.
    """
    if folder is None:
        yield lambda _: None
        return
    try:
        descriptor = os.open(folder / PROCS, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise not_joined(folder, error) from error

    def put(pid: int) -> None:
        try:
            os.write(descriptor, str(pid).encode())
        except OSError as error:
            raise not_joined(folder, error) from error

    try:
        yield put
    finally:
        os.close(descriptor)


def not_joined(folder: Path, error: OSError) -> HostUnfit:
    """Return what to say where the kernel lets no process into a group."""
    return HostUnfit(
        f"process.cgroup: no process can be put into it: {folder / PROCS}: {error.strerror}",
        _REMEDIES.get(error.errno or 0, _MAY_NOT),
    )


def _place_of(pid: int | Literal["self"], root: Path) -> tuple[_Mount, str, Path] | None:
    for mount in _mounts(root):
        path = path_of(pid, mount.version, root)
        folder = mount.folder(path) if path else None
        if folder is not None and folder.is_dir():
            return mount, path, folder
    return None


def _place_named(path: str, root: Path) -> tuple[_Mount, str, Path]:
    mounts = _mounts(root)
    places = [(mount, folder) for mount in mounts if (folder := mount.folder(path))]
    if not places:
        seen = "is outside of what is mounted of them" if mounts else "cannot be: no memory controller is mounted"
        raise HostUnfit(
            f"process.cgroup: {path} {seen}",
            "write a path as /proc/PID/cgroup shows it, of a group below the mount point, or leave cgroup out",
        )
    mount, folder = places[0]
    (limit, _), *_ = _COUNTERS[mount.version]
    if not folder.is_dir():
        raise HostUnfit(
            f"process.cgroup: there is no group {path}: {folder} does not exist",
            f"make it, and say what it may have: mkdir {folder}; echo BYTES >{folder / limit}",
        )
    if not (folder / limit).exists():
        raise HostUnfit(
            f"process.cgroup: {path} counts no memory of its own: {folder / limit} does not exist",
            f"let it: echo +memory >{folder.parent / 'cgroup.subtree_control'}",
        )
    return mount, path, folder


def _mounts(root: Path) -> list[_Mount]:
    """Return the mounts of the memory controller, those that show most groups first: it is in one hierarchy at most."""
    found = []
    for line in (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        match = _MOUNT.fullmatch(line) if " - cgroup" in line else None
        if match is None:
            continue
        top, point = (_ESCAPE.sub(lambda code: chr(int(code[1], 8)), field) for field in match.group(1, 2))
        mount = _Mount(1 if match[3] == "cgroup" else 2, root / point.lstrip("/"), _names(top))
        if "memory" in (match[4].split(",") if mount.version == 1 else _controllers(mount.point)):
            found.append(mount)
    return sorted(found, key=lambda mount: (mount.version, len(mount.top)))


def _controllers(folder: Path) -> list[str]:
    try:
        return (folder / "cgroup.controllers").read_text().split()
    except OSError:  # another file system is mounted over it
        return []


def _names(path: str) -> tuple[str, ...]:
    return tuple(name for name in path.split("/") if name)


def _read(mount: _Mount, path: str, folder: Path) -> MemoryCgroup:
    (limit, usage), *_ = _COUNTERS[mount.version]
    return MemoryCgroup(
        path=path,
        folder=folder,
        version=mount.version,
        limit=_number(folder / limit),
        high=_number(folder / "memory.high") if mount.version == 2 else None,
        usage=_number(folder / usage),
        reclaimable=_reclaimable(folder, mount.version),
        room=_least_room(mount, folder),
    )


def _least_room(mount: _Mount, folder: Path) -> int | None:
    levels = [folder, *folder.parents]
    lefts = [_room(level, mount.version) for level in levels[: levels.index(mount.point) + 1]]
    return min((left for left in lefts if left is not None), default=None)


def _room(folder: Path, version: Literal[1, 2]) -> int | None:
    """Return what fits by one group's own limits, None if it has none. Each is of the group and all below it.

    So is it on version 1, too: since Linux 5.11, older than secret memory, there is no group that counts without those
    below it.
    """
    lefts = []
    for limit, usage in _COUNTERS[version]:
        most = _number(folder / limit)
        if most is not None:
            lefts.append(most - (_number(folder / usage) or 0))
    return max(0, min(lefts) + _reclaimable(folder, version)) if lefts else None


def _reclaimable(folder: Path, version: Literal[1, 2]) -> int:
    """Return how many bytes of file cache the kernel can surely drop to make room, in the group and all below it.

    Those on the lists that reclaim goes through: `file` and `cache` count shared and secret memory as well, which stay.
    Without what must be written first. And of what was used more than once only half: it is the programs that run, and
    would be read again and again.
    """
    stat: dict[str, int] = {}
    with suppress(OSError):  # the root of version 2 had none before Linux 5.12; a group may vanish
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            stat[name] = int(value)
    names = ("inactive_file", "active_file", "file_dirty", "file_writeback")
    if version == 1:
        names = ("total_inactive_file", "total_active_file", "total_dirty", "total_writeback")
    inactive, active, dirty, writeback = (stat.get(name, 0) for name in names)
    return max(0, inactive + active // 2 - dirty - writeback)


def _number(file: Path) -> int | None:
    """Return what a file of one number says, None where it says that nothing limits, or is not there."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    number = None if text == "max" else int(text)
    return None if number == _V1_NO_LIMIT else number
