"""Another process against one that maps the memory: each vector on secret memory, with its twin on ordinary memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.capabilities import Capability, require
from integration.conftest import LiveGuest, eventually
from vmmback.isolation import throwaway as throwaway_module
from vmmback.isolation import throwaway_worker
from vmmback.isolation.catalogue import PROCESS_PROBES
from vmmback.isolation.core_dump import CoreDumpForcedProbe
from vmmback.isolation.holes import wait_for_read
from vmmback.isolation.outside import PtracePeekProbe
from vmmback.isolation.physical import KcoreProbe
from vmmback.isolation.probe import Probe, Target
from vmmback.isolation.task_memory import BpfCopyFromUserTaskProbe
from vmmback.isolation.throwaway import throwaway
from vmmback.linux import procfs, ptrace, user_reader
from vmmback.linux.perf import PerfEvent
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.linux.user_reader import TaskReader
from vmmback.report import Observation, Verdict

NOBODY = Target(0, {})  # these probes look at children of their own

ERRNO = {
    "proc-mem-write": ("EIO",),
    "process-vm-writev": ("EFAULT",),
    "ptrace-peek": ("EIO",),
    "ptrace-poke": ("EIO",),
    "gcore": ("EIO",),
    "process-madvise-pageout": ("EINVAL", ""),  # by Linux 6.1 it is accepted, in vain: its frames are unevictable
}
"""What refuses a vector; the others that are blocked are not refused, but no data comes out."""

MAY_BE_MISSING = {
    "proc-kcore": "kernels for small virtual machines are built without CONFIG_PROC_KCORE",
    "dev-mem": "CONFIG_DEVMEM is often off, and CONFIG_STRICT_DEVMEM often on",
    "dev-mem-mmap": "CONFIG_DEVMEM is often off, and CONFIG_STRICT_DEVMEM often on",
    "core-dump": "many hosts give core dumps to a program",
    "core-dump-dodump": "many hosts give core dumps to a program",
    "watchpoint": "many virtual machines have no debug registers",
}
"""What a machine of CI may lack, and why."""

EACH = pytest.mark.parametrize("probe", PROCESS_PROBES, ids=lambda probe: probe.name)


def _open_task_reader() -> None:
    with TaskReader.open():
        pass


TASK_READER = Capability("an iterator over tasks in BPF, with BTF", _open_task_reader)


@pytest.fixture(autouse=True)
def no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def observe(probe: type[Probe[Any]]) -> Observation:
    """Observe, and skip the test where the host lacks what is needed, unless a machine of CI must have it."""
    seen = probe().observe(NOBODY)
    if seen.missing:
        assert seen.probe in MAY_BE_MISSING or os.environ.get("CI") != "true", seen
        pytest.skip(f"needs {seen.missing}")
    return seen


@EACH
def test_secret_memory(probe: type[Probe[Any]]) -> None:
    seen = observe(probe)
    # A known hole is expected to be one: the day it is closed, what the documents say of it must change.
    expected = Verdict.READABLE if probe.holders else Verdict.BLOCKED
    if probe is KcoreProbe and seen.target is Verdict.READABLE:
        pytest.xfail(f"frames that were part of the kernel's image (physical.py): {seen.detail}")
    assert (seen.target, seen.control) == (expected, Verdict.READABLE), seen
    assert seen.errno in ERRNO.get(probe.name, ("",))
    assert not probe.live_safe


@EACH
def test_its_twin_is_readable(probe: type[Probe[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "target", probe.control)
    seen = observe(probe)
    assert (seen.target, seen.control) == (Verdict.READABLE, Verdict.READABLE), seen


def test_a_forced_dump_holds_the_mapping_but_nothing_of_it() -> None:
    """Without it, `core-dump-dodump` would be `core-dump` once more."""
    plain, forced = (
        int(observe(probe).detail.split()[-2]) for probe in (CoreDumpForcedProbe.__bases__[0], CoreDumpForcedProbe)
    )
    assert forced - plain >= 1024  # KiB of a specimen


# --- A live guest -----------------------------------------------------------------------------------------------------


@pytest.fixture
def task_reader() -> None:
    require(TASK_READER)


@pytest.mark.usefixtures("task_reader")
def test_bpf_copy_from_user_task_on_guests(guest_running: LiveGuest, ordinary_guest_running: LiveGuest) -> None:
    for live, expected, errno in (
        (guest_running, Verdict.BLOCKED, "EFAULT"),
        (ordinary_guest_running, Verdict.READABLE, ""),
    ):
        seen = BpfCopyFromUserTaskProbe().observe(live.guest.target)
        assert (seen.target, seen.control, seen.errno) == (expected, Verdict.READABLE, errno), seen


@pytest.mark.usefixtures("task_reader")
def test_bpf_copy_from_user_task_without_a_target_proves_nothing(guest_running: LiveGuest) -> None:
    target = guest_running.guest.target
    seen = BpfCopyFromUserTaskProbe().observe(
        Target(target.pid, {inode + 1_000_000: size for inode, size in target.ram.items()})
    )
    assert seen.target is Verdict.INCONCLUSIVE, seen
    guest_running.run(guest_running.guest.qemu.kill())
    seen = BpfCopyFromUserTaskProbe().observe(target)
    assert (seen.target, seen.control) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE), seen


# --- What reads -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("task_reader")
def test_the_task_reader_reads_the_process_it_is_asked_for() -> None:
    with throwaway("ordinary") as one, throwaway("ordinary") as other, TaskReader.open() as reader:
        for child in (one, other, one):
            assert reader.read(child.pid, child.address) == child.specimen.canary
        with pytest.raises(OSError, match="Bad address"):
            reader.read(one.pid, PAGE_SIZE)
        assert reader.read(one.pid, one.address) == one.specimen.canary
    with TaskReader.open() as reader, pytest.raises(OSError, match=r"did not run|No such process"):
        reader.read(one.pid, one.address)


def test_programs_in_a_processs_context_run_in_no_other() -> None:
    with throwaway("ordinary") as child, user_reader.at_system_calls(child.pid) as reader:
        reader.expect(child.address)
        os.getppid()
        assert reader.tries == 0
        with pytest.raises(OSError, match="did not run"):
            reader.result()
        child.command(throwaway_worker.NOTHING)
        assert reader.result() == child.specimen.canary


IN_A_NAMESPACE = """
import sys
from vmmback.isolation import holes, task_memory
from vmmback.isolation.probe import Target
from vmmback.isolation.throwaway import throwaway
for kind in (holes.BpfAtSystemCallsProbe, holes.UprobeBpfProbe, holes.UprobeBpfSleepableProbe):
    seen = kind().observe(Target(0, {}))
    print(seen.probe, seen.target.value, seen.control.value)
with throwaway("secret") as child:
    ram = child.specimen.ram
    seen = task_memory.BpfCopyFromUserTaskProbe().observe(Target(child.pid, {ram.inode: ram.size}))
    print(seen.probe, seen.target.value, seen.control.value)
"""


def test_processes_are_found_by_their_numbers_in_a_pid_namespace_of_ones_own() -> None:
    """As in a container. The kernel's own numbers for them are others."""
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", IN_A_NAMESPACE]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "bpf-at-system-calls readable readable",
        "uprobe-bpf readable readable",
        "uprobe-bpf-sleepable readable readable",
        "bpf-copy-from-user-task blocked readable",
    ]


def test_a_watchpoint_counts_each_touch() -> None:
    with throwaway("secret") as child, PerfEvent.watchpoint(child.pid, child.address) as event:
        for touches in range(1, 4):
            child.command(throwaway_worker.TOUCH)
            assert event.count() == touches
        child.command(throwaway_worker.NOTHING)
        assert event.count() == 3


def test_a_process_goes_on_after_a_system_call_that_it_was_made_to_make() -> None:
    getppid, close = 110, 3
    with throwaway("secret") as child:
        child.command(throwaway_worker.NOTHING)
        wait_for_read(child)
        with ptrace.stopped(child.pid) as tracee:
            assert tracee.system_call(getppid) == os.getpid()
            with pytest.raises(OSError, match="Bad file descriptor"):
                tracee.system_call(close, 999)
        child.command(throwaway_worker.NOTHING)
        assert child.process.poll() is None


# --- What is left of a child ------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def ended(pid: int) -> bool:
    """Tell whether a process that is not ours to reap runs no more."""
    try:
        return procfs.status(pid)["State"].startswith("Z")
    except OSError:
        return True


def test_a_stopped_child_is_killed_at_once() -> None:
    """It reads no end of its standard input."""
    started = time.monotonic()
    with throwaway("secret") as child:
        stop(child.pid)
    assert gone(child.pid)
    assert time.monotonic() - started < throwaway_module._DEADLINE_S / 2


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("disturb", [stop, end])
def test_a_child_that_does_not_answer_is_an_error_and_gone(
    disturb: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throwaway_module, "_DEADLINE_S", 0.3)
    with throwaway("secret") as child:
        disturb(child.pid)
        with pytest.raises((ProcessLookupError, BrokenPipeError)):
            child.command(throwaway_worker.TOUCH)
    assert gone(child.pid)


def test_a_child_that_ends_while_it_is_traced_is_an_error() -> None:
    with throwaway("secret") as child, ptrace.stopped(child.pid) as tracee:
        end(child.pid)
        with pytest.raises(ProcessLookupError):
            tracee.peek(child.address)
    assert gone(child.pid)


def test_a_child_is_gone_after_an_error_in_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = []

    def fail(_: PtracePeekProbe, child: throwaway_module.Throwaway) -> str:
        pids.append(child.pid)
        raise RuntimeError

    monkeypatch.setattr(PtracePeekProbe, "reach", fail)
    with pytest.raises(RuntimeError):
        PtracePeekProbe().observe(NOBODY)
    assert [gone(pid) for pid in pids] == [True]


def test_a_child_does_not_outlive_its_parent() -> None:
    program = """
import os, signal
from vmmback.isolation.throwaway import throwaway
with throwaway("secret") as child:
    os.write(1, b"%d" % child.pid)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=30)
    assert done.returncode == -signal.SIGKILL
    eventually(lambda: ended(int(done.stdout)), "the child whose parent was killed has ended")
