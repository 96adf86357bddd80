"""Capabilities: their names, and how to give them up. Sources: include/uapi/linux/capability.h, capabilities(7)."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from contextlib import suppress

from vmmback.linux import procfs
from vmmback.linux.syscall import libc

# By their numbers, from 0 on.
_NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip

IPC_LOCK = "CAP_IPC_LOCK"

# include/uapi/linux/prctl.h
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_VERSION_3 = 0x20080522
_HEADER, _SETS = struct.Struct("=Ii"), struct.Struct("=6I")  # __user_cap_header_struct, __user_cap_data_struct[2]


def names(mask: int) -> tuple[str, ...]:
    """Return the names of the capabilities in a set, in the order of their numbers; one without a name is `CAP_N`."""
    numbers = (number for number in range(mask.bit_length()) if mask >> number & 1)
    return tuple(f"CAP_{_NAMES[number]}" if number < len(_NAMES) else f"CAP_{number}" for number in numbers)


def keep(wanted: Iterable[str]) -> None:
    """Give up all capabilities but these, and what could bring more: for the calling thread and all that it will start.

    Of `wanted` it keeps what it has. As root, a program that it starts has the same ones (capabilities(7)): it is
    started with what is left of the bounding set. Raises OSError.
    """
    kept = sum(1 << _NAMES.index(name.removeprefix("CAP_")) for name in wanted)
    status = procfs.status("thread-self")
    bounding, permitted = int(status["CapBnd"], 16), int(status["CapPrm"], 16) & kept
    libc("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(bounding.bit_length()):
        if (bounding & ~kept) >> number & 1:
            with suppress(PermissionError):  # without CAP_SETPCAP; nobody gains by it after no_new_privs
                libc("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)
    low, high = permitted & 0xFFFF_FFFF, permitted >> 32
    sets = _SETS.pack(low, low, 0, high, high, 0)  # effective, permitted, inheritable
    libc("capset", ctypes.create_string_buffer(_HEADER.pack(_VERSION_3, 0)), ctypes.create_string_buffer(sets))
