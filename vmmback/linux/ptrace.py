"""ptrace(2): stop a process, read and write its memory and registers, let it make a system call.

The thread that stops a process must make all requests: ptrace knows tracers by thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vmmback.errors import HostUnfit
from vmmback.linux import arch

# include/uapi/linux/ptrace.h
_PEEKDATA, _POKEDATA, _SINGLESTEP, _DETACH = 2, 5, 9, 17
_GETREGSET, _SETREGSET, _SEIZE, _INTERRUPT = 0x4204, 0x4205, 0x4206, 0x4207
_NT_PRSTATUS = 1
_SYSCALL_INSTRUCTION_BYTES = 2  # 0f 05
_MAX_ERRNO = 4095

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64 (arch/x86/include/asm/user_64.h)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
            "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
        )
    )  # fmt: skip


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Tracee:
    """A thread that is stopped. `with stopped(pid) as tracee`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def peek(self, address: int) -> bytes:
        """Return the 8 bytes at `address`. Raises OSError: EIO when they are out of reach."""
        return _request(_PEEKDATA, self.pid, address).to_bytes(8, "little", signed=True)

    def poke(self, address: int, word: bytes) -> None:
        """Write 8 bytes to `address`. Raises OSError: EIO when it is out of reach."""
        _request(_POKEDATA, self.pid, address, int.from_bytes(word, "little"))

    @property
    def registers(self) -> Registers:
        """The registers of the stopped thread; assign to change them. Raises HostUnfit on other than x86-64."""
        _only_x86_64()
        registers = Registers()
        self._register_set(_GETREGSET, registers)
        return registers

    @registers.setter
    def registers(self, registers: Registers) -> None:
        self._register_set(_SETREGSET, registers)

    def system_call(self, number: int, *arguments: int) -> int:
        """Let the thread, stopped in a system call, make another one and return its result; it goes on as before.

        Raises OSError, with the errno that the system call failed with.
        """
        changed = self.registers
        changed.rip -= _SYSCALL_INSTRUCTION_BYTES  # the instruction that it is in is used once more
        changed.rax = number
        for name, argument in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(changed, name, argument)
        result = ctypes.c_int64(self._step(changed).rax).value
        if -_MAX_ERRNO <= result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def step_with_stack(self, stack_pointer: int) -> None:
        """Let the thread execute its next instruction with another stack pointer; it goes on as before. Raises OSError.

        The instruction must not use the stack.
        """
        changed = self.registers
        changed.rsp = stack_pointer
        self._step(changed)

    def _step(self, changed: Registers) -> Registers:
        """Execute one instruction with other registers; return what it made of them, and put the old ones back."""
        before = self.registers
        changed.orig_rax = (1 << 64) - 1  # not in a system call: nothing to restart (arch/x86/kernel/signal.c)
        self.registers = changed
        _request(_SINGLESTEP, self.pid)
        _wait_until_stopped(self.pid)
        after = self.registers
        self.registers = before
        return after

    def _register_set(self, request: int, registers: Registers) -> None:
        vector = _Iovec(ctypes.addressof(registers), ctypes.sizeof(registers))
        _request(request, self.pid, _NT_PRSTATUS, ctypes.addressof(vector))


@contextmanager
def stopped(pid: int) -> Iterator[Tracee]:
    """Stop a child's main thread by PTRACE_SEIZE and PTRACE_INTERRUPT, and let it go again. Raises OSError."""
    _request(_SEIZE, pid)
    try:
        _request(_INTERRUPT, pid)
        _wait_until_stopped(pid)
        yield Tracee(pid)
    finally:
        with suppress(ProcessLookupError):  # it was killed meanwhile
            _request(_DETACH, pid)


def _wait_until_stopped(pid: int) -> None:
    """Wait for the stop. Whoever owns the child sets the deadline, by killing it. Raises OSError (ESRCH) then."""
    # Its end, if it comes, is left for its owner to reap.
    result = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if result is None or result.si_code not in (os.CLD_TRAPPED, os.CLD_STOPPED):
        raise ProcessLookupError(errno.ESRCH, f"process {pid} ended while it was traced")
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)


def _only_x86_64() -> None:
    if arch.current().name != "x86_64":
        raise HostUnfit("the registers of this architecture are not known", "run vmmback on x86_64")


def _request(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)  # PEEKDATA returns the word itself: -1 alone says nothing (ptrace(2))
    result: int = _libc.ptrace(request, pid, address, data)
    if result == -1 and (number := ctypes.get_errno()):
        raise OSError(number, os.strerror(number))
    return result
