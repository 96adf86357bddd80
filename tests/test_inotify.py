"""A watched file: what is written to it, and the end of its last name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmback.linux.inotify import watch


def test_what_is_written_and_the_removal_are_seen_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb", buffering=0) as log, watch(path) as changes:
        assert not changes.changed(0)
        log.write(b"a")
        log.write(b"b")
        assert changes.changed(5)
        (tmp_path / "other").touch()
        assert not changes.changed(0)
        path.unlink()
        assert changes.changed(5)


def test_what_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), watch(tmp_path / "log"):
        pass
