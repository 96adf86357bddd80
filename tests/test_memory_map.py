"""The picture of a memory map: every address is drawn once, and nothing looks more secret than it is."""

from __future__ import annotations

from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sample_reports import guest_report
from vmmback.render import memory_map
from vmmback.report import MapRange

STYLE = files("vmmback.render").joinpath("templates/style.css").read_text("ascii")


def ram(first: int, last: int) -> MapRange:
    return MapRange(first=first, last=last, kind="ram", region="r", block="r", backing="secretmem", guest_writable=True)


@given(st.lists(st.integers(0, 1 << 40), unique=True, max_size=20))
def test_ranges_and_holes_cover_all_addresses_once(bounds: list[int]) -> None:
    bounds.sort()
    ranges = [ram(first, behind - 1) for first, behind in zip(bounds[::2], bounds[1::2], strict=False)]
    drawn = list(memory_map.rows(reversed(ranges)))
    assert [row.range for row in drawn if row.range] == ranges
    position = 0
    for row in drawn:
        assert row.first == position <= row.last
        position = row.last + 1
    assert not ranges or position == ranges[-1].last + 1


def test_ranges_over_each_other_are_drawn_each_without_a_hole() -> None:
    ranges = [ram(0, 99), ram(10, 19), ram(100, 199)]
    assert [row.range for row in memory_map.rows(ranges)] == ranges


def test_a_larger_range_is_not_drawn_lower_and_every_height_is_in_the_style_sheet() -> None:
    steps = [next(memory_map.rows([ram(0, (1 << bits) - 1)])).step for bits in range(60)]
    assert steps == sorted(steps)
    assert steps[12] == 0 < steps[28] < steps[32] <= memory_map.STEPS == steps[-1]
    for step in range(memory_map.STEPS + 1):
        assert f".step-{step} {{ height: " in STYLE


@pytest.mark.parametrize(
    ("kind", "backing", "guest_writable", "look"),
    [
        ("ram", "secretmem", True, "secret"),
        ("rom", "secretmem", False, "secret"),
        ("ram", "ordinary", True, "ordinary"),
        ("rom", "ordinary", False, "read-only"),
        ("ram", "none", True, "ordinary"),
        ("device", "none", True, "device"),
        ("device", "ordinary", True, "ordinary"),
    ],
)
def test_what_is_not_known_to_be_secret_is_drawn_as_ordinary(
    kind: str, backing: str, guest_writable: bool, look: str
) -> None:
    one = MapRange.of({**ram(0, 1).as_tables(), "kind": kind, "backing": backing, "guest_writable": guest_writable})
    assert memory_map.look(one) == look
    assert f".{look} {{ background: " in STYLE


def test_the_legend_adds_up() -> None:
    totals = {
        one.look: (one.ranges, one.size) for one in memory_map.totals(list(memory_map.rows(guest_report().memory_map)))
    }
    assert totals["secret"] == (5, 256 << 20)
    assert totals["read-only"] == (1, 256 << 10)
    assert totals["ordinary"] == (0, 0)
    assert totals["device"][0] == 6
