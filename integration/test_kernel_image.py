"""The second mapping of the kernel's image, on the real kernel. Frames that were part of it: test_debian_kernel.py."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration import capabilities
from vmmback.isolation.direct_map import DirectMapProbe, PageCount
from vmmback.isolation.probe import Target
from vmmback.isolation.specimen import Specimen, specimen
from vmmback.linux import kernel_image, procfs
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.kernel_image import ImageRange
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Observation, Verdict, judge_probe

pytestmark = pytest.mark.usefixtures("needs_secretmem", "needs_direct_map")


@pytest.fixture
def image() -> ImageRange:
    capabilities.require(capabilities.KERNEL_IMAGE)
    found = kernel_image.image_range()
    assert found is not None
    return found


@pytest.fixture
def secret_page(image: ImageRange) -> Iterator[Specimen]:
    """A page whose frame never was the image's."""
    with ExitStack() as stack:  # one that was is held until another is found
        for _ in range(100):
            page = stack.enter_context(specimen("secret", PAGE_SIZE))
            if not image.start <= frame_of(page) * PAGE_SIZE < image.end:
                yield page
                return
        pytest.fail("the kernel gave us nothing but frames of its image")


def frame_of(page: Specimen) -> int:
    return procfs.pagemap("self", page.address, PAGE_SIZE)[0] & procfs.PFN_MASK


def claim(monkeypatch: pytest.MonkeyPatch, image: ImageRange, page: Specimen) -> None:
    """Make the probe take the frame of `page`, and no other, for one of the image's."""
    start = frame_of(page) * PAGE_SIZE
    monkeypatch.setattr(kernel_image, "image_range", lambda: image._replace(start=start, end=start + PAGE_SIZE))


def observe(page: Specimen) -> tuple[Observation, PageCount]:
    probe = DirectMapProbe({})
    return probe.observe(Target(os.getpid(), {page.ram.inode: page.ram.size})), probe.pages


def test_the_image_is_found_and_read_where_the_kernel_says_it_is(image: ImageRange) -> None:
    symbols = [line.split() for line in Path("/proc/kallsyms").read_text().splitlines()]
    (text,) = [int(address, 16) for address, _, name, *_ in symbols if name == "_text"]
    entries = array(
        "Q", [procfs.PRESENT | frame for frame in range(image.rodata // PAGE_SIZE, image.rodata // PAGE_SIZE + 64)]
    )
    with DirectMap.open() as direct_map:
        mapping = kernel_image.mapping(direct_map, image)
        assert (mapping.base + image.code) % (1 << 64) == text or not text
        assert list(mapping.read_frames(entries)) == list(direct_map.read_frames(entries))
        assert mapping.check(entries).readable == len(entries)


def test_a_frame_outside_the_range_is_not_looked_for_there(
    image: ImageRange, secret_page: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_image, "image_range", lambda: image._replace(start=0, end=PAGE_SIZE))
    seen, pages = observe(secret_page)
    assert (seen.target, seen.detail) == (Verdict.BLOCKED, "0 of 1 present pages readable (EFAULT)")
    assert pages == PageCount(1, 1, 0)


def test_a_frame_that_the_images_mapping_lacks_is_blocked(
    image: ImageRange, secret_page: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, image, secret_page)
    seen, pages = observe(secret_page)
    assert judge_probe(seen).verdict is Verdict.BLOCKED
    assert (seen.detail, pages) == ("0 of 1 present pages readable (EFAULT)", PageCount(1, 1, 0))


def test_a_frame_that_the_images_mapping_shows_is_readable(
    image: ImageRange, secret_page: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's mapping is one that has an ordinary page of ours where the secret frame would be."""
    with specimen("ordinary", PAGE_SIZE) as shown:
        delta = (frame_of(shown) - frame_of(secret_page)) * PAGE_SIZE
        claim(monkeypatch, image, secret_page)
        monkeypatch.setattr(kernel_image, "mapping", lambda direct_map, _: direct_map.at(direct_map.base + delta))
        seen, pages = observe(secret_page)
    assert judge_probe(seen).verdict is Verdict.READABLE
    assert seen.detail == "1 of 1 present pages readable, 1 through the kernel image's mapping"
    assert pages == PageCount(1, 1, 1)


def test_an_ordinary_page_counts_once(image: ImageRange, monkeypatch: pytest.MonkeyPatch) -> None:
    with specimen("ordinary", PAGE_SIZE) as page:
        claim(monkeypatch, image, page)
        monkeypatch.setattr(kernel_image, "mapping", lambda direct_map, _: direct_map)
        seen, pages = observe(page)
    assert (seen.detail, pages) == ("1 of 1 present pages readable", PageCount(1, 1, 1))


def test_where_the_mapping_is_not_found_the_frame_is_inconclusive(
    image: ImageRange, secret_page: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, image._replace(rodata=image.rodata + PAGE_SIZE, code=image.code - PAGE_SIZE), secret_page)
    seen, pages = observe(secret_page)
    assert (seen.target, seen.control) == (Verdict.INCONCLUSIVE, Verdict.READABLE)
    assert "but only 0 could be tried; the mapping of the kernel's image was not found" in seen.detail
    assert pages == PageCount(1, 0, 0)
