"""Where `vmmback libvirt install` puts what libvirt is to find, and what belongs to domains while they run.

Paths below `/` are fixed: hooks and emulators get an environment of libvirt's making, so nothing else could tell them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LIBEXEC = Path("/usr/local/libexec/vmmback")
EMULATOR = LIBEXEC / "emulator"
"""What executes wrappers, with a capability which others of QEMU's user have not: to lock memory."""

RUN = Path("/run/vmmback-libvirt")
SECRET = RUN / "secret"
"""An empty file for each domain that has secret RAM, or is about to, named by its UUID: for polkit's rule."""
RECORDS = RUN / "records"
"""What the last audit of a domain found, UUID.json."""


def wrapper_of(qemu: Path) -> Path:
    """Return what a domain's <emulator> names in place of a QEMU."""
    return LIBEXEC / qemu.name


@dataclass(frozen=True)
class Places:
    """The paths of what is installed, below `root`."""

    root: Path = Path("/")

    def below(self, path: Path | str) -> Path:
        """Return where an absolute path is."""
        return self.root / str(path).lstrip("/")

    @property
    def libexec(self) -> Path:
        """The wrappers, which libvirt executes as emulators, and what executes those."""
        return self.below(LIBEXEC)

    @property
    def manifest(self) -> Path:
        """What was installed, so that all of it, and nothing else, is removed again."""
        return self.libexec / "installed.json"

    @property
    def emulator(self) -> Path:
        """What executes wrappers."""
        return self.below(EMULATOR)

    @property
    def hooks(self) -> Path:
        """Libvirt's folder of hooks, whose names begin with `qemu`."""
        return self.below("/etc/libvirt/hooks")

    @property
    def hook(self) -> Path:
        """Ours, beside those of others; they are called in the order of their names."""
        return self.hooks / "qemu.d/50-vmmback"

    @property
    def polkit_rules(self) -> Path:
        """The first one: polkit asks rules in the order of their names, and takes the first answer (polkit(8))."""
        return self.below("/etc/polkit-1/rules.d/00-vmmback.rules")

    @property
    def units(self) -> Path:
        """Systemd's folder for an administrator's units."""
        return self.below("/etc/systemd/system")

    @property
    def tmpfiles(self) -> Path:
        """What makes RUN when the host boots."""
        return self.below("/etc/tmpfiles.d/vmmback-libvirt.conf")

    @property
    def apparmor(self) -> Path:
        """AppArmor's profiles; those of an administrator are in `local`."""
        return self.below("/etc/apparmor.d")
