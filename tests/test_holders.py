"""Who is at a memory file: this process, its children, and none. No secret memory is needed to find that out."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmmback.isolation import holders
from vmmback.isolation.holders import HoldersProbe, Memory, TracerProbe
from vmmback.isolation.probe import Target
from vmmback.linux import procfs, ptrace
from vmmback.report import Verdict

SIZE = 1 << 20
# A child that maps what it inherits, and drops the descriptor; Python's mapping has one of its own.
MAPS = """
import mmap, os, sys
number = int(sys.argv[1])
memory = mmap.mmap(number, 4096)
os.closerange(3, 1000)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory() -> Iterator[int]:
    """A memory file that this process holds."""
    descriptor = os.memfd_create("vmmback-test", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE)
    yield descriptor
    os.close(descriptor)


@contextmanager
def child(*argv: str, descriptors: tuple[int, ...] = ()) -> Iterator[int]:
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors, close_fds=True
    ) as process:
        try:
            if argv[0] == sys.executable:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def found(descriptor: int, *known: int) -> tuple[Verdict, str]:
    reading = HoldersProbe().attempt(memory_of(descriptor, *known))
    return reading.verdict, reading.detail


def memory_of(descriptor: int, *known: int) -> Memory:
    (device,) = [file.device for file in procfs.descriptors(os.getpid()) if file.number == descriptor]
    return Memory(frozenset({(device, os.fstat(descriptor).st_ino)}), frozenset({os.getpid(), *known}))


def test_a_file_of_another_device_with_the_same_inode_number_is_another_file(memory: int) -> None:
    """Else anybody could make memfds until one has the guest's number, and the guest would be taken for exposed."""
    with child("cat", descriptors=(memory,)):
        assert HoldersProbe().attempt(memory_of(memory)).verdict is Verdict.READABLE
        ((_, inode),) = memory_of(memory).files
        elsewhere = Memory(frozenset({("ff:ff", inode)}), frozenset())
        assert HoldersProbe().attempt(elsewhere).verdict is Verdict.BLOCKED


# A process of two threads: one has a table of descriptors of its own, and the file only there; the first one may end.
UNSHARES = """
import ctypes, os, sys, threading
number = int(sys.argv[1])
CLONE_FILES = 0x400
libc = ctypes.CDLL(None)
apart = threading.Event()
def hold():
    libc.unshare(CLONE_FILES)
    apart.set()
    sys.stdin.read()
thread = threading.Thread(target=hold)
thread.start()
apart.wait()
os.close(number)
print("ready", flush=True)
if sys.argv[2] == "first thread ends":
    libc.syscall({exit}, 0)
thread.join()
"""


@pytest.mark.parametrize("way", ["both live", "first thread ends"])
def test_a_thread_with_descriptors_of_its_own_is_found(memory: int, way: str) -> None:
    program = UNSHARES.replace("{exit}", {"x86_64": "60", "aarch64": "93"}[platform.machine()])
    with child(sys.executable, "-c", program, str(memory), way, descriptors=(memory,)) as holder:
        verdict, detail = found(memory)
        assert (verdict, detail.split(" (")[0]) == (Verdict.READABLE, f"process {holder}"), detail
        assert detail.endswith("holds its descriptor")


def test_who_has_only_another_of_the_guests_memory_files_is_found(memory: int) -> None:
    """QEMU's other secret RAM blocks: this process stands for QEMU, which has both."""
    auxiliary = os.memfd_create("vmmback-test-auxiliary", os.MFD_CLOEXEC)
    try:
        target = Target(os.getpid(), {os.fstat(memory).st_ino: SIZE}, auxiliary=frozenset({os.fstat(auxiliary).st_ino}))
        assert HoldersProbe().observe(target).target is Verdict.BLOCKED
        with child("cat", descriptors=(auxiliary,)) as holder:
            seen = HoldersProbe().observe(target)
        assert (seen.target, seen.detail) == (Verdict.READABLE, f"process {holder} (cat) holds its descriptor")
    finally:
        os.close(auxiliary)


def test_each_of_several_descriptors_counts_and_none_may_be_missing(memory: int) -> None:
    second = os.memfd_create("vmmback-test-second", os.MFD_CLOEXEC)
    try:
        ram = {os.fstat(descriptor).st_ino: SIZE for descriptor in (memory, second)}
        with child("cat", descriptors=(second,)) as holder:
            seen = HoldersProbe().observe(Target(os.getpid(), ram))
        assert (seen.target, seen.detail) == (Verdict.READABLE, f"process {holder} (cat) holds its descriptor")
    finally:
        os.close(second)
    seen = HoldersProbe().observe(Target(os.getpid(), ram))
    assert (seen.target, seen.detail) == (Verdict.INCONCLUSIVE, "[Errno 2] QEMU does not have the guest's RAM")


def test_a_tracer_of_any_thread_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tracers = {"7/task/7": "0", "7/task/8": "0", "7/task/9": str(os.getppid())}
    monkeypatch.setattr(procfs, "threads", lambda _: [7, 8, 9])
    monkeypatch.setattr(procfs, "status", lambda task: {"TracerPid": tracers[task]})
    reading = TracerProbe().attempt((7,))
    assert reading.verdict is Verdict.READABLE
    assert f"process {os.getppid()} " in reading.detail
    tracers["7/task/9"] = "0"
    assert TracerProbe().attempt((7,)).verdict is Verdict.BLOCKED


def test_a_child_of_the_supervisor_is_no_stranger_and_that_of_another_is(memory: int) -> None:
    with child("cat", descriptors=(memory,)):
        place = memory_of(memory)
        assert HoldersProbe().attempt(place).verdict is Verdict.READABLE
        assert HoldersProbe().attempt(place._replace(parent=os.getpid())).verdict is Verdict.BLOCKED
        assert HoldersProbe().attempt(place._replace(parent=os.getppid())).verdict is Verdict.READABLE


def test_nobody_else_has_it(memory: int) -> None:
    verdict, detail = found(memory)
    assert (verdict, detail.split()[0]) == (Verdict.BLOCKED, "none")


def test_who_holds_it_and_who_maps_it(memory: int) -> None:
    with child("cat", descriptors=(memory,)) as holder:
        assert found(memory) == (Verdict.READABLE, f"process {holder} (cat) holds its descriptor")
        assert found(memory, holder)[0] is Verdict.BLOCKED
    with child(sys.executable, "-c", MAPS, str(memory), descriptors=(memory,)) as mapper:
        assert found(memory) == (Verdict.READABLE, f"process {mapper} ({procfs.command_name(mapper)}) maps it")
        with child("cat", descriptors=(memory,)) as holder:
            verdict, detail = found(memory)
            assert verdict is Verdict.READABLE
            assert sorted(part.split()[1] for part in detail.split("; ")) == sorted([str(mapper), str(holder)])
    assert found(memory)[0] is Verdict.BLOCKED


@pytest.mark.parametrize(("privileged", "verdict"), [(True, Verdict.BLOCKED), (False, Verdict.INCONCLUSIVE)])
def test_who_may_not_be_looked_at_is_counted(
    memory: int, monkeypatch: pytest.MonkeyPatch, privileged: bool, verdict: Verdict
) -> None:
    """Without CAP_SYS_PTRACE others may be closed, and whether one of them has it is unknown."""
    original = holders._holding

    def closed(pid: int, wanted: Memory) -> str:
        if pid == 1:
            raise PermissionError
        return original(pid, wanted)

    monkeypatch.setattr(holders, "_holding", closed)
    monkeypatch.setattr(procfs, "has_capability", lambda number: privileged)
    seen, detail = found(memory)
    assert seen is verdict
    assert detail.endswith("; 1 may not be looked at")


def test_a_process_that_is_gone_has_nothing(memory: int) -> None:
    with child("cat") as pid:
        pass
    assert holders._holding(pid, memory_of(memory)) == ""


def test_a_qemu_without_the_ram_is_inconclusive_and_the_control_is_found(memory: int) -> None:
    with child("cat") as qemu:
        seen = HoldersProbe().observe(Target(qemu, {os.fstat(memory).st_ino: SIZE}, os.getpid()))
    assert (seen.target, seen.control, seen.errno) == (Verdict.INCONCLUSIVE, Verdict.READABLE, "ENOENT")
    assert "QEMU does not have the guest's RAM" in seen.detail


def test_qemu_and_its_supervisor_may_have_it_and_the_control_leaves_nothing(memory: int) -> None:
    with child("cat", descriptors=(memory,)) as qemu:
        before = len(list(Path("/proc/self/fd").iterdir()))
        seen = HoldersProbe().observe(Target(qemu, {os.fstat(memory).st_ino: SIZE}, os.getpid()))
        assert (seen.target, seen.control) == (Verdict.BLOCKED, Verdict.READABLE)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_daemon_that_qemu_shares_the_ram_with_is_known_and_another_is_not(memory: int) -> None:
    with child("cat", descriptors=(memory,)) as qemu, child("cat", descriptors=(memory,)) as daemon:
        target = Target(qemu, {os.fstat(memory).st_ino: SIZE}, partners=frozenset({daemon, os.getpid()}))
        assert HoldersProbe().observe(target).target is Verdict.BLOCKED
        with child("cat", descriptors=(memory,)) as stranger:
            seen = HoldersProbe().observe(target)
    assert (seen.target, seen.detail) == (Verdict.READABLE, f"process {stranger} (cat) holds its descriptor")


def test_a_mapping_without_a_descriptor_is_seen_in_this_process_too() -> None:
    descriptor = os.memfd_create("vmmback-test", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE)
    wanted = memory_of(descriptor)
    assert holders._holding(os.getpid(), wanted) == "holds its descriptor"
    with mmap.mmap(descriptor, SIZE):
        assert holders._holding(os.getpid(), wanted) == "holds its descriptor and maps it"
    os.close(descriptor)
    assert holders._holding(os.getpid(), wanted) == ""


def test_a_tracer_of_a_daemon_is_found_and_a_daemon_that_is_gone_hides_none() -> None:
    with child("cat") as qemu, child("cat") as daemon:
        target = Target(qemu, {}, partners=frozenset({daemon}))
        assert TracerProbe().observe(target).detail == "none of 2 threads is traced"
        with ptrace.stopped(daemon):
            seen = TracerProbe().observe(target)
        assert seen.target is Verdict.READABLE
        assert f"traced by process {os.getpid()} " in seen.detail
        with child("cat") as ended:
            pass
        gone = TracerProbe().observe(target._replace(partners=frozenset({ended})))
        assert gone.detail == "none of 1 threads is traced"


def test_a_process_that_nobody_traces() -> None:
    with child("cat") as pid:
        seen = TracerProbe().observe(Target(pid, {}))
    assert (seen.target, seen.control, seen.detail) == (
        Verdict.BLOCKED,
        Verdict.READABLE,
        "none of 1 threads is traced",
    )
