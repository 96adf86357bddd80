"""The perl that executes QEMU's wrapper with the right to lock memory, CAP_IPC_LOCK, as QEMU's group alone can.

A process of the same user has no access to one with a capability that it lacks (ptrace(2)), and so none to QEMU's files
and memory; who is in QEMU's group can get this one, and has another user (own_user.py). The capability also goes
beyond the limit on locked memory, as which secret RAM counts (mm/secretmem.c), where the host's root may not raise it
(CAP_SYS_RESOURCE), as in many containers. A copy of perl has it, as a file capability; its wrapper hands it on to QEMU.
Sources: capabilities(7), include/uapi/linux/capability.h.
"""

from __future__ import annotations

import grp
import pwd
import re
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from vmmback.errors import HostUnfit
from vmmback.libvirt.places import PERL, Places

_IPC_LOCK = 14
_REVISION_2, _EFFECTIVE = 0x02000000, 1

# struct vfs_cap_data: effective, and permitted; nothing inheritable.
CAPABILITY = struct.pack("<5I", _REVISION_2 | _EFFECTIVE, 1 << _IPC_LOCK, 0, 0, 0)

# As whom QEMU runs where qemu.conf does not say: Debian's and Fedora's.
_USERS = ("libvirt-qemu", "qemu")
_ENDS_S = 5.0


class QemuUser(NamedTuple):
    """As whom libvirt starts QEMU."""

    uid: int
    gid: int

    @property
    def group(self) -> str:
        """The group, as a domain's label names it."""
        try:
            return grp.getgrgid(self.gid).gr_name
        except KeyError:
            return f"+{self.gid}"


def qemu_user(places: Places) -> QemuUser:
    """Return as whom libvirt starts QEMU. Raises HostUnfit."""
    conf = places.below("/etc/libvirt/qemu.conf")
    text = conf.read_text() if conf.exists() else ""
    # libvirt gives it to its QEMUs' group, which need not be their user's first one: on Debian that is kvm.
    folder = places.below("/var/lib/libvirt/qemu")
    said = {key: found[1] for key in ("user", "group") if (found := re.search(_setting(key), text, re.MULTILINE))}
    for name in [said["user"]] if "user" in said else _USERS:
        try:
            user = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
            group = said.get("group", str(folder.stat().st_gid if folder.exists() else user.pw_gid))
            return QemuUser(user.pw_uid, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid)
        except KeyError:
            continue
    raise HostUnfit("the user as whom libvirt runs QEMU is not known", f"name it in {conf}: user, group")


def _setting(key: str) -> str:
    return rf"""^\s*{key}\s*=\s*["']\+?([^"']+)["']"""


def program() -> bytes:
    """Return the program that it is a copy of. Raises OSError."""
    return PERL.read_bytes()


def verify(perl: Path, user: QemuUser) -> None:
    """See that it has the capability, and no other, when QEMU's user executes it. Raises HostUnfit."""
    try:
        ended = subprocess.run(
            [perl, "-pe", "", "/proc/self/status"], user=user.uid, group=user.gid, extra_groups=[],
            capture_output=True, text=True, timeout=_ENDS_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise HostUnfit(f"QEMU's user cannot execute {perl}: {said.strip()}", _HINT) from error
    found = re.findall(r"^Cap(Prm|Eff):\s*([0-9a-f]+)", ended.stdout, re.MULTILINE)
    if {mask for _, mask in found} != {f"{1 << _IPC_LOCK:016x}"}:
        raise HostUnfit(f"QEMU's user gets other capabilities by {perl}: {dict(found)}", _HINT)


_HINT = "have /usr/local on a file system without nosuid, with capabilities of files; run vmmback libvirt install again"
