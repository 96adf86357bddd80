"""The QEMU of this host, what it can do, and its accelerator."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from vmmback.errors import HostUnfit
from vmmback.linux import arch, kvm, memlock

# What QEMU may map of RAM blocks beside the guest's RAM: 2.5 MiB of firmware and tables on q35, more with a larger
# firmware. Only what is touched takes memory, and QEMU needs as much for them where they are ordinary.
AUX_RAM_BYTES = 32 << 20

QEMU_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
"""QEMU never sees the user's environment: only what programs need to run at all."""

# The one written in C, which is part of QEMU until 7.2; then where Debian has the one written in Rust.
_VIRTIOFSDS = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")

_QEMU_ANSWERS_S = 5.0

_AUX_RAM_SHARE = b"aux-ram-share"


def find_qemu() -> Path:
    """Return the path of the QEMU for guests of this host's architecture. Raises HostUnfit when it is not installed."""
    name = f"qemu-system-{arch.current().name}"
    found = shutil.which(name)
    if found is None:
        package = "qemu-system-arm" if arch.current().name == "aarch64" else "qemu-system-x86"
        raise HostUnfit(f"{name} was not found on PATH", f"install it: apt-get install {package}")
    return Path(found)


def virtiofsds() -> list[str]:
    """Return the paths of all virtiofsd programs, in the order in which they are to be tried."""
    paths = (*_VIRTIOFSDS, shutil.which("virtiofsd"))
    return list(dict.fromkeys(path for path in paths if path and os.access(path, os.X_OK)))


def can_share_aux_ram(qemu: Path, machine: str, ram_size: int) -> bool:
    """Tell whether QEMU's RAM blocks beside the `ram_size` bytes of RAM can be secret, too.

    QEMU must be able to put them on memfds, and the limit on locked memory must have room for them. Where not, they are
    ordinary memory. Otherwise as knows_aux_ram_share().
    """
    return memlock.allows(ram_size + AUX_RAM_BYTES) and knows_aux_ram_share(qemu, machine)


def knows_aux_ram_share(qemu: Path, machine: str) -> bool:
    """Tell whether this QEMU's machines have the property aux-ram-share, as since QEMU 10.0.

    Call it in a thread that outlives the call: QEMU ends with it. Raises OSError when QEMU cannot be started.
    """
    if not _may_know(qemu, _AUX_RAM_SHARE):
        return False
    try:
        answer = subprocess.run(
            ["setpriv", "--pdeathsig", "KILL", "--", qemu, "-machine", f"{machine},help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=QEMU_ENVIRONMENT,
            start_new_session=True,  # a Ctrl-C on the terminal is for the supervisor to handle
            check=False,
            timeout=_QEMU_ANSWERS_S,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):  # the launch will say what is wrong
        return False
    return answer.returncode == 0 and b" %b=" % _AUX_RAM_SHARE in answer.stdout


def _may_know(program: Path, word: bytes) -> bool:
    """Tell whether `word` is in an ELF program; to look takes a third of the time that a QEMU takes to say no.

    True for what cannot be looked at, and for what is no ELF program: it may be a script that starts one.
    """
    try:
        with program.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return True
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
                return contents.find(word) >= 0
    except OSError:
        return True


def choose_accel(wanted: Literal["auto", "tcg", "kvm"]) -> Literal["tcg", "kvm"]:
    """Return the accelerator for secret RAM: kvm only where an experiment shows that KVM can map it (linux/kvm.py).

    Raises HostUnfit with the reason when kvm is wanted and cannot.
    """
    if wanted == "tcg":
        return "tcg"
    answer = kvm.can_map_secret_ram()
    if answer.usable:
        return "kvm"
    if wanted == "kvm":
        raise HostUnfit(answer.reason, 'set [machine] accel to "tcg", or to "auto", which takes kvm where it works')
    return "tcg"


def kernel_release() -> str:
    """Return the running kernel's release, such as `6.1.0-18-amd64`."""
    return os.uname().release
