"""As whom QEMU runs and what it may have: from [process] of the guest file, and from what this process may give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from vmmback import jail, uids
from vmmback.config import GuestConfig
from vmmback.errors import HostUnfit
from vmmback.host.qemu import AUX_RAM_BYTES
from vmmback.linux import cgroups

_BOOT_FILES = ("kernel", "initrd", "firmware")


class Plan(NamedTuple):
    """The ids of one QEMU, the guest's configuration as QEMU is to see it, and its files: place in the jail, path here.

    Without `ids` QEMU runs as this process does, and there is no jail.
    """

    ids: tuple[int, int] | None
    config: GuestConfig
    files: dict[Path, Path]

    def jail(self, root: Path, program: Path, accel: str, *, secret_aux: bool) -> jail.Jail | None:
        """Return the jail for QEMU, `program`; `root` is a folder of the guest's that lives as long.

        It may lock its secret RAM, as much of that as the guest may come to have, and that of its other RAM blocks
        (`secret_aux`).
        """
        if self.ids is None:
            return None
        memory = self.config.memory
        locked = memory.largest if memory.backing == "secret" else 0
        return jail.Jail(
            *self.ids,
            root=root,
            program=program,
            locked=locked + AUX_RAM_BYTES * secret_aux,
            files=self.files,
            host_network=self.config.needs_host_network,
            kvm=accel == "kvm",
        )


@contextmanager
def planned(config: GuestConfig) -> Iterator[Plan]:
    """Hold a uid for the guest's QEMU alone, if this process may give it one.

    Raises HostUnfit where there is none, or where a QEMU of that uid could not read what the guest boots.
    """
    if missing := jail.missing_rights():
        if config.process.user is not None:
            problem = f"process.user: QEMU cannot be given another uid without {', '.join(missing)}"
            raise HostUnfit(problem, "run as root with all capabilities, or leave user out")
        yield Plan(None, config, {})
        return
    with uids.claimed(config.process) as ids:
        files = {key: file for key in _BOOT_FILES if (file := getattr(config.boot, key))}
        jail.check_readable({f"boot.{key}": file for key, file in files.items()}, *ids)
        places = {key: Path("/boot", key) for key in files}
        seen = replace(config, boot=replace(config.boot, **places))
        yield Plan(ids, seen, {places[key]: file for key, file in files.items()})


def memory_group(config: GuestConfig) -> Path | None:
    """Return the folder of the memory cgroup that is to pay for the guest, None for this process's own.

    Raises HostUnfit where there is none, or this process may put no other into it.
    """
    if config.process.cgroup is None:
        return None
    folder = cgroups.named(config.process.cgroup).folder
    with cgroups.entrance(folder):
        return folder
