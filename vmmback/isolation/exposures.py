"""Ways out of a guest that secret RAM does not close: named and measured, so that a report does not hide them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from vmmback.errors import VmmbackError
from vmmback.isolation import access
from vmmback.isolation.probe import Target, errorcode
from vmmback.isolation.residue import clears_freed_memory
from vmmback.linux import procfs
from vmmback.linux.pidfd import pidfd_getfd
from vmmback.report import Exposure, RamBlock


def pidfd_getfd_exposure(target: Target) -> Exposure:
    """Try pidfd_getfd(2) on the descriptor of the guest's RAM: who gets it can map it. The copy is closed at once."""
    try:
        numbers = access.descriptors_of(target)
        pidfd = os.pidfd_open(target.pid)
        try:
            for number in numbers:
                os.close(pidfd_getfd(pidfd, number))
        finally:
            os.close(pidfd)
    except OSError as error:
        detail = f"{_tried()}: refused, {_name(error)}"
    else:
        if not numbers:
            return Exposure(name="pidfd-getfd", holders="root, CAP_SYS_PTRACE", detail="QEMU holds no descriptor of it")
        detail = f"{_tried()}: {len(numbers)} descriptor(s) copied; with one of them the guest's RAM can be mapped"
    return Exposure(name="pidfd-getfd", holders="root, CAP_SYS_PTRACE", detail=detail)


def code_injection_exposure(target: Target) -> Exposure:
    """Try to open QEMU's memory for writing, and write nothing: who may can put code of their own into QEMU.

    The kernel asks for the same right as for ptrace(2) (fs/proc/base.c, proc_mem_open; PTRACE_MODE_ATTACH).
    """
    holders = "root, CAP_SYS_PTRACE"
    try:
        os.close(os.open(f"/proc/{target.pid}/mem", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Exposure(name="code-injection", holders=holders, detail=f"{_tried()}: refused, {_name(error)}")
    detail = f"{_tried()}: QEMU may be written to; code in it reads the guest's RAM as QEMU does"
    return Exposure(name="code-injection", holders=holders, detail=detail)


def ordinary_blocks_exposure(ram_blocks: Sequence[RamBlock]) -> Exposure | None:
    """Name QEMU's RAM blocks that are ordinary memory but that the guest cannot write to, None if there are none."""
    blocks = [block for block in ram_blocks if block.backing == "ordinary" and not block.guest_writable]
    if not blocks:
        return None
    names = ", ".join(block.name for block in blocks)
    size = sum(block.size for block in blocks)
    return Exposure(
        name="ordinary-ram-blocks",
        holders="the host kernel, root",
        detail=f"{names}: up to {size >> 10} KiB that the guest can read but not write, filled by QEMU",
    )


def qemu_memory_exposure(target: Target) -> Exposure:
    """Say how much ordinary memory QEMU has of its own, and whether the kernel clears such memory once it is freed.

    Raises OSError when QEMU is gone.
    """
    anonymous = procfs.status(target.pid).get("RssAnon", "").removesuffix(" kB")
    if not anonymous:  # a process that has dropped its memory, but was not reaped yet
        raise ProcessLookupError(errno.ESRCH, f"process {target.pid} ended")
    try:
        cleared = clears_freed_memory()
    except (VmmbackError, OSError) as error:
        freed = f"whether this kernel clears freed memory could not be tried: {error}"
    else:
        freed = {
            True: "a freed sample of ordinary memory was clear: this kernel clears what QEMU leaves",
            False: "a freed sample of ordinary memory held its contents still: what QEMU leaves is not cleared",
            None: "whether this kernel clears freed memory is not known: a freed sample was in use again at once",
        }[cleared]
    return Exposure(
        name="qemu-memory",
        holders="the host kernel, root",
        detail=f"{anonymous} KiB of QEMU's own memory (heap, stacks) is ordinary, and what passes through QEMU may be "
        f"in it: processor registers, random numbers, console, disks, network; {freed}",
    )


def console_exposure(bytes_printed: int, bytes_typed: int) -> Exposure:
    """Say how much of what the guest printed, and of what was typed to it, went through the host."""
    typed = f" and {bytes_typed} bytes that were typed to it" if bytes_typed else ""
    return Exposure(
        name="serial-console",
        holders="the host kernel, root, who reads the log or is at the console",
        detail=f"{bytes_printed} bytes that the guest printed{typed} went through QEMU and vmmback in ordinary memory",
    )


def _tried() -> str:
    return f"tried as uid {os.geteuid()}"


def _name(error: OSError) -> str:
    return errorcode(error) or str(error)
