"""The reader of BTF, on a BTF that is made here by the kernel's Documentation/bpf/btf.rst."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.errors import HostUnfit
from vmmback.linux import btf
from vmmback.linux.btf import Kind, type_id

# Kind, how many members, and the bytes that follow its 12: by the tables of btf.rst.
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = 1, 2, 3, 4, 5, 6, 7, 8
VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(9, 20)
FOLLOWED_BY = {
    INT: (4, 0), PTR: (0, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), FWD: (0, 0),
    TYPEDEF: (0, 0), VOLATILE: (0, 0), CONST: (0, 0), RESTRICT: (0, 0), FUNC: (0, 0), FUNC_PROTO: (0, 8), VAR: (4, 0),
    DATASEC: (0, 12), FLOAT: (0, 0), DECL_TAG: (4, 0), TYPE_TAG: (0, 0), ENUM64: (0, 12),
}  # fmt: skip


def make(types: Sequence[tuple[str, int, int]]) -> bytes:
    """Return a BTF of types by name, kind and number of members; what follows them are zeroes."""
    strings, section = bytearray(b"\0"), bytearray()
    for name, kind, members in types:
        at = strings.find(b"\0" + name.encode() + b"\0") + 1 if name else 0
        if name and not at:
            at = len(strings)
            strings += name.encode() + b"\0"
        fixed, each = FOLLOWED_BY[kind]
        section += struct.pack("=III", at, 1 << 31 | kind << 24 | members, 0) + bytes(fixed + each * members)
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(section), len(section), len(strings)) + section + strings


def test_types_are_counted_from_one() -> None:
    raw = make([("int", INT, 0), ("task", STRUCT, 3), ("run", FUNC, 0)])
    assert type_id(raw, "task", Kind.STRUCT) == 2
    assert type_id(raw, "run", Kind.FUNC) == 3


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "ab", "b"]), st.sampled_from(sorted(FOLLOWED_BY)), st.integers(0, 9)))
)
def test_whatever_lies_before_it_is_passed_over(types: list[tuple[str, int, int]]) -> None:
    raw = make([*types, ("wanted", FUNC, 0), ("more", FUNC, 0)])
    assert type_id(raw, "wanted", Kind.FUNC) == len(types) + 1


def test_one_name_can_be_that_of_several_kinds() -> None:
    raw = make([("same", FUNC, 0), ("same", STRUCT, 1)])
    assert type_id(raw, "same", Kind.STRUCT) == 2


@pytest.mark.parametrize("name", ["absent", "tas", "ask", "run"])
def test_what_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(LookupError, match=f"no STRUCT {name}"):
        type_id(make([("task", STRUCT, 0), ("run", FUNC, 0)]), name, Kind.STRUCT)


@pytest.mark.parametrize("raw", [b"", b"\x9f\xeb", bytes(64), make([])[1:] + b"\0"])
def test_what_is_no_btf_is_an_error(raw: bytes) -> None:
    with pytest.raises(ValueError, match="no BTF"):
        type_id(raw, "task", Kind.STRUCT)


def test_a_kernel_without_btf_or_without_the_function_is_unfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btf, "VMLINUX", tmp_path / "vmlinux")
    with pytest.raises(HostUnfit, match=r"has no .*vmlinux") as unfit:
        btf.kernel_type_id("of the first test", Kind.FUNC)
    assert "CONFIG_DEBUG_INFO_BTF" in unfit.value.hint
    (tmp_path / "vmlinux").write_bytes(make([("run", FUNC, 0)]))
    with pytest.raises(HostUnfit, match="has no walk"):
        btf.kernel_type_id("walk", Kind.FUNC)
