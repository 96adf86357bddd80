"""What is installed for libvirt, file by file: made of what is in configs/, for this host."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmmback.broker.client import SOCKET
from vmmback.errors import UsageError
from vmmback.libvirt import programs
from vmmback.libvirt.places import EMULATOR, LIBEXEC, RECORDS, RUN, SECRET, Places, wrapper_of
from vmmback.libvirt.programs import CAPABILITY
from vmmback.libvirt.qemu_user import QemuUser
from vmmback.toml_errors import ascii_path, quote

CONFIGS = Path(__file__).parents[1] / "configs"

# Of longer ones the kernel cuts the end off (fs/binfmt_script.c; BINPRM_BUF_SIZE of include/uapi/linux/binfmts.h).
FIRST_LINE_BYTES = 255

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


def filled(name: str, **others: str) -> str:
    """Return a file of configs/libvirt with what is this host's, or other values, in place of @NAMES@."""
    values = {"LIBEXEC": LIBEXEC, "SOCKET": SOCKET, "RUN": RUN, "SECRET": SECRET, "RECORDS": RECORDS} | others
    text = (CONFIGS / "libvirt" / name).read_text()
    return re.sub("@([A-Z]+)@", lambda found: str(values[found[1]]), text)


def program(name: str, host: Host, sources: Path = programs.SOURCES) -> bytes:
    """Return what libvirt executes, compiled for this host. Raises HostUnfit."""
    values = {"LIBEXEC": str(LIBEXEC), "SOCKET": str(SOCKET), "RUN": str(RUN), "SECRET": str(SECRET)}
    return programs.compiled(name, values | {"VMMBACK": host.program}, sources)


def can_be_wrapped(qemu: Path) -> bool:
    """Tell whether a QEMU's path is one that a wrapper can be made for."""
    is_plain = re.fullmatch(r"/[A-Za-z0-9/._+-]+", str(qemu)) and qemu.name.startswith("qemu")
    return bool(is_plain) and len(_first_line(qemu)) <= FIRST_LINE_BYTES


def wrapper(qemu: Path) -> str:
    """Return the text of a QEMU's wrapper. Raises UsageError."""
    if not can_be_wrapped(qemu):
        raise UsageError(f"{quote(str(qemu))} cannot be wrapped", "give the plain absolute path of a program qemu…")
    return f"{_first_line(qemu)}\n# libvirt starts this as <emulator> of domains on secret RAM (docs/LIBVIRT.md)\n"


def qemu_of(wrapper: str) -> Path | None:
    """Return which QEMU a wrapper executes, by its text."""
    found = re.match(rf"#!{re.escape(str(EMULATOR))} (/\S+)\n", wrapper)
    return Path(found[1]) if found else None


def _first_line(qemu: Path) -> str:
    return f"#!{EMULATOR} {qemu}"


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
    # What executes wrappers is there before they are.
    yield File(places.emulator, program("emulator", host), 0o750, host.user.gid, capability=CAPABILITY)
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
    yield File(places.hook, program("hook", host), 0o755)


def blocks(places: Places) -> list[Block]:
    """Return what is to be added to files of others on this host."""
    return [
        Block(places.apparmor / "local" / profile, filled(name))
        for profile, name in _APPARMOR.items()
        if (places.apparmor / profile).exists()
    ]
