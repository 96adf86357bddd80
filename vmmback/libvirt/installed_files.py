"""What is installed for libvirt, file by file: made of what is in configs/, for this host."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmmback.broker.client import SOCKET
from vmmback.errors import UsageError
from vmmback.libvirt import capable_perl
from vmmback.libvirt.capable_perl import CAPABILITY, QemuUser
from vmmback.libvirt.places import LIBEXEC, PERL, RECORDS, RUN, SECRET, Places, wrapper_of
from vmmback.linux import arch
from vmmback.toml_errors import ascii_path, quote

CONFIGS = Path(__file__).parents[1] / "configs"

# What Perl calls by number.
_CALLS = ("capget", "capset", "prctl", "recvmsg", "seccomp", "sendmsg")

_BEGIN, _END = b"# BEGIN vmmback: added and removed by `vmmback libvirt`\n", b"# END vmmback\n"
_BLOCK = re.compile(re.escape(_BEGIN) + b".*?" + re.escape(_END), re.DOTALL)

# Local additions of an administrator to profiles that libvirt's package brings, by the profile.
_APPARMOR = {
    "abstractions/libvirt-qemu": "apparmor-qemu",
    "usr.sbin.libvirtd": "apparmor-libvirtd",
    "usr.sbin.virtqemud": "apparmor-libvirtd",
}


class Host(NamedTuple):
    """What is asked of a host before anything is installed on it."""

    qemus: Sequence[Path]
    program: Sequence[str]
    """The command that is vmmback, as libvirt's hook is to start it."""
    user: QemuUser
    """As whom QEMU runs, where its domain does not say another user."""


class File(NamedTuple):
    """A file of ours."""

    path: Path
    content: bytes
    mode: int
    gid: int | None = None
    mtime_ns: int = 0
    capability: bytes = b""


class Block(NamedTuple):
    """Our part of a file that is others'."""

    path: Path
    text: str

    def in_place_of_old(self, content: bytes) -> bytes:
        """Return a file's content with this block, at its beginning, and no other of ours."""
        block = _BEGIN + self.text.encode() + _END if self.text else b""
        return block + _BLOCK.sub(b"", content)


def filled(name: str, **values: str) -> str:
    """Return a file of configs/libvirt with what is this host's in place of @NAMES@."""
    values |= {"LIBEXEC": str(LIBEXEC), "PERL": str(PERL), "SOCKET": str(SOCKET)} | values
    values |= {"RUN": str(RUN), "SECRET": str(SECRET), "RECORDS": str(RECORDS)} | values
    numbers = arch.current()
    values |= {call.upper(): str(getattr(numbers, call)) for call in _CALLS}
    text = (CONFIGS / "libvirt" / name).read_text()
    return re.sub("@([A-Z]+)@", lambda found: values[found[1]], text)


def can_be_wrapped(qemu: Path) -> bool:
    """Tell whether a QEMU's path is one that a wrapper can be made for."""
    return bool(re.fullmatch(r"/[A-Za-z0-9/._+-]+", str(qemu))) and qemu.name.startswith("qemu")


def wrapper(qemu: Path) -> str:
    """Return the text of a QEMU's wrapper. Raises UsageError."""
    if not can_be_wrapped(qemu):
        raise UsageError(f"{quote(str(qemu))} cannot be wrapped", "give the plain absolute path of a program qemu…")
    return filled("emulator", QEMU=str(qemu))


def qemu_of(wrapper: str) -> Path | None:
    """Return which QEMU a wrapper executes, by its text."""
    found = re.search(r"^my \$qemu = '(/.+)';$", wrapper, re.MULTILINE)
    return Path(found[1]) if found else None


def see_wrapper(places: Places, qemu: Path) -> None:
    """Raise UsageError unless the wrapper of a QEMU's name is there, and executes that one: they go by names alone."""
    path, text = wrapper_of(qemu), ""
    with suppress(OSError):
        text = places.below(path).read_text()
    if (wrapped := qemu_of(text)) == qemu:
        return
    what = f"is the wrapper of {ascii_path(wrapped)}" if wrapped else "is not there"
    raise UsageError(
        f"{ascii_path(path)} {what}, and the domain's QEMU is {ascii_path(qemu)}",
        f"run vmmback libvirt install --emulator {ascii_path(qemu)}"
        if can_be_wrapped(qemu)
        else "have <emulator> name a program qemu…, such as /usr/bin/qemu-system-x86_64 (virsh edit)",
    )


def files(places: Places, host: Host) -> Iterator[File]:
    """Yield what is to be installed on this host. Raises UsageError, OSError."""
    names = [qemu.name for qemu in host.qemus]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two QEMUs are called {twice[0]}", "name one of them: --emulator PATH")
    program = shlex.join(host.program)
    # What wrappers and the hook execute is there before they are.
    for name in ("announce", "broker_call"):
        yield File(places.libexec / name, filled(name, VMMBACK=program).encode(), 0o644)
    yield File(places.capable_perl, capable_perl.program(), 0o750, host.user.gid, capability=CAPABILITY)
    for qemu in host.qemus:
        # libvirt looks at the wrapper's times, not at QEMU's: they are the same, and the hook keeps them so.
        mtime_ns = places.below(qemu).stat().st_mtime_ns
        yield File(places.libexec / qemu.name, wrapper(qemu).encode(), 0o755, mtime_ns=mtime_ns)
    if places.polkit_rules.parent.is_dir():
        yield File(places.polkit_rules, filled("00-vmmback.rules").encode(), 0o644)
    if places.below("/run/systemd/system").is_dir():
        for unit in ("vmmback-broker.service", "vmmback-broker.socket"):
            yield File(places.units / unit, (CONFIGS / "systemd" / unit).read_bytes(), 0o644)
        yield File(places.tmpfiles, filled("tmpfiles.conf").encode(), 0o644)
    yield File(places.hook, filled("hook", VMMBACK=program).encode(), 0o755)


def blocks(places: Places) -> list[Block]:
    """Return what is to be added to files of others on this host."""
    return [
        Block(places.apparmor / "local" / profile, filled(name))
        for profile, name in _APPARMOR.items()
        if (places.apparmor / profile).exists()
    ]
