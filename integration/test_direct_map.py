"""The direct map on the real kernel: every test on secret memory has its twin on ordinary memory."""

import mmap
import os
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import pytest

from vmmback.errors import HostUnfit
from vmmback.isolation.access import ProcMemProbe, VmaFlagsProbe
from vmmback.isolation.direct_map import DirectMapProbe, PageCount, pagemap_entries
from vmmback.isolation.probe import Target
from vmmback.linux import bpf_assembler as asm
from vmmback.linux import direct_map
from vmmback.linux.bpf import Program, SharedValue
from vmmback.linux.bpf_assembler import R0, R2
from vmmback.linux.direct_map import DirectMap, find, own_pages
from vmmback.linux.memfd_secret import memfd_secret
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Observation, Verdict, judge_probe

Kind = Literal["secret", "ordinary"]
KINDS: tuple[Kind, ...] = ("secret", "ordinary")
PAGES = 2000  # several runs of the program on each processor, and a last one that is not full
PRESENT = 1 << 63


@contextmanager
def descriptor(kind: Kind, pages: int) -> Iterator[int]:
    fd = memfd_secret() if kind == "secret" else os.memfd_create("twin", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, pages * PAGE_SIZE)
        yield fd
    finally:
        os.close(fd)


def observe(pid: int, inode: int, pages: int = PAGES) -> tuple[Observation, DirectMapProbe]:
    probe = DirectMapProbe({})
    return probe.observe(Target(pid, {inode: pages * PAGE_SIZE})), probe


def expect(kind: Kind, present: int, observation: Observation, probe: DirectMapProbe) -> None:
    assert observation.control is Verdict.READABLE, observation.detail
    if kind == "secret":
        assert probe.pages == PageCount(present, present, 0)
        assert observation.target is Verdict.BLOCKED
        assert observation.detail == f"0 of {present} present pages readable (EFAULT)"
    else:
        assert probe.pages == PageCount(present, present, present)
        assert observation.target is Verdict.READABLE
        assert observation.detail == f"{present} of {present} present pages readable"


@pytest.mark.parametrize("kind", KINDS)
def test_own_process(kind: Kind) -> None:
    with descriptor(kind, PAGES) as fd, mmap.mmap(fd, PAGES * PAGE_SIZE) as memory:
        memory[:] = b"x" * len(memory)
        observation, probe = observe(os.getpid(), os.fstat(fd).st_ino)
    expect(kind, PAGES, observation, probe)
    assert len(probe.frames) == PAGES


@dataclass
class Child:
    process: subprocess.Popen[str]
    inode: int
    canary: bytes

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def child(kind: Kind) -> Iterator[Child]:
    """Start a process that fills its memory with a canary of its own making, and tells us which."""
    with subprocess.Popen(
        [sys.executable, __file__, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            inode, canary = process.stdout.readline().split()
            yield Child(process, int(inode), bytes.fromhex(canary))
        finally:
            process.kill()


def child_main(kind: Kind) -> None:
    with descriptor(kind, PAGES) as fd, mmap.mmap(fd, PAGES * PAGE_SIZE) as memory:
        canary = os.urandom(32)
        memory[:] = canary * (len(memory) // len(canary))
        sys.stdout.write(f"{os.fstat(fd).st_ino} {canary.hex()}\n")
        sys.stdout.flush()
        sys.stdin.read()


@pytest.mark.parametrize("kind", KINDS)
def test_another_process(kind: Kind) -> None:
    with child(kind) as other:
        observation, probe = observe(other.process.pid, other.inode)
        with DirectMap.open() as kernel:
            frames = list(kernel.read_frames(probe.frames))
    expect(kind, PAGES, observation, probe)
    assert [index for index, _ in frames] == list(range(PAGES))
    page = other.canary * (PAGE_SIZE // len(other.canary))
    assert {frame for _, frame in frames} == {None if kind == "secret" else page}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_after_the_end(kind: Kind) -> None:
    """Back in the direct map. Others may have got them at once, as secret RAM again even: one time must do."""
    found = []
    for _ in range(5):
        with child(kind) as other, DirectMap.open() as kernel:
            entries = pagemap_entries(other.process.pid, other.inode)
            other.end()
            zeroness = kernel.zeroness(entries)
            canaries = sum(frame is not None and other.canary in frame for _, frame in kernel.read_frames(entries))
        assert (zeroness.present, zeroness.checked) == (PAGES, PAGES)
        if kind == "secret":
            assert canaries == 0
            expected = zeroness.nonzero < PAGES // 2
        else:
            expected = canaries > PAGES // 2 and zeroness.nonzero > PAGES // 2
        if zeroness.readable > PAGES // 2 and expected:
            return
        found.append((zeroness.readable, zeroness.nonzero, canaries))
    pytest.fail(f"of {PAGES} frames were readable, not zero, and with the canary, time for time: {found}")


@pytest.mark.parametrize("kind", KINDS)
def test_absent_pages_are_not_counted(kind: Kind) -> None:
    with descriptor(kind, PAGES) as fd, mmap.mmap(fd, PAGES * PAGE_SIZE) as memory:
        for page in range(0, PAGES, 2):
            memory[page * PAGE_SIZE] = 1
        observation, probe = observe(os.getpid(), os.fstat(fd).st_ino)
        with DirectMap.open() as kernel:
            indexes = [index for index, _ in kernel.read_frames(probe.frames)]
    expect(kind, PAGES // 2, observation, probe)
    assert indexes == list(range(0, PAGES, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_mapping_is_added_up(kind: Kind) -> None:
    with descriptor(kind, PAGES) as fd, mmap.mmap(fd, PAGES * PAGE_SIZE) as memory:
        memory[:] = b"x" * len(memory)
        memory.madvise(mmap.MADV_DONTFORK, 100 * PAGE_SIZE, 50 * PAGE_SIZE)
        observation, probe = observe(os.getpid(), os.fstat(fd).st_ino)
    expect(kind, PAGES, observation, probe)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_mapped_twice_counts_once_whichever_mapping_touched_it(kind: Kind) -> None:
    with (
        descriptor(kind, 60) as fd,
        mmap.mmap(fd, 40 * PAGE_SIZE) as lower,
        mmap.mmap(fd, 10 * PAGE_SIZE, offset=10 * PAGE_SIZE) as inner,
        mmap.mmap(fd, 30 * PAGE_SIZE, offset=30 * PAGE_SIZE) as upper,
    ):
        inode = os.fstat(fd).st_ino
        upper[:] = b"x" * len(upper)  # 30 to 59
        observation, probe = observe(os.getpid(), inode, 60)
        expect(kind, 30, observation, probe)
        inner[:] = b"x" * len(inner)  # 10 to 19
        observation, probe = observe(os.getpid(), inode, 60)
        expect(kind, 40, observation, probe)
        lower[:] = b"x" * len(lower)  # 0 to 39
        observation, probe = observe(os.getpid(), inode, 60)
        expect(kind, 60, observation, probe)


@pytest.mark.parametrize("kind", KINDS)
def test_qemus_other_blocks_are_tried_but_not_counted(kind: Kind) -> None:
    """The RAM itself is secret; of three other descriptors one is of `kind`, and one is mapped no more."""
    with (
        descriptor("secret", 4) as ram,
        descriptor("secret", 5) as block,
        descriptor(kind, 6) as other,
        mmap.mmap(ram, 4 * PAGE_SIZE) as ram_memory,
        mmap.mmap(block, 5 * PAGE_SIZE) as block_memory,
        mmap.mmap(other, 6 * PAGE_SIZE) as other_memory,
    ):
        for memory in (ram_memory, block_memory, other_memory):
            memory[: 3 * PAGE_SIZE] = b"x" * (3 * PAGE_SIZE)
        auxiliary = {os.fstat(block).st_ino, os.fstat(other).st_ino, os.fstat(ram).st_ino + 1_000_000}
        probe = DirectMapProbe({})
        seen = probe.observe(Target(os.getpid(), {os.fstat(ram).st_ino: 4 * PAGE_SIZE}, auxiliary=frozenset(auxiliary)))
    assert (probe.pages, len(probe.frames)) == (PageCount(3, 3, 0), 4)
    assert seen.target is (Verdict.BLOCKED if kind == "secret" else Verdict.READABLE)
    readable = 0 if kind == "secret" else 3
    expected = f"0 of 3 present pages readable, and {readable} of 6 of QEMU's other secret RAM blocks"
    assert seen.detail.removesuffix(" (EFAULT)") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_all_descriptors_of_the_ram_are_read(kind: Kind) -> None:
    """The first is secret, the second of `kind`: of that, three pages were prefaulted and only one touched here."""
    with (
        descriptor("secret", 4) as first,
        descriptor(kind, 6) as second,
        mmap.mmap(first, 4 * PAGE_SIZE) as first_memory,
        mmap.mmap(second, 6 * PAGE_SIZE) as second_memory,
        mmap.mmap(second, 6 * PAGE_SIZE) as untouched,
    ):
        first_memory[: 2 * PAGE_SIZE] = b"x" * (2 * PAGE_SIZE)
        second_memory[: 3 * PAGE_SIZE] = b"x" * (3 * PAGE_SIZE)
        ram = {os.fstat(first).st_ino: 4 * PAGE_SIZE, os.fstat(second).st_ino: 6 * PAGE_SIZE}
        prefaulted = pagemap_entries(os.getpid(), list(ram)[1])
        second_memory.close()
        untouched[0] = 1
        probe = DirectMapProbe({list(ram)[1]: prefaulted})
        seen = probe.observe(Target(os.getpid(), ram))
    assert (probe.pages, len(probe.frames)) == (PageCount(5, 5, 0 if kind == "secret" else 3), 10)
    assert seen.target is (Verdict.BLOCKED if kind == "secret" else Verdict.READABLE)


@pytest.mark.parametrize("second", ["mapped", "not mapped"])
def test_no_descriptor_of_the_ram_may_be_left_out(second: str) -> None:
    with (
        descriptor("secret", 4) as first,
        descriptor("secret", 4) as other,
        mmap.mmap(first, 4 * PAGE_SIZE) as first_memory,
        mmap.mmap(other, 4 * PAGE_SIZE) as other_memory,
    ):
        first_memory[0] = other_memory[0] = 1
        if second == "not mapped":
            other_memory.close()
        ram = {os.fstat(each).st_ino: 4 * PAGE_SIZE for each in (first, other)}
        for probe in (DirectMapProbe({}), ProcMemProbe(), VmaFlagsProbe()):
            seen = probe.observe(Target(os.getpid(), ram))
            assert seen.target is (Verdict.BLOCKED if second == "mapped" else Verdict.INCONCLUSIVE), seen


def test_no_present_page_is_inconclusive() -> None:
    with descriptor("secret", PAGES) as fd, mmap.mmap(fd, PAGES * PAGE_SIZE):
        observation, probe = observe(os.getpid(), os.fstat(fd).st_ino)
    assert (observation.target, observation.control) == (Verdict.INCONCLUSIVE, Verdict.READABLE)
    assert observation.detail == f"none of {PAGES} pages is present"
    assert probe.pages == PageCount(0, 0, 0)


def test_memory_that_is_not_mapped_is_inconclusive() -> None:
    with descriptor("secret", PAGES) as fd:
        observation, probe = observe(os.getpid(), os.fstat(fd).st_ino)
    assert (observation.target, observation.control) == (Verdict.INCONCLUSIVE, Verdict.READABLE)
    assert "maps no memory with inode" in observation.detail
    assert (probe.pages, probe.frames) == (PageCount(0, 0, 0), array("Q"))


def test_a_probe_forgets_its_last_target() -> None:
    probe = DirectMapProbe({})
    with descriptor("ordinary", 1) as fd, mmap.mmap(fd, PAGE_SIZE) as memory:
        memory[0] = 1
        target = Target(os.getpid(), {os.fstat(fd).st_ino: PAGE_SIZE})
        probe.observe(target)
        assert probe.pages == PageCount(1, 1, 1)
    probe.observe(target)
    assert (probe.pages, probe.frames) == (PageCount(0, 0, 0), array("Q"))


def test_the_base_is_the_same_found_by_the_small_program() -> None:
    with DirectMap.open() as direct_map:
        assert find() == direct_map.base


def test_a_wrong_base_makes_secret_memory_inconclusive_not_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    find_base = direct_map._find_base
    monkeypatch.setattr(direct_map, "_find_base", lambda lane, limit: find_base(lane, limit) - (1 << 40))
    with descriptor("secret", PAGES) as fd, mmap.mmap(fd, PAGES * PAGE_SIZE) as memory:
        memory[:] = b"x" * len(memory)
        observation, _ = observe(os.getpid(), os.fstat(fd).st_ino)
    assert observation.target is Verdict.BLOCKED
    assert observation.control is Verdict.INCONCLUSIVE
    assert "0 of 64 pages of our own showed their contents" in observation.detail
    assert judge_probe(observation).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("dropped", ["-sys_admin", "-all"])
def test_without_capabilities_it_is_inconclusive_and_says_which(dropped: str) -> None:
    program = (
        "import os\n"
        "from vmmback.isolation.direct_map import DirectMapProbe\n"
        "from vmmback.isolation.probe import Target\n"
        "seen = DirectMapProbe({}).observe(Target(os.getpid(), {1: 4096}))\n"
        "print(seen.target, seen.control, seen.detail)\n"
    )
    assert "CAP_SYS_ADMIN is missing" in without_capabilities(dropped, program)


def test_without_capabilities_bpf_says_which() -> None:
    program = (
        "from vmmback.errors import HostUnfit\n"
        "from vmmback.linux.bpf import SharedValue\n"
        "try:\n"
        "    SharedValue(4096, 'value')\n"
        "except HostUnfit as error:\n"
        "    print(error.message)\n"
    )
    assert "CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, are missing" in without_capabilities("-all", program)


def without_capabilities(dropped: str, program: str) -> str:
    """Run a program as root, so that it may read the checkout, but with fewer capabilities; return what it prints."""
    return subprocess.run(
        ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=30,
    ).stdout


def test_frame_numbers_that_are_no_ram_are_not_tried() -> None:
    with DirectMap.open() as kernel:
        hidden, past, last = PRESENT, PRESENT | kernel.limit, PRESENT | (1 << 55) - 1
        swapped = 1 << 62 | 0x1234
        result = kernel.check(array("Q", [hidden, past, last, swapped, 0]))
        frames = list(kernel.read_frames(array("Q", [hidden, past, last, swapped, 0])))
    assert (result.present, result.checked, result.readable) == (3, 0, 0)
    assert frames == [(0, None), (1, None), (2, None)]


def test_zeroness_finds_the_pages_that_are_not_zero() -> None:
    contents = bytearray(PAGES * PAGE_SIZE)
    wanted = (0, 127, 128, 1000, PAGES - 1)
    for page in wanted:
        contents[(page + 1) * PAGE_SIZE - 1] = 1
    with own_pages(bytes(contents)) as entries, DirectMap.open() as kernel:
        result = kernel.zeroness(entries)
        readability = kernel.check(entries)
        # What an earlier run left behind must not count for pages that are absent now.
        absent = kernel.zeroness(array("Q", [entry & ~PRESENT for entry in entries]))
    assert (result.present, result.checked, result.readable) == (PAGES, PAGES, PAGES)
    assert (result.nonzero, result.first_nonzero) == (len(wanted), wanted)
    assert readability.first_readable == tuple(range(8))
    assert (absent.present, absent.nonzero) == (0, 0)


def test_frames_come_with_their_own_bytes() -> None:
    contents = os.urandom(PAGES * PAGE_SIZE)
    with own_pages(contents) as entries, DirectMap.open() as kernel:
        frames = dict(kernel.read_frames(entries.tobytes()))
    assert b"".join(frames[index] or b"" for index in range(PAGES)) == contents


def test_no_entries() -> None:
    with DirectMap.open() as kernel:
        assert kernel.check(b"").present == 0
        assert list(kernel.read_frames(b"")) == []


@pytest.mark.parametrize("step", ["SharedValue", "Program", "_find_base", "nothing"])
def test_descriptors_are_released_at_whatever_step_it_fails(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise HostUnfit("as the test wants it")

    before = open_descriptors()
    if step == "nothing":
        with DirectMap.open():
            assert open_descriptors() > before
    else:
        monkeypatch.setattr(direct_map, step, fail)
        with pytest.raises(HostUnfit), DirectMap.open():
            pass
    assert open_descriptors() == before


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_a_rejected_program_shows_the_verifiers_words() -> None:
    with pytest.raises(HostUnfit, match=r"rejected the BPF program bad \(EACCES\): .*R2 !read_ok"):
        Program([asm.move(R0, R2), asm.leave()], "bad")


def test_a_load_ends_however_often_signals_come() -> None:
    """A thousand a second: the verifier takes some 15 ms for the program, and gives up where a signal is pending."""
    signals = list[int]()
    over = threading.Event()
    target = threading.get_ident()

    def disturb() -> None:
        while not over.wait(0.001):
            signal.pthread_kill(target, signal.SIGUSR1)

    earlier = signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(5):
            with DirectMap.open():
                pass
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, earlier)
    assert len(signals) >= 5  # each was only late


def test_descriptors_are_close_on_exec() -> None:
    with SharedValue(PAGE_SIZE, "value") as value, Program([asm.move(R0, 0), asm.leave()], "good") as program:
        assert not os.get_inheritable(value.descriptor)
        assert not os.get_inheritable(program.descriptor)


if __name__ == "__main__":
    child_main("secret" if sys.argv[1] == "secret" else "ordinary")
