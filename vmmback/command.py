"""QEMU's command line, made from a guest's configuration: pure, so that tests can compare it as text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vmmback.config import GuestConfig
from vmmback.report import Exposure

# The id of the memory backend, and so the name of QEMU's RAM block and the last part of its mem-path. Those by which a
# guest grows are ram1 and so on.
RAM_ID = "ram0"


class QemuCommand(NamedTuple):
    """What to execute, and the descriptors that it inherits."""

    argv: tuple[str, ...]
    descriptors: tuple[int, ...]


class Device(NamedTuple):
    """What a device of a guest adds to QEMU's command line, the descriptors that it needs, and what gets out by it."""

    argv: tuple[str, ...]
    descriptors: tuple[int, ...] = ()
    exposures: tuple[Exposure, ...] = ()


def memory_backend(name: str, size: int, mem_path: Path) -> dict[str, object]:
    """Return the object that has `size` bytes of a guest's RAM, as -object and object-add take it."""
    return {
        "qom-type": "memory-backend-file",
        "id": name,
        "size": size,
        "mem-path": str(mem_path),
        "share": True,  # mm/secretmem.c maps MAP_SHARED only
        "merge": False,  # madvise(MADV_MERGEABLE) would split the VMA, to no use
        "dump": False,
    }


def build(
    config: GuestConfig,
    qemu: Path,
    accel: str,
    mem_path: Path,
    qmp: int,
    serial: int,
    devices: Iterable[Device] = (),
    share_aux_ram: bool = False,
) -> QemuCommand:
    """Return the command for a guest that starts paused; `qmp` and `serial` are descriptors of connected sockets.

    With `share_aux_ram` QEMU puts its RAM blocks beside the guest's RAM (firmware, tables) on memfds.
    """
    machine = f"{config.machine.type},memory-backend={RAM_ID},mem-merge=off,dump-guest-core=off"
    if share_aux_ram:
        machine += ",aux-ram-share=on"
    argv = [
        str(qemu),
        "-name", f"guest={config.name}",
        "-S",
        "-no-user-config",
        "-nodefaults",
        "-no-reboot",  # a boot is what was validated: the next one is another launch
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine", machine,
        "-accel", accel,
        "-cpu", config.cpu.model,
        "-smp", str(config.cpu.count),
        "-m", _memory(config),
        "-object", json.dumps(memory_backend(RAM_ID, config.memory.size, mem_path)),
        "-display", "none",
        "-vga", "none",  # video RAM would be ordinary memory that the guest can write to
        "-chardev", f"socket,id=qmp,fd={qmp}",
        "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=serial,fd={serial}",
        "-serial", "chardev:serial",
        # Not rng-builtin: Debian's QEMU takes 64 bytes of getrandom(2) for it once, and makes all else by itself, from
        # a state in its heap (crypto/random-gnutls.c). This one reads the host's generator whenever the guest asks.
        "-object", "rng-random,id=rng0,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=rng0",
    ]  # fmt: skip
    if config.boot.firmware:
        argv += ["-bios", str(config.boot.firmware)]
    if config.boot.kernel:
        argv += ["-kernel", str(config.boot.kernel), "-append", config.boot.cmdline]
    if config.boot.initrd:
        argv += ["-initrd", str(config.boot.initrd)]
    descriptors = [qmp, serial]
    for device in devices:
        argv += device.argv
        descriptors += device.descriptors
    return QemuCommand(tuple(argv), tuple(descriptors))


def _memory(config: GuestConfig) -> str:
    memory = config.memory
    if not memory.slots:
        return f"{memory.size}B"
    return f"size={memory.size}B,slots={memory.slots},maxmem={memory.largest}B"
