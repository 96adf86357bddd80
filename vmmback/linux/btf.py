"""Where the running kernel keeps what in its structures, and its functions' numbers: /sys/kernel/btf/vmlinux.

Source: Documentation/bpf/btf.rst and include/uapi/linux/btf.h of the kernel.
"""

from __future__ import annotations

import functools
import struct
import sys
from array import array
from pathlib import Path

from vmmback.errors import HostUnfit

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")

_STRUCT, _UNION, _TYPEDEF, _VOLATILE, _CONST, _FUNC, _TYPE_TAG = 4, 5, 8, 9, 10, 12, 18
# Bytes that follow a type, by its kind: a fixed number, or so many for each of its `vlen` parts.
_FIXED = {1: 4, 3: 12, 14: 4, 17: 4}
_EACH = {_STRUCT: 12, _UNION: 12, 6: 8, 13: 8, 15: 12, 19: 12}


class Btf:
    """Sizes and member offsets of the kernel's structures, in bytes. Raises HostUnfit where there is no BTF."""

    def __init__(self, path: Path = VMLINUX) -> None:
        try:
            self._data = path.read_bytes()
        except OSError as error:
            raise HostUnfit(
                f"{path} cannot be read: {error.strerror}", "boot a kernel built with CONFIG_DEBUG_INFO_BTF"
            ) from error
        if len(self._data) < _HEADER.size or _HEADER.unpack_from(self._data)[0] != _MAGIC:
            raise HostUnfit(f"{path} is no BTF in {sys.byteorder}-endian order", "it is the kernel's own: report a bug")
        _, _, _, length, types, types_length, strings, strings_length = _HEADER.unpack_from(self._data)
        self._strings = length + strings
        self._strings_end = self._strings + strings_length
        self._types = array("I", [0])  # type 0 is void and is not stored
        # There are 100,000 and more, so this is kept short: in words of 4 bytes, of which all parts are made.
        words = memoryview(self._data)[length + types : length + types + types_length].cast("I")
        fixed = [(_TYPE.size + _FIXED.get(kind, 0)) // 4 for kind in range(32)]
        each = [_EACH.get(kind, 0) // 4 for kind in range(32)]
        starts = []
        at, end = 0, len(words)
        while at < end:
            starts.append(length + types + at * 4)
            info = words[at + 1]
            kind = info >> 24 & 0x1F
            at += fixed[kind] + each[kind] * (info & 0xFFFF)
        self._types.extend(starts)
        self._found: dict[tuple[str, int], int] = {}

    def size(self, structure: str) -> int:
        """Return the size of a structure."""
        return int(_TYPE.unpack_from(self._data, self._structure(structure))[2])

    def offset(self, structure: str, *path: str) -> int:
        """Return where a member is; with more names, where a member of that member is, and so on.

        Members of unnamed structures and unions in it count as its own.
        """
        at: int | None = self._structure(structure)
        bits = 0
        for name in path:
            found = None if at is None else self._member(at, self._names(name))
            if found is None:
                raise HostUnfit(
                    f"this kernel's struct {structure} has no member {'.'.join(path)}", "its version is not known yet"
                )
            bits += found[0]
            at = self._aggregate(found[1])
        return bits // 8

    def _names(self, name: str) -> set[int]:
        """Return where a name is among the strings: the linker of BTF may let names share their ends."""
        found = set()
        wanted = name.encode() + b"\0"
        at = self._data.find(wanted, self._strings, self._strings_end)
        while at >= 0:
            found.add(at - self._strings)
            at = self._data.find(wanted, at + 1, self._strings_end)
        return found

    def function_id(self, name: str) -> int:
        """Return the number of a function's type, as bpf(2) wants it."""
        return self._number(name, _FUNC)

    def _structure(self, name: str) -> int:
        return self._types[self._number(name, _STRUCT)]

    def _number(self, name: str, kind: int) -> int:
        if (name, kind) not in self._found:
            names = self._names(name)
            unpack, data = _TYPE.unpack_from, self._data
            for number, at in enumerate(self._types[1:], 1):
                name_at, info, _ = unpack(data, at)
                if name_at in names and info >> 24 & 0x1F == kind:
                    self._found[name, kind] = number
                    break
            else:
                what = "function" if kind == _FUNC else "struct"
                raise HostUnfit(f"this kernel has no {what} {name}", "its version is not known yet")
        return self._found[name, kind]

    def _member(self, at: int, names: set[int]) -> tuple[int, int] | None:
        """Return a member's offset in bits and its type."""
        _, info, _ = _TYPE.unpack_from(self._data, at)
        mask = 0xFFFFFF if info >> 31 else 0xFFFFFFFF  # with kind_flag the rest is the size of a bit field
        for index in range(info & 0xFFFF):
            name_at, type_id, offset = _MEMBER.unpack_from(self._data, at + _TYPE.size + index * _MEMBER.size)
            offset &= mask
            if name_at in names:
                return offset, type_id
            unnamed = self._data[self._strings + name_at] == 0
            inner = self._aggregate(type_id) if unnamed else None
            if inner is not None and (found := self._member(inner, names)) is not None:
                return offset + found[0], found[1]
        return None

    def _aggregate(self, type_id: int) -> int | None:
        """Return where the structure or union that a type is at last is stored, None where it is neither."""
        while type_id:
            at = self._types[type_id]
            _, info, referred = _TYPE.unpack_from(self._data, at)
            kind = info >> 24 & 0x1F
            if kind in (_STRUCT, _UNION):
                return at
            if kind not in (_TYPEDEF, _VOLATILE, _CONST, _TYPE_TAG):
                return None
            type_id = referred
        return None


@functools.cache
def kernel_function_id(name: str) -> int:
    """Return the number of a function's type in the running kernel: about 0.1 s the first time. Raises HostUnfit."""
    return Btf().function_id(name)
