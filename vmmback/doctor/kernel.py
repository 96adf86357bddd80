"""What a launch, and an audit, need of the kernel: each tried, for a version says too little."""

from __future__ import annotations

import os
from pathlib import Path

from vmmback.doctor.finding import Finding, State
from vmmback.errors import HostUnfit
from vmmback.linux import memfd_secret, memlock, procfs, seccomp
from vmmback.linux.own_thread import in_own_thread

SMALLEST_GUEST_BYTES = 1 << 20

_STRICT_OVERCOMMIT = "2"  # Documentation/mm/overcommit-accounting.rst


def secret_memory() -> Finding:
    """Make one page of secret memory, and have the kernel write to it.

    By read(2) of /dev/zero: where there is no page it gives EFAULT, a store SIGBUS (arch/x86/mm/fault.c).
    """
    try:
        with memfd_secret.SecretBuffer(procfs.PAGE_SIZE) as page, open("/dev/zero", "rb", buffering=0) as zero:
            os.readv(zero.fileno(), [page.memory])
    except HostUnfit as error:
        return Finding("missing", error.message, error.hint)
    except OSError as error:
        problem = f"memfd_secret(2) is there, but a page of it cannot be had: {error.strerror}"
        return Finding("missing", problem, f"raise the limit on locked memory: {memlock.remedy(SMALLEST_GUEST_BYTES)}")
    return Finding("ok", "memfd_secret(2) gave a page, and the page was touched")


def locked_memory() -> Finding:
    """Look how much secret RAM a guest may have by the limit on locked memory; the limit is left as it is."""
    most = memlock.most()
    if most is None:
        return Finding("ok", "a guest may lock any amount of memory")
    evidence = f"RLIMIT_MEMLOCK lets a guest have at most {most >> 10} KiB of secret RAM, and CAP_IPC_LOCK is missing"
    state: State = "missing" if most < SMALLEST_GUEST_BYTES else "note"
    return Finding(state, evidence, "run as root (CAP_IPC_LOCK), or set LimitMEMLOCK=infinity in the systemd unit")


def seccomp_notification() -> Finding:
    """Install the filter that a QEMU gets on a thread, which then ends."""
    try:
        os.close(in_own_thread(lambda: seccomp.install_listener(memfds=True)))
    except OSError as error:
        return Finding(
            "missing",
            f"seccomp(2) gives no listener for user notification: {error.strerror}",
            "boot Linux 5.14 or later built with CONFIG_SECCOMP_FILTER; a container must allow seccomp(2), and must "
            "not be watched by such a listener itself (EBUSY)",
        )
    return Finding("ok", "a filter with a listener was installed")


def direct_map() -> Finding:
    """Load a BPF program that reads the kernel's direct map, and find it."""
    from vmmback.linux import direct_map

    try:
        direct_map.find()
    except HostUnfit as error:
        return Finding("note", f"audits are inconclusive: {error.message}", error.hint)
    return Finding("ok", "a BPF program read the direct map")


def overcommit(root: Path = procfs.PROC) -> Finding:
    """Look whether memory that is mapped but not touched is refused."""
    mode = (root / "sys/vm/overcommit_memory").read_text().strip()
    if mode != _STRICT_OVERCOMMIT:
        return Finding("ok", f"vm.overcommit_memory is {mode}: what is mapped need not be there at once")
    memory = procfs.meminfo(root)
    room = max(0, memory["CommitLimit"] - memory["Committed_AS"])
    return Finding(
        "note",
        f"vm.overcommit_memory is 2: {room >> 20} MiB can still be mapped; a launch fails where QEMU wants more",
        "sysctl -w vm.overcommit_memory=0, or raise vm.overcommit_ratio",
    )
