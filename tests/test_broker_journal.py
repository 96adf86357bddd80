"""The leases as a file: what the next broker makes of it, whatever it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmmback.broker.config import MIB
from vmmback.broker.journal import Journal
from vmmback.broker.ledger import Lease
from vmmback.linux import procfs

real_write = os.write


def lease(number: int, pid: int) -> Lease:
    started = procfs.start_time(pid)
    return Lease(number, 64 * MIB, 7, pid, 1000, 100, started, "a guest", "2026-01-01 00:00:00+00:00")


def read(file: Path) -> list[Lease]:
    found = list(Journal(file).read())
    for _, pidfd in found:
        os.close(pidfd)
    return [each for each, _ in found]


def test_a_lease_lives_with_its_process_and_no_other_of_its_number(tmp_path: Path) -> None:
    file = tmp_path / "leases"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        own, theirs = lease(1, os.getpid()), lease(2, process.pid)
        journal = Journal(file)
        journal.add(own)
        journal.add(theirs)
        assert read(file) == [own, theirs]
        process.kill()
    assert read(file) == [own]
    journal.close()
    entry = json.loads(file.read_bytes().splitlines()[0])
    file.write_text(json.dumps(entry | {"started": entry["started"] + 1}))
    assert read(file) == []


def test_what_has_ended_is_none_and_without_leases_there_is_no_file(tmp_path: Path) -> None:
    file = tmp_path / "leases"
    journal = Journal(file)
    for number in (1, 2):
        journal.add(lease(number, os.getpid()))
    journal.end(1)
    assert read(file) == [lease(2, os.getpid())]
    journal.end(2)
    assert read(file) == []
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_the_next_one_goes_on_with_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "leases"
    first = Journal(file)
    for number in (1, 2, 3):
        first.add(lease(number, os.getpid()))
    first.end(1)
    second = Journal(file)  # the first was killed
    found = list(second.read())
    for _, pidfd in found:
        os.close(pidfd)
    assert [each.number for each, _ in found] == [2, 3]
    second.end(2)
    second.add(lease(4, os.getpid()))
    assert [each.number for each in read(file)] == [3, 4]
    first.close()
    second.close()


def test_the_file_is_no_longer_than_what_lives_and_some_lines(tmp_path: Path) -> None:
    file = tmp_path / "leases"
    journal = Journal(file)
    most = 0
    journal.add(lease(1, os.getpid()))
    for number in range(2, 2000):
        journal.add(lease(number, os.getpid()))
        journal.end(number)
        most = max(most, len(file.read_bytes().splitlines()))
    assert read(file) == [lease(1, os.getpid())]
    assert 100 < most < 300
    journal.close()


def test_what_could_not_be_written_is_written_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "leases"
    journal = Journal(file)
    journal.add(lease(1, os.getpid()))
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[: len(data) // 2]))
        journal.add(lease(2, os.getpid()))  # half of its line
        journal.add(lease(3, os.getpid()))
    assert read(file) == [lease(1, os.getpid())]
    assert not file.with_suffix(".new").exists()
    journal.end(1)
    assert [each.number for each in read(file)] == [2, 3]
    journal.close()


@pytest.mark.parametrize(
    "text", ["", "{", "7", "[7]", '["x"]', "[{}]", '{"started": 1, "pid": "x"}', "[[]]", "{}", '{"ended": []}']
)
def test_what_is_no_file_of_ours_holds_no_leases(tmp_path: Path, text: str) -> None:
    (tmp_path / "leases").write_text(text)
    assert read(tmp_path / "leases") == []
