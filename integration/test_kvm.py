"""Does KVM map secret RAM? The experiment on this host's own /dev/kvm, each refusal with its control."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.conftest import children, open_descriptors
from vmmback.linux import kvm
from vmmback.linux.kvm import SLOT_BYTES, can_map_secret_ram, child_argv, experiment, run_guest
from vmmback.linux.memfd_secret import memfd_secret

SPIN = bytes.fromhex("ebfe")  # jmp to itself: KVM_RUN never returns
STORE_MISSING = b"\xf4"  # hlt alone
UNDEFINED = bytes.fromhex("0f0b")  # ud2, and no table of interrupts: a triple fault


@contextlib.contextmanager
def sized(descriptor: int) -> Iterator[int]:
    try:
        os.ftruncate(descriptor, SLOT_BYTES)
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture
def device() -> Iterator[int]:
    """Open /dev/kvm. Even under CI=true a host may lack it: KVM is no capability that vmmback needs."""
    try:
        descriptor = os.open("/dev/kvm", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"needs /dev/kvm: {error.strerror}")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def ordinary() -> Iterator[int]:
    with sized(os.memfd_create("ordinary")) as descriptor:
        yield descriptor


@pytest.fixture
def more_ordinary() -> Iterator[int]:
    with sized(os.memfd_create("more-ordinary")) as descriptor:
        yield descriptor


@pytest.fixture
def secret(needs_secretmem: None) -> Iterator[int]:
    with sized(memfd_secret()) as descriptor:
        yield descriptor


@pytest.fixture
def working_kvm(device: int, ordinary: int, more_ordinary: int) -> int:
    """Skip where KVM runs no guest even on ordinary memory: then there is no control."""
    answer = experiment(device, ordinary, more_ordinary, timeout_s=5)
    if not answer.usable:
        pytest.skip(f"needs a KVM that runs guests: {answer.reason}")
    return device


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test ends with the descriptors and children that it began with."""
    before = open_descriptors(), children()
    yield
    assert (open_descriptors(), children()) == before


@pytest.mark.usefixtures("working_kvm")
def test_secret_memory_is_judged_by_what_differs_from_ordinary_memory(device: int, ordinary: int, secret: int) -> None:
    """The pair: the same guest on both kinds. A host where both pass has a KVM that can map secret RAM: so be it."""
    control, run = run_guest(device, ordinary), run_guest(device, secret)
    assert control.passed
    assert control.describe() == "ran to HLT, with a clock"
    answer = can_map_secret_ram()
    assert answer.usable == run.passed
    if not run.passed:
        assert answer.reason == f"KVM cannot map secret RAM: {run.describe()} (ordinary memory: {control.describe()})"


def test_ordinary_memory_in_the_place_of_secret_memory_is_usable(
    working_kvm: int, ordinary: int, more_ordinary: int
) -> None:
    """So nothing but the memory decides: the answer becomes True by itself on a host that can do it."""
    answer = experiment(working_kvm, ordinary, more_ordinary, timeout_s=5)
    assert answer == kvm.KvmAnswer(usable=True, reason="KVM maps secret RAM: ran to HLT, with a clock")


def test_the_same_descriptor_can_be_tried_again(working_kvm: int, ordinary: int) -> None:
    """A marker or clock of the run before must not pass for this run's."""
    assert run_guest(working_kvm, ordinary).passed
    again = run_guest(working_kvm, ordinary, STORE_MISSING)
    assert not again.passed
    assert again.describe() == "the guest ran to HLT, but its store never arrived"


def test_a_guest_that_faults_is_no_success(working_kvm: int, ordinary: int) -> None:
    run = run_guest(working_kvm, ordinary, UNDEFINED)
    assert not run.passed
    assert "instead of HLT" in run.describe()


def test_a_hanging_kvm_run_meets_its_deadline(working_kvm: int, ordinary: int, more_ordinary: int) -> None:
    started = time.monotonic()
    answer = experiment(working_kvm, ordinary, more_ordinary, timeout_s=0.5, code=SPIN)
    assert time.monotonic() - started < 20
    assert not answer.usable
    assert answer.reason == (
        "KVM does not work here, not even with ordinary memory: KVM_RUN gave no answer within 0.5 s"
    )


def test_a_hanging_child_without_its_parent_ends_by_itself(working_kvm: int, ordinary: int) -> None:
    """Called as the parent would, but by one that sets no deadline of its own."""
    ended = subprocess.run(
        child_argv(working_kvm, (ordinary, ordinary), timeout_s=0.1, code=SPIN),
        pass_fds=(working_kvm, ordinary),
        timeout=30,
        check=False,
        capture_output=True,
    )
    assert ended.returncode == -signal.SIGALRM
    assert ended.stdout == b""


def test_a_fifo_in_the_place_of_the_device_is_no_kvm(tmp_path: Path, secret: int) -> None:
    fifo = tmp_path / "kvm"
    os.mkfifo(fifo)
    answer = can_map_secret_ram(device=fifo)
    assert not answer.usable
    assert answer.reason == ("KVM does not work here, not even with ordinary memory: KVM_GET_API_VERSION gave ENOTTY")


def test_memory_that_cannot_be_mapped_is_an_answer(device: int, ordinary: int) -> None:
    read_end, write_end = os.pipe()
    answer = experiment(device, read_end, ordinary, timeout_s=5)
    os.close(read_end)
    os.close(write_end)
    assert answer.reason == "KVM does not work here, not even with ordinary memory: mmap gave EACCES"


def test_threads_may_ask_at_the_same_time(working_kvm: int, secret: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(lambda _: can_map_secret_ram(), range(8)))
    assert len(answers) == 1
