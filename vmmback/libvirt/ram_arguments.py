"""What QEMU's arguments say, as libvirt writes them: whose they are, and by which calls QEMU will ask for its RAM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from vmmback.errors import ConfigError
from vmmback.toml_errors import quote

_MEMFD, _FILE = "memory-backend-memfd", "memory-backend-file"
_ENABLE = "run vmmback libvirt enable once more"
_REPORT = "report this, with the domain's XML"


class Block(NamedTuple):
    """A RAM block that QEMU will make."""

    call: str
    """By which call it asks for the memory: open, memfd_create."""
    name: str
    """The path that it opens, or the name that it gives to the memfd."""
    size: int
    """Bytes."""


def name_of(arguments: Sequence[str]) -> str:
    """Return the domain's name: `-name guest=NAME,debug-threads=on`, commas doubled. Raises ConfigError.

    (qemuBuildNameCommandLine in libvirt's src/qemu/qemu_command.c.)
    """
    for option, value in pairwise(arguments):
        if option == "-name" and value.startswith("guest="):
            return value.removeprefix("guest=").replace(",,", "\0").partition(",")[0].replace("\0", ",")
    raise ConfigError("QEMU's arguments name no domain", "let libvirt start it: this is a domain's <emulator>")


def blocks_of(arguments: Sequence[str]) -> list[Block]:
    """Return QEMU's RAM blocks, in its order. Raises ConfigError for memory that cannot be secret.

    (qemuBuildMemoryBackendProps in libvirt's src/qemu/qemu_command.c; JSON since libvirt 7.2, for QEMU 6.0 and later.)
    """
    blocks = []
    for option, value in pairwise(arguments):
        if option != "-object" or "memory-backend-" not in value:
            continue
        try:
            backend = json.loads(value)
            kind, size = backend["qom-type"], _bytes(backend["size"])
            if kind == _MEMFD and not backend.get("hugetlb"):
                blocks.append(Block("memfd_create", _MEMFD, size))
                continue
            if kind == _FILE and backend.get("share"):
                blocks.append(Block("open", str(backend["mem-path"]), size))
                continue
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"QEMU's memory is described in a way not known here: {quote(value)}", _REPORT) from None
        raise ConfigError(f"{quote(str(kind))} {quote(str(backend.get('id')))} cannot be secret RAM", _ENABLE)
    return blocks


def _bytes(value: object) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError
    return value
