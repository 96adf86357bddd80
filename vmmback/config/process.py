"""[process]: as whom QEMU runs, and which memory cgroup pays."""

import pwd
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from vmmback.ids import DEFAULT_UIDS
from vmmback.toml_errors import Problem, a_string, quote
from vmmback.toml_tables import Checked, Parsed, Table

_HIGHEST_UID = (1 << 32) - 2  # -1 means "leave as it is" to setresuid(2)
_NOBODY = (65534, 65535)  # the overflow uid, and -1 in 16 bits
_UIDS_PATTERN = "([0-9]{1,10})-([0-9]{1,10})"
_CGROUP_PATTERN = r"(/(?!\.\.?(/|$))[!-.0-~]+)+"  # names of printable ASCII without space
_USER_PATTERN = "[a-z_][a-z0-9_-]{0,31}"  # useradd(8)


def _uids(written: object, _: Path | None) -> tuple[int, int]:
    value = a_string(written, 'a range in quotes, like "1900000000-1900065535"')
    found = re.fullmatch(_UIDS_PATTERN, value)
    if not found:
        raise ValueError(f'{quote(value)} is not a range of uids; write it like "1900000000-1900065535"')
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise ValueError(f"{quote(value)} ends before it begins; write the lower uid first")
    if first == 0:
        raise ValueError(f"{quote(value)} has 0 in it, which is root's; QEMU never runs as root")
    if last > _HIGHEST_UID:
        raise ValueError(f"{quote(value)} goes beyond the highest uid, {_HIGHEST_UID}")
    if any(first <= uid <= last for uid in _NOBODY):
        raise ValueError(f"{quote(value)} has nobody's uid in it, 65534 or 65535; write a range without them")
    return first, last


def _user(written: object, folder: Path | None) -> str:
    value = a_string(written, 'an account in quotes, like "vmm-demo"')
    if not re.fullmatch(_USER_PATTERN, value):
        raise ValueError(f"{quote(value)} is not the name of an account")
    if folder is None:
        return value
    try:
        account = pwd.getpwnam(value)
    except KeyError:
        raise ValueError(f"there is no account {quote(value)}; make it, or leave user out") from None
    if account.pw_uid == 0:
        raise ValueError(f"{quote(value)} is root; QEMU never runs as root: write another account, or leave user out")
    if account.pw_uid in _NOBODY:
        raise ValueError(f"{quote(value)} is nobody, whom many share; write another account, or leave user out")
    return value


def _cgroup(path: str) -> str:
    if not re.fullmatch(_CGROUP_PATTERN, path):
        wanted = 'write the path of a memory cgroup as /proc/PID/cgroup shows it, like "/machine/demo"'
        raise ValueError(f"{quote(path)} is not absolute, or no plain path; {wanted}")
    return path


class Process(Table, frozen=True):
    """As whom QEMU runs, when root launches a guest (a uid is never shared by two live guests), and who pays for it."""

    more_schema: ClassVar[Mapping[str, object]] = {"not": {"required": ["user", "uids"]}}

    user: Annotated[
        Annotated[str, Parsed(_user, type="string", pattern=f"^{_USER_PATTERN}$")] | None,
        Meta(
            description="The account that QEMU runs as: not root, and no other process's meanwhile.",
            examples=["vmm-demo"],
        ),
    ] = None
    uids: Annotated[
        tuple[int, int],
        Parsed(_uids, type="string", pattern=f"^{_UIDS_PATTERN}$"),
        Meta(
            description="The range of uids of which QEMU gets one, with the gid of the same number. No accounts "
            "needed.",
            examples=["1900000000-1900065535"],
            extra_json_schema={"default": f"{DEFAULT_UIDS[0]}-{DEFAULT_UIDS[1]}"},
        ),
    ] = DEFAULT_UIDS
    cgroup: Annotated[
        str | None,
        Checked(_cgroup, pattern=f"^{_CGROUP_PATTERN}$"),
        Meta(
            description="The memory cgroup that pays for the guest's RAM and for QEMU: the path of one that there is, "
            "as /proc/PID/cgroup shows it. Without it, vmmback's own pays.",
            examples=["/machine/demo"],
        ),
    ] = None

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell whether there are two ways to a uid."""
        if {"user", "uids"} <= written.keys() and {"user", "uids"} <= good.keys():
            yield (), "has both user and uids; keep one of the two"
