"""Folders, ids, limits, namespaces and devices that a launch takes."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vmmback import jail, runtime, uids
from vmmback.doctor.finding import Finding
from vmmback.errors import HostUnfit, VmmbackError
from vmmback.host import limits
from vmmback.ids import DEFAULT_UIDS
from vmmback.linux import namespaces, procfs, tap, vhost_vsock
from vmmback.linux.namespaces import NODEV, NOEXEC, NOSUID
from vmmback.linux.network import in_new_network
from vmmback.linux.own_thread import in_own_thread

ROOT = Path("/")
_IN_MEMORY = ("tmpfs", "ramfs")
_TAP = "vmmdoctor"
_NETWORK = Path("/sys/class/net")
_TUN = Path("/dev/net/tun")
_TUN_LOADED, _VSOCK_LOADED = (Path("/sys/class/misc", name) for name in ("tun", "vhost-vsock"))


def descriptors() -> Finding:
    """Open as many descriptors as a launch needs besides those that are open."""
    try:
        limits.check_descriptors()
    except HostUnfit as error:
        return Finding("missing", error.message, error.hint)
    return Finding("ok", f"RLIMIT_NOFILE is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}")


def runtime_folder() -> Finding:
    """Look whether the folder of guests' folders is there, or could be made; it is not made."""
    try:
        base = runtime.runtime_folder()
        runtime.check_owner(base)
    except VmmbackError as error:
        return Finding("missing", error.message, error.hint)
    place = next(path for path in (base, *base.parents) if _is_there(path))
    remedy = "run as root, or set VMMBACK_RUNTIME_DIR to a folder that you may write to"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        return Finding("missing", f"{base} cannot be written to: {place} is no folder, or closed to this user", remedy)
    kind = _file_system(place)
    if kind not in _IN_MEMORY:
        return Finding(
            "note",
            f"{base} is on {kind or 'an unknown file system'}: what a guest prints is written to a disk",
            "set VMMBACK_RUNTIME_DIR to a folder in a tmpfs, such as one below /run or /dev/shm",
        )
    return Finding("ok", f"{base} {'is there' if place == base else 'can be made'}, in a {kind}")


def uid_range(root: Path = ROOT) -> Finding:
    """Look who else uses the ids that guests' QEMUs get, and whether the file of their locks can be had."""
    if lacking := jail.missing_rights():
        return Finding(
            "note",
            f"QEMU runs as this process's user, uid {os.geteuid()}, for want of {', '.join(lacking)}",
            "run as root with all capabilities: then each guest's QEMU has a uid of its own (docs/PROCESS.md)",
        )
    if problem := _lock_problem():
        return Finding("missing", problem, "is it a file of root's, in a folder that can be written to?")
    first, last = DEFAULT_UIDS
    if others := sorted(set(_users_of(root, first, last))):
        return Finding(
            "note",
            f"uids or gids from {first} to {last}, which QEMU gets, are used by {', '.join(others)} as well",
            'give them others, or write another range in [process] uids of the guest file, such as "900000-965535"',
        )
    return Finding("ok", f"{first}-{last}: no account, and no range of subordinate ids, has one of them")


def walls() -> Finding:
    """Make the namespaces and mounts of QEMU's jail, and a device in it, for a thread which then ends."""
    if lacking := jail.missing_rights():
        return Finding(
            "note", f"QEMU runs without a jail, for want of {', '.join(lacking)}", "run as root with all capabilities"
        )
    try:
        in_own_thread(_build_walls)
    except OSError as error:
        return Finding(
            "missing",
            f"QEMU's namespaces and mounts cannot be made: {error}",
            "run as root with CAP_SYS_ADMIN; a container must allow mount(2), unshare(2) and mknod(2)",
        )
    return Finding("ok", "namespaces, mounts and a device were made")


def taps() -> Finding:
    """Make a tap in a network of its own; not where that would have the kernel load a module."""
    remedy = "modprobe tun (in a container, on its host, and pass /dev/net/tun in); CAP_NET_ADMIN and CAP_SYS_ADMIN"
    try:
        if not _TUN_LOADED.exists():
            _TUN.stat()
            return Finding("ok", f"{_TUN} is there; the kernel loads its module at the first use")
        for descriptor in in_new_network(lambda: tap.open_tap(_TAP)):
            os.close(descriptor)
    except OSError as error:
        return Finding("note", f"[[nic]] on a bridge cannot be used: no tap can be made: {error}", remedy)
    return Finding("ok", "a tap was made, for [[nic]]")


def bridges(folder: Path = _NETWORK) -> Finding:
    """Tell which bridges there are (Documentation/ABI/testing/sysfs-class-net)."""
    names = sorted(path.parent.name for path in folder.glob("*/bridge"))
    if not names:
        return Finding("ok", "there is none: [[nic]] makes its own with create = true")
    return Finding("ok", f"{', '.join(names)}, for [[nic]]")


def vsock(device: Path = vhost_vsock.DEVICE) -> Finding:
    """Open the device; not where that would have the kernel load a module."""
    try:
        if not _VSOCK_LOADED.exists():
            device.stat()
            return Finding("ok", f"{device} is there; the kernel loads its module at the first use")
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = "modprobe vhost_vsock (in a container, on its host, and pass the device in)"
        return Finding("note", f"[vsock] cannot be used: {device}: {error.strerror}", remedy)
    return Finding("ok", f"{device} can be opened, for [vsock]")


def _build_walls() -> None:
    own = namespaces.NEWNS | namespaces.NEWIPC | namespaces.NEWUTS | namespaces.NEWCGROUP | namespaces.NEWNET
    namespaces.unshare(own)
    namespaces.stop_propagation()
    place = Path("/proc")  # a folder that is there everywhere; what is mounted on it here, this thread alone sees
    namespaces.mount_new("proc", place, NOSUID | NODEV | NOEXEC, "subset=pid,hidepid=ptraceable")
    namespaces.mount_new("tmpfs", place, NOSUID | NOEXEC, "size=4k,nr_inodes=4,mode=755")
    device = place / "null"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    namespaces.make_read_only(place, 0)


def _lock_problem() -> str:
    try:
        os.close(os.open(uids.LOCKS, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
    except FileNotFoundError:
        if not os.access(uids.LOCKS.parent, os.W_OK | os.X_OK, effective_ids=True):
            return f"the file {uids.LOCKS} cannot be made"
    except OSError as error:
        return f"the file {uids.LOCKS} cannot be opened: {error.strerror}"
    return ""


def _users_of(root: Path, first: int, last: int) -> Iterator[str]:
    """Name the accounts and groups of files (passwd(5), group(5)) and the owners of ranges (subuid(5)) in a range."""
    for file, start, count in (("passwd", 2, None), ("group", 2, None), ("subuid", 1, 2), ("subgid", 1, 2)):
        for line in _lines(root / "etc" / file):
            fields = line.split(":")
            with suppress(ValueError, IndexError):
                lowest = int(fields[start])
                highest = lowest if count is None else lowest + int(fields[count]) - 1
                if lowest <= last and first <= highest:
                    yield f"{fields[0]} (/etc/{file})"


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def _file_system(path: Path, root: Path = procfs.PROC) -> str:
    """Return the kind of the file system that a folder is in: that of the deepest mount above it (proc_mounts(5))."""
    real, kind, deepest = path.resolve(), "", -1
    for line in (root / "self/mounts").read_text(errors="replace").splitlines():
        _, place, this, *_ = line.split(" ")
        parts = len(Path(place).parts)
        if real.is_relative_to(place) and parts >= deepest:  # of two mounts at one place the later one is seen
            kind, deepest = this, parts
    return kind
