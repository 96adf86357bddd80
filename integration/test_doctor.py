"""The doctor on the real kernel: what it says of this host, and what a launch then does, agree."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import MIB, ROOT, children, eventually, guest_file, open_descriptors
from integration.test_memlock import unprivileged
from vmmback import doctor
from vmmback.doctor import Check, places
from vmmback.linux import memlock, procfs

pytestmark = pytest.mark.usefixtures("needs_secretmem", "needs_qemu")

LAUNCH = [sys.executable, "-m", "vmmback", "launch", "--no-validate"]


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another uid may write to; pytest's own are closed to it."""
    with tempfile.TemporaryDirectory(prefix="vmmback-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.usefixtures("needs_direct_map")
def test_a_host_that_can_do_it_misses_nothing() -> None:
    """The other tests of this folder launch guests here; what they need the doctor tries as well."""
    checks = by_name(doctor.examine())
    assert [check for check in checks.values() if check.state == "missing"] == []
    assert not doctor.would_fail(checks.values())
    tried = ("secret-memory", "locked-memory", "seccomp-notification", "jail", "uids", "direct-map", "qemu", "programs")
    assert {name: checks[name].state for name in tried} == dict.fromkeys(tried, "ok")


def test_nothing_is_changed_or_left() -> None:
    def host() -> object:
        return (
            open_descriptors(),
            children(),
            [line for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[1] == "/proc"],
            places._TAP in Path("/proc/net/dev").read_text(),
        )

    threads = set(procfs.threads(os.getpid()))  # pytest-xdist has some of its own

    def alone() -> bool:  # a thread is there for a moment after it was joined
        return set(procfs.threads(os.getpid())) <= threads

    def rights() -> object:
        limits = [resource.getrlimit(limit) for limit in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE)]
        return limits, {key: procfs.status("self").get(key) for key in ("Seccomp_filters", "CapEff", "VmLck")}

    rights_before = rights()
    doctor.examine()  # imports what it needs
    eventually(alone, "the threads have ended", timeout_s=30)
    before = host()
    doctor.examine()
    eventually(alone, "the threads have ended", timeout_s=30)
    assert host() == before
    assert rights() == rights_before


def test_without_qemu_it_is_missing_and_the_launch_fails(
    tmp_path: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = guest_file(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = doctor.examine()
    assert by_name(checks)["qemu"].state == "missing"
    assert doctor.would_fail(checks)
    launched = subprocess.run([*LAUNCH, file], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert launched.returncode == 3
    assert by_name(checks)["qemu"].evidence in launched.stderr


EXAMINE = """
checks = {check.name: check for check in doctor.examine()}
print(json.dumps([checks["locked-memory"].state, doctor.would_fail(checks.values()), checks["locked-memory"].evidence]))
"""
START = """
import asyncio, contextlib
from pathlib import Path
from vmmback.guest import SilentWatcher
async def start():
    async with contextlib.AsyncExitStack() as stack:
        await launch.prepare(config.load(Path(sys.argv[1])), SilentWatcher(), stack)
try:
    asyncio.run(start())
except errors.VmmbackError as error:
    sys.exit(f"{error.exit_code} {error.message}")
"""


@pytest.mark.parametrize(("limit", "state", "size"), [(MIB // 2, "missing", "1MiB"), (8 * MIB, "note", "4MiB")])
def test_a_limit_on_locked_memory_and_a_launch_agree(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int, state: str, size: str
) -> None:
    """Of a process without capabilities: below the smallest guest none can be launched, above it a small one can."""
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(open_folder / "run"))
    told = unprivileged(EXAMINE, limit, limit)
    assert told.returncode == 0, told.stderr
    seen, would_fail, evidence = json.loads(told.stdout)
    assert (seen, would_fail) == (state, state == "missing")
    assert f"at most {limit >> 10} KiB" in evidence
    file = guest_file(open_folder, size=size, memory="prefault = false")  # by a program that may be closed to others
    for path in open_folder.iterdir():
        path.chmod(0o644)
    launched = unprivileged(START, limit, limit, str(file))
    if state == "missing":
        assert launched.stderr.startswith("3 RLIMIT_MEMLOCK is 512 KiB"), launched.stderr
    else:
        assert (launched.returncode, launched.stderr) == (0, "")


def test_what_may_be_locked_is_what_a_launch_would_be_allowed() -> None:
    """memlock.most() looks, memlock.allows() raises the limit: on either side of the most."""
    program = "import os\nprint(json.dumps([memlock.most(), memlock.allows(4 << 20), memlock.allows((4 << 20) + 1)]))"
    told = unprivileged(program, MIB, 4 * MIB)
    assert json.loads(told.stdout) == [4 * MIB, True, False], told.stderr
    assert memlock.most() is None
