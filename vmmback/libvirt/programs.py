"""The programs that libvirt executes while a domain starts, compiled for this host: its hook, and the emulator's.

The emulator's has the right to lock memory, CAP_IPC_LOCK, as a capability of its file, which QEMU's group alone can
execute, and hands it on to a QEMU whose claim the broker has confirmed. A process of the same user has no access to
one with a capability that it lacks (ptrace(2)), and so none to QEMU's files and memory. The capability also goes
beyond the limit on locked memory, as which secret RAM counts (mm/secretmem.c), where the host's root may not raise it
(CAP_SYS_RESOURCE), as in many containers.
Sources: capabilities(7), include/uapi/linux/capability.h.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmmback.errors import HostUnfit
from vmmback.libvirt.qemu_user import QemuUser

SOURCES = Path(__file__).parents[1] / "configs/libvirt"

_IPC_LOCK = 14
_REVISION_2, _EFFECTIVE = 0x02000000, 1

# struct vfs_cap_data: effective, and permitted; nothing inheritable.
CAPABILITY = struct.pack("<5I", _REVISION_2 | _EFFECTIVE, 1 << _IPC_LOCK, 0, 0, 0)

_OPTIONS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-s")
_COMPILES_S, _ENDS_S = 60.0, 5.0


def compiled(name: str, values: Mapping[str, str | Sequence[str]], sources: Path) -> bytes:
    """Return the program of `name`.c, with values in place of its names: texts, and lists of them. Raises HostUnfit."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise HostUnfit("there is no C compiler, which makes what libvirt executes", "apt-get install gcc libc6-dev")
    named = [f"-D{key}={_literals(value)}" for key, value in values.items()]
    said = ""
    with tempfile.TemporaryDirectory(prefix="vmmback-") as folder:
        result = Path(folder, name)
        files = [str(sources / f"{name}.c"), str(sources / "broker_call.c"), "-o", str(result)]
        # Without shared libraries it starts in half the time; not each host has the C library for that.
        for linked in (["-static-pie"], ["-pie"]):
            try:
                subprocess.run(
                    [compiler, *_OPTIONS, *linked, *named, *files], capture_output=True, text=True, errors="replace",
                    timeout=_COMPILES_S, check=True,
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TMPDIR": folder},
                )  # fmt: skip
                return result.read_bytes()
            except (OSError, subprocess.SubprocessError) as error:
                said = getattr(error, "stderr", "") or str(error)
    raise HostUnfit(
        f"{compiler} cannot compile {name}.c: {said.strip()}", "has it the C library? apt-get install libc6-dev"
    )


def verify(emulator: Path, user: QemuUser) -> None:
    """See that it has the capability, and no other, when QEMU's user executes it. Raises HostUnfit."""
    try:
        ended = subprocess.run(
            [emulator], user=user.uid, group=user.gid, extra_groups=[], capture_output=True, text=True,
            timeout=_ENDS_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise HostUnfit(f"QEMU's user cannot execute {emulator}: {said.strip()}", _HINT) from error
    only = f"{1 << _IPC_LOCK:016x}"
    if (found := ended.stdout.split()) != ["permitted", only, "effective", only]:
        raise HostUnfit(f"QEMU's user gets other capabilities by {emulator}: {' '.join(found)}", _HINT)


def _literals(value: str | Sequence[str]) -> str:
    """Return texts as C has them, with all but plain characters as octal numbers."""
    texts = [value] if isinstance(value, str) else value
    return ", ".join(f'"{"".join(map(_character, os.fsencode(text)))}"' for text in texts)


def _character(byte: int) -> str:
    character = chr(byte)
    is_plain = byte < 0x80 and (character.isalnum() or character in "/._-+")
    return character if is_plain else f"\\{byte:03o}"


_HINT = "have /usr/local on a file system without nosuid, with capabilities of files; run vmmback libvirt install again"
