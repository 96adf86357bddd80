"""memfd_secret(2) itself, and what a kernel without it looks like: a seccomp filter in a child answers ENOSYS."""

from __future__ import annotations

import errno
import json
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import ROOT, Start, guest_file
from vmmback.linux.memfd_secret import ENABLE, memfd_secret
from vmmback.linux.procfs import PAGE_SIZE

# Installs a filter that answers system call 447 with an errno, then does what `{then}` says.
FILTERED = """
import errno, os, sys
from pathlib import Path
from vmmback.linux import arch, seccomp
SECCOMP_RET_ERRNO = 0x00050000
seccomp._install(
    b"".join([
        seccomp._load(seccomp._NR),
        seccomp._skip_unless_equal(arch.current().memfd_secret, 1),
        seccomp._return(SECCOMP_RET_ERRNO | {errno}),
        seccomp._return(seccomp._SECCOMP_RET_ALLOW),
    ]),
    0,
)
"""

REFUSED = """
import json
from vmmback.errors import VmmbackError
from vmmback.linux.memfd_secret import memfd_secret
try:
    memfd_secret(Path(sys.argv[1]))
except VmmbackError as error:
    print(json.dumps([type(error).__name__, error.exit_code, error.message, error.hint]))
except OSError as error:
    print(json.dumps(["OSError", error.errno]))
"""


@pytest.fixture
def descriptor(needs_secretmem: None) -> Iterator[int]:
    new = memfd_secret()
    yield new
    os.close(new)


def refused(error: int, enable: Path) -> Any:
    program = FILTERED.format(errno=error) + REFUSED
    result = subprocess.run(
        [sys.executable, "-c", program, enable], stdout=subprocess.PIPE, cwd=ROOT, check=True, timeout=30
    )
    return json.loads(result.stdout)


def test_it_is_secretmem_empty_and_close_on_exec(descriptor: int) -> None:
    assert str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("/secretmem")
    assert os.fstat(descriptor).st_size == 0
    assert not os.get_inheritable(descriptor)


def test_its_size_is_set_once(descriptor: int) -> None:
    os.ftruncate(descriptor, PAGE_SIZE)
    for size in (2 * PAGE_SIZE, 0):
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            os.ftruncate(descriptor, size)


def test_it_can_be_mapped_shared_only(descriptor: int) -> None:
    os.ftruncate(descriptor, PAGE_SIZE)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        mmap.mmap(descriptor, PAGE_SIZE, flags=mmap.MAP_PRIVATE)
    with mmap.mmap(descriptor, PAGE_SIZE) as memory:
        memory[:2] = b"hi"
        assert memory[:3] == b"hi\0"


def test_no_path_opens_it_again(descriptor: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):  # secretmem has no read method either
        os.read(descriptor, 1)


def test_out_of_descriptors_is_no_unfit_host(needs_secretmem: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            memfd_secret()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_kernel_that_has_it_switched_off(tmp_path: Path) -> None:
    enable = tmp_path / "enable"
    enable.write_text("N\n")
    kind, code, message, hint = refused(errno.ENOSYS, enable)
    assert (kind, code) == ("HostUnfit", 3)
    assert "secretmem.enable=0" in message
    assert "secretmem.enable=1 to the kernel command line" in hint


def test_a_kernel_that_lacks_it(tmp_path: Path) -> None:
    kind, code, message, hint = refused(errno.ENOSYS, tmp_path / "missing")
    assert (kind, code, message) == ("HostUnfit", 3, "this kernel has no memfd_secret(2)")
    assert "CONFIG_SECRETMEM" in hint


@pytest.mark.usefixtures("needs_secretmem")
def test_a_call_that_is_filtered_on_a_kernel_that_has_it() -> None:
    """What this very test does: the parameter says that the kernel can, so the call itself must be in the way."""
    assert ENABLE.read_text() == "Y\n"
    kind, code, message, hint = refused(errno.ENOSYS, ENABLE)
    assert (kind, code) == ("HostUnfit", 3)
    assert "answers ENOSYS though secretmem.enable is set" in message
    assert "seccomp" in hint


def test_another_errno_stays_what_it_is(tmp_path: Path) -> None:
    assert refused(errno.EPERM, tmp_path / "missing") == ["OSError", errno.EPERM]


@pytest.mark.usefixtures("needs_qemu")
def test_launch_on_such_a_host_is_exit_code_3_and_never_ordinary_memory(start: Start, tmp_path: Path) -> None:
    program = FILTERED.format(errno=errno.ENOSYS) + "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    result = start(sys.executable, "-c", program, "-m", "vmmback", "launch", guest_file(tmp_path), "--json").ended()
    assert (result.code, result.stdout) == (3, "")
    assert result.has_one_error()
    assert "memfd_secret(2)" in result.stderr
    assert "vmmback: hint: " in result.stderr


@pytest.mark.usefixtures("needs_qemu")
def test_the_same_host_runs_the_control(start: Start, tmp_path: Path) -> None:
    """The twin: it is the missing call, and nothing else about the filter, that stopped the launch."""
    program = FILTERED.format(errno=errno.ENOSYS) + "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    file = guest_file(tmp_path, backing="ordinary", isolation='on-exposed = "kill"')
    result = start(sys.executable, "-c", program, "-m", "vmmback", "launch", file, "--json").ended()
    assert result.code == 5, result.stderr
