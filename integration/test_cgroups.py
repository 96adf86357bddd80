"""Who pays for a guest's RAM: the memory cgroup of its file, or its supervisor's own. On the kernel's own controller.

What version 2 makes of it is tried in test_debian_kernel.py, as this machine may have version 1.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import (
    MIB,
    MemoryGroup,
    Start,
    eventually,
    guest_file,
    prepared,
    processes_of,
    qemu_of,
)
from vmmback import grow, handoff, ram
from vmmback.errors import AdmissionRefused, HostUnfit
from vmmback.isolation import owner
from vmmback.linux import cgroups
from vmmback.linux.procfs import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("needs_qemu")

GUEST = 32 * MIB
# Pages wait for their list in batches of each processor's (mm/swap.c, folio_batch), and are not counted meanwhile.
BATCHES = 2 * MIB


@pytest.fixture
def bystander(memory_group: MemoryGroup) -> Iterator[int]:
    """A process in the group that uses some memory, as another guest's QEMU would."""
    program = "import sys; data = b'x' * (8 << 20); print(len(data), flush=True); sys.stdin.read()"
    command = memory_group.command([sys.executable, "-I", "-S", "-c", program])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        yield process.pid
        process.kill()


def path_of(group: MemoryGroup) -> str:
    """Return a group's path as the kernel tells it of a process in it."""
    told = subprocess.run(group.command(["cat", "/proc/self/cgroup"]), capture_output=True, text=True, check=True)
    lines = [line.split(":", 2) for line in told.stdout.splitlines()]
    return next(path for _, controllers, path in sorted(lines, reverse=True) if controllers in {"memory", ""})


def out_of_memory(group: MemoryGroup) -> int:
    """Return how many processes the group's OOM killer has ended."""
    name = "memory.oom_control" if (group.folder / "memory.oom_control").exists() else "memory.events"
    return int(dict(line.split() for line in (group.folder / name).read_text().splitlines())["oom_kill"])


# --- Who pays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("configured", "prefault"), [(True, "true"), (True, "false"), (False, "true")])
def test_the_group_of_the_file_pays_for_all_of_the_ram_else_the_supervisors_own(
    start: Start, tmp_path: Path, runtime_dir: Path, memory_group: MemoryGroup, other_group: MemoryGroup,
    configured: bool, prefault: str,
) -> None:  # fmt: skip
    """Without a prefault it is QEMU that touches first: the tiny guest fills its RAM."""
    path = path_of(memory_group)
    file = guest_file(
        tmp_path, size="32MiB", memory=f"prefault = {prefault}", process=f'cgroup = "{path}"' * configured
    )
    running = start(*other_group.command([sys.executable, "-m", "vmmback", "launch", file, "--json"]))
    running.wait_until(lambda: "is isolated while it runs" in running.stderr, "it is validated", 60)
    payer, other = (memory_group, other_group) if configured else (other_group, memory_group)
    assert GUEST - BATCHES <= payer.secret() <= GUEST
    assert payer.used() >= GUEST
    assert other.secret() == 0

    (qemu,) = qemu_of(runtime_dir)
    threads = {line for task in Path(f"/proc/{qemu}/task").iterdir() for line in _memory_lines(task / "cgroup")}
    assert threads == {path if configured else path_of(other_group)}
    assert _memory_lines(Path(f"/proc/{running.process.pid}/cgroup")) == [path_of(other_group)]

    assert start(sys.executable, "-m", "vmmback", "stop", "--kill", file.stem).ended().code == 0
    ended = running.ended(60)
    assert json.loads(ended.stdout)["process"]["cgroup"] == (path if configured else "")
    eventually(lambda: payer.secret() == 0, "all of it is given back", 30)


def _memory_lines(file: Path) -> list[str]:
    lines = [line.split(":", 2) for line in file.read_text().splitlines()]
    ordered = sorted((line for line in lines if line[1] in {"memory", ""}), reverse=True)
    return [path for _, _, path in ordered[:1]]


def test_a_guest_grows_within_its_group_and_no_further(tmp_path: Path, memory_group: MemoryGroup) -> None:
    path = path_of(memory_group)
    with prepared(guest_file(tmp_path, memory='max = "144MiB"', process=f'cgroup = "{path}"')) as live:
        live.start()
        assert owner.observe(live.pid).cgroup == path
        memory_group.limit(memory_group.used() + 64 * MIB)
        with pytest.raises(AdmissionRefused):
            live.run(grow.grow(live.guest, 128 * MIB, lambda *_: None))
        assert live.run(live.guest.monitor.execute("query-status"))["status"] == "running"

        memory_group.limit(512 * MIB)
        live.run(grow.grow(live.guest, 128 * MIB, lambda *_: None))
        assert memory_group.secret() >= 144 * MIB - BATCHES


# --- Limits -----------------------------------------------------------------------------------------------------------

PREFAULT = """
import asyncio, json, sys
from pathlib import Path
from vmmback import errors, ram
try:
    with ram.allocate("secret", int(sys.argv[2])) as memory:
        asyncio.run(memory.prefault(lambda _: None, group=Path(sys.argv[1])))
    print(json.dumps(["done"]))
except errors.VmmbackError as error:
    print(json.dumps([error.exit_code, error.message, error.hint]))
"""


def prefaulted(start: Start, group: MemoryGroup, size: int) -> Any:
    """Prefault so much secret RAM that the group pays for, by a supervisor outside of it, and return what that said."""
    ended = start(sys.executable, "-c", PREFAULT, group.folder, str(size)).ended(60)
    assert ended.code == 0, f"the supervisor itself died: {ended}"
    return json.loads(ended.stdout)


def test_out_of_memory_the_worker_alone_is_ended(
    start: Start, memory_group: MemoryGroup, bystander: int, runtime_dir: Path
) -> None:
    memory_group.limit(64 * MIB)
    code, message, hint = prefaulted(start, memory_group, 128 * MIB)
    assert code == 4
    assert "the OOM killer ended the prefault" in message
    assert hint.endswith(f"or raise the memory limit of the cgroup {memory_group.folder}")
    assert out_of_memory(memory_group) == 1
    assert (memory_group.folder / "cgroup.procs").read_text().split() == [str(bystander)]
    eventually(lambda: memory_group.secret() == 0, "memory is back", 30)
    assert processes_of(runtime_dir).keys() == {bystander}

    memory_group.limit(256 * MIB)  # the twin: it was the limit
    assert prefaulted(start, memory_group, 128 * MIB) == ["done"]
    assert out_of_memory(memory_group) == 1


def test_a_launch_that_is_too_large_for_its_group_is_refused(tmp_path: Path, memory_group: MemoryGroup) -> None:
    memory_group.limit(120 * MIB)
    file = guest_file(tmp_path, size="32MiB", process=f'cgroup = "{path_of(memory_group)}"')
    refused = r"^32 MiB of secret RAM do not fit: .* memory cgroup has room for (119|120) MiB"
    with pytest.raises(AdmissionRefused, match=refused), prepared(file):
        pass
    assert memory_group.used() < MIB
    assert out_of_memory(memory_group) == 0
    memory_group.limit(150 * MIB)
    with prepared(file):
        assert memory_group.secret() >= 32 * MIB - BATCHES


def test_the_room_is_there_also_where_file_cache_is_in_it(
    start: Start, tmp_path: Path, memory_group: MemoryGroup
) -> None:
    file = tmp_path / "data"
    with file.open("wb") as written:
        written.write(bytes(96 * MIB))
        os.fsync(written.fileno())
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else who wrote it pays
    memory_group.limit(128 * MIB)
    subprocess.run(memory_group.command(["cat", file]), stdout=subprocess.DEVNULL, check=True)
    group = cgroups.named(path_of(memory_group))
    assert group.usage
    if group.reclaimable < 64 * MIB:
        pytest.skip("pages of files in this folder cannot be dropped: no disk is behind it")
    assert group.limit == 128 * MIB
    assert group.usage >= 96 * MIB
    assert group.room
    assert 96 * MIB < group.room <= 128 * MIB
    tables = 4 * MIB  # page tables and stacks of the worker, which the group pays for as well
    assert prefaulted(start, memory_group, (group.room - tables) // PAGE_SIZE * PAGE_SIZE) == ["done"]
    assert out_of_memory(memory_group) == 0


def test_a_process_is_found_in_its_group(memory_group: MemoryGroup, bystander: int) -> None:
    memory_group.limit(64 * MIB)
    group = cgroups.of(bystander)
    assert group
    assert (group.path, group.folder, group.limit) == (path_of(memory_group), memory_group.folder, 64 * MIB)
    assert group.usage
    assert group.usage >= 8 * MIB
    assert group.room
    assert 48 * MIB <= group.room <= 56 * MIB


# --- What cannot be ---------------------------------------------------------------------------------------------------


def test_a_group_that_there_is_not_is_named_with_its_folder(tmp_path: Path, memory_group: MemoryGroup) -> None:
    path, gone = f"{path_of(memory_group)}/gone", memory_group.folder / "gone"
    with pytest.raises(HostUnfit) as refused, prepared(guest_file(tmp_path, process=f'cgroup = "{path}"')):
        pass
    assert refused.value.message == f"process.cgroup: there is no group {path}: {gone} does not exist"
    assert f"mkdir {gone};" in refused.value.hint


def test_a_group_that_is_mounted_read_only_is_refused_before_anything_is_made(
    start: Start, tmp_path: Path, memory_group: MemoryGroup
) -> None:
    """As a systemd unit with ProtectControlGroups=yes sees it."""
    file = guest_file(tmp_path, process=f'cgroup = "{path_of(memory_group)}"')
    command = 'mount -o remount,bind,ro "$0" && exec "$@"'
    mount = memory_group.folder.parent
    words = [sys.executable, "-m", "vmmback", "launch", file]
    ended = start("unshare", "--mount", "sh", "-c", command, mount, *words).ended()
    assert ended.code == 3
    assert f"{memory_group.folder}/cgroup.procs: Read-only file system" in ended.stderr
    assert "ProtectControlGroups=no" in ended.stderr


@pytest.fixture
def closed_group(tmp_path: Path) -> Path:
    """What can be opened like a group, and then refuses whoever is written to it."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/cgroup.procs").symlink_to("/dev/full")
    return tmp_path / "closed"


def test_a_worker_that_cannot_join_touches_nothing(secret_ram: ram.Ram, closed_group: Path) -> None:
    with pytest.raises(HostUnfit, match=r"^process.cgroup: no process can be put into it: .*No space left on device"):
        asyncio.run(secret_ram.prefault(lambda _: pytest.fail("a page was touched"), group=closed_group))


def test_a_qemu_that_cannot_join_is_ended(tmp_path: Path, closed_group: Path) -> None:
    async def begin() -> None:
        async with handoff.start(["sleep", "60"], {}, [], tmp_path / "log", group=closed_group):
            pytest.fail("it runs")

    with pytest.raises(HostUnfit, match=r"^process.cgroup: no process can be put into it"):
        asyncio.run(begin())
