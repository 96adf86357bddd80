"""A Linux guest that does what a test's script says (guest/task-init), with the devices that its guest file names."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from integration import capabilities, residue
from integration.conftest import Backing, LiveGuest, prepared

INIT = capabilities.ROOT / "integration/guest/task-init"
READY = "GUEST READY"


def guest_file(folder: Path, task: str, tables: str = "", backing: Backing = "secret") -> Path:
    """Write the guest file, with `tables` at its end, and the initrd of a guest that does `task`, a shell script."""
    name = f"task-{secrets.token_hex(4)}"
    place = folder / name
    place.mkdir()
    path = place / "guest.toml"
    path.write_text(
        f'name = "{name}"\n'
        f'[memory]\nsize = "128MiB"\nbacking = "{backing}"\n'
        f'[cpu]\nmodel = "max,-erms,-fsrm"\n'
        f'[machine]\naccel = "tcg"\n'
        f'[boot]\nkernel = "{capabilities.KERNEL}"\ninitrd = "{residue.pack_initrd(place, INIT, task)}"\n'
        f'cmdline = "console=ttyS0 quiet panic=-1 no_timer_check"\n'
        f'[isolation]\nready = "{READY}"\n{tables}\n'
    )
    return path


@contextmanager
def task_guest(folder: Path, task: str, tables: str = "", backing: Backing = "secret") -> Iterator[LiveGuest]:
    """Bring the guest up to the moment before its first instruction; end it on exit."""
    with prepared(guest_file(folder, task, tables, backing)) as live:
        yield live


def printed(live: LiveGuest, key: str) -> str:
    """Return what stands behind `key` on a line of the guest's console."""
    lines = live.watcher.printed.decode(errors="replace").splitlines()
    found = [line.partition(key)[2].strip() for line in lines if line.startswith(key)]
    assert found, f"the guest printed no line with {key!r}: {lines}"
    return found[-1]
