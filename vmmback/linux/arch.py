"""What differs between the architectures that vmmback knows: system call and audit numbers.

Sources: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h (aarch64) and
include/uapi/linux/audit.h of the kernel.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

from vmmback.errors import HostUnfit


@dataclass(frozen=True)
class Architecture:
    """Numbers of one architecture's kernel interface."""

    name: str
    audit_arch: int
    openat: int
    bpf: int
    seccomp: int
    pidfd_open: int
    pidfd_getfd: int
    memfd_secret: int
    perf_event_open: int
    process_madvise: int
    write: int


KNOWN = {
    arch.name: arch
    for arch in (
        Architecture(
            "x86_64",
            0xC000003E,
            openat=257,
            bpf=321,
            seccomp=317,
            pidfd_open=434,
            pidfd_getfd=438,
            memfd_secret=447,
            perf_event_open=298,
            process_madvise=440,
            write=1,
        ),
        Architecture(
            "aarch64",
            0xC00000B7,
            openat=56,
            bpf=280,
            seccomp=277,
            pidfd_open=434,
            pidfd_getfd=438,
            memfd_secret=447,
            perf_event_open=241,
            process_madvise=440,
            write=64,
        ),
    )
}


@functools.cache
def current(machine: str | None = None) -> Architecture:
    """Return the numbers of this machine's architecture.

    Raises HostUnfit, naming the architecture, where they are not known.
    """
    name = machine or platform.machine()
    if name not in KNOWN:
        raise HostUnfit(
            f"the architecture {name} is not supported",
            f"run vmmback on one of: {', '.join(KNOWN)}",
        )
    return KNOWN[name]
