"""What the broker may do, and what it lets others do: its own capabilities, and how much borrowers may lock."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

from integration.conftest import MIB, eventually
from integration.leftovers import command_line, descendants
from integration.test_broker import (
    UNITS,
    Brokers,
    acquire,
    brokers,
    client,
    filled,
    pool,
    scraped,
)
from vmmback.broker.run import RIGHTS
from vmmback.linux import capabilities as linux_capabilities
from vmmback.linux import procfs

__all__ = ["brokers"]  # a fixture

pytestmark = pytest.mark.usefixtures("needs_secretmem")


def sets(task: Path) -> dict[str, set[str] | str]:
    status = procfs.status(task.name, task.parent)
    found: dict[str, set[str] | str] = {
        name: set(linux_capabilities.names(int(status[name], 16)))
        for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")
    }
    return found | {"NoNewPrivs": status["NoNewPrivs"]}


def tasks_of(pid: int) -> list[dict[str, set[str] | str]]:
    """Return the sets of each thread of a process; nothing for what has ended meanwhile."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                found.append(sets(task))
    return found


def test_the_broker_keeps_the_rights_that_are_named_and_no_process_of_its_has_more(
    brokers: Brokers, tmp_path: Path
) -> None:
    """With a thread beside its own, which looks for figures, while the pool is being filled."""
    broker = brokers.start(f'metrics = "{tmp_path}/metrics"\n' + pool(512 * MIB))
    assert "vmmback" in scraped(tmp_path / "metrics")
    own = linux_capabilities.names(int(procfs.status("self")["CapPrm"], 16))
    kept = set(RIGHTS) & set(own)
    expected = {
        "CapPrm": kept, "CapEff": kept, "CapInh": set(), "CapBnd": kept, "CapAmb": set(), "NoNewPrivs": "1",
    }  # fmt: skip
    assert kept < set(own)
    threads = tasks_of(broker.pid)
    assert len(threads) > 1
    assert [found for found in threads if found != expected] == []

    def filling() -> bool:
        workers = [pid for pid in descendants(broker.pid) if "prefault_worker.py" in command_line(pid)]
        return any(tasks_of(pid) for pid in workers)

    eventually(filling, "the pool is being filled")
    others = [found for pid in descendants(broker.pid) for found in tasks_of(pid)]
    assert others
    assert [found for found in others if found != expected] == []


def test_its_unit_names_the_same_rights() -> None:
    (names,) = re.findall(r"^CapabilityBoundingSet=(.*)$", (UNITS / "vmmback-broker.service").read_text(), re.MULTILINE)
    assert names.split() == list(RIGHTS)


def test_what_is_lent_is_mapped_by_no_process_of_the_brokers(brokers: Brokers) -> None:
    broker = brokers.start(pool())
    eventually(filled, "the pool is filled", timeout_s=60)
    with client() as borrower:
        _, memory, _ = acquire(borrower)
        inode = os.fstat(memory).st_ino
        for pid in (broker.pid, *descendants(broker.pid)):
            mapped = procfs.maps(pid)
            assert mapped
            assert not [each for each in mapped if each.inode == inode and each.path == procfs.SECRETMEM]
        os.close(memory)
