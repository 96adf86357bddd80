"""A host's memory as Prometheus' text format, for node_exporter's textfile collector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, generate_latest

if TYPE_CHECKING:
    from vmmback.doctor import Check
    from vmmback.overview import Overview

_Sample = tuple[str, str, dict[str, str], float]
"""Name without prefix, help, labels, value."""


def exposition(overview: Overview, checks: tuple[Check, ...]) -> str:
    """Return all metrics as text. Sizes are in bytes."""
    registry = CollectorRegistry()
    gauges: dict[str, Gauge] = {}
    for name, told, labels, value in (*_memory(overview), *_nodes(overview), *_checks(checks)):
        if name not in gauges:
            gauges[name] = Gauge(f"vmmback_host_{name}", told, tuple(labels), registry=registry)
        gauge = gauges[name].labels(**labels) if labels else gauges[name]
        gauge.set(value)
    return generate_latest(registry).decode()


def _memory(overview: Overview) -> Iterator[_Sample]:
    budget = overview.budget
    yield "largest_guest_bytes", "Largest guest that admission would let in now", {}, budget.largest_guest()
    yield "available_bytes", "What kernel zones can give to one more guest; can be negative", {}, budget.available()
    yield "promised_bytes", "Promised to guests and not touched yet", {}, budget.promised
    yield "secret_present_bytes", "Secret RAM that is known to be present", {}, overview.secret_present
    yield "secret_files", "Files of secret RAM that processes map", {}, len(overview.secret)
    for page, size in (("4k", overview.direct_map.in_4k), ("huge", overview.direct_map.in_huge_pages)):
        if size is not None:
            yield "direct_map_bytes", "The direct map by the size of its pages", {"pages": page}, size
    if budget.group_room is not None:
        yield "group_room_bytes", "What this memory cgroup can still be charged", {}, budget.group_room


def _nodes(overview: Overview) -> Iterator[_Sample]:
    told = {
        "free": "Free memory of kernel zones, without CMA",
        "reclaimable": "Caches of kernel zones that can be dropped",
        "held": "Held back by watermarks and lowmem_reserve",
        "reserve": "Kept for page tables and slab",
        "movable": "Free for movable pages alone",
    }
    for node in overview.budget.nodes:
        for name, text in told.items():
            yield f"node_{name}_bytes", text, {"node": str(node.number)}, getattr(node, name)


def _checks(checks: tuple[Check, ...]) -> Iterator[_Sample]:
    for check in checks:
        labels = {"check": check.name, "state": check.state}
        yield "check", "A check of `vmmback host`, by its state: ok, note or missing", labels, 1
