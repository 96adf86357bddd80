"""How the free memory of zones is cut up: /proc/buddyinfo and /proc/pagetypeinfo (proc(5); mm/vmstat.c).

`root` is another folder with files of the same shape, for tests of the parsers.
"""

from __future__ import annotations

import re
from pathlib import Path

from vmmback.linux.procfs import PROC

Orders = tuple[int, ...]
"""Free blocks by their order: so many of 2**0 pages, of 2**1, and so on."""
Place = tuple[int, str]
"""A node's number and a zone's name."""

_BUDDY = re.compile(r"^Node +(\d+), zone +(\S+)((?: +\d+)+) *$", re.MULTILINE)
# The kernel stops to count at 100,000 blocks and then writes `>100000` (pagetypeinfo_showfree_print).
_TYPE = re.compile(r"^Node +(\d+), zone +(\S+), type +(\S+)((?: +>?\d+)+) *$", re.MULTILINE)


def free_blocks(root: Path = PROC) -> dict[Place, Orders]:
    """Return the free blocks of each zone that has memory. Raises OSError."""
    text = (root / "buddyinfo").read_text()
    return {(int(node), zone): tuple(map(int, counts.split())) for node, zone, counts in _BUDDY.findall(text)}


def free_blocks_by_type(root: Path = PROC) -> dict[Place, dict[str, Orders]] | None:
    """Return the free blocks of each zone by migrate type, `Unmovable`, `Movable`, `CMA` and others.

    None where only root may know. A count of 100,000 can be more.
    """
    try:
        text = (root / "pagetypeinfo").read_text()
    except PermissionError:
        return None
    found: dict[Place, dict[str, Orders]] = {}
    for node, zone, kind, counts in _TYPE.findall(text):
        orders = tuple(int(count.lstrip(">")) for count in counts.split())
        found.setdefault((int(node), zone), {})[kind] = orders
    return found


def pages(blocks: Orders) -> int:
    """Return how many pages are in these blocks."""
    return sum(count << order for order, count in enumerate(blocks))
