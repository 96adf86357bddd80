"""What test_debian_kernel.py runs inside a machine whose emulated processor has AMD's virtualization.

That is all that inside_debian.py does and, after it, the KVM probe: one boot does for both.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import closing
from typing import Any

from integration import inside_debian
from vmmback.linux import kvm
from vmmback.linux.memfd_secret import memfd_secret

MODULES = ("irqbypass", "kvm", "kvm-amd")
CPU = "EPYC,+svm,+npt"
_FINIT_MODULE = 313  # x86-64; finit_module(2)


def main() -> dict[str, Any]:
    """Return what inside_debian.py does and, under "kvm", what KVM did."""
    return {**inside_debian.main(), "kvm": _probed()}


def _probed() -> dict[str, Any]:
    """Load KVM; return what became of a guest on each kind of memory, and the probe's answer."""
    for name in MODULES:
        _load(f"/modules/{name}.ko")
    return {
        "ordinary": _run(os.memfd_create("ordinary"))._asdict(),
        "secret": _run(memfd_secret())._asdict(),
        "answer": kvm.can_map_secret_ram(timeout_s=60)._asdict(),
    }


def _load(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        if libc.syscall(_FINIT_MODULE, file.fileno(), b"", 0) != 0:
            raise OSError(ctypes.get_errno(), f"finit_module(2): {os.strerror(ctypes.get_errno())}", path)


def _run(memory: int) -> kvm.SlotRun:
    device = os.open(kvm.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    with closing(os.fdopen(device, "rb", buffering=0)), closing(os.fdopen(memory, "rb", buffering=0)):
        os.ftruncate(memory, kvm.SLOT_BYTES)
        return kvm.run_guest(device, memory)
