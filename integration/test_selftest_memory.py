"""What the kernel does for the owner of memory: each vector refused on secret memory, and shown to work on ordinary."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest

from integration.conftest import open_descriptors
from vmmback.isolation import file_calls, memory_calls, metadata, pinning, specimen
from vmmback.isolation.catalogue import MEMORY_PROBES
from vmmback.isolation.probe import Missing, Probe, Target
from vmmback.isolation.specimen import CallProbe, Specimen, SpecimenProbe
from vmmback.linux import kvm, memory, procfs, xdp
from vmmback.linux.io_uring import Ring
from vmmback.linux.userfaultfd import UserFault
from vmmback.report import Observation, Verdict, judge_probe

pytestmark = pytest.mark.usefixtures("needs_secretmem")

EVERY = pytest.mark.parametrize("probe", MEMORY_PROBES, ids=lambda probe: probe.name)
NOWHERE = Target(0, {})  # none of these looks at a guest

# Of all that is tried here, CI's machine may lack this; another machine may lack more.
MAY_BE_MISSING = {
    "kvm-slot": "few machines of CI have a /dev/kvm that runs guests",
    "io-uring-ring": "IORING_SETUP_NO_MMAP came with Linux 6.5",
    "cachestat": "cachestat(2) came with Linux 6.5",
    "numa-migration": "few machines of CI have two NUMA nodes; tried by hand in a guest that has",
    "page-idle": "CONFIG_IDLE_PAGE_TRACKING; no kernel of Debian's has it",
    "soft-dirty": "CONFIG_MEM_SOFT_DIRTY; tried by hand in a guest with Debian's kernel, which has it",
}

# Known holes that older kernels do not have: secret memory was left out by follow_page() of Linux 6.1.
OF_LATE = {"move-pages-node"}

# What moves no data shows itself otherwise than by the canary.
WITHOUT_CANARY = {
    "direct-io-read", "io-uring-ring", "kvm-slot", "file-write", "punch-hole", "truncate", "seek-hole", "madv-pageout",
    "evictable", "munlock", "madv-dodump", "madv-remove", "userfaultfd-missing", "userfaultfd-wp",
    "madv-mergeable", "mincore", "cachestat", "pagemap", "move-pages-node", "kpageflags", "kpagecount", "kpagecgroup",
    "numa-migration", "soft-dirty", "page-idle",
}  # fmt: skip


def observe(probe: Probe[Any]) -> Observation:
    """Observe; where the host lacks what it takes, skip, or fail if CI's machine must have it."""
    seen = probe.observe(NOWHERE)
    if seen.missing:
        message = f"{probe.name} needs {seen.missing}"
        if os.environ.get("CI") == "true" and probe.name not in MAY_BE_MISSING:
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return seen


def twin_of(probe: type[Probe[Any]]) -> Probe[Any]:
    """Return a probe whose target is ordinary memory as well."""
    twin = probe()
    twin.target = twin.control  # type: ignore[method-assign]
    return twin


@EVERY
def test_secret_memory_is_refused_and_the_control_reached(probe: type[Probe[Any]]) -> None:
    seen = observe(probe())
    assert seen.control is Verdict.READABLE, seen.detail
    if probe.holders and not (probe.name in OF_LATE and seen.target is Verdict.BLOCKED):
        # A known hole: should it ever close, docs/PROBES.md is to say so.
        assert (seen.target, seen.errno) == (Verdict.READABLE, ""), seen.detail
        return
    assert judge_probe(seen).verdict is Verdict.BLOCKED, seen.detail
    assert seen.errno in expected_errnos(probe), seen.detail


def expected_errnos(probe: type[Probe[Any]]) -> set[str]:
    """Return the names of the errnos that count as a refusal, "" where a call without effect does."""
    if not issubclass(probe, CallProbe):
        # A kernel that maps KVM's slot by faults says EFAULT; one that emulates by copies runs it, without a clock.
        return {"", "EFAULT"} if probe is pinning.KvmSlotProbe else {""}
    return {errno.errorcode[number] for number in probe.refusals} | ({""} if probe.idle is Verdict.BLOCKED else set())


@EVERY
def test_its_twin_on_ordinary_memory_is_readable(probe: type[Probe[Any]]) -> None:
    seen = observe(twin_of(probe))
    assert (seen.target, seen.control, seen.errno) == (Verdict.READABLE, Verdict.READABLE, ""), seen.detail


@EVERY
def test_nothing_is_left(probe: type[Probe[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def state() -> tuple[object, ...]:
        mappings = [m for m in procfs.maps("self") if procfs.is_memory_file(m.path)]
        return open_descriptors(), mappings, threading.active_count(), list(tmp_path.iterdir())

    before = state()
    for kind in (probe(), twin_of(probe)):
        observe(kind)
        assert state() == before


@EVERY
def test_each_says_what_it_is(probe: type[Probe[Any]]) -> None:
    assert not probe.live_safe
    assert probe.vector
    assert probe.control_is
    assert "(2)" in probe.source or ".c" in probe.source or ".rst" in probe.source or ".h" in probe.source


@pytest.mark.parametrize(
    "probe", [p for p in MEMORY_PROBES if p.name not in WITHOUT_CANARY], ids=lambda probe: probe.name
)
def test_a_call_that_succeeds_without_the_canary_proves_nothing(
    probe: type[SpecimenProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A specimen that holds something else: neither readable nor blocked, though the kernel takes every call."""
    original = specimen.specimen

    @contextmanager
    def without_canary(
        backing: Literal["secret", "ordinary"], size: int = specimen.SPECIMEN_BYTES, filled: int | None = None
    ) -> Iterator[Specimen]:
        with original(backing, size, filled) as place:
            yield place._replace(canary=os.urandom(len(place.canary)))

    observe(twin_of(probe))  # it can be tried at all
    monkeypatch.setattr(specimen, "specimen", without_canary)
    seen = twin_of(probe).observe(NOWHERE)
    assert (seen.target, seen.control) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE), seen.detail


def do_nothing(*_: object, **__: object) -> tuple[int, ...]:
    return ()


@pytest.mark.parametrize(
    ("probe", "place", "call"),
    [
        (pinning.DirectReadProbe, os, "preadv"),
        (file_calls.FileWriteProbe, os, "write"),
        (file_calls.PunchHoleProbe, memory, "punch_hole"),
        (file_calls.TruncateProbe, os, "ftruncate"),
        (file_calls.SeekHoleProbe, os, "lseek"),
        (memory_calls.UserFaultMissingProbe, UserFault, "copy"),
        (memory_calls.UserFaultWriteProbe, UserFault, "write_protect"),
        (metadata.MincoreProbe, memory, "mincore"),
        (metadata.PagemapProbe, procfs, "pagemap"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_call_that_does_nothing_proves_nothing(probe: type[CallProbe], place: object, call: str) -> None:
    """The effect counts: that a call was taken is not enough."""
    with (
        specimen.specimen("ordinary", probe.size, probe.filled) as ordinary,
        mock.patch.object(place, call, do_nothing),  # a Mock would keep its arguments, views of the memory
    ):
        reading = probe().attempt(ordinary)
    assert reading.verdict is Verdict.INCONCLUSIVE


def test_memory_that_stays_locked_is_blocked_whatever_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "unlock", lambda *_: None)
    with specimen.specimen("ordinary") as ordinary:
        assert memory_calls.MunlockProbe().attempt(ordinary).verdict is Verdict.BLOCKED
        assert metadata.EvictableProbe().attempt(ordinary).verdict is Verdict.BLOCKED


def test_an_errno_that_was_not_expected_is_no_refusal() -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with mock.patch.object(os, "read", full):
        seen = file_calls.FileReadProbe().observe(NOWHERE)
    assert (seen.target, seen.control, seen.errno) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE, "EMFILE")


# --- What a host may lack, found by trying ----------------------------------------------------------------------------


def refuse(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize(
    ("probe", "place", "name", "missing"),
    [
        (pinning.IoUringFixedProbe, Ring, "open", "io_uring: Function not implemented"),
        (pinning.IoUringRingProbe, pinning, "rings_in", "io_uring with IORING_SETUP_NO_MMAP: Function not implemented"),
        (pinning.XdpMemoryProbe, xdp, "open_socket", "AF_XDP (CONFIG_XDP_SOCKETS, CAP_NET_RAW): Function not"),
        (
            file_calls.FileHandleProbe,
            memory,
            "reopen_by_handle",
            "open_by_handle_at(2) of a memfd (CAP_DAC_READ_SEARCH)",
        ),
        (metadata.CachestatProbe, memory, "cached_pages", "cachestat(2): Function not implemented"),
        (metadata.PageFlagsProbe, os, "open", "/proc/kpageflags: Function not implemented"),
        (memory_calls.UserFaultMinorProbe, UserFault, "open", "userfaultfd(2) for files' memory, mode MINOR: Function"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_the_host_lacks_is_named(probe: type[CallProbe], place: object, name: str, missing: str) -> None:
    with mock.patch.object(place, name, refuse):
        seen = probe().observe(NOWHERE)
    assert (seen.target, seen.control) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE)
    assert seen.missing.startswith(missing)
    assert seen.detail == f"not tried: this host has no {seen.missing}"


def test_a_file_system_that_only_pretends_direct_io_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """tmpfs takes O_DIRECT since Linux 6.6, and copies: secret memory would seem readable there."""
    folders = ["/dev/shm"]
    monkeypatch.setattr(pinning, "_folders", lambda: folders)
    seen = pinning.DirectWriteProbe().observe(NOWHERE)
    assert seen.missing == "file system with direct I/O (O_DIRECT, O_TMPFILE) among /dev/shm"
    folders.append("/var/tmp")
    assert observe(pinning.DirectWriteProbe()).target is Verdict.BLOCKED


def test_kvm_that_does_not_run_on_ordinary_memory_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    assert pinning.KvmSlotProbe().observe(NOWHERE).missing.startswith(f"KVM ({tmp_path}/kvm: No such file")
    (tmp_path / "kvm").touch()
    missing = pinning.KvmSlotProbe().observe(NOWHERE).missing
    assert missing == "KVM that runs a guest on ordinary memory (KVM_GET_API_VERSION gave ENOTTY)"


def test_without_swap_pages_that_stay_are_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "madvise", lambda *_: None)
    monkeypatch.setattr(procfs, "meminfo", lambda: {"SwapTotal": 0})
    assert memory_calls.PageoutProbe().observe(NOWHERE).missing.startswith("swap")
    monkeypatch.setattr(procfs, "meminfo", lambda: {"SwapTotal": 1 << 20})
    seen = memory_calls.PageoutProbe().observe(NOWHERE)
    assert (seen.missing, judge_probe(seen).verdict) == ("", Verdict.INCONCLUSIVE)


@pytest.mark.parametrize("probe", [metadata.EvictableProbe, metadata.PageCountProbe], ids=lambda probe: probe.name)
def test_frame_numbers_that_are_hidden_are_missing(probe: type[Probe[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    pagemap: Callable[..., Any] = procfs.pagemap
    present = 1 << 63

    def hidden(*arguments: Any) -> Any:
        entries = pagemap(*arguments)
        for index, entry in enumerate(entries):
            entries[index] = entry & present
        return entries

    monkeypatch.setattr(procfs, "pagemap", hidden)
    assert probe().observe(NOWHERE).missing == "frame numbers in /proc/self/pagemap (CAP_SYS_ADMIN)"


def test_one_numa_node_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "nodes_with_memory", lambda: [0])
    assert memory_calls.MigrationProbe().observe(NOWHERE).missing == "second NUMA node with memory"


def test_missing_is_raised_by_what_is_tried() -> None:
    @contextmanager
    def attempt() -> Iterator[None]:
        raise OSError(errno.EPERM, "Operation not permitted")
        yield

    with pytest.raises(Missing, match=r"^a thing: Operation not permitted$"):
        specimen.require(attempt, "a thing")
