"""The judgement on what the guest's runs showed, and the child's deadline: no /dev/kvm needed."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmmback.errors import HostUnfit
from vmmback.linux import kvm, kvm_worker
from vmmback.linux.kvm import SlotRun, can_map_secret_ram, judge

PASSED = SlotRun(exit_reason=5, marker=True, clock_version=2)
EFAULT = SlotRun(failed="KVM_RUN", error=errno.EFAULT)
NO_CLOCK = SlotRun(exit_reason=5, marker=True)

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="the experiment is known for x86_64 only")


def test_usable_only_when_both_kinds_of_memory_pass() -> None:
    answer = judge([PASSED, PASSED])
    assert answer.usable
    assert answer.reason == "KVM maps secret RAM: ran to HLT, with a clock"


@pytest.mark.parametrize(
    ("secret", "seen"),
    [
        (EFAULT, "KVM_RUN gave EFAULT"),
        (SlotRun(failed="KVM_RUN", error=9999), "KVM_RUN gave errno 9999"),
        (NO_CLOCK, "the guest ran to HLT, but KVM did not write its clock there"),
        (SlotRun(exit_reason=5, clock_version=2), "the guest ran to HLT, but its store never arrived"),
        (
            SlotRun(exit_reason=8, marker=True, clock_version=2),
            "KVM_RUN ended with exit reason 8 (SHUTDOWN) instead of HLT",
        ),
        (SlotRun(exit_reason=77), "KVM_RUN ended with exit reason 77 (unknown) instead of HLT"),
    ],
)
def test_a_failure_on_secret_memory_says_what_differed(secret: SlotRun, seen: str) -> None:
    answer = judge([PASSED, secret])
    assert not answer.usable
    assert answer.reason == f"KVM cannot map secret RAM: {seen} (ordinary memory: ran to HLT, with a clock)"


@pytest.mark.parametrize("secret", [[], [PASSED], [EFAULT]])
def test_a_failed_control_proves_nothing_whatever_secret_memory_did(secret: list[SlotRun]) -> None:
    answer = judge([EFAULT, *secret])
    assert not answer.usable
    assert answer.reason == "KVM does not work here, not even with ordinary memory: KVM_RUN gave EFAULT"


def test_a_missing_run_is_explained_by_how_the_child_ended() -> None:
    assert judge([], "it hung").reason == "KVM does not work here, not even with ordinary memory: it hung"
    assert judge([PASSED], "it hung").reason.startswith("KVM cannot map secret RAM: it hung (ordinary memory: ran")
    assert not judge([PASSED], "it hung").usable


def test_ioctl_numbers_are_those_of_the_kernel_headers() -> None:
    assert kvm_worker._io(0x80) == 0xAE80  # KVM_RUN
    assert kvm_worker._iow(0x46, 32) == 0x4020AE46  # KVM_SET_USER_MEMORY_REGION
    assert kvm_worker._ior(0x83, 312) == 0x8138AE83  # KVM_GET_SREGS
    assert kvm_worker._iowr(0x05, 8) == 0xC008AE05  # KVM_GET_SUPPORTED_CPUID


def test_no_experiment_is_known_for_other_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    answer = can_map_secret_ram()
    assert answer == kvm.KvmAnswer(usable=False, reason="no probe of KVM on secret RAM is known for aarch64")


def no_child(*arguments: object, **options: object) -> None:
    raise AssertionError("a child was started")


@x86_only
def test_a_missing_device_is_answered_without_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "Popen", no_child)
    answer = can_map_secret_ram(device=tmp_path / "kvm")
    assert not answer.usable
    assert answer.reason == f"KVM cannot be used: {tmp_path}/kvm: No such file or directory"


@x86_only
def test_a_host_without_secret_memory_is_answered_without_a_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unfit() -> int:
        raise HostUnfit("this kernel has no memfd_secret(2)")

    monkeypatch.setattr(kvm, "memfd_secret", unfit)
    monkeypatch.setattr(subprocess, "Popen", no_child)
    device = tmp_path / "kvm"
    device.touch()
    answer = can_map_secret_ram(device=device)
    assert not answer.usable
    assert answer.reason == "KVM cannot be tried on secret RAM: this kernel has no memfd_secret(2)"


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", program]


HANGS_AFTER_A_LINE = ["sh", "-c", "echo '{}'; exec sleep 1000"]


def test_a_hanging_child_is_killed_at_the_deadline_and_its_first_run_kept() -> None:
    started = time.monotonic()
    output, ending = kvm._run_child(HANGS_AFTER_A_LINE, (), timeout_s=0.5)
    assert output == "{}\n"
    assert ending == "KVM_RUN gave no answer within 0.5 s"
    assert time.monotonic() - started < 20


def test_a_child_that_sigkill_cannot_end_is_not_waited_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task stuck inside the kernel takes its SIGKILL only later; here it is one that never gets it."""
    children: list[subprocess.Popen[str]] = []

    class Unkillable(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

        def kill(self) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Unkillable)
    monkeypatch.setattr(kvm, "_KILL_GRACE_S", 0.1)
    output, ending = kvm._run_child(HANGS_AFTER_A_LINE, (), timeout_s=0.5)
    (child,) = children
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert output == "{}\n"
    assert ending == f"KVM_RUN gave no answer within 0.5 s, and SIGKILL did not end process {child.pid}"


def test_an_interrupted_wait_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen[str]):
        def communicate(self, *arguments: Any, **options: Any) -> tuple[str, str]:
            if not children:
                children.append(self)
                raise KeyboardInterrupt
            return super().communicate(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvm._run_child(HANGS_AFTER_A_LINE, (), timeout_s=60)
    assert children[0].returncode == -signal.SIGKILL


def test_a_child_that_dies_is_quoted() -> None:
    output, ending = kvm._run_child(python("raise SystemExit('no ctypes here')"), (), timeout_s=10)
    assert output == ""
    assert ending == "the experiment's process ended early, status 1: no ctypes here"


def test_a_run_survives_the_pipe() -> None:
    assert SlotRun(**json.loads(json.dumps(PASSED._asdict()))) == PASSED
