"""The programs that a launch starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from vmmback.doctor.finding import Finding
from vmmback.errors import HostUnfit
from vmmback.host import qemu

_ANSWERS_S = 5.0
_PATH = qemu.QEMU_ENVIRONMENT["PATH"]

_NEEDED = {"setpriv": "util-linux", "prlimit": "util-linux"}
"""Programs that start QEMU, and the Debian packages that have them."""
_KEEPERS = dict.fromkeys(("ls", "chmod", "dd", "stat", "rm"), "coreutils") | {"find": "findutils", "sh": "dash"}
"""Programs of the keeper, which empties and removes a guest's folder (runtime.py)."""


def emulator() -> Finding:
    """Ask the QEMU on PATH for its version."""
    try:
        program = qemu.find_qemu()
    except HostUnfit as error:
        return Finding("missing", error.message, error.hint)
    try:
        words = _ask(program, "-version")
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("missing", f"{program} cannot be asked for its version: {error}", "install QEMU again")
    return Finding("ok", f"{program}: {words}")


def secret_blocks() -> Finding:
    """Ask QEMU whether its RAM blocks beside the guest's RAM can be secret."""
    try:
        program = qemu.find_qemu()
    except HostUnfit as error:
        return Finding("note", f"not tried: {error.message}", error.hint)
    if qemu.knows_aux_ram_share(program, "q35"):
        return Finding("ok", "firmware, option ROMs and ACPI tables can be secret as well (aux-ram-share)")
    return Finding(
        "note",
        "this QEMU has no aux-ram-share: firmware, option ROMs and ACPI tables are ordinary memory",
        "install QEMU 10.0 or later (docs/RAM-BLOCKS.md)",
    )


def helpers(path: str = _PATH) -> Finding:
    """Look for the programs that start QEMU, and for those that tidy up; Python itself starts what prefaults."""
    packages = _NEEDED | _KEEPERS
    gone = {name: package for name, package in packages.items() if not shutil.which(name, path=path)}
    if gone:
        remedy = f"install them: apt-get install {' '.join(sorted(set(gone.values())))}"
        return Finding("missing", f"not found on {path}: {', '.join(sorted(gone))}", remedy)
    if not os.access(sys.executable, os.X_OK):
        return Finding(
            "note",
            f"{sys.executable} is closed to this user, so nothing can prefault a guest's RAM",
            "install Python and vmmback where this user may run them; or write [memory] prefault = false",
        )
    return Finding("ok", f"found on {path}: {', '.join(sorted(packages))}")


def shares() -> Finding:
    """Look for what [[share]] needs; whether a virtiofsd can map secret RAM is tried by a launch that has one."""
    found = qemu.virtiofsds()
    if not found or not shutil.which("unshare", path=_PATH):
        return Finding(
            "note",
            "[[share]] cannot be used: virtiofsd or unshare was not found",
            "apt-get install qemu-system-common (Debian 12) and util-linux",
        )
    return Finding("ok", f"virtiofsd for [[share]]: {', '.join(found)}")


def _ask(program: Path, option: str) -> str:
    """Return the first line of what a program says; it is ended where it takes too long. Raises as subprocess does."""
    answer = subprocess.run(
        [program, option],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=qemu.QEMU_ENVIRONMENT,
        check=True,
        text=True,
        errors="replace",
        timeout=_ANSWERS_S,
    )
    return answer.stdout.partition("\n")[0]
