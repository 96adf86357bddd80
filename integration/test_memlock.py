"""The limit on locked memory, met by a process that has no capability: another uid, RLIMIT_MEMLOCK of 8 MiB."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import MIB, ROOT, guest_file
from vmmback import ram

pytestmark = pytest.mark.usefixtures("needs_secretmem")

NOBODY = 65534

# Everything is imported as root: the interpreter may lie where another uid cannot read (in /root, for one). Leaving
# uid 0 drops all capabilities (capabilities(7)), as `setpriv --reuid` does for the program it starts.
UNPRIVILEGED = f"""
import json, os, resource, sys
from vmmback import cli, config, doctor, errors, launch, ram
from vmmback.doctor import kernel, kvm, places, programs, settings
from vmmback.linux import direct_map, memlock, procfs
import vmmback.cli.launch, vmmback.cli.lead, vmmback.guest, vmmback.isolation.audit, vmmback.isolation.residue
soft, hard = (int(limit) for limit in sys.argv[1:3])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
assert int(procfs.status("self")["CapEff"], 16) == 0
del sys.argv[1:3]
"""

ALLOCATE = """
try:
    with ram.SecretRam(int(sys.argv[1])) as memory:
        answer = ["made", resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]]
except errors.VmmbackError as error:
    answer = [type(error).__name__, error.exit_code, error.message, error.hint]
print(json.dumps(answer))
"""


def unprivileged(program: str, soft: int, hard: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED + program, str(soft), str(hard), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=30,
    )


def allocate(size: int, soft: int, hard: int) -> Any:
    result = unprivileged(ALLOCATE, soft, hard, str(size))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_more_than_the_limit_is_refused_with_the_remedy() -> None:
    kind, code, message, hint = allocate(16 * MIB, soft=8 * MIB, hard=8 * MIB)
    assert (kind, code) == ("LimitTooLow", 3)
    assert message == "RLIMIT_MEMLOCK is 8192 KiB, too small to map 16384 KiB of secret RAM"
    assert "ulimit -l 16384" in hint
    assert "LimitMEMLOCK=16777216" in hint


def test_less_than_the_limit_is_allowed() -> None:
    assert allocate(4 * MIB, soft=8 * MIB, hard=8 * MIB) == ["made", 8 * MIB]


def test_exactly_the_limit_is_allowed() -> None:
    assert allocate(8 * MIB, soft=8 * MIB, hard=8 * MIB) == ["made", 8 * MIB]


def test_the_soft_limit_is_raised_as_far_as_needed() -> None:
    """QEMU inherits it, and maps the same RAM once more, as a process of its own."""
    assert allocate(4 * MIB, soft=1 * MIB, hard=8 * MIB) == ["made", 4 * MIB]


def test_the_capability_frees_from_the_limit() -> None:
    """The twin: the same size, under the same limit, as root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (min(soft, 8 * MIB) if soft >= 0 else 8 * MIB, hard))
    try:
        with ram.SecretRam(16 * MIB) as memory:
            assert memory.size == 16 * MIB
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_what_others_locked_counts_too() -> None:
    """Another mapping of this uid's process eats half of the limit: the kernel says so at mmap(2), with EAGAIN."""
    program = "held = ram.SecretRam(4 * 1024 * 1024)\nimport mmap\nmapped = mmap.mmap(held.fileno(), held.size)\n"
    result = unprivileged(program + ALLOCATE, 8 * MIB, 8 * MIB, str(8 * MIB))
    kind, code, message, _ = json.loads(result.stdout)
    assert (kind, code) == ("LimitTooLow", 3)
    assert "RLIMIT_MEMLOCK is 8192 KiB" in message


ALLOWS = "print(json.dumps([memlock.allows(int(sys.argv[1])), resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]]))"


@pytest.mark.parametrize(
    ("soft", "hard", "answer"),
    [(8 * MIB, 8 * MIB, [True, 8 * MIB]), (1 * MIB, 8 * MIB, [True, 4 * MIB]), (1 * MIB, 2 * MIB, [False, 1 * MIB])],
    ids=["within the limit", "within the hard limit", "beyond it"],
)
def test_to_ask_raises_the_soft_limit_and_no_error(soft: int, hard: int, answer: list[object]) -> None:
    result = unprivileged(ALLOWS, soft, hard, str(4 * MIB))
    assert json.loads(result.stdout) == answer, result.stderr


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another uid may write to; pytest's own are closed to it."""
    with tempfile.TemporaryDirectory(prefix="vmmback-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.usefixtures("needs_qemu")
@pytest.mark.parametrize(
    ("size", "memory", "kib"),
    [("16MiB", "", 16 << 10), ("4MiB", 'max = "132MiB"', 132 << 10)],
    ids=["size", "what the guest may grow to"],
)
def test_launch_is_exit_code_3(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch, size: str, memory: str, kib: int
) -> None:
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(open_folder / "run"))
    file = guest_file(open_folder, size=size, memory=memory)
    for path in open_folder.iterdir():
        path.chmod(0o644)
    program = "sys.argv[0] = 'vmmback'\ncli.main()\n"
    result = unprivileged(program, 8 * MIB, 8 * MIB, "launch", str(file), "--json")
    assert (result.returncode, result.stdout) == (3, ""), result.stderr
    assert f"vmmback: error: RLIMIT_MEMLOCK is 8192 KiB, too small to map {kib} KiB of secret RAM" in result.stderr
    assert "Traceback" not in result.stderr
    assert list((open_folder / "run").iterdir()) == []
