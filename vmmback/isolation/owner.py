"""As whom QEMU runs and what it may do, as the kernel tells it: nothing here is what was asked for."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec.structs import replace

from vmmback.linux import capabilities, cgroups, procfs
from vmmback.report import Process, judge_process

# A process id namespace of its own it has not by design, nor a user or time namespace: docs/PROCESS.md.
_NAMESPACES = ("mnt", "net", "ipc", "uts", "cgroup")
_SECCOMP_FILTER = "2"  # proc_pid_status(5)
_LIMITS = {"Max core file size": "core", "Max locked memory": "memlock"}


def observe(pid: int) -> Process:
    """Return what /proc shows of QEMU. Raises OSError when it is gone."""
    status = procfs.status(pid)
    sets = {name: capabilities.names(int(status[f"Cap{key}"], 16)) for name, key in _SETS.items()}
    limits = _limits(pid)
    uid, gid = (int(status[name].split()[1]) for name in ("Uid", "Gid"))
    group = cgroups.path_of(pid)
    has_lock = capabilities.IPC_LOCK in sets["effective"]
    process = Process(
        uid=uid,
        gid=gid,
        groups=tuple(int(group) for group in status["Groups"].split()),
        capabilities=tuple(dict.fromkeys(sets["effective"] + sets["permitted"])),
        bounding_set=sets["bounding"],
        no_new_privs=status["NoNewPrivs"] == "1",
        seccomp_filtered=status["Seccomp"] == _SECCOMP_FILTER,
        dumpable=_is_dumpable(pid, uid),
        memlock=limits["memlock"],
        core=limits["core"],
        locks_by="CAP_IPC_LOCK" if has_lock else "limit",
        own_namespaces=tuple(kind for kind in _NAMESPACES if _namespace(pid, kind) != _namespace(os.getpid(), kind)),
        cgroup="" if group == cgroups.path_of("self") else group,
    )
    return replace(process, lacking=judge_process(process, os.geteuid(), _NAMESPACES))


_SETS = {"effective": "Eff", "permitted": "Prm", "bounding": "Bnd"}


def _is_dumpable(pid: int, uid: int) -> bool | None:
    """Tell by the owner of a file in /proc/PID: root, if the process is not dumpable (fs/proc/base.c, task_dump_owner).

    None for a process of root's, of which that tells nothing.
    """
    return None if uid == 0 else Path(f"/proc/{pid}/maps").stat().st_uid == uid


def _limits(pid: int) -> dict[str, int | None]:
    """Return the soft limits in bytes, None for no limit (proc_pid_limits(5))."""
    found: dict[str, int | None] = {}
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        for title, name in _LIMITS.items():
            if line.startswith(title):
                soft = line.removeprefix(title).split()[0]
                found[name] = None if soft == "unlimited" else int(soft)
    return found


def _namespace(pid: int, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
