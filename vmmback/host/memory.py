"""What memory this host has, and what of it is spoken for: a snapshot that admission and the plan judge alike."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vmmback.linux import direct_map_use, procfs, zones
from vmmback.linux.zones import Node


class HostMemory(NamedTuple):
    """The nodes that this process may take memory from, and what is spoken for, in bytes.

    `promised` was promised to guests that have not touched it yet. `group_room` is what the guest's memory cgroup, and
    all above it, can still be charged beyond what was promised of that; None where nothing limits it.
    `huge_direct_map` is what the kernel maps for itself in pages of 2 MiB and more, which secret pages split.
    """

    nodes: tuple[Node, ...]
    promised: int = 0
    group_room: int | None = None
    huge_direct_map: int = 0

    @classmethod
    def read(cls, promised: int = 0, group_room: int | None = None, root: Path = procfs.PROC) -> HostMemory:
        """Read /proc/zoneinfo, as far as this process's cpuset lets it take memory there (proc(5), Mems_allowed_list).

        Count what is promised first, then the group's room: what is touched in between counts twice, and not never.
        """
        allowed = _numbers(procfs.status("self", root).get("Mems_allowed_list", ""))
        found = zones.nodes(root)
        nodes = tuple(node for node in found if not allowed or node.number in allowed)
        return cls(nodes, promised, group_room, direct_map_use.of(root).in_huge_pages or 0)


def _numbers(text: str) -> set[int]:
    """Return the numbers of a list such as `0-1,4`."""
    ranges = (part.partition("-") for part in text.split(",") if part)
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}
