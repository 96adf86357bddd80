"""The leases as a file: what the next broker makes of it, whatever it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmmback.broker.config import MIB
from vmmback.broker.journal import Journal
from vmmback.broker.ledger import Lease


def lease(number: int, pid: int) -> Lease:
    return Lease(number, 64 * MIB, 7, pid, 1000, 100, "a guest", "2026-01-01 00:00:00+00:00")


def read(file: Path) -> list[Lease]:
    found = list(Journal(file).read())
    for _, pidfd in found:
        os.close(pidfd)
    return [each for each, _ in found]


@pytest.fixture
def own_pidfd() -> Iterator[int]:
    pidfd = os.pidfd_open(os.getpid())
    yield pidfd
    os.close(pidfd)


def test_a_lease_lives_with_its_process_and_no_other_of_its_number(tmp_path: Path, own_pidfd: int) -> None:
    file = tmp_path / "leases"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        theirs = os.pidfd_open(process.pid)
        Journal(file).write([(lease(1, os.getpid()), own_pidfd), (lease(2, process.pid), theirs)])
        assert read(file) == [lease(1, os.getpid()), lease(2, process.pid)]
        process.kill()
    os.close(theirs)
    assert read(file) == [lease(1, os.getpid())]
    (entry, _) = json.loads(file.read_text())
    file.write_text(json.dumps([entry | {"started": entry["started"] + 1}]))
    assert read(file) == []


def test_without_leases_there_is_no_file_and_one_whose_process_has_ended_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "leases"
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        ended = os.pidfd_open(process.pid)
    file.write_text("[]")
    Journal(file).write([(lease(1, process.pid), ended)])
    os.close(ended)
    assert not file.exists()
    assert read(file) == []


@pytest.mark.parametrize("text", ["", "{", "7", "[7]", '["x"]', "[{}]", '[{"started": 1, "pid": "x"}]', "[[]]", "{}"])
def test_what_is_no_file_of_ours_holds_no_leases(tmp_path: Path, text: str) -> None:
    (tmp_path / "leases").write_text(text)
    assert read(tmp_path / "leases") == []
