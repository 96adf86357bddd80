"""The names of capabilities. Sources: include/uapi/linux/capability.h, capabilities(7)."""

from __future__ import annotations

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


def names(mask: int) -> tuple[str, ...]:
    """Return the names of the capabilities in a set, in the order of their numbers; one without a name is `CAP_N`."""
    numbers = (number for number in range(mask.bit_length()) if mask >> number & 1)
    return tuple(f"CAP_{_NAMES[number]}" if number < len(_NAMES) else f"CAP_{number}" for number in numbers)
