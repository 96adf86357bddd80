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

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmmback.errors import HostUnfit
from vmmback.linux.memfd_secret import memfd_secret

DEVICE = Path("/dev/kvm")
SLOT_BYTES = 64 * 1024
"""Size of the guest's RAM, in bytes: small enough for the usual RLIMIT_MEMLOCK of 64 KiB and more."""

# movb $0x5a, 0x2000 ; hlt
GUEST_CODE = bytes.fromhex("c6042500200000 5a f4")
_MARKER = 0x5A

# Guest-physical addresses, in bytes. Each page has one use; a pvclock structure must not cross a page.
_CODE, _MARKER_AT, _CLOCK_AT, _PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000

_API_VERSION = 12  # fixed since Linux 2.6.22; api.rst: "Applications should refuse to run" with another
_MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01  # bit 0 of its value switches the clock on
_EXITS = {5: "HLT", 6: "MMIO", 8: "SHUTDOWN", 9: "FAIL_ENTRY", 17: "INTERNAL_ERROR", 39: "MEMORY_FAULT"}
_EXIT_HLT = 5
_KILL_GRACE_S = 2.0


@dataclass(frozen=True)
class KvmAnswer:
    """Whether KVM can map secret RAM on this host, and why, in words fit for an error message."""

    usable: bool
    reason: str


@dataclass(frozen=True)
class SlotRun:
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
        return self.halted and self.marker and self.clock_version != 0

    @property
    def halted(self) -> bool:
        """The guest ran to HLT, be it on memory that KVM had mapped, or emulated by copies."""
        return not self.failed and self.exit_reason == _EXIT_HLT

    def describe(self) -> str:
        """Return the first thing that went wrong, or the success, in words."""
        if self.failed:
            return f"{self.failed} gave {errno.errorcode.get(self.error, f'errno {self.error}')}"
        if self.exit_reason != _EXIT_HLT:
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
    if platform.machine() != "x86_64":
        return KvmAnswer(usable=False, reason=f"no probe of KVM on secret RAM is known for {platform.machine()}")
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
    runs = [SlotRun(**json.loads(line)) for line in output.splitlines(keepends=True) if line.endswith("\n")]
    return runs, ending


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


def child_argv(kvm: int, memories: Sequence[int], timeout_s: float, code: bytes) -> list[str]:
    """Return the command line whose process calls child(); it must inherit the descriptors."""
    # -I: no user's setting may change what is run. -S: site costs as much as all the rest of the start, some 15 ms.
    program = "import sys; sys.path.insert(0, sys.argv[1]); from vmmback.linux import kvm; kvm.child(sys.argv[2:])"
    root = str(Path(__file__).parents[2])
    arguments = [str(kvm), str(timeout_s), code.hex(), *map(str, memories)]
    return [sys.executable, "-I", "-S", "-c", program, root, *arguments]


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


# ---- inside the child ------------------------------------------------------------------------------------------------


def child(arguments: list[str]) -> None:
    """Be the child: run the guest on each memory, and write one JSON line a run to standard output.

    Arguments: the descriptor of /dev/kvm, the deadline in seconds, the code as hexadecimal digits, the memories'
    descriptors, first the control. Where one fails, the rest is left out, since it would prove nothing.
    """
    kvm, timeout_s, code, *memories = arguments
    # If the parent is gone, SIGALRM ends a hanging KVM_RUN; a second late, so that a living parent comes first.
    signal.setitimer(signal.ITIMER_REAL, float(timeout_s) + 1)
    for memory in memories:
        run = run_guest(int(kvm), int(memory), bytes.fromhex(code))
        os.write(sys.stdout.fileno(), (json.dumps(vars(run)) + "\n").encode())
        if not run.passed:
            break


def run_guest(kvm: int, memory: int, code: bytes = GUEST_CODE) -> SlotRun:
    """Run `code` in long mode on one memory slot, the descriptor `memory` of SLOT_BYTES; `kvm` is an open /dev/kvm.

    May never return, for KVM_RUN has no deadline. Raises nothing that the kernel causes: a refused call is an answer.
    """
    with ExitStack() as stack:
        try:
            ram = _map(stack, memory, SLOT_BYTES, "mmap")
            ram[:] = bytes(SLOT_BYTES)  # the marker and the clock of an earlier run must not pass for this one's
            vcpu = _make_vcpu(stack, kvm, ram, code)
            with _step("KVM_GET_VCPU_MMAP_SIZE"):
                state_bytes = fcntl.ioctl(kvm, _io(0x04))
            state = _map(stack, vcpu, state_bytes, "mmap of the vCPU")
            with _step("KVM_RUN"):
                fcntl.ioctl(vcpu, _io(0x80))
        except _Refused as refused:
            return SlotRun(failed=refused.step, error=refused.error)
        # struct kvm_run: exit_reason is a u32 at offset 8. struct pvclock_vcpu_time_info: version is the first u32.
        (exit_reason,) = struct.unpack_from("=I", state, 8)
        (clock_version,) = struct.unpack_from("=I", ram, _CLOCK_AT)
        return SlotRun(exit_reason=exit_reason, marker=ram[_MARKER_AT] == _MARKER, clock_version=clock_version)


class _Refused(Exception):
    """The kernel refused the call named `step`."""

    def __init__(self, step: str, error: int) -> None:
        super().__init__(step, error)
        self.step = step
        self.error = error


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Name the call within, should the kernel refuse it."""
    try:
        yield
    except OSError as error:
        raise _Refused(name, error.errno or 0) from error


def _io(number: int) -> int:
    """Encode _IO(KVMIO, number) of include/uapi/asm-generic/ioctl.h; KVMIO is 0xAE."""
    return 0xAE00 | number


def _iow(number: int, size_bytes: int) -> int:
    return 1 << 30 | size_bytes << 16 | _io(number)


def _ior(number: int, size_bytes: int) -> int:
    return 2 << 30 | size_bytes << 16 | _io(number)


def _iowr(number: int, size_bytes: int) -> int:
    return 3 << 30 | size_bytes << 16 | _io(number)


def _map(stack: ExitStack, descriptor: int, size_bytes: int, step: str) -> mmap.mmap:
    with _step(step):
        return stack.enter_context(mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED))


def _make_vcpu(stack: ExitStack, kvm: int, ram: mmap.mmap, code: bytes) -> int:
    """Return a vCPU of a new VM with the one slot `ram`, about to execute `code` in long mode, its clock on."""
    with _step("KVM_GET_API_VERSION"):
        if fcntl.ioctl(kvm, _io(0x00)) != _API_VERSION:
            raise _Refused("KVM_GET_API_VERSION", errno.EPROTONOSUPPORT)
    with _step("KVM_CREATE_VM"):
        vm = fcntl.ioctl(kvm, _io(0x01))
    stack.callback(os.close, vm)
    with _step("KVM_SET_TSS_ADDR"):
        # api.rst: Intel needs three pages below 4 GiB that no slot uses. AMD takes the call and does nothing.
        fcntl.ioctl(vm, _io(0x47), 0x1000_0000)
    with _step("KVM_SET_USER_MEMORY_REGION"):
        host_address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        slot, flags, guest_address = 0, 0, 0
        fcntl.ioctl(vm, _iow(0x46, 32), struct.pack("=IIQQQ", slot, flags, guest_address, SLOT_BYTES, host_address))
    with _step("KVM_CREATE_VCPU"):
        vcpu = fcntl.ioctl(vm, _io(0x41))
    stack.callback(os.close, vcpu)
    _set_cpuid(kvm, vcpu)
    _enter_long_mode(vcpu, ram, code)
    _switch_clock_on(vcpu)
    return vcpu


def _set_cpuid(kvm: int, vcpu: int) -> None:
    """Give the vCPU all that the host supports: without it KVM allows neither long mode nor, if asked to, kvmclock."""
    # struct kvm_cpuid2: u32 nent, u32 padding, then entries of 40 bytes; 256 is KVM_MAX_CPUID_ENTRIES.
    table = bytearray(struct.pack("=II", 256, 0) + bytes(256 * 40))
    with _step("KVM_GET_SUPPORTED_CPUID"):
        fcntl.ioctl(kvm, _iowr(0x05, 8), table)
    with _step("KVM_SET_CPUID2"):
        fcntl.ioctl(vcpu, _iow(0x90, 8), table)


def _enter_long_mode(vcpu: int, ram: mmap.mmap, code: bytes) -> None:
    """Write the code and identity page tables (one 2 MiB page), and set the registers to run it in 64-bit mode."""
    present_writable, large = 0b11, 1 << 7
    ram[_CODE : _CODE + len(code)] = code
    struct.pack_into("=Q", ram, _PML4, _PDPT | present_writable)
    struct.pack_into("=Q", ram, _PDPT, _PD | present_writable)
    struct.pack_into("=Q", ram, _PD, present_writable | large)
    # struct kvm_sregs: cs ds es fs gs ss tr ldt of 24 bytes each, gdt and idt of 16, then cr0 cr2 cr3 cr4 cr8 efer.
    sregs = bytearray(312)
    with _step("KVM_GET_SREGS"):
        fcntl.ioctl(vcpu, _ior(0x83, len(sregs)), sregs)
    code_segment = _segment(selector=0x08, kind=0b1011, long=1)
    data_segment = _segment(selector=0x10, kind=0b0011, long=0)
    sregs[: 6 * 24] = code_segment + 5 * data_segment
    cr0, cr4, efer = 0x8000_0033, 0x20, 0x500  # PG NE ET MP PE; PAE; LMA LME
    struct.pack_into("=6Q", sregs, 8 * 24 + 2 * 16, cr0, 0, _PML4, cr4, 0, efer)
    with _step("KVM_SET_SREGS"):
        fcntl.ioctl(vcpu, _iow(0x84, len(sregs)), sregs)
    # struct kvm_regs: 16 general registers, rip, rflags (bit 1 is always set).
    with _step("KVM_SET_REGS"):
        fcntl.ioctl(vcpu, _iow(0x82, 144), struct.pack("=18Q", *[0] * 16, _CODE, 0b10))


def _segment(selector: int, kind: int, long: int) -> bytes:
    """Return a flat, present, ring 0 struct kvm_segment; its fields are base limit selector type and eight flags."""
    present, ring, default_32_bit, not_system, granular = 1, 0, 1 - long, 1, 1
    flags = (present, ring, default_32_bit, not_system, long, granular, 0, 0)
    return struct.pack("=QIH10B", 0, 0xFFFF_FFFF, selector, kind, *flags, 0)


def _switch_clock_on(vcpu: int) -> None:
    """Point the MSR kvmclock at guest RAM: KVM then writes the clock when the vCPU next runs."""
    # struct kvm_msrs: u32 count, u32 padding, then u32 index, u32 reserved, u64 data. Returns how many it took.
    msrs = bytearray(struct.pack("=IIIIQ", 1, 0, _MSR_KVM_SYSTEM_TIME_NEW, 0, _CLOCK_AT | 1))
    with _step("KVM_SET_MSRS"):
        taken = fcntl.ioctl(vcpu, _iow(0x89, 8), msrs)
    if taken != 1:
        raise _Refused("KVM_SET_MSRS of kvmclock", errno.EINVAL)
