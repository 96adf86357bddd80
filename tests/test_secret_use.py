"""Secret RAM of all processes, by files in the kernel's shape."""

from __future__ import annotations

from pathlib import Path

from vmmback.linux.secret_use import SecretFile, secret_files

KIB = 1024


def block(addresses: str, inode: int, name: str, rss_kib: int) -> str:
    return (
        f"{addresses} rw-s 00000000 00:0e {inode:<10}                       {name}\n"
        f"Size:               9999 kB\nKernelPageSize:        4 kB\nMMUPageSize:           4 kB\n"
        f"Rss:               {rss_kib:>5} kB\nPss:                   7 kB\nTHPeligible:           0\n"
        f"VmFlags: rd wr sh mr mw me ms lo dd sd \n"
    )


def process(root: Path, pid: int, *blocks: str) -> None:
    folder = root / str(pid)
    folder.mkdir()
    (folder / "smaps").write_text("".join(blocks))
    (folder / "maps").write_text("".join(each.split("\n")[0] + "\n" for each in blocks))


def test_each_file_counts_once_and_split_mappings_are_added_up(tmp_path: Path) -> None:
    secret = "/secretmem (deleted)"
    process(tmp_path, 1, block("1000-3000", 5, "/memfd:x (deleted)", 8))
    process(
        tmp_path,
        2,
        block("1000-2000", 7, secret, 4),
        block("2000-4000", 7, secret, 0),
        block("8000-9000", 9, secret, 4),
    )
    process(tmp_path, 3, block("5000-8000", 7, secret, 12), block("8000-9000", 0, "", 4))
    (tmp_path / "4").mkdir()  # it ends just now
    (tmp_path / "net").mkdir()
    assert secret_files(tmp_path) == {
        7: SecretFile(12 * KIB, 12 * KIB, frozenset({2, 3})),
        9: SecretFile(4 * KIB, 4 * KIB, frozenset({2})),
    }
    known = secret_files(tmp_path, known={7})  # of process 2 it is looked at for its other file
    assert known[7] == SecretFile(12 * KIB, 4 * KIB, frozenset({2, 3}))
    assert known[9].present == 4 * KIB


def test_a_file_of_such_a_name_is_none(tmp_path: Path) -> None:
    process(tmp_path, 1, block("1000-3000", 5, "/tmp/secretmem (deleted)", 8))
    assert secret_files(tmp_path) == {}
