"""Admission on a host whose kernel zones are small: a machine with ZONE_MOVABLE, and vmmback and QEMU inside it.

There the kernel may run out of memory: nobody is harmed. inside_host.py does what is told of here; the last part is the
control, without admission.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from integration import capabilities, inside_host
from integration.debian_host import run_on_host

# Of 1 GiB, 171 MiB are the kernel's zones, and all else is ZONE_MOVABLE.
MEMORY, CMDLINE = "1G", "secretmem.enable=1 movablecore=850M"
TIMEOUT_S = 600.0

pytestmark = pytest.mark.timeout_s(TIMEOUT_S + 60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """What inside_host.py returned there, and the machine's serial log; one run for all tests."""
    for capability in (capabilities.QEMU, capabilities.GUEST_KERNEL, capabilities.DEBOOTSTRAP):
        capabilities.require(capability)
    folder = tmp_path_factory.mktemp("host")
    program = Path(inside_host.__file__)
    return run_on_host(program, folder, memory=MEMORY, cmdline=CMDLINE, timeout_s=TIMEOUT_S), folder / "serial.log"


@pytest.fixture
def told(run: tuple[Any, Path], tmp_path: Path) -> Any:
    """What was told; the log lies where it is kept for a test that failed."""
    shutil.copy(run[1], tmp_path)
    return run[0]


def test_launches_fill_the_host_up_to_the_budget_and_the_next_is_refused(told: Any) -> None:
    *guests, refused = told["filled"]
    assert [guest["code"] for guest in guests] == [0, 0], [guest["said"] for guest in guests]
    assert refused["code"] == 4, refused["said"]
    assert refused["said"].count("vmmback: error: ") == 1
    assert f"{refused['size']} MiB of secret RAM do not fit" in refused["said"]
    # It is not memory as such that is short.
    assert refused["memory"]["available"] > 10 * refused["size"]


def test_a_full_host_can_still_do_what_hosts_do(told: Any) -> None:
    worked = told["worked"]
    left = worked["left"]
    assert (worked["killed"], worked["ooms"]) == (0, 0)
    assert left["tables"]["tables"] - left["forks"]["tables"] >= inside_host.WORK.tables // inside_host.MIB - 1
    assert left["files"]["kernel"] > 0


def test_nobody_is_killed_over_many_rounds_of_launch_and_release(told: Any) -> None:
    rounds = told["rounds"]
    assert len(rounds) == inside_host.ROUNDS
    for one in rounds:
        assert one["guest"] == {"up": True}
        assert one["end"] == 0
        assert one["worked"]["killed"] == 0
    assert told["ooms"] == 0
    assert [stopped["code"] for stopped in told["released"]["stopped"]] == [0, 0]


def test_without_admission_the_kernel_kills_while_much_memory_is_free(told: Any) -> None:
    control = told["control"]
    guests = control["guests"]
    assert guests[:-1] == [{"up": True}] * (len(guests) - 1)
    assert "the OOM killer ended the prefault" in guests[-1]["refused"]
    # For the guest there would be room, were it not for watermarks, and for what a launch takes besides.
    assert control["before"]["kernel"] < 2 * inside_host.CONTROL_GUEST // inside_host.MIB
    assert control["before"]["movable"] > 100
    assert control["before"]["available"] > 300
    # The same work as before: now it costs lives.
    after_launches, after_work = control["ooms"]
    assert after_work > after_launches > 0
    assert any("invoked oom-killer" in line for line in told["log"])
