"""Which part of a needle is its anchor. What a needle is besides needs secret memory: integration/test_needle.py."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback.isolation.needle import choose_anchor

IDLE = 4096


def steps(anchor: bytes, fill: int) -> int:
    """Count the steps of glibc's memmem() through a page of a fill, as its source describes them."""

    def pair(first: int, second: int) -> int:
        return (second - first * 8) % 256

    end = len(anchor) - 1
    places = {pair(anchor[index - 1], anchor[index]): index for index in range(1, end)}
    last = pair(anchor[-2], anchor[-1])
    behind = end - places.get(last, 0)
    places[last] = end
    at = count = 0
    while at <= IDLE - len(anchor):
        place = places.get(pair(fill, fill), 0)
        at += behind if place == end else end - place
        count += 1
    return count


def with_bad(size: int, places: set[int], fill: int = 0, seed: int = 1) -> bytes:
    """Return a needle whose byte at each place hashes with the one before it like a pair of the fill."""
    needle = bytearray(random.Random(seed).randbytes(size))
    for index in range(1, size):
        like = (needle[index - 1] * 8 - 7 * fill) % 256
        if index in places:
            needle[index] = like
        elif any((needle[index] - needle[index - 1] * 8 + 7 * other) % 256 == 0 for other in (0, 0xFF)):
            needle[index] ^= 1 << 6
    return bytes(needle)


@given(st.binary(min_size=16, max_size=200))
def test_an_anchor_is_a_part_of_the_needle_never_the_whole(needle: bytes) -> None:
    start, size = choose_anchor(needle, len(needle))
    assert 8 <= size <= 60
    assert size <= len(needle) - 4
    assert 0 <= start <= len(needle) - size


@given(st.lists(st.sampled_from(b"abcdef\0"), min_size=16, max_size=200))
def test_a_needle_with_enough_different_bytes_has_an_anchor_with_enough(values: list[int]) -> None:
    needle = bytes(values)
    start, size = choose_anchor(needle, len(needle))
    longest = min(len(needle) - 4, 60)
    most = max(len(set(needle[at : at + longest])) for at in range(len(needle) - longest + 1))
    assert len(set(needle[start : start + size])) >= min(most, 8)


@given(st.integers(1, 63), st.integers(0, 10_000), st.sampled_from([0, 0xFF]))
def test_one_bad_pair_costs_at_most_half_the_speed(bad: int, seed: int, fill: int) -> None:
    needle = with_bad(64, {bad}, fill, seed)
    start, size = choose_anchor(needle, 64)
    assert steps(needle[start : start + size], fill) <= IDLE // 30 + 1


@pytest.mark.parametrize("bad", [range(56, 64), range(30), [20, 40], [30, 58, 59, 60, 61, 62]])
def test_the_part_without_bad_pairs_is_chosen(bad: list[int]) -> None:
    needle = with_bad(64, set(bad))
    start, size = choose_anchor(needle, 64)
    assert not any(start < index < start + size for index in bad)


@pytest.mark.parametrize("bad", [{13, 14}, {14, 15}, {8}, {1, 2}])
def test_the_shortest_needle_has_a_part_without_bad_pairs(bad: set[int]) -> None:
    needle = with_bad(16, bad)
    start, size = choose_anchor(needle, 16)
    assert steps(needle[start : start + size], 0) <= IDLE // 7 + 1


def test_all_bad_is_no_error() -> None:
    needle = with_bad(64, set(range(1, 64)))
    start, size = choose_anchor(needle, 64)
    assert 8 <= size <= 60
    assert start + size <= 64
