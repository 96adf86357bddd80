"""The reader of BTF, on data laid out as Documentation/bpf/btf.rst says, and on this machine's where it has some."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.errors import HostUnfit
from vmmback.linux.btf import VMLINUX, Btf

INT, POINTER, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = range(1, 9)
VOLATILE, CONST, RESTRICT, FUNC, PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(9, 20)

# What follows the 12 bytes of a type: so many bytes, and so many for each of its members.
FOLLOWED_BY = {
    INT: (4, 0), POINTER: (0, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), FWD: (0, 0),
    TYPEDEF: (0, 0), VOLATILE: (0, 0), CONST: (0, 0), RESTRICT: (0, 0), FUNC: (0, 0), PROTO: (0, 8), VAR: (4, 0),
    DATASEC: (0, 12), FLOAT: (0, 0), DECL_TAG: (4, 0), TYPE_TAG: (0, 0), ENUM64: (0, 12),
}  # fmt: skip

# Byte offsets below count from the start of the strings.
STRINGS = b"\0inode\0i_ino\0i_sb\0d_u\0d_alias\0dentry\0d_flags\0d_wide\0"


def name(text: bytes) -> int:
    return STRINGS.index(b"\0" + text + b"\0") + 1 if text else 0


def of_type(text: bytes, kind: int, size_or_type: int, *parts: bytes, kind_flag: bool = False) -> bytes:
    vlen = len(parts) if kind in (STRUCT, UNION, PROTO, ENUM64) else 0
    head = struct.pack("=III", name(text), vlen | kind << 24 | kind_flag << 31, size_or_type)
    return head + b"".join(parts)


def member(text: bytes, type_id: int, offset: int) -> bytes:
    return struct.pack("=III", name(text), type_id, offset)


TYPES = b"".join(
    [
        of_type(b"", INT, 8, struct.pack("=I", 64)),  # 1
        of_type(b"", POINTER, 1),  # 2
        of_type(b"", ARRAY, 0) + struct.pack("=III", 1, 1, 4),  # 3
        of_type(b"", PROTO, 0, struct.pack("=II", 0, 1)),  # 4
        of_type(b"", ENUM64, 8, struct.pack("=III", 0, 1, 0)),  # 5
        of_type(b"", DECL_TAG, 1, struct.pack("=i", -1)),  # 6
        of_type(b"inode", TYPEDEF, 1),  # 7, a type of the same name that is no structure
        of_type(b"", UNION, 16, member(b"i_ino", 1, 0), member(b"d_alias", 1, 64)),  # 8
        of_type(b"", CONST, 8),  # 9
        of_type(b"inode", STRUCT, 40, member(b"i_sb", 2, 64), member(b"", 8, 128), member(b"d_u", 9, 192)),  # 10
        of_type(b"dentry", STRUCT, 24, member(b"d_flags", 1, 3 | 5 << 24), member(b"d_wide", 1, 64), kind_flag=True),
    ]
)


@pytest.fixture
def btf(tmp_path: Path) -> Btf:
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(TYPES), len(TYPES), len(STRINGS))
    (tmp_path / "btf").write_bytes(header + TYPES + STRINGS)
    return Btf(tmp_path / "btf")


def test_sizes_and_offsets_are_in_bytes(btf: Btf) -> None:
    assert (btf.size("inode"), btf.size("dentry")) == (40, 24)
    assert btf.offset("inode", "i_sb") == 8
    assert btf.offset("dentry", "d_wide") == 8
    assert btf.offset("dentry", "d_flags") == 0  # a bit field, 5 bits from bit 3 on


def test_members_of_what_has_no_name_are_the_structures_own(btf: Btf) -> None:
    assert btf.offset("inode", "i_ino") == 16
    assert btf.offset("inode", "d_alias") == 24


def test_members_of_members_are_found_through_const(btf: Btf) -> None:
    assert btf.offset("inode", "d_u", "d_alias") == 24 + 8


@given(st.lists(st.tuples(st.sampled_from([b"", b"inode"]), st.sampled_from(sorted(FOLLOWED_BY)), st.integers(0, 9))))
def test_functions_are_counted_from_one_whatever_lies_before_them(
    tmp_path_factory: pytest.TempPathFactory, before: list[tuple[bytes, int, int]]
) -> None:
    types = bytearray()
    for text, kind, members in [*before, (b"dentry", FUNC, 0), (b"dentry", STRUCT, 0)]:
        fixed, each = FOLLOWED_BY[kind]
        types += struct.pack("=III", name(text), kind << 24 | members, 0) + bytes(fixed + each * members)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(STRINGS))
    path = tmp_path_factory.getbasetemp() / "functions"
    path.write_bytes(header + types + STRINGS)
    assert Btf(path).function_id("dentry") == len(before) + 1
    with pytest.raises(HostUnfit, match="has no function nonesuch"):
        Btf(path).function_id("nonesuch")


@pytest.mark.parametrize(
    ("structure", "path", "message"),
    [
        ("inode", ("d_wide",), "struct inode has no member d_wide"),
        ("inode", ("i_sb", "i_ino"), r"struct inode has no member i_sb\.i_ino"),
        ("inode", ("nonesuch",), "struct inode has no member nonesuch"),
        ("d_u", ("i_ino",), "has no struct d_u"),
        ("nonesuch", ("i_ino",), "has no struct nonesuch"),
    ],
)
def test_what_is_not_there_is_named(btf: Btf, structure: str, path: tuple[str, ...], message: str) -> None:
    with pytest.raises(HostUnfit, match=message):
        btf.offset(structure, *path)


@pytest.mark.parametrize("data", [b"", b"\x9f", bytes(100)])
def test_what_is_no_btf_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "btf").write_bytes(data)
    with pytest.raises(HostUnfit, match="is no BTF"):
        Btf(tmp_path / "btf")


def test_a_kernel_without_btf_is_unfit(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit, match="cannot be read: No such file"):
        Btf(tmp_path / "none")


@pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel has no BTF")
def test_the_kernel_that_runs_here_is_understood() -> None:
    btf = Btf()
    assert btf.size("list_head") == 16
    assert (btf.offset("list_head", "next"), btf.offset("list_head", "prev")) == (0, 8)
    assert btf.offset("qstr", "name") == 8  # behind an unnamed union of hash and len
    assert btf.offset("dentry", "d_name", "len") == btf.offset("dentry", "d_name") + 4
