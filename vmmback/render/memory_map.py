"""The picture of a guest's memory map: its flat view, drawn as a strip on a compressed scale of addresses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vmmback.report import MapRange

CLASSES = {
    "secret": "secret RAM",
    "read-only": "ordinary, the guest cannot write",
    "ordinary": "ordinary, the guest can write",
    "device": "device, no memory",
}
"""What a range can be, and how the legend calls it."""

STEPS = 8
"""Ranges are drawn in so many heights; each is four times the memory of the one below, from 64 KiB on."""


@dataclass(frozen=True)
class Row:
    """One row of the picture: a range, or a hole (`range` is None, `look` is "hole").

    `first` and `last` are guest-physical addresses, `last` inclusive; `step` is the height, 0 to `STEPS`.
    """

    first: int
    last: int
    look: str
    step: int
    range: MapRange | None

    @property
    def size(self) -> int:
        """Bytes of addresses."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Total:
    """One line of the legend: how many ranges are of one class, and how many bytes they span."""

    look: str
    label: str
    ranges: int
    size: int


def rows(ranges: Iterable[MapRange]) -> Iterator[Row]:
    """Yield the ranges in the order of their addresses, and the holes between them, all of one height."""
    position = 0
    for one in sorted(ranges, key=lambda one: (one.first, one.last)):
        if one.first > position:
            yield Row(position, one.first - 1, "hole", 0, None)
        yield Row(one.first, one.last, look(one), _step(one.last - one.first + 1), one)
        position = max(position, one.last + 1)


def totals(drawn: Sequence[Row]) -> list[Total]:
    """Add the rows up, class by class. Ranges that lie over each other are counted each."""
    return [
        Total(
            name,
            label,
            sum(row.look == name for row in drawn),
            sum(row.size for row in drawn if row.look == name),
        )
        for name, label in CLASSES.items()
    ]


def look(one: MapRange) -> str:
    """Return the class of a range. Memory that is not known to be secret is taken as ordinary."""
    if one.backing == "secretmem":
        return "secret"
    if one.kind == "device" and one.backing == "none":
        return "device"
    return "ordinary" if one.guest_writable else "read-only"


def _step(size: int) -> int:
    """Return the height of a range: small ones stay visible, large ones do not drown them."""
    return min(STEPS, max(0, (size.bit_length() - 16) // 2))
