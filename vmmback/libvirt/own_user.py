"""A user of its own for each domain: as whom its QEMU runs, beside those of all others.

Who runs as QEMU's user, with no fewer capabilities, can take its files and read its memory (ptrace(2),
pidfd_getfd(2)), and libvirt runs the QEMUs of all domains as one, unless a domain's label of model dac says another.
"""

from __future__ import annotations

import hashlib

# What libvirt's packages call the group, and the user, of all QEMUs.
GROUP = "libvirt-qemu"
_SHARED = ("root", "libvirt-qemu", "qemu")

# 2^24 numbers that nobody has: systemd's containers end below them (doc/UIDS-GIDS of systemd: 0x6fffffff), users and
# packages have smaller ones, and they fit into 31 bits, as programs want that take a uid for a signed number.
_FIRST, _HEX_DIGITS = 0x70000000, 6
_OURS = range(_FIRST, _FIRST + 16**_HEX_DIGITS)


def own_uid(uuid: str) -> int:
    """Return the number of a domain's user, by its UUID as libvirt writes it."""
    return _FIRST + int(hashlib.sha256(uuid.encode()).hexdigest()[:_HEX_DIGITS], 16)


def own_label(uuid: str, group: str) -> str:
    """Return a domain's label of model dac; libvirt's folders, and our emulator, are of QEMU's group."""
    return f"+{own_uid(uuid)}:{group}"


def is_own(label: str, uuid: str) -> bool:
    """Tell whether a label names a user that other domains do not run as: not all QEMUs', and not a copied domain's."""
    user = label.partition(":")[0].removeprefix("+")
    if not user.isdecimal():
        return user not in {"", *_SHARED}
    return int(user) != 0 and (int(user) not in _OURS or int(user) == own_uid(uuid))
