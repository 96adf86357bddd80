"""Admission across supervisors that are real processes."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration.conftest import ROOT, Start, eventually, guest_file, processes_of
from vmmback import admission, ram
from vmmback.host.budget import Budget
from vmmback.host.memory import HostMemory
from vmmback.linux import secret_use
from vmmback.linux.secret_use import SecretFile

pytestmark = pytest.mark.usefixtures("needs_qemu")

WAIT_S = 60.0

# One supervisor's part, with the time between its reading and its promise made long enough for others to read, too.
ADMITS = """
import asyncio, sys, time
from vmmback import admission, runtime
from vmmback.errors import AdmissionRefused
from vmmback.host.memory import HostMemory
read = HostMemory.read
def slow(*arguments):
    memory = read(*arguments)
    time.sleep(0.5)
    return memory
HostMemory.read = slow
with runtime.guest_folder(sys.argv[1]) as folder:
    try:
        asyncio.run(admission.admit(folder, int(sys.argv[2]), "secret"))
        print("admitted", flush=True)
    except AdmissionRefused:
        print("refused", flush=True)
    sys.stdin.read()
"""


def large_guest(folder: Path) -> Path:
    """Write the file of a guest whose twin has no room beside it; it touches next to nothing of its RAM."""
    fits = Budget.of(HostMemory.read(admission.promised())).largest_guest()
    return guest_file(folder, size=f"{fits * 6 // 10 >> 20}MiB", memory="prefault = false")


def test_secret_ram_is_counted_as_the_kernel_has_it(secret_ram: ram.Ram) -> None:
    assert secret_ram.inode not in secret_use.secret_files()
    with mmap.mmap(secret_ram.fileno(), secret_ram.size) as mapped:
        mapped[: 1 << 20] = bytes(1 << 20)
        found = secret_use.secret_files()[secret_ram.inode]
    assert found == SecretFile(secret_ram.size, 1 << 20, frozenset({os.getpid()}))


def test_two_supervisors_at_once_do_not_both_get_the_last_of_it(runtime_dir: Path) -> None:
    size = Budget.of(HostMemory.read(admission.promised())).largest_guest() * 6 // 10
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", ADMITS, name, str(size)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                )
            )
            for name in ("a", "b")
        ]  # fmt: skip
        said = [each.stdout.readline().strip() for each in both if each.stdout]
    assert sorted(said) == ["admitted", "refused"]


@pytest.mark.alone  # what it is promised is most of the host, and no memory cgroup of another test has room beside it
def test_launches_at_once_do_not_all_get_the_last_of_it_and_a_crash_gives_it_back(
    tmp_path: Path, runtime_dir: Path, vmmback: Start
) -> None:
    files = [large_guest(tmp_path) for _ in range(4)]
    started = [vmmback("launch", "--detach", "--no-validate", file) for file in files]
    at_once = [each.ended(WAIT_S) for each in started]
    assert sorted(ended.code for ended in at_once) == [0, 4, 4, 4], [ended.stderr for ended in at_once]
    untouched = admission.promised()
    for ended in at_once:
        if ended.code == 4:
            assert ended.has_one_error()
            told = int(ended.stderr.rpartition(" MiB were promised")[0].rpartition(" ")[2].replace(",", "")) << 20
            assert told > untouched * 0.9

    name = next(file.stem for file, ended in zip(files, at_once, strict=True) if ended.code == 0)
    pids = processes_of(runtime_dir)
    os.kill(next(pid for pid, line in pids.items() if "launch" in line), signal.SIGKILL)
    eventually(lambda: not (runtime_dir / name).exists(), "the crashed guest's folder is gone", WAIT_S)
    again = vmmback("launch", "--detach", "--no-validate", files[0])
    assert again.ended(WAIT_S).code == 0
    assert vmmback("stop", "--kill", files[0].stem).ended(WAIT_S).code == 0
