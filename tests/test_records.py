"""What is kept of a domain's runs, in files."""

from __future__ import annotations

import os
import shutil
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.domain_frames import write_frames
from tests.sample_reports import exposed_report, guest_report
from vmmback.libvirt import records
from vmmback.linux import page_file

UUID = "0d7e5a4f-8a1c-4b1e-9b0e-6a1f7e5d3c2b"
OTHER = "1d7e5a4f-8a1c-4b1e-9b0e-6a1f7e5d3c2b"
FRAMES = {17: array("Q", [1 << 63 | 5, 0, 7]), 18: array("Q", [9])}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It is not there yet."""
    folder = tmp_path / "run/records"
    monkeypatch.setattr(records, "RECORDS", folder)
    return folder


@pytest.fixture
def begun(folder: Path) -> Path:
    records.begin(UUID)
    return folder


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_where_nothing_was_written_nothing_is_known(folder: Path) -> None:
    assert records.read(UUID) is None
    assert records.frames(UUID, 4711) == {}
    assert records.runs(UUID) == []
    records.forget_frames(UUID, 4711)
    with pytest.raises(FileNotFoundError):
        records.write(UUID, guest_report())
    assert not folder.exists()


def test_a_report_is_read_as_it_was_written_and_the_last_one_counts(begun: Path) -> None:
    records.write(UUID, guest_report())
    records.write(UUID, exposed_report())
    records.write(OTHER, guest_report())
    assert records.read(UUID) == exposed_report()
    assert sorted(file.name for file in begun.iterdir()) == [f"{UUID}.json", f"{OTHER}.json"]


def test_a_new_run_begins_without_a_report_and_with_the_frames_of_the_last_one(begun: Path) -> None:
    """Which are looked at when the last run's end is told; that may come later."""
    records.write(UUID, guest_report())
    records.write(OTHER, guest_report())
    write_frames(UUID, 4711, FRAMES)
    records.begin(UUID)
    assert records.read(UUID) is None
    assert records.read(OTHER) is not None
    assert records.frames(UUID, 4711) == FRAMES


def test_frames_are_of_one_run_until_they_are_forgotten(begun: Path) -> None:
    write_frames(UUID, 4711, FRAMES)
    write_frames(UUID, 12, {1: array("Q")})
    write_frames(OTHER, 4712, FRAMES)
    assert sorted(records.runs(UUID)) == [12, 4711]
    assert records.frames(UUID, 4711) == FRAMES
    assert records.frames(UUID, 12) == {1: array("Q")}
    write_frames(UUID, 4711, {19: array("Q", [1])})  # its pid came again
    assert records.frames(UUID, 4711) == {19: array("Q", [1])}
    records.forget_frames(UUID, 4711)
    assert (records.runs(UUID), records.frames(UUID, 4711)) == ([12], {})
    assert records.runs(OTHER) == [4712]


def test_a_name_with_dots_is_one_name(begun: Path) -> None:
    for name in ("a", "a.b", "a.b.1"):
        records.write(name, guest_report(guest=name))
        write_frames(name, 7, FRAMES)
    assert records.runs("a.b.1") == [7]
    for name in ("a", "a.b", "a.b.1"):
        found = records.read(name)
        assert found is not None
        assert found.guest == name
        assert records.frames(name, 7) == FRAMES
        records.forget_frames(name, 7)
    assert sorted(file.name for file in begun.iterdir()) == ["a.b.1.json", "a.b.json", "a.json"]


def test_they_are_of_their_owner_alone(begun: Path) -> None:
    records.write(UUID, guest_report())
    write_frames(UUID, 4711, FRAMES)
    assert mode(begun) == 0o700
    assert mode(begun / f"{UUID}.json") == 0o600
    assert mode(begun / f"{UUID}.4711.frames") == 0o700
    assert [mode(file) for file in (begun / f"{UUID}.4711.frames").iterdir()] == [0o600, 0o600]


def test_polkits_rule_can_look_beside_them_whatever_the_umask_is(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        records.begin(UUID)
    finally:
        os.umask(before)
    assert (mode(folder.parent), mode(folder)) == (0o755, 0o700)


def test_who_reads_sees_a_whole_file_or_the_one_before(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write(UUID, guest_report())
    with monkeypatch.context() as full:
        full.setattr(os, "O_TRUNC", os.O_TRUNC | os.O_DIRECTORY)  # nothing can be written
        with pytest.raises(OSError, match=r"directory|argument"):
            records.write(UUID, exposed_report())
    assert records.read(UUID) == guest_report()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as before_the_end:
        before_the_end.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            records.write(UUID, exposed_report())
        with pytest.raises(KeyboardInterrupt):
            write_frames(UUID, 4711, FRAMES)
    assert records.read(UUID) == guest_report()
    assert records.frames(UUID, 4711) == {}  # of a file that is not whole nothing is known
    assert len(list(begun.glob("*.new"))) == 2
    records.begin(UUID)
    assert list(begun.iterdir()) == []


def test_frames_are_of_no_run_until_they_get_its_pid(begun: Path) -> None:
    one, other = records.new_frames(UUID), records.new_frames(UUID)
    file = page_file.sealed(FRAMES[17])
    records.write_frames(one, {17: file})
    records.write_frames(other, {18: file})
    os.close(file)
    assert records.runs(UUID) == []
    records.name_frames(one, UUID, 4711)
    records.drop_frames(other)
    records.drop_frames(one)
    assert (records.runs(UUID), records.frames(UUID, 4711)) == ([4711], {17: FRAMES[17]})
    assert [file.name for file in begun.iterdir()] == [f"{UUID}.4711.frames"]
    with pytest.raises(FileNotFoundError):
        records.name_frames(other, UUID, 4711)


def test_what_is_of_no_run_can_be_removed_of_all_domains(begun: Path) -> None:
    write_frames(UUID, 4711, FRAMES)
    for uuid in (UUID, OTHER):
        records.write_frames(records.new_frames(uuid), {})
    assert len(list(begun.iterdir())) == 3
    records.drop_unnamed()
    assert [path.name for path in begun.iterdir()] == [f"{UUID}.4711.frames"]
    shutil.rmtree(begun)
    records.drop_unnamed()


def test_of_frames_that_are_written_when_the_next_run_begins_none_are_named(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = records.new_frames(UUID), page_file.sealed(FRAMES[17])
    records.write_frames(folder, {17: file})
    with monkeypatch.context() as half_way:
        half_way.setattr(shutil, "rmtree", lambda *_, **__: (folder / "17").unlink(missing_ok=True))
        records.begin(UUID)
    os.close(file)
    with pytest.raises(FileNotFoundError):
        records.name_frames(folder, UUID, 4711)
    records.begin(UUID)
    assert list(begun.iterdir()) == []


def test_several_who_write_at_once_do_not_mix(begun: Path) -> None:
    reports = [guest_report(guest="short"), guest_report(guest="long" * 5000)]

    def write(number: int) -> None:
        records.write(UUID, reports[number % 2])
        assert records.read(UUID) in reports

    with ThreadPoolExecutor(4) as executor:
        for future in [executor.submit(write, number) for number in range(200)]:
            future.result()
    assert [file.name for file in begun.iterdir()] == [f"{UUID}.json"]
