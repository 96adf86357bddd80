"""As whom libvirt starts QEMU, where a domain does not say another user."""

from __future__ import annotations

import grp
import pwd
import re
from typing import NamedTuple

from vmmback.errors import HostUnfit
from vmmback.libvirt.places import Places

# Where qemu.conf does not say: Debian's and Fedora's.
_USERS = ("libvirt-qemu", "qemu")


class QemuUser(NamedTuple):
    """A user, and the group."""

    uid: int
    gid: int

    @property
    def group(self) -> str:
        """The group, as a domain's label names it."""
        try:
            return grp.getgrgid(self.gid).gr_name
        except KeyError:
            return f"+{self.gid}"


def of_host(places: Places) -> QemuUser:
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
