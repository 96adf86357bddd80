"""Seccomp user notification: a program's system calls are answered by another process, with a descriptor of its choice.

Sources: seccomp(2), seccomp_unotify(2), include/uapi/linux/seccomp.h. The structures are the same on x86-64 and
aarch64.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
from typing import NamedTuple

from vmmback.linux import arch
from vmmback.linux.syscall import syscall

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
_SECCOMP_RET_ALLOW = 0x7FFF0000
_SECCOMP_RET_USER_NOTIF = 0x7FC00000
_USER_NOTIF_FLAG_CONTINUE = 1
_ADDFD_FLAG_SETFD, _ADDFD_FLAG_SEND = 1 << 0, 1 << 1

# struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6];
_NR, _ARCH, _ARGS = 0, 4, 16
_INSTRUCTION_BYTES = 8  # struct sock_filter
_MAP_FIXED = 0x10  # include/uapi/asm-generic/mman-common.h

_BPF_LD_W_ABS, _BPF_JEQ, _BPF_RET = 0x20, 0x15, 0x06

_libc = ctypes.CDLL(None, use_errno=True)


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class _Notif(ctypes.Structure):
    """struct seccomp_notif with its struct seccomp_data: 80 bytes."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("pid", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("nr", ctypes.c_int),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
    )


class _NotifResp(ctypes.Structure):
    """struct seccomp_notif_resp: 24 bytes."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("val", ctypes.c_int64),
        ("error", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
    )


class _NotifAddfd(ctypes.Structure):
    """struct seccomp_notif_addfd: 24 bytes."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("srcfd", ctypes.c_uint32),
        ("newfd", ctypes.c_uint32),
        ("newfd_flags", ctypes.c_uint32),
    )


def _iowr(number: int, size: int) -> int:
    """_IOWR('!', number, size) of include/uapi/asm-generic/ioctl.h."""
    return 3 << 30 | size << 16 | ord("!") << 8 | number


_NOTIF_RECV = _iowr(0, ctypes.sizeof(_Notif))
_NOTIF_SEND = _iowr(1, ctypes.sizeof(_NotifResp))
_NOTIF_ID_VALID = 1 << 30 | 8 << 16 | ord("!") << 8 | 2  # _IOW
_NOTIF_ADDFD = 1 << 30 | ctypes.sizeof(_NotifAddfd) << 16 | ord("!") << 8 | 3  # _IOW


class Notification(NamedTuple):
    """System call `number` of the thread `tid`, which waits for an answer; `arguments` are its six words."""

    id: int
    tid: int
    number: int
    arguments: tuple[int, ...]


def program(*, memfds: bool = False, mappings: bool = False) -> bytes:
    """Return a filter (an array of struct sock_filter) that stops calls until the holder of its listener answers.

    It stops each openat(2) whose flags are exactly O_RDWR, as QEMU's memory-backend-file makes it (system/physmem.c,
    file_ram_open). With `memfds` it also stops memfd_create(2), and what QEMU does next to such a descriptor:
    ftruncate(2) and fcntl(2) with F_ADD_SEALS (util/memfd.c, qemu_memfd_create). With `mappings`, mmap(2) as QEMU maps
    shared RAM, which tells its size (util/mmap-alloc.c, mmap_activate). It is no sandbox: system calls of another ABI
    (x32, i386) pass it.
    """
    numbers = arch.current()
    stopped = _stop(numbers.openat, (2, os.O_RDWR))
    if memfds:
        stopped += _stop(numbers.memfd_create) + _stop(numbers.ftruncate) + _stop(numbers.fcntl, (1, fcntl.F_ADD_SEALS))
    if mappings:
        stopped += _stop(numbers.mmap, (3, mmap.MAP_SHARED | _MAP_FIXED))
    allow = _return(_SECCOMP_RET_ALLOW)
    checked = [_load(_ARCH), _skip_unless_equal(numbers.audit_arch, 1 + len(stopped)), _load(_NR), *stopped, allow]
    return b"".join(checked)


def install_listener(*, memfds: bool = False, mappings: bool = False) -> int:
    """Put the calling *thread*, and what it will execute, under `program`; return the listener's descriptor.

    Sets no_new_privs on the thread. The descriptor is close-on-exec. Raises OSError.
    """
    return _install(program(memfds=memfds, mappings=mappings), _SECCOMP_FILTER_FLAG_NEW_LISTENER)


def receive(listener: int) -> Notification | None:
    """Return the next notification, or None when none waits or its caller died meanwhile. Raises OSError."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    # Without a notification the ioctl would block, for ever once the last filtered task is gone (kernel/seccomp.c).
    if not any(events & select.POLLIN for _, events in poll.poll(0)):
        return None
    notif = _Notif()  # the kernel wants it zeroed
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, notif)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return Notification(notif.id, notif.pid, notif.nr, tuple(notif.args))


def is_waiting(listener: int, notification: Notification) -> bool:
    """Tell whether the caller still waits: only then did what was read of `/proc/TID` belong to it."""
    try:
        fcntl.ioctl(listener, _NOTIF_ID_VALID, struct.pack("Q", notification.id))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def answer_descriptor(listener: int, notification: Notification, descriptor: int) -> bool:
    """Give the caller a close-on-exec copy of `descriptor` as the result of its system call.

    One atomic step (SECCOMP_ADDFD_FLAG_SEND, Linux 5.14). Returns False when the caller is gone.
    """
    addfd = _NotifAddfd(notification.id, _ADDFD_FLAG_SEND, descriptor, 0, os.O_CLOEXEC)
    return _answer(listener, _NOTIF_ADDFD, addfd)


def replace_descriptor(listener: int, notification: Notification, descriptor: int, number: int) -> bool:
    """Put a close-on-exec copy of `descriptor` in the place of the caller's `number`; its call still waits.

    Returns False when the caller is gone. Raises OSError, the caller's EMFILE among them.
    """
    addfd = _NotifAddfd(notification.id, _ADDFD_FLAG_SETFD, descriptor, number, os.O_CLOEXEC)
    return _answer(listener, _NOTIF_ADDFD, addfd)


def answer_continue(listener: int, notification: Notification) -> bool:
    """Let the kernel carry out the system call as if there were no filter. Returns False when the caller is gone."""
    return _answer(listener, _NOTIF_SEND, _NotifResp(notification.id, 0, 0, _USER_NOTIF_FLAG_CONTINUE))


def answer_error(listener: int, notification: Notification, error: int) -> bool:
    """Let the system call fail with the errno `error`. Returns False when the caller is gone."""
    return _answer(listener, _NOTIF_SEND, _NotifResp(notification.id, 0, -error, 0))


def answer_success(listener: int, notification: Notification) -> bool:
    """Let the system call return 0 without being carried out. Returns False when the caller is gone."""
    return _answer(listener, _NOTIF_SEND, _NotifResp(notification.id, 0, 0, 0))


def _answer(listener: int, request: int, structure: _NotifResp | _NotifAddfd) -> bool:
    try:
        fcntl.ioctl(listener, request, structure)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def _stop(number: int, argument: tuple[int, int] | None = None) -> list[bytes]:
    """Return the instructions that stop system call `number`, where `argument` is given as (index, value) only with it.

    They expect the number in the accumulator, and leave it there for every other call. The low half of an argument
    decides (these are little-endian): the kernel takes flags and commands as 32 bits, too.
    """
    notify = _return(_SECCOMP_RET_USER_NOTIF)
    if argument is None:
        return [_skip_unless_equal(number, 1), notify]
    index, value = argument
    only_with_it = [_load(_ARGS + index * 8), _skip_unless_equal(value, 1), notify, _return(_SECCOMP_RET_ALLOW)]
    return [_skip_unless_equal(number, len(only_with_it)), *only_with_it]


def _install(filter_: bytes, flags: int) -> int:
    code = ctypes.create_string_buffer(filter_)
    fprog = _SockFprog(len(filter_) // _INSTRUCTION_BYTES, ctypes.addressof(code))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    return syscall(arch.current().seccomp, _SECCOMP_SET_MODE_FILTER, flags, fprog)


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", _BPF_LD_W_ABS, 0, 0, offset)


def _skip_unless_equal(value: int, skip: int) -> bytes:
    return struct.pack("HBBI", _BPF_JEQ, 0, skip, value)


def _return(value: int) -> bytes:
    return struct.pack("HBBI", _BPF_RET, 0, 0, value)
