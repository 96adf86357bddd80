"""All that an operator may want to know of a host's memory, read at one time; bytes, unless a name says otherwise."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any, NamedTuple

from vmmback import admission
from vmmback.errors import VmmbackError
from vmmback.host.budget import Budget
from vmmback.linux import direct_map_use, fragments, procfs, secret_use, zones
from vmmback.linux.direct_map_use import DirectMapUse
from vmmback.linux.fragments import Orders, Place
from vmmback.linux.secret_use import SecretFile
from vmmback.linux.zones import Node

_CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h
_MEMINFO = {
    "total": "MemTotal",
    "free": "MemFree",
    "available": "MemAvailable",
    "unevictable": "Unevictable",
    "mlocked": "Mlocked",
    "page_tables": "PageTables",
    "slab_unreclaimable": "SUnreclaim",
    "kernel_stacks": "KernelStack",
    "committed": "Committed_AS",
    "commit_limit": "CommitLimit",
}


class Overview(NamedTuple):
    """The host's memory as the kernel tells it, and what admission makes of it.

    `meminfo` has the kernel's own names. `blocks` are the free blocks of each zone by their order, `types` the same by
    migrate type, None where only root may know them, or where they were not asked for. `secret` is what processes map
    of secret RAM, by inode; `promises` is what the guests of this runtime folder were promised, and how much of it is
    touched.
    """

    budget: Budget
    nodes: tuple[Node, ...]
    blocks: Mapping[Place, Orders]
    types: Mapping[Place, Mapping[str, Orders]] | None
    meminfo: Mapping[str, int]
    secret: Mapping[int, SecretFile]
    promises: Mapping[str, admission.Record]
    direct_map: DirectMapUse
    overcommit: int
    """vm.overcommit_memory: 2 lets no more be promised than CommitLimit; secret RAM does not count there."""
    memlock: tuple[int | None, int | None]
    """RLIMIT_MEMLOCK, soft and hard, of this process; None for no limit."""
    ipc_lock: bool
    """Whether this process has CAP_IPC_LOCK, which frees from that limit."""

    @property
    def secret_present(self) -> int:
        """Bytes of secret RAM that are known to be present: by this runtime folder's supervisors, or by mappings."""
        known = {inode for record in self.promises.values() for inode in record.inodes}
        others = sum(file.present for inode, file in self.secret.items() if inode not in known)
        return others + sum(self._touched(record) for record in self.promises.values() if record.backing == "secret")

    def _touched(self, record: admission.Record) -> int:
        present = sum(self.secret[inode].present for inode in record.inodes if inode in self.secret)
        return max(record.touched, present)

    @property
    def gives_nothing(self) -> bool:
        """Whether not even the smallest guest would be let in: it has 1 MiB, and admission counts whole ones."""
        return not self.budget.largest_guest()

    def document(self) -> dict[str, Any]:
        """Return it all in the terms of JSON; docs/HOST.md explains each."""
        budget, settled = self.budget, admission.settled(self.promises.values())
        return {
            "secret_ram": {
                "largest_guest": budget.largest_guest(),
                "available": budget.available(),
                "promised": budget.promised,
                "overhead": budget.overhead,
                "direct_map": budget.direct_map,
                "group_room": budget.group_room,
                "nodes": [{**node._asdict(), "available": node.available} for node in budget.nodes],
                "present": self.secret_present,
                "files": [
                    {
                        "inode": inode,
                        "mapped": file.mapped,
                        "touched": None if inode in settled else file.present,
                        "pids": sorted(file.pids),
                    }
                    for inode, file in sorted(self.secret.items())
                ],
                "guests": [
                    {"name": name, "promised": record.size, "touched": self._touched(record)}
                    for name, record in sorted(self.promises.items())
                ],
            },
            "memory": {name: self.meminfo.get(key) for name, key in _MEMINFO.items()} | {"overcommit": self.overcommit},
            "direct_map": self.direct_map._asdict(),
            "locking": {"soft": self.memlock[0], "hard": self.memlock[1], "cap_ipc_lock": self.ipc_lock},
            "nodes": [self._node(node) for node in self.nodes],
        }

    def _node(self, node: Node) -> dict[str, Any]:
        counters = node._asdict()
        del counters["zones"], counters["protected_for"]
        return counters | {"zones": [self._zone(node.number, zone._asdict()) for zone in node.zones]}

    def _zone(self, number: int, zone: dict[str, Any]) -> dict[str, Any]:
        place = number, zone["name"]
        return zone | {
            "free_blocks": self.blocks.get(place),
            "free_blocks_by_type": self.types and self.types.get(place),
        }


def read(*, types: bool = False) -> Overview:
    """Read it. Raises OSError.

    /proc/pagetypeinfo is read for `types` alone: the kernel counts all page blocks for it, 20 to 40 ms on 24 GiB, and
    walks lists of free pages with the zone locked (mm/vmstat.c, pagetypeinfo_showfree_print).
    """
    mappings = secret_use.secret_mappings()
    promises = _promises()  # after that, and before the memory: admission.reckon
    secret = secret_use.secret_files(known=admission.settled(promises.values()), mappings=mappings)
    memory = admission.reckon(promises.values(), secret)
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    return Overview(
        budget=Budget.of(memory),
        nodes=zones.nodes(),
        blocks=fragments.free_blocks(),
        types=fragments.free_blocks_by_type() if types else None,
        meminfo=procfs.meminfo(),
        secret=secret,
        promises=promises,
        direct_map=direct_map_use.of(),
        overcommit=int((procfs.PROC / "sys/vm/overcommit_memory").read_text()),
        memlock=(soft, hard),
        ipc_lock=procfs.has_capability(_CAP_IPC_LOCK),
    )


def _promises() -> Mapping[str, admission.Record]:
    """Return the guests' promises; none where no runtime folder can be used: the doctor says so."""
    try:
        return admission.promises()
    except VmmbackError:
        return {}
