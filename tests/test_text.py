"""How values become text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.render import text


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1 KiB"),
        (799 << 10, "799 KiB"),
        (255 << 20, "255 MiB"),
        ((5 << 30) // 2, "2.5 GiB"),
        (3 << 40, "3 TiB"),
        (5000 << 40, "5,000 TiB"),
        (1028 << 20, "1 GiB"),
    ],
)
def test_sizes(size: int, expected: str) -> None:
    assert text.size(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, "0.0 ms"), (0.00031, "0.3 ms"), (0.059, "59 ms"), (1.254, "1.25 s")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


def test_counts_and_addresses() -> None:
    assert [text.count(number, "page") for number in (0, 1, 65536)] == ["0 pages", "1 page", "65,536 pages"]
    assert text.count(2, "copy", "copies") == "2 copies"
    assert [text.address(value) for value in (0, 1 << 32)] == ["0x00000000", "0x100000000"]


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_visible_text_is_printable_and_printable_text_is_left_alone(anything: str) -> None:
    assert text.visible(anything).isprintable()
    assert text.visible(text.visible(anything)) == text.visible(anything)
    if anything.isprintable():
        assert text.visible(anything) == anything


def test_what_cannot_be_seen_is_shown() -> None:
    assert text.visible("a\x1b[2J\u202eb\n\ud800\u00e9") == r"a\x1b[2J\u202eb\n\ud800" + "\u00e9"
