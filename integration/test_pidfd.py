"""pidfd_getfd(2): the way out that secret RAM does not close, for who may ptrace; and who may not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.conftest import ROOT
from vmmback import ram
from vmmback.linux.pidfd import pidfd_getfd

# As uid 65534, without capabilities: tries to copy descriptor 0 of a process, and prints the errno's name.
AS_NOBODY = """
import errno, os, sys
from vmmback.linux.pidfd import pidfd_getfd
pidfd = os.pidfd_open(int(sys.argv[1]))
os.setresuid(65534, 65534, 65534)
try:
    pidfd_getfd(pidfd, 0)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@contextmanager
def holder(*descriptors: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that holds `descriptors`, under the same numbers, until it is killed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=descriptors) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def pidfd_of(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_it_copies_the_descriptor_of_secret_ram(secret_ram: ram.Ram) -> None:
    with holder(secret_ram.fileno()) as process, pidfd_of(process.pid) as pidfd:
        copy = pidfd_getfd(pidfd, secret_ram.fileno())
        assert os.fstat(copy).st_ino == secret_ram.inode
        assert str(Path(f"/proc/self/fd/{copy}").readlink()).startswith("/secretmem")
        assert not os.get_inheritable(copy)
        os.close(copy)


def test_a_descriptor_that_is_not_there() -> None:
    refused = pytest.raises(OSError, match=os.strerror(errno.EBADF))
    with holder() as process, pidfd_of(process.pid) as pidfd, refused:
        pidfd_getfd(pidfd, 9999)


def test_a_process_that_has_ended() -> None:
    with holder() as process, pidfd_of(process.pid) as pidfd:
        process.kill()
        process.wait()
        with pytest.raises(OSError, match=os.strerror(errno.ESRCH)):
            pidfd_getfd(pidfd, 0)


def test_another_uid_without_capabilities_gets_nothing() -> None:
    with holder() as process:
        result = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(process.pid)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            check=True,
            timeout=30,
        )
    assert result.stdout == b"EPERM\n"
