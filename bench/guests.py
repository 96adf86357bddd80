"""The tiny guest that is measured, by vmmback and by QEMU alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmmback import command, config, tiny_guest
from vmmback.host.qemu import find_qemu


def guest_file(folder: Path, *, fill: bool, size: str = "64MiB") -> config.GuestConfig:
    """Write the tiny guest and its configuration."""
    (folder / "tiny.rom").write_bytes(tiny_guest.rom(fill=fill))
    file = folder / "bench.toml"
    file.write_text(
        f'name = "bench"\n[memory]\nsize = "{size}"\n[machine]\naccel = "tcg"\n'
        '[boot]\nfirmware = "tiny.rom"\n[isolation]\nready = "READY"\n'
    )
    return config.load(file)


def bare_command(guest: config.GuestConfig, *, prealloc: bool = False) -> list[str]:
    """Return vmmback's command line with a memfd for RAM, not paused, without QMP, its serial port on stdout."""
    argv = list(command.build(guest, find_qemu(), "tcg", Path("/nothing"), 3, 4).argv)
    argv.remove("-S")
    for option in ("-object", "-mon", "-chardev", "-chardev", "-serial"):
        position = argv.index(option)
        del argv[position : position + 2]
    memory = {
        "qom-type": "memory-backend-memfd",
        "id": command.RAM_ID,
        "size": guest.memory.size,
        "share": True,
        "prealloc": prealloc,
    }
    return [*argv, "-object", json.dumps(memory), "-serial", "stdio"]


@contextmanager
def supervised(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Launch the tiny guest in a supervisor of its own; yield it once the guest is validated."""
    with subprocess.Popen(
        [sys.executable, "-m", "vmmback", "launch", str(folder / "bench.toml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as supervisor:
        assert supervisor.stdout is not None
        while (line := supervisor.stdout.readline()) and not line.startswith(b"guest bench:"):
            pass
        yield supervisor


def end(supervisor: subprocess.Popen[bytes]) -> None:
    """End the guest; the tiny one has no power button, so do not wait for it."""
    for _ in range(2):
        supervisor.send_signal(signal.SIGINT)
    assert supervisor.stdout is not None
    supervisor.stdout.read()
