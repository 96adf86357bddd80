"""The direct map's counters, contiguity, and the estimate of what stays in huge pages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from vmmback import ram
from vmmback.host.direct_map_estimate import left_in_huge_pages
from vmmback.linux import direct_map_use
from vmmback.linux.direct_map_use import REGION, DirectMapUse
from vmmback.linux.procfs import PRESENT
from vmmback.report import DirectMap

GIB = 1 << 30
SOFT_DIRTY = 1 << 55


def host(root: Path, meminfo: str, vmstat: str) -> Path:
    (root / "meminfo").write_text("MemTotal:  1024 kB\n" + meminfo)
    (root / "vmstat").write_text("nr_free_pages 7\n" + vmstat)
    return root


def test_x86_tells_all(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        "DirectMap4k:    26624 kB\nDirectMap2M:  2048 kB\nDirectMap1G:  1048576 kB\n",
        "direct_map_level2_splits 3\ndirect_map_level3_splits 1\n"
        "direct_map_level2_collapses 2\ndirect_map_level3_collapses 0\n",
    )
    use = direct_map_use.of(root)
    assert use == DirectMapUse(26624 << 10, 2 << 20, GIB, 3, 1, 2, 0)
    assert use.in_huge_pages == GIB + (2 << 20)


def test_without_pages_of_1_gib_nor_collapses(tmp_path: Path) -> None:
    use = direct_map_use.of(host(tmp_path, "DirectMap4k: 4 kB\nDirectMap2M: 2048 kB\n", "direct_map_level2_splits 3\n"))
    assert use == DirectMapUse(4096, 2 << 20, None, 3, None, None, None)
    assert use.in_huge_pages == 2 << 20


def test_arm64_tells_nothing(tmp_path: Path) -> None:
    use = direct_map_use.of(host(tmp_path, "", ""))
    assert use == DirectMapUse(None, None, None, None, None, None, None)
    assert use.in_huge_pages is None


def test_regions_are_counted_once_and_absent_pages_not_at_all() -> None:
    entries = [PRESENT | SOFT_DIRTY | frame for frame in (512, 513, 1023, 1024, 4096)] + [7]
    assert direct_map_use.region_numbers(entries) == {1, 2, 8}
    assert direct_map_use.regions(entries) == 3
    assert direct_map_use.regions([PRESENT] * 3) == 0  # as the kernel shows them to whoever may not know


@pytest.mark.parametrize(("size", "ideal"), [(0, 0), (1, 1), (REGION, 1), (REGION + 1, 2), (GIB, 512)])
def test_ideal(size: int, ideal: int) -> None:
    assert direct_map_use.ideal_regions(size) == ideal


def test_nothing_is_told_of_ram_that_was_not_prefaulted_or_is_ordinary() -> None:
    with ram.OrdinaryRam(REGION) as ordinary:
        assert ram.direct_map([ordinary]) is None
        ordinary.direct_map = (direct_map_use.DirectMapUse(*[1] * 7),) * 2
        assert ram.direct_map([ordinary]) is None


def test_regions_that_two_rams_share_count_once_and_their_splits_add_up() -> None:
    def use(huge: int, splits: int | None) -> DirectMapUse:
        return DirectMapUse(0, huge, None, splits, splits, None, None)

    def secret(regions: set[int], before: DirectMapUse, after: DirectMapUse) -> ram.Ram:
        made = SimpleNamespace(backing="secret", size=REGION + 1, regions=regions, direct_map=(before, after))
        return cast("ram.Ram", made)

    found = ram.direct_map([secret({1, 2}, use(90, 3), use(80, 5)), secret({2, 9}, use(70, 10), use(60, 11))])
    assert found == DirectMap(regions=3, ideal=4, splits_2m=3, splits_1g=3, huge_before=90, huge_after=60)
    uncounted = ram.direct_map([secret({1}, use(1, None), use(1, None))])
    assert uncounted is not None
    assert uncounted.splits_2m is None
    hidden = ram.direct_map([secret(set(), use(1, 1), use(1, 2))])
    assert hidden is not None
    assert hidden.regions is None


@pytest.mark.parametrize(
    ("zones", "secret", "left"),
    [
        (24 * GIB, 0, 24 * GIB),
        (24 * GIB, 1, 24 * GIB - 2 * REGION),
        (24 * GIB, 4 * GIB, 16 * GIB),
        (24 * GIB, 20 * GIB, 0),
        (REGION + 5, 0, REGION),
    ],
)
def test_estimate(zones: int, secret: int, left: int) -> None:
    assert left_in_huge_pages(zones, secret) == left
