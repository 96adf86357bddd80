"""The bitmap of idle frames, as a file: the kernels at hand have none."""

from __future__ import annotations

import os
import sys
from array import array
from pathlib import Path

import pytest

from vmmback.isolation import metadata
from vmmback.isolation.metadata import PageIdleProbe
from vmmback.isolation.probe import Missing
from vmmback.isolation.specimen import specimen
from vmmback.linux import procfs
from vmmback.linux.memory import PAGE_SIZE

FRAME = 3 * 64 + 37


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PageIdleProbe:
    (tmp_path / "bitmap").write_bytes(bytes(64))
    monkeypatch.setattr(PageIdleProbe, "bitmap", tmp_path / "bitmap")
    monkeypatch.setattr(procfs, "pagemap", lambda *_: array("Q", [procfs.PRESENT | FRAME]))
    return PageIdleProbe()


def test_the_bit_of_the_frame_is_marked_and_one_that_stays_tells_nothing(probe: PageIdleProbe) -> None:
    with specimen("ordinary", PAGE_SIZE) as place:
        assert probe.reach(place) == ""
    words = array("Q", probe.bitmap.read_bytes())
    assert list(words) == [0, 0, 0, 1 << 37, 0, 0, 0, 0]


def test_a_bit_that_is_gone_after_the_use_tells_of_it(probe: PageIdleProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    read = iter([(1 << 37).to_bytes(8, sys.byteorder), bytes(8)])
    monkeypatch.setattr(metadata.os, "pread", lambda *_: next(read))  # type: ignore[attr-defined]
    with specimen("ordinary", PAGE_SIZE) as place:
        assert probe.reach(place) == "it told that a frame was used"


def test_a_kernel_without_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageIdleProbe, "bitmap", Path(os.devnull) / "none")
    with pytest.raises(Missing, match="CONFIG_IDLE_PAGE_TRACKING"):
        PageIdleProbe().require()
