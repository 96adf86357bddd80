"""The picture of a plan: a bar for each node that says what its memory is for, as SVG. The terminal draws the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from vmmback.render import text

LOOKS = {
    "system": "firmware, kernel, services",
    "held": "watermarks and the kernel's reserve",
    "guest": "guests, with page tables and processes",
    "parts": "guests that lie on several nodes",
    "spare": "left for more guests",
    "cma": "CMA: movable pages only",
    "movable": "ZONE_MOVABLE: never secret RAM",
}
"""What a segment can be, and how the legend calls it."""

_WIDTH, _LEFT, _RIGHT = 960, 84, 36
_BAR, _GAP = 46, 16
_LEAST_BOX = 4.0  # pixels of a guest that is drawn as a box of its own
_LETTER = 7.4  # pixels of a letter of a label, about
_TICKS = 8


@dataclass(frozen=True)
class Segment:
    """A part of a bar, `size` bytes long, in so many equal `boxes`; `label` says what it is, where there is room."""

    look: str
    size: int
    label: str = ""
    boxes: int = 1


@dataclass(frozen=True)
class Bar:
    """The memory of a node, from its first segment to its last."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self.segments)


@dataclass(frozen=True)
class Picture:
    """What is drawn: a verdict (`good` says its tone), bars, and facts as names with their values."""

    title: str
    subtitle: str
    verdict: str
    good: bool
    bars: tuple[Bar, ...]
    facts: tuple[tuple[str, str], ...]

    def totals(self) -> list[tuple[str, str, int]]:
        """Return look, name and bytes for the legend, of what there is."""
        sums = {
            look: sum(part.size for bar in self.bars for part in bar.segments if part.look == look) for look in LOOKS
        }
        return [(look, LOOKS[look], size) for look, size in sums.items() if size]


@dataclass(frozen=True)
class _Drawn:
    look: str
    x: float
    width: float
    name: str
    label: str
    room: float
    marks: tuple[float, ...]


def svg(picture: Picture) -> str:
    """Return a picture as an SVG document of its own, in ASCII: no script, nothing from elsewhere."""
    longest = max(bar.size for bar in picture.bars)
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    document = _template().render(
        picture=picture,
        width=_WIDTH,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        bar=_BAR,
        step=_BAR + _GAP,
        rows=[(bar.name, text.size(bar.size), list(_drawn(bar, scale))) for bar in picture.bars],
        ticks=[(_LEFT + at * scale, text.size(at) if at else "0") for at in _ticks(longest)],
        totals=picture.totals(),
    )
    return document.encode("ascii", "xmlcharrefreplace").decode()


def cells(bar: Bar, longest: int, width: int) -> list[tuple[Segment, int]]:
    """Return how many cells of a terminal each segment has, of `width` for the longest bar: as a whole no more.

    Each segment that is not empty has one at least, where that many fit; those before it decide where it begins.
    """
    drawn, position, used = [], 0, 0
    for segment in bar.segments:
        position += segment.size
        end = max(used + bool(segment.size), round(width * position / longest))
        drawn.append((segment, min(end, width) - used))
        used = min(end, width)
    return drawn


def _drawn(bar: Bar, scale: float) -> list[_Drawn]:
    drawn, x = [], float(_LEFT)
    for segment in bar.segments:
        width = segment.size * scale
        box = width / segment.boxes
        marks = tuple(x + box * number for number in range(1, segment.boxes)) if box >= _LEAST_BOX else ()
        name = f"{LOOKS[segment.look]}: {segment.label or text.size(segment.size)}"
        room = len(segment.label) * _LETTER + 8
        drawn.append(_Drawn(segment.look, x, width, name, segment.label if room <= width else "", room, marks))
        x += width
    return drawn


def _ticks(longest: int) -> Sequence[int]:
    """Return sizes for the axis: a power of two apart, so that they are round, and no more than `_TICKS`."""
    step = 1 << max(0, (longest // _TICKS).bit_length())
    return range(0, longest + 1, step)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vmmback.render"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=text.size, px=lambda value: f"{value:.1f}".removesuffix(".0"))
    return environment.get_template("plan.svg")
