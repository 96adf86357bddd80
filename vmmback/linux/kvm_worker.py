"""Runs a guest of a few instructions on memory that KVM is to map; kvm.py has the why, the sources and the judgement.

Run as `python -I -S kvm_worker.py DESCRIPTOR TIMEOUT CODE MEMORY...`: the descriptor of /dev/kvm, the deadline in
seconds, the code as hexadecimal digits, the memories' descriptors, first the control. It writes one line a run to
standard output: what run_guest() returns, with tabs between. Where one fails, the rest is left out, since it would
prove nothing.

Standard library only, and little of that: the imports of kvm.py take 80 ms of a processor, all of this 25.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys

TYPE_CHECKING = False  # typing itself would cost as much to import as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable

SLOT_BYTES = 64 * 1024
"""Size of the guest's RAM, in bytes: small enough for the usual RLIMIT_MEMLOCK of 64 KiB and more."""

# movb $0x5a, 0x2000 ; hlt
GUEST_CODE = bytes.fromhex("c6042500200000 5a f4")
EXIT_HLT = 5
_MARKER = 0x5A

# Guest-physical addresses, in bytes. Each page has one use; a pvclock structure must not cross a page.
_CODE, _MARKER_AT, _CLOCK_AT, _PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000

_API_VERSION = 12  # fixed since Linux 2.6.22; api.rst: "Applications should refuse to run" with another
_MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01  # bit 0 of its value switches the clock on


def main() -> None:
    """Run the guest on each memory, up to the first on which it fails."""
    kvm, timeout_s, code, *memories = sys.argv[1:]
    # If the parent is gone, SIGALRM ends a hanging KVM_RUN; a second late, so that a living parent comes first.
    ctypes.CDLL(None).alarm(int(float(timeout_s)) + 2)  # whole seconds; the module signal would take 8 ms
    for memory in memories:
        run = run_guest(int(kvm), int(memory), bytes.fromhex(code))
        failed, *numbers = run
        os.write(1, "\t".join([failed, *(str(int(number)) for number in numbers)]).encode() + b"\n")
        if not passed(*run):
            break


def run_guest(kvm: int, memory: int, code: bytes = GUEST_CODE) -> tuple[str, int, int, bool, int]:
    """Run `code` in long mode on one memory slot, the descriptor `memory` of SLOT_BYTES; `kvm` is an open /dev/kvm.

    Returns what SlotRun of kvm.py has, in its order. May never return, for KVM_RUN has no deadline. Raises nothing that
    the kernel causes: a refused call is an answer.
    """
    opened: list[Callable[[], object]] = []
    try:
        ram = _map(opened, memory, SLOT_BYTES, "mmap")
        ram[:] = bytes(SLOT_BYTES)  # the marker and the clock of an earlier run must not pass for this one's
        vcpu = _make_vcpu(opened, kvm, ram, code)
        with _Step("KVM_GET_VCPU_MMAP_SIZE"):
            state_bytes = fcntl.ioctl(kvm, _io(0x04))
        state = _map(opened, vcpu, state_bytes, "mmap of the vCPU")
        with _Step("KVM_RUN"):
            fcntl.ioctl(vcpu, _io(0x80))
        # struct kvm_run: exit_reason is a u32 at offset 8. struct pvclock_vcpu_time_info: version is the first u32.
        (exit_reason,) = struct.unpack_from("=I", state, 8)
        (clock_version,) = struct.unpack_from("=I", ram, _CLOCK_AT)
        return "", 0, exit_reason, ram[_MARKER_AT] == _MARKER, clock_version
    except _Refused as refused:
        return refused.step, refused.error, 0, False, 0
    finally:
        for close in reversed(opened):
            close()


def passed(failed: str, _: int, exit_reason: int, marker: bool, clock_version: int) -> bool:
    """Tell whether a guest of which run_guest() returned this ran to HLT on memory that KVM had really mapped."""
    return not failed and exit_reason == EXIT_HLT and marker and clock_version != 0


class _Refused(Exception):
    """The kernel refused the call named `step`."""

    def __init__(self, step: str, error: int) -> None:
        super().__init__(step, error)
        self.step = step
        self.error = error


class _Step:
    """Name the call within, should the kernel refuse it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError):
            raise _Refused(self._name, error.errno or 0) from error


def _io(number: int) -> int:
    """Encode _IO(KVMIO, number) of include/uapi/asm-generic/ioctl.h; KVMIO is 0xAE."""
    return 0xAE00 | number


def _iow(number: int, size_bytes: int) -> int:
    return 1 << 30 | size_bytes << 16 | _io(number)


def _ior(number: int, size_bytes: int) -> int:
    return 2 << 30 | size_bytes << 16 | _io(number)


def _iowr(number: int, size_bytes: int) -> int:
    return 3 << 30 | size_bytes << 16 | _io(number)


def _map(opened: list[Callable[[], object]], descriptor: int, size_bytes: int, step: str) -> mmap.mmap:
    with _Step(step):
        memory = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED)
    opened.append(memory.close)
    return memory


def _make_vcpu(opened: list[Callable[[], object]], kvm: int, ram: mmap.mmap, code: bytes) -> int:
    """Return a vCPU of a new VM with the one slot `ram`, about to execute `code` in long mode, its clock on."""
    with _Step("KVM_GET_API_VERSION"):
        if fcntl.ioctl(kvm, _io(0x00)) != _API_VERSION:
            raise _Refused("KVM_GET_API_VERSION", errno.EPROTONOSUPPORT)
    with _Step("KVM_CREATE_VM"):
        vm = fcntl.ioctl(kvm, _io(0x01))
    opened.append(lambda: os.close(vm))
    with _Step("KVM_SET_TSS_ADDR"):
        # api.rst: Intel needs three pages below 4 GiB that no slot uses. AMD takes the call and does nothing.
        fcntl.ioctl(vm, _io(0x47), 0x1000_0000)
    with _Step("KVM_SET_USER_MEMORY_REGION"):
        host_address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        slot, flags, guest_address = 0, 0, 0
        fcntl.ioctl(vm, _iow(0x46, 32), struct.pack("=IIQQQ", slot, flags, guest_address, SLOT_BYTES, host_address))
    with _Step("KVM_CREATE_VCPU"):
        vcpu = fcntl.ioctl(vm, _io(0x41))
    opened.append(lambda: os.close(vcpu))
    _set_cpuid(kvm, vcpu)
    _enter_long_mode(vcpu, ram, code)
    _switch_clock_on(vcpu)
    return vcpu


def _set_cpuid(kvm: int, vcpu: int) -> None:
    """Give the vCPU all that the host supports: without it KVM allows neither long mode nor, if asked to, kvmclock."""
    # struct kvm_cpuid2: u32 nent, u32 padding, then entries of 40 bytes; 256 is KVM_MAX_CPUID_ENTRIES.
    table = bytearray(struct.pack("=II", 256, 0) + bytes(256 * 40))
    with _Step("KVM_GET_SUPPORTED_CPUID"):
        fcntl.ioctl(kvm, _iowr(0x05, 8), table)
    with _Step("KVM_SET_CPUID2"):
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
    with _Step("KVM_GET_SREGS"):
        fcntl.ioctl(vcpu, _ior(0x83, len(sregs)), sregs)
    code_segment = _segment(selector=0x08, kind=0b1011, long=1)
    data_segment = _segment(selector=0x10, kind=0b0011, long=0)
    sregs[: 6 * 24] = code_segment + 5 * data_segment
    cr0, cr4, efer = 0x8000_0033, 0x20, 0x500  # PG NE ET MP PE; PAE; LMA LME
    struct.pack_into("=6Q", sregs, 8 * 24 + 2 * 16, cr0, 0, _PML4, cr4, 0, efer)
    with _Step("KVM_SET_SREGS"):
        fcntl.ioctl(vcpu, _iow(0x84, len(sregs)), sregs)
    # struct kvm_regs: 16 general registers, rip, rflags (bit 1 is always set).
    with _Step("KVM_SET_REGS"):
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
    with _Step("KVM_SET_MSRS"):
        taken = fcntl.ioctl(vcpu, _iow(0x89, 8), msrs)
    if taken != 1:
        raise _Refused("KVM_SET_MSRS of kvmclock", errno.EINVAL)


if __name__ == "__main__":
    main()
