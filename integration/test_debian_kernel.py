"""The probes inside a machine with Debian 12's kernel, 6.1, which differs in what matters from later ones:

it sets no `lo` on secret mappings, and the frames that it gives away first are those of its own image, which it freed.
And cgroups of version 2 with the memory controller, which a machine that has it in version 1 cannot have.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from integration import capabilities, inside_debian, inside_kvm
from integration.debian_kernel import run_inside
from vmmback.linux.kvm import SlotRun
from vmmback.report import Verdict

ALL = inside_debian.BYTES // 4096
PAID = inside_debian.PAID_BYTES
# Pages wait for their list in batches of each processor's (mm/swap.c, folio_batch), and are not counted meanwhile.
BATCHES = 1 << 20

# Where the kernel lies is drawn at each boot, and in some draws other frames are given away first.
BOOTS = 3


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What inside_kvm.py returned there, or inside_debian.py where there is no KVM; one run for all tests."""
    capabilities.require(capabilities.QEMU)
    capabilities.require(capabilities.GUEST_KERNEL)
    for _ in range(BOOTS):
        folder = tmp_path_factory.mktemp("debian")
        if capabilities.has(capabilities.GUEST_KVM):
            told = run_inside(Path(inside_kvm.__file__), folder, cpu=inside_kvm.CPU, modules=inside_kvm.MODULES)
        else:
            told = run_inside(Path(inside_debian.__file__), folder)
        if told["taken as they come"] and told["secret"]["in the image"]:
            break
    return told


def test_frames_of_the_image_that_the_direct_map_lacks_are_found_readable(said: Any) -> None:
    secret = said["secret"]
    within = secret["in the image"]
    assert within > 0, "the kernel gave away none of the frames that it freed of its image"
    assert secret["in the image, read directly"] == 0
    assert secret["in the image, canary read through its mapping"] == within
    assert secret["direct-map"] == {
        "target": Verdict.READABLE,
        "control": Verdict.READABLE,
        "detail": f"{within} of {ALL} present pages readable, {within} through the kernel image's mapping",
    }
    assert secret["pages"] == {"present": ALL, "checked": ALL, "readable": within}
    assert secret["in the image, canary in kcore"] == min(within, inside_debian.WITNESSED)


def test_a_prefault_leaves_such_frames_alone(said: Any) -> None:
    """The twin takes the frames as they come, and so has some: they were free, and where the kernel looks first."""
    assert said["taken as they come"] > 0
    assert said["set aside"] == 0


def test_a_secret_mapping_without_lo_is_blocked_by_its_unevictable_frames(said: Any) -> None:
    secret = said["secret"]
    assert "dd" in secret["flags"]
    assert "lo" not in secret["flags"], "this kernel locks secret memory: it shows nothing of what is tested here"
    assert secret["vma-flags"] == {
        "target": Verdict.BLOCKED,
        "control": Verdict.READABLE,
        "detail": f"unevictable, {ALL} frames, and left out of dumps (dd): 1 mapping(s)",
    }


def test_the_limit_on_locked_memory_is_taken_away_where_it_counts_for_root_too(said: Any) -> None:
    """The RAM of which the other tests tell is larger than the limit, which this kernel holds against root as well."""
    assert said["limit"] < inside_debian.BYTES
    assert said["beyond the limit"] == said["limit"]


def test_ordinary_memory_is_readable_by_both(said: Any) -> None:
    ordinary = said["ordinary"]
    assert ordinary["direct-map"]["detail"] == f"{ALL} of {ALL} present pages readable"
    assert ordinary["vma-flags"]["target"] == Verdict.READABLE
    assert ordinary["vma-flags"]["detail"].endswith(f"{ALL} of {ALL} frames can be swapped out")


def test_a_group_of_version_2_is_found_with_the_least_room_of_all_above(said: Any) -> None:
    told = said["cgroups"]
    assert told["without the controller"].startswith("3 process.cgroup: /machine/guest counts no memory of its own: ")
    assert told["no limit"] is None
    assert told["path of ours"] == "/ours"
    assert told["path from behind a wall"] == "/machine/guest"
    group = told["group"]
    assert (group["path"], group["version"], group["high"]) == ("/machine/guest", 2, None)
    assert (group["limit"], group["usage"]) == (4 * PAID, 0)
    assert 3 * PAID - BATCHES <= group["room"] <= 3 * PAID


def test_a_group_of_version_2_pays_for_the_prefault_of_its_guest(said: Any) -> None:
    """And as the twin, without a group it is the supervisor's own that pays."""
    told = said["cgroups"]
    by_us, by_the_guest = told["its own"]
    assert (by_us >= PAID - BATCHES, by_the_guest) == (True, 0)
    by_us, by_the_guest = told["the guest's"]
    assert (by_us, by_the_guest >= PAID - BATCHES) == (0, True)


def test_a_group_of_version_2_that_cannot_take_it_refuses(said: Any) -> None:
    told = said["cgroups"]
    assert told["too large"].startswith("4 the host ran out of memory while secret RAM was prefaulted: the OOM killer ")
    assert told["with children"].endswith("/machine/cgroup.procs: Device or resource busy")
    assert told["with children"].startswith("3 process.cgroup: no process can be put into it: ")


def test_mainlines_kvm_runs_a_guest_on_ordinary_memory_and_refuses_secret_memory(said: Any) -> None:
    """The probe on a KVM that works and is no nested one: its pages come by get_user_pages, as in every release."""
    capabilities.require(capabilities.GUEST_KVM)
    told = said["kvm"]
    halted = SlotRun(exit_reason=5, marker=True, clock_version=told["ordinary"]["clock_version"])
    assert told["ordinary"] == halted._asdict()
    assert halted.passed
    assert told["secret"] == SlotRun(failed="KVM_RUN", error=errno.EFAULT)._asdict()
    assert told["answer"] == {
        "usable": False,
        "reason": "KVM cannot map secret RAM: KVM_RUN gave EFAULT (ordinary memory: ran to HLT, with a clock)",
    }
