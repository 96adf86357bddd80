"""How values become text: strings that a guest or a host chose, sizes, times."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmmback.report import Process

KIB = 1024


def visible(text: str) -> str:
    r"""Return `text` with all that is not printable as a Python escape, such as `\x1b` or `\u202e`.

    Names, paths and details hold what guests and hosts chose. Control characters are no XML 1.0 (its section 2.2), and
    characters that turn the direction of writing or cannot be seen make a reader see what is not there.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(size_bytes: int) -> str:
    """Return a size in the largest binary unit that it fills, with at most one decimal: `640 KiB`, `3.7 GiB`."""
    value, unit = float(size_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < KIB:
            break
        value, unit = value / KIB, larger
    return f"{value:,.1f}".removesuffix(".0") + f" {unit}"


def duration(seconds: float) -> str:
    """Return a time in a unit that shows it: `0.3 ms`, `59 ms`, `1.25 s`."""
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def address(value: int) -> str:
    """Return a physical address in hexadecimal, with at least the 8 digits of 4 GiB."""
    return f"0x{value:08x}"


def count(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: `1 page`, `65,536 pages`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


_MANY = 4


def process_facts(process: Process) -> list[tuple[str, str]]:
    """Return the rows of a table about QEMU's process."""
    seen = {True: "yes", False: "no", None: "cannot be told of a process of root's"}
    limit = "no limit" if process.memlock is None else size(process.memlock)
    facts = [
        ("uid, gid", f"{process.uid}, {process.gid}"),
        ("capabilities", _few(process.capabilities)),
        ("could ever gain", _few(process.bounding_set)),
        ("no_new_privs", seen[process.no_new_privs]),
        ("seccomp filter", seen[process.seccomp_filtered]),
        ("dumpable", seen[process.dumpable]),
        ("locks memory by", f"{process.locks_by} (RLIMIT_MEMLOCK: {limit})"),
        ("namespaces of its own", ", ".join(process.own_namespaces) or "none"),
    ]
    facts += [("memory cgroup", process.cgroup)] if process.cgroup else []
    return facts + [("not as it should be", what) for what in process.lacking]


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none" if len(names) <= _MANY else f"{len(names)}"
