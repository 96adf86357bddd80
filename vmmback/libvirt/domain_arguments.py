"""Which of QEMU's arguments a domain may hand through to it (`qemu:arg`): those that are known to be harmless.

QEMU has options that give a guest more memory, that let others at it and that write it out, and each version has more
of them, so this is no list of what is refused. What is here is in use, libvirt's XML cannot say it all, and by QEMU's
source, at the file that is named, no RAM block comes of it and no way to the guest's RAM. docs/LIBVIRT.md has the same
in a table; integration/test_domain_arguments.py asks a QEMU that has them for its RAM blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

OPTIONS = {
    "acpitable",  # in the tables that the guest has anyway, and cannot write to (hw/acpi/core.c)
    "fw_cfg",  # on QEMU's heap; the guest reads a copy by way of a port (hw/nvram/fw_cfg.c)
    "smbios",  # the same, by fw_cfg (hw/smbios/smbios.c)
}
"""Options that may pass with any value."""

DEVICES = {
    "isa-applesmc": {"iobase", "osk"},  # ports, and what they answer on QEMU's heap (hw/misc/applesmc.c)
    "isa-debug-exit": {"iobase", "iosize"},  # a port that ends QEMU (hw/misc/debugexit.c)
}
"""Devices that may pass, and what may be said of them beside an id: not all that QEMU lets one say of any device."""

KNOWN = (*(f"-{option}" for option in sorted(OPTIONS)), *(f"-device {driver}" for driver in sorted(DEVICES)))
"""What may pass, for users."""


def refused_arguments(arguments: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield the number of each argument that may not pass, from 0 on, and how it reads, with what may be its value."""
    number = 0
    while number < len(arguments):
        said = arguments[number : number + 2]
        if _is_harmless(*said):
            number += 2
            continue
        # Which options have a value is QEMU's to know. What looks like an option is judged as one.
        said = said[:1] if said[-1].startswith("-") else said
        yield number, " ".join(said)
        number += len(said)


def _is_harmless(option: str, value: str | None = None) -> bool:
    # An option has one dash or two, and its value is the next argument, whatever that is (lookup_opt in QEMU's vl.c).
    if value is None or not option.startswith("-"):
        return False
    name = option[1:].removeprefix("-")
    return _is_harmless_device(value) if name == "device" else name in OPTIONS


def _is_harmless_device(value: str) -> bool:
    said = _properties(value)
    properties = dict(said)
    driver = properties.get("driver")
    if len(properties) < len(said) or driver not in DEVICES:  # of two drivers QEMU takes the last
        return False
    return properties.keys() - {"driver", "id"} <= DEVICES[driver]


def _properties(value: str) -> list[tuple[str, str]]:
    """Return what is said of a device, in its order; nothing if it is not understood.

    It is JSON, or `[driver=]DRIVER,NAME=VALUE,...`, with the driver at any place, and each comma of a value doubled
    (util/qemu-option.c).
    """
    if value.startswith("{"):
        try:
            pairs: list[tuple[str, str]] = json.loads(value, object_pairs_hook=_named)
        except (ValueError, RecursionError):
            return []  # QEMU reads more than JSON is, such as 'single quotes'
        return pairs
    first, *rest = value.replace(",,", "\0").split(",")
    if "=" not in first:
        first = f"driver={first}"
    return [(name, said) for name, _, said in (part.partition("=") for part in (first, *rest))]


def _named(pairs: list[tuple[str, object]]) -> list[tuple[str, str]]:
    return [(name, str(said)) for name, said in pairs]
