"""What runs a libvirtd and is the parent of all that it leaves: its QEMUs, its hooks' programs. A program of its own.

libvirt's daemons and QEMUs detach from who started them. Here they come to this process (PR_SET_CHILD_SUBREAPER,
prctl(2)), which reaps them at once, as libvirt expects of a host's first process, and with which they end.

It prints a line when it is ready. A line on standard input then starts libvirtd, and is answered with its pid; the end
of the input ends all.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
_LIBVIRTD = "/usr/sbin/libvirtd"
# As systemd has it. What our own environment says must not reach hooks and emulators: on a host it does not either.
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def main() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    awake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print("ready", flush=True)
    while True:
        for ready in select.select([0, awake], [], [])[0]:
            if not os.read(ready, 4096):
                return _end_all()
            if ready == 0:
                print(_start(), flush=True)
        _reap()


def _start() -> int:
    """Start libvirtd; a session of its own, so that no terminal's signal reaches it."""
    log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawn(
        _LIBVIRTD,
        [_LIBVIRTD],
        _ENVIRONMENT,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/var/log/libvirt/stderr.log", log, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigdef=[signal.SIGPIPE],  # which Python ignores
    )


def _reap() -> bool:
    """Take the status of each child that has ended; False once there are no more children."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
        return True
    return False


def _end_all() -> None:
    """Kill all children; theirs become ours, until there are none."""
    while _reap():
        for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        select.select([], [], [], 0.002)


if __name__ == "__main__":
    main()
