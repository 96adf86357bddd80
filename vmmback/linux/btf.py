"""Names of the kernel's own types and functions, as the numbers by which bpf(2) wants them: BTF.

Source: Documentation/bpf/btf.rst, include/uapi/linux/btf.h. The kernel shows its own in /sys/kernel/btf/vmlinux, 5 MB.
"""

from __future__ import annotations

import functools
import struct
from enum import IntEnum
from pathlib import Path

from vmmback.errors import HostUnfit

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")  # magic, version, flags, hdr_len, type_off, type_len, str_off, str_len
_TYPE = struct.Struct("=II")  # the first 8 of struct btf_type's 12 bytes: name_off, info


class Kind(IntEnum):
    """Kinds of types that are looked up: BTF_KIND_* of include/uapi/linux/btf.h."""

    STRUCT = 4
    FUNC = 12


# What follows a struct btf_type, by kind: bytes, and bytes for each of its vlen members.
_FOLLOWS = {
    1: (4, 0),  # INT
    3: (12, 0),  # ARRAY
    4: (0, 12),  # STRUCT
    5: (0, 12),  # UNION
    6: (0, 8),  # ENUM
    13: (0, 8),  # FUNC_PROTO
    14: (4, 0),  # VAR
    15: (0, 12),  # DATASEC
    17: (4, 0),  # DECL_TAG
    19: (0, 12),  # ENUM64
}
_KIND_SHIFT, _KIND_MASK, _VLEN_MASK = 24, 0x1F, 0xFFFF


def type_id(raw: bytes, name: str, kind: Kind) -> int:
    """Return the number of the type of this name and kind. Raises LookupError, and ValueError for what is no BTF."""
    if len(raw) < _HEADER.size or _HEADER.unpack_from(raw)[0] != _MAGIC:
        raise ValueError("no BTF of this machine's byte order")
    _, _, _, header, types, types_size, strings, strings_size = _HEADER.unpack_from(raw)
    start = header + strings
    # Each name is there once and ends with a zero, as does the empty one before the first.
    wanted = raw.find(b"\0" + name.encode() + b"\0", start, start + strings_size) + 1 - start
    position, end = header + types, header + types + types_size
    number = 0
    while wanted > 0 and position < end:  # types have no index: their numbers are counted from 1
        number += 1
        name_at, info = _TYPE.unpack_from(raw, position)
        this = info >> _KIND_SHIFT & _KIND_MASK
        if name_at == wanted and this == kind:
            return number
        fixed, each = _FOLLOWS.get(this, (0, 0))
        position += 12 + fixed + each * (info & _VLEN_MASK)
    raise LookupError(f"no {kind.name} {name} in this BTF")


@functools.cache
def kernel_type_id(name: str, kind: Kind) -> int:
    """Return the number of a type of the running kernel: about 50 ms the first time. Raises HostUnfit."""
    try:
        return type_id(VMLINUX.read_bytes(), name, kind)
    except FileNotFoundError as error:
        raise HostUnfit(f"this kernel has no {VMLINUX}", "boot a kernel built with CONFIG_DEBUG_INFO_BTF") from error
    except LookupError as error:
        raise HostUnfit(f"this kernel has no {name}", "boot a newer kernel") from error
