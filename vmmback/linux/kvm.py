"""KVM on secret RAM: does this host's KVM map it into a guest? Answered by an experiment, never by a version.

The experiment runs one tiny guest twice, on ordinary memory (the control) and on secret memory. Its few instructions
store a marker into guest RAM and halt. Three observations count, and each exists because one host answers wrongly
without it:

- KVM_RUN ends with KVM_EXIT_HLT. Mainline cannot: its page fault handler takes guest pages with get_user_pages
  (virt/kvm/kvm_main.c, hva_to_pfn), which refuses secret memory (mm/gup.c, check_vma_flags), and KVM_RUN gives EFAULT.
- The marker is there.
- KVM itself wrote the guest's clock: the MSR kvmclock is pointed at guest RAM, and the structure there has a version
  afterwards. KVM may *emulate* a few instructions through copies to the VMM's own mapping, which reach secret memory
  (nested PVM does so; so does Intel without unrestricted guest, in real mode, which is why the guest starts in long
  mode). The clock's page is taken with get_user_pages instead (virt/kvm/pfncache.c), so it stays zero. Kernels from
  before KVM kept that page in a gfn_to_pfn_cache copy to it too; there KVM_RUN alone decides.

KVM_RUN may hang where KVM is broken, so a throwaway child process makes the calls, and is killed at a deadline.

Sources: Documentation/virt/kvm/api.rst (every ioctl used), include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h
(structures), arch/x86/include/uapi/asm/kvm_para.h (the MSR), arch/x86/include/asm/pvclock-abi.h (the clock).
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from vmmback.errors import HostUnfit
from vmmback.linux import kvm_worker
from vmmback.linux.kvm_worker import EXIT_HLT, GUEST_CODE
from vmmback.linux.memfd_secret import memfd_secret

DEVICE = Path("/dev/kvm")
SLOT_BYTES = kvm_worker.SLOT_BYTES
"""Size of the guest's RAM, in bytes."""

_EXITS = {5: "HLT", 6: "MMIO", 8: "SHUTDOWN", 9: "FAIL_ENTRY", 17: "INTERNAL_ERROR", 39: "MEMORY_FAULT"}
_KILL_GRACE_S = 2.0


class KvmAnswer(NamedTuple):
    """Whether KVM can map secret RAM on this host, and why, in words fit for an error message."""

    usable: bool
    reason: str


class SlotRun(NamedTuple):
    """What one run of the guest on one kind of memory showed.

    `failed` names the call that the kernel refused ("" if none), `error` is its errno; `exit_reason` is KVM_RUN's
    (KVM_EXIT_…, 0 before it ran); `clock_version` is the version field of the pvclock structure, 0 if never written.
    """

    failed: str = ""
    error: int = 0
    exit_reason: int = 0
    marker: bool = False
    clock_version: int = 0

    @property
    def passed(self) -> bool:
        """The guest ran to HLT on memory that KVM had really mapped."""
        return kvm_worker.passed(self.failed, self.error, self.exit_reason, self.marker, self.clock_version)

    @property
    def halted(self) -> bool:
        """The guest ran to HLT, be it on memory that KVM had mapped, or emulated by copies."""
        return not self.failed and self.exit_reason == EXIT_HLT

    def describe(self) -> str:
        """Return the first thing that went wrong, or the success, in words."""
        if self.failed:
            return f"{self.failed} gave {errno.errorcode.get(self.error, f'errno {self.error}')}"
        if self.exit_reason != EXIT_HLT:
            name = _EXITS.get(self.exit_reason, "unknown")
            return f"KVM_RUN ended with exit reason {self.exit_reason} ({name}) instead of HLT"
        if not self.marker:
            return "the guest ran to HLT, but its store never arrived"
        if not self.clock_version:
            return "the guest ran to HLT, but KVM did not write its clock there"
        return "ran to HLT, with a clock"


def can_map_secret_ram(timeout_s: float = 5.0, *, device: Path = DEVICE) -> KvmAnswer:
    """Find out by experiment whether KVM can run a guest on secret RAM; takes some 50 ms.

    Blocks: an asyncio program calls it in a thread (the child is started without preexec_fn, so threads are fine).
    The child gets `timeout_s`, and 2 s more to die where KVM_RUN hangs.
    Only a success on ordinary memory *and* on secret memory makes KVM usable. A missing device, an architecture
    without a known experiment (kvmclock is x86 only) and a host without secret memory are answers too, not errors.
    Raises OSError when descriptors or processes run out (EMFILE, ENFILE, EAGAIN, ENOMEM).
    """
    if (machine := os.uname().machine) != "x86_64":
        return KvmAnswer(usable=False, reason=f"no probe of KVM on secret RAM is known for {machine}")
    with ExitStack() as stack:
        try:
            kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            return KvmAnswer(usable=False, reason=f"KVM cannot be used: {device}: {error.strerror}")
        stack.callback(os.close, kvm)
        control = os.memfd_create("vmmback-kvm-control")
        stack.callback(os.close, control)
        try:
            secret = memfd_secret()
        except HostUnfit as error:
            return KvmAnswer(usable=False, reason=f"KVM cannot be tried on secret RAM: {error.message}")
        stack.callback(os.close, secret)
        for descriptor in (control, secret):
            os.ftruncate(descriptor, SLOT_BYTES)
        return experiment(kvm, control, secret, timeout_s)


def experiment(kvm: int, control: int, secret: int, timeout_s: float, code: bytes = GUEST_CODE) -> KvmAnswer:
    """Run the guest on the descriptors `control` and `secret` (SLOT_BYTES each) in a child, and judge what it saw.

    The child has ended and is reaped on return, whatever happened, unless not even SIGKILL ends it: the reason says so.
    """
    return judge(*run_in_child(kvm, (control, secret), timeout_s, code))


def run_in_child(
    kvm: int, memories: Sequence[int], timeout_s: float, code: bytes = GUEST_CODE
) -> tuple[list[SlotRun], str]:
    """Run the guest on each descriptor (SLOT_BYTES each) up to the first that fails; return the runs that there were.

    The text says why one of them is missing. As experiment(), it leaves no child.
    """
    output, ending = _run_child(child_argv(kvm, memories, timeout_s, code), (kvm, *memories), timeout_s)
    return [_run_of(line) for line in output.splitlines(keepends=True) if line.endswith("\n")], ending


def judge(runs: list[SlotRun], ending: str = "") -> KvmAnswer:
    """Turn the child's runs, first the control, into an answer; `ending` says why one of them is missing."""
    control, secret = (*runs, None, None)[:2]
    if control is None or not control.passed:
        seen = control.describe() if control else ending
        return KvmAnswer(usable=False, reason=f"KVM does not work here, not even with ordinary memory: {seen}")
    if secret is None or not secret.passed:
        seen = secret.describe() if secret else ending
        reason = f"KVM cannot map secret RAM: {seen} (ordinary memory: {control.describe()})"
        return KvmAnswer(usable=False, reason=reason)
    return KvmAnswer(usable=True, reason=f"KVM maps secret RAM: {secret.describe()}")


def run_guest(kvm: int, memory: int, code: bytes = GUEST_CODE) -> SlotRun:
    """Run `code` in this process, on the descriptor `memory` of SLOT_BYTES; `kvm` is an open /dev/kvm.

    May never return, for KVM_RUN has no deadline. Raises nothing that the kernel causes: a refused call is an answer.
    """
    return SlotRun(*kvm_worker.run_guest(kvm, memory, code))


def _run_of(line: str) -> SlotRun:
    failed, error, exit_reason, marker, clock_version = line.rstrip("\n").split("\t")
    return SlotRun(failed, int(error), int(exit_reason), marker == "1", int(clock_version))


def child_argv(kvm: int, memories: Sequence[int], timeout_s: float, code: bytes) -> list[str]:
    """Return the command line of the child; it must inherit the descriptors."""
    # -I: no user's setting may change what is run. -S: site costs more than the start of the interpreter.
    arguments = [str(kvm), str(timeout_s), code.hex(), *map(str, memories)]
    return [sys.executable, "-I", "-S", kvm_worker.__file__, *arguments]


def _run_child(argv: list[str], descriptors: tuple[int, ...], timeout_s: float) -> tuple[str, str]:
    """Run `argv` to its end or its deadline; return what it wrote, and why that may not be all, in words."""
    child = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=descriptors,
        text=True,
    )
    try:
        output, errors = child.communicate(timeout=timeout_s)
        ending = f"the experiment's process ended early, status {child.returncode}: {_last_line(errors)}"
    except subprocess.TimeoutExpired:
        child.kill()
        output, ending = _reap_killed(child, timeout_s)
    except BaseException:
        child.kill()
        _reap_killed(child, timeout_s)
        raise
    return output, ending


def _reap_killed(child: subprocess.Popen[str], timeout_s: float) -> tuple[str, str]:
    """Wait for a killed child, though not forever: KVM_RUN stuck inside the kernel outlives SIGKILL."""
    ending = f"KVM_RUN gave no answer within {timeout_s:g} s"
    try:
        output, _ = child.communicate(timeout=_KILL_GRACE_S)
    except subprocess.TimeoutExpired as late:
        for pipe in (child.stdout, child.stderr):
            if pipe:
                pipe.close()
        # Bytes even in text mode (CPython's Popen._check_timeout): what was read so far, perhaps the control's run.
        return (late.output or b"").decode(), f"{ending}, and SIGKILL did not end process {child.pid}"
    return output, ending


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
