"""What differs between the architectures that vmmback knows: system call and audit numbers.

Sources: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h (aarch64) and
include/uapi/linux/audit.h of the kernel.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from vmmback.errors import HostUnfit


class Architecture(NamedTuple):
    """Numbers of one architecture's kernel interface."""

    name: str
    audit_arch: int
    openat: int
    fcntl: int
    ftruncate: int
    memfd_create: int
    bpf: int
    seccomp: int
    pidfd_open: int
    pidfd_getfd: int
    memfd_secret: int
    perf_event_open: int
    process_madvise: int
    write: int
    mmap: int
    io_setup: int
    io_destroy: int
    io_submit: int
    io_getevents: int
    io_uring_setup: int
    io_uring_enter: int
    io_uring_register: int
    userfaultfd: int
    move_pages: int
    cachestat: int
    kcmp: int
    pivot_root: int
    mount_setattr: int
    loader: str
    """The ELF interpreter of glibc's programs, as they name it."""


KNOWN = {
    arch.name: arch
    for arch in (
        Architecture(
            "x86_64",
            0xC000003E,
            openat=257,
            fcntl=72,
            ftruncate=77,
            memfd_create=319,
            bpf=321,
            seccomp=317,
            pidfd_open=434,
            pidfd_getfd=438,
            memfd_secret=447,
            perf_event_open=298,
            process_madvise=440,
            write=1,
            mmap=9,
            io_setup=206,
            io_destroy=207,
            io_submit=209,
            io_getevents=208,
            io_uring_setup=425,
            io_uring_enter=426,
            io_uring_register=427,
            userfaultfd=323,
            move_pages=279,
            cachestat=451,
            kcmp=312,
            pivot_root=155,
            mount_setattr=442,
            loader="/lib64/ld-linux-x86-64.so.2",
        ),
        Architecture(
            "aarch64",
            0xC00000B7,
            openat=56,
            fcntl=25,
            ftruncate=46,
            memfd_create=279,
            bpf=280,
            seccomp=277,
            pidfd_open=434,
            pidfd_getfd=438,
            memfd_secret=447,
            perf_event_open=241,
            process_madvise=440,
            write=64,
            mmap=222,
            io_setup=0,
            io_destroy=1,
            io_submit=2,
            io_getevents=4,
            io_uring_setup=425,
            io_uring_enter=426,
            io_uring_register=427,
            userfaultfd=282,
            move_pages=239,
            cachestat=451,
            kcmp=272,
            pivot_root=41,
            mount_setattr=442,
            loader="/lib/ld-linux-aarch64.so.1",
        ),
    )
}


@functools.cache
def current(machine: str | None = None) -> Architecture:
    """Return the numbers of this machine's architecture.

    Raises HostUnfit, naming the architecture, where they are not known.
    """
    name = machine or os.uname().machine
    if name not in KNOWN:
        raise HostUnfit(
            f"the architecture {name} is not supported",
            f"run vmmback on one of: {', '.join(KNOWN)}",
        )
    return KNOWN[name]
