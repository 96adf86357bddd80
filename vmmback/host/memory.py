"""What memory this host has, and what of it is spoken for: a snapshot that admission and the plan judge alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmmback.linux import procfs, zones
from vmmback.linux.zones import Node


@dataclass(frozen=True)
class HostMemory:
    """The nodes that this process may take memory from, and what is spoken for, in bytes.

    `promised` was promised to guests that have not touched it yet. `group_room` is what the guest's memory cgroup, and
    all above it, can still be charged; None where nothing limits it.
    """

    nodes: tuple[Node, ...]
    promised: int = 0
    group_room: int | None = None

    @classmethod
    def read(cls, promised: int = 0, group_room: int | None = None, root: Path = procfs.PROC) -> HostMemory:
        """Read /proc/zoneinfo, as far as this process's cpuset lets it take memory there (proc(5), Mems_allowed_list).

        Count what is promised before, not after: what is touched in between then counts twice, and not never.
        """
        allowed = _numbers(procfs.status("self", root).get("Mems_allowed_list", ""))
        found = zones.nodes(root)
        return cls(tuple(node for node in found if not allowed or node.number in allowed), promised, group_room)


def _numbers(text: str) -> set[int]:
    """Return the numbers of a list such as `0-1,4`."""
    ranges = (part.partition("-") for part in text.split(",") if part)
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}
