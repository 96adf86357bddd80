"""process_vm_readv(2) on a process of our own making: ordinary memory is read, secret memory never."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from integration.conftest import ROOT, Backing
from vmmback.linux import process_vm
from vmmback.linux.procfs import PAGE_SIZE

# Maps two pages, of which the second can't be read, fills the first, and prints its address.
VICTIM = """
import ctypes, mmap, os, sys
from vmmback import ram
with ram.allocate(sys.argv[1], 2 * 4096) as memory, mmap.mmap(memory.fileno(), 2 * 4096) as view:
    view[:4096] = b"canary--" * 512
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(address + 4096), ctypes.c_size_t(4096), 0) == 0
    print(address, flush=True)
    sys.stdin.read()
    os._exit(0)
"""

AS_NOBODY = """
import errno, os, sys
from vmmback.linux import process_vm
os.setresuid(65534, 65534, 65534)
try:
    process_vm.read(int(sys.argv[1]), int(sys.argv[2]), 8)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@contextmanager
def victim(backing: Backing) -> Iterator[tuple[int, int]]:
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, backing], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


def test_secret_memory_cannot_be_read_and_ordinary_memory_can(backing: Backing) -> None:
    with victim(backing) as (pid, address):
        if backing == "ordinary":
            assert process_vm.read(pid, address, 16) == b"canary--" * 2
        else:
            with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
                process_vm.read(pid, address, 16)


def test_a_read_ends_before_the_first_page_out_of_reach() -> None:
    with victim("ordinary") as (pid, address):
        assert process_vm.read(pid, address + PAGE_SIZE - 8, 100) == b"canary--"
        with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
            process_vm.read(pid, address + PAGE_SIZE, 8)


def test_a_process_that_has_ended() -> None:
    with victim("ordinary") as (pid, address):
        pass
    with pytest.raises(OSError, match=os.strerror(errno.ESRCH)):
        process_vm.read(pid, address, 8)


def test_another_uid_without_capabilities_reads_nothing() -> None:
    with victim("ordinary") as (pid, address):
        result = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(pid), str(address)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            check=True,
            timeout=30,
        )
    assert result.stdout == b"EPERM\n"
