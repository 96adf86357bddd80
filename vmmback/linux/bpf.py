"""bpf(2): array maps shared with the kernel, and programs (bpf_assembler.py) run once on request.

Sources: bpf(2), include/uapi/linux/bpf.h, kernel/bpf/verifier.c and net/bpf/test_run.c of the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self

from vmmback.errors import HostUnfit
from vmmback.linux import arch
from vmmback.linux.bpf_assembler import Instruction, Label, assemble
from vmmback.linux.syscall import syscall

# enum bpf_cmd, enum bpf_map_type, enum bpf_prog_type and flags of include/uapi/linux/bpf.h
_MAP_CREATE, _PROG_LOAD, _PROG_TEST_RUN = 0, 5, 10
_MAP_TYPE_ARRAY = 2
_F_MMAPABLE = 1 << 10
_F_SLEEPABLE = 1 << 4

# The helpers that read kernel memory want a licence that license_is_gpl_compatible() knows (include/linux/license.h).
_LICENCE = b"Dual MIT/GPL"
_LOG_BYTES = 1 << 20
_LOG_TAIL_LINES = 6

_LOADS = 5


class _MapCreate(ctypes.Structure):
    """The part of union bpf_attr that BPF_MAP_CREATE reads; the kernel takes what is missing as 0."""

    _fields_ = (
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("map_name", ctypes.c_char * 16),
    )


class _ProgLoad(ctypes.Structure):
    """The part of union bpf_attr that BPF_PROG_LOAD reads."""

    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_name", ctypes.c_char * 16),
        ("prog_ifindex", ctypes.c_uint32),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf_fd", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("func_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64),
        ("line_info_cnt", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
    )


class _TestRun(ctypes.Structure):
    """The part of union bpf_attr that BPF_PROG_TEST_RUN reads; this type wants only the program and its context."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("data_in", ctypes.c_uint64),
        ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32),
        ("duration", ctypes.c_uint32),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_uint64),
        ("ctx_out", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


def command(number: int, attributes: ctypes.Structure) -> int:
    """Call bpf(2). Raises HostUnfit where it is missing or not allowed, OSError otherwise."""
    try:
        return syscall(arch.current().bpf, number, attributes, ctypes.sizeof(attributes))
    except OSError as error:
        if error.errno == errno.EPERM:
            raise HostUnfit(
                "bpf(2) is not permitted (EPERM): CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, are missing",
                "run as root; where a seccomp filter or a container runtime denies bpf(2), allow it",
            ) from error
        if error.errno == errno.ENOSYS:
            raise HostUnfit(
                "this kernel has no bpf(2) (ENOSYS)",
                "boot a kernel built with CONFIG_BPF_SYSCALL (distribution kernels are)",
            ) from error
        raise


class SharedValue:
    """An array map of one value whose `size` bytes are mapped here as `memory`; owns descriptor and mapping.

    The kernel starts it zeroed. It reads and writes the same memory: no system call copies anything. Raises HostUnfit
    without the right to make maps, OSError (ENOMEM, EMFILE, …).
    """

    def __init__(self, size: int, name: str) -> None:
        attributes = _MapCreate(
            map_type=_MAP_TYPE_ARRAY,
            key_size=4,
            value_size=size,
            max_entries=1,
            map_flags=_F_MMAPABLE,
            map_name=name.encode(),
        )
        self.descriptor = command(_MAP_CREATE, attributes)  # bpf(2) sets close-on-exec on what it returns
        try:
            self.memory = mmap.mmap(self.descriptor, size)
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.memory.close()
        os.close(self.descriptor)


class ProgramKind(NamedTuple):
    """Where a program may run: enum bpf_prog_type, whether it may sleep, enum bpf_attach_type, BTF id of its target."""

    type: int
    sleepable: bool = False
    attach_type: int = 0
    attach_btf_id: int = 0


# Linux 5.14; check_attach_btf_id() of the verifier wants it to be sleepable.
_RUN_ON_REQUEST = ProgramKind(31, sleepable=True)  # BPF_PROG_TYPE_SYSCALL


class Program:
    """A verified program, of type BPF_PROG_TYPE_SYSCALL unless `kind` says otherwise; owns its descriptor.

    Raises HostUnfit with the end of the verifier's log where it is rejected, and without the right to load programs.
    """

    def __init__(self, program: Sequence[Instruction | Label], name: str, kind: ProgramKind = _RUN_ON_REQUEST) -> None:
        self.descriptor = _load(assemble(program), name, kind)

    def run(self, context: bytes) -> bytes:
        """Run it once on the caller's processor; return the context, which R1 pointed to, as the program left it.

        For the type BPF_PROG_TYPE_SYSCALL alone. The context must not be empty. Other threads of Python run meanwhile,
        as ctypes lets them. Raises OSError.
        """
        copy = ctypes.create_string_buffer(context, len(context))
        run = _TestRun(prog_fd=self.descriptor, ctx_size_in=len(context), ctx_in=ctypes.addressof(copy))
        command(_PROG_TEST_RUN, run)
        return copy.raw

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.descriptor)


def _load(code: bytes, name: str, kind: ProgramKind) -> int:
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(_LICENCE)
    attributes = _ProgLoad(
        prog_type=kind.type,
        insn_cnt=len(code) // 8,
        insns=ctypes.addressof(instructions),
        license=ctypes.addressof(licence),
        prog_flags=_F_SLEEPABLE if kind.sleepable else 0,
        prog_name=name.encode(),
        expected_attach_type=kind.attach_type,
        attach_btf_id=kind.attach_btf_id,
    )
    try:
        return _verified(attributes)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.E2BIG):
            raise
        reason = errno.errorcode[error.errno]
        raise HostUnfit(
            f"the kernel's verifier rejected the BPF program {name} ({reason}): {_rejection(attributes)}",
            "kernel lockdown in confidentiality mode keeps BPF from reading kernel memory: "
            "see /sys/kernel/security/lockdown",
        ) from error


def _verified(attributes: _ProgLoad) -> int:
    """Load a program while this thread takes no signals: the verifier gives up for one (do_check, verifier.c).

    It starts from nothing then, and signals that come more often than it takes would keep it at that. What cannot be
    kept off (a stop, other work for the thread) is rare: it is tried again then.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for _ in range(_LOADS - 1):
            with suppress(BlockingIOError):  # EAGAIN
                return command(_PROG_LOAD, attributes)
        return command(_PROG_LOAD, attributes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _rejection(attributes: _ProgLoad) -> str:
    """Load once more, for the log: writing it makes a load that succeeds slow. Return its last lines."""
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attributes.log_level = 1
    attributes.log_size = _LOG_BYTES
    attributes.log_buf = ctypes.addressof(log)
    try:
        os.close(_verified(attributes))
    except OSError:
        lines = log.value.decode(errors="replace").splitlines()
        return " | ".join(lines[-_LOG_TAIL_LINES:]) or "no log"
    return "accepted when tried again"
