"""`vmmback host` on made-up hosts: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.test_zones import SNAPSHOTS
from vmmback import admission, doctor, overview
from vmmback.cli import commands
from vmmback.doctor import Check, places
from vmmback.doctor.finding import checked
from vmmback.errors import UsageError
from vmmback.host.budget import Budget
from vmmback.host.memory import HostMemory
from vmmback.linux import direct_map_use, fragments, procfs, zones
from vmmback.linux.secret_use import SecretFile
from vmmback.overview import Overview

MIB, GIB = 1 << 20, 1 << 30
FINE = Check("memfd_secret", "ok", "a page was had", "")
NOTED = Check("swap", "note", "swap is on", "swapoff -a")
MISSING = Check("qemu", "missing", "qemu-system-x86_64 was not found on PATH", "apt-get install qemu-system-x86")


def made_up(name: str, room: int | None = None, *, types: bool = True) -> Overview:
    root = SNAPSHOTS / name
    nodes = zones.nodes(root)
    return Overview(
        budget=Budget.of(HostMemory(nodes, 300 * MIB, room)),
        nodes=nodes,
        blocks=fragments.free_blocks(root),
        types=fragments.free_blocks_by_type(root) if types else None,
        meminfo=procfs.meminfo(root),
        secret={
            7: SecretFile(GIB, 10 * MIB, frozenset({41})),
            9: SecretFile(64 * MIB, 32 * MIB, frozenset({50, 51})),
        },
        promises={
            "demo": admission.Record(40, GIB, 724 * MIB, 0, [7]),
            "control": admission.Record(60, GIB, GIB, 0, [8], "ordinary"),  # which is no secret RAM
        },
        direct_map=direct_map_use.of(root),
        overcommit=0,
        memlock=(8 * MIB, None),
        ipc_lock=False,
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    def on(name: str, *arguments: str, checks: tuple[Check, ...] = (FINE, NOTED), room: int | None = None) -> Result:
        monkeypatch.setattr(overview, "read", lambda *, types: made_up(name, room, types=types))
        monkeypatch.setattr(doctor, "examine", lambda: checks)
        return CliRunner().invoke(commands, ["host", *arguments])

    return on


def test_people_read_first_what_it_can_give_and_why(run: Any) -> None:
    result = run("four-nodes-256g")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "This host can give 119,203 MiB of secret RAM to one more guest."
    for text in ("node 3", "node 3 Movable", "movable alone", "demo", "300 MiB", "swap is on", "swapoff -a"):
        assert text in result.stdout, text
    assert "secret RAM present  756 MiB" in result.stdout
    assert max(map(len, lines)) <= 110


def test_a_launch_that_would_fail_is_the_second_line_and_the_exit_code(run: Any) -> None:
    result = run("plain-1g", checks=(FINE, MISSING))
    assert result.exit_code == 3
    assert result.stdout.splitlines()[1] == "A launch would fail: qemu"
    assert "apt-get install qemu-system-x86" in result.stdout


def test_a_host_without_memory_for_any_guest_says_so_by_the_exit_code_of_admission(run: Any) -> None:
    result = run("plain-1g", room=0)
    assert result.exit_code == 4
    assert result.stdout.splitlines()[1] == "A launch would be refused: no memory is left for a guest"
    assert json.loads(run("plain-1g", "--json", room=0).stdout)["launch_possible"] is False
    assert run("plain-1g", room=0, checks=(MISSING,)).exit_code == 3


def test_a_limit_on_locked_memory_that_a_guest_meets_first_is_said_at_once(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "RLIMIT_MEMLOCK lets a guest of this user have at most 8 MiB of it."
    assert told not in run("large-64g").stdout
    limited = made_up("large-64g")._replace(memlock=(MIB, 8 * MIB))
    for held, found in ((limited, True), (limited._replace(ipc_lock=True), False)):
        run("large-64g")
        monkeypatch.setattr(overview, "read", lambda held=held, **_: held)
        shown = CliRunner().invoke(commands, ["host"]).stdout.splitlines()
        assert (shown[1] == told) is found


def test_json_has_it_all_in_bytes(run: Any) -> None:
    result = run("movable-1g", "--json", "--types", checks=(FINE, MISSING), room=100 * MIB)
    found = json.loads(result.stdout)
    assert result.exit_code == 3
    assert found["launch_possible"] is False
    assert found["checks"][1]["remedy"] == MISSING.remedy
    secret = found["secret_ram"]
    assert (secret["promised"], secret["group_room"], secret["present"]) == (300 * MIB, 100 * MIB, 756 * MIB)
    assert secret["guests"] == [
        {"name": "control", "promised": GIB, "touched": GIB},
        {"name": "demo", "promised": GIB, "touched": 724 * MIB},
    ]
    assert secret["files"][1] == {"inode": 9, "mapped": 64 * MIB, "touched": 32 * MIB, "pids": [50, 51]}
    (node,) = found["nodes"]
    movable = node["zones"][2]
    assert (movable["name"], movable["free_blocks_by_type"]["Movable"][-1]) == ("Movable", 169)
    assert found["memory"]["total"] == procfs.meminfo(SNAPSHOTS / "movable-1g")["MemTotal"]
    assert found["direct_map"]["in_4k"] == procfs.meminfo(SNAPSHOTS / "movable-1g")["DirectMap4k"]
    assert found["locking"] == {"soft": 8 * MIB, "hard": None, "cap_ipc_lock": False}


def test_free_memory_by_type_is_read_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel locks zones for it, and takes long where free memory is in small pieces."""
    read = []
    monkeypatch.setattr(doctor, "examine", lambda: (FINE,))
    monkeypatch.setattr(fragments, "free_blocks_by_type", lambda: read.append("once"))
    for arguments, times in (([], 0), (["--prometheus"], 0), (["--json"], 0), (["--json", "--types"], 1)):
        read.clear()
        assert CliRunner().invoke(commands, ["host", *arguments]).exit_code in (0, 4)
        assert len(read) == times, arguments


def test_metrics_have_each_node_and_each_check(run: Any) -> None:
    text = run("two-nodes-movable-2g", "--prometheus", checks=(FINE, MISSING)).stdout
    assert 'vmmback_host_check{check="qemu",state="missing"} 1.0' in text
    for node in "01":
        assert f'vmmback_host_node_movable_bytes{{node="{node}"}}' in text
    assert "# HELP vmmback_host_promised_bytes " in text
    (promised,) = re.findall(r"^vmmback_host_promised_bytes (\S+)$", text, re.MULTILINE)
    assert float(promised) == 300 * MIB
    assert 'vmmback_host_direct_map_bytes{pages="huge"}' in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "--prometheus"], "two formats"),
        (["--every", "2s"], "write --watch, too"),
        (["--watch", "--every", "2"], "--every: "),
    ],
)
def test_options_that_make_no_sense_are_refused(run: Any, arguments: list[str], message: str) -> None:
    result = run("plain-1g", *arguments)
    assert message in f"{result.exception} {getattr(result.exception, 'hint', '')}"


def test_a_file_is_written_as_a_whole(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    result = run("plain-1g", "--json", "--output", str(file))
    assert (result.stdout, result.exit_code) == ("", 0)
    assert json.loads(file.read_text())["launch_possible"] is True


@pytest.mark.parametrize("place", ["missing/host.json", ".", "pipe"])
def test_a_place_that_no_file_can_take_is_refused_and_stays_as_it_is(run: Any, tmp_path: Path, place: str) -> None:
    """A device would be replaced: as root, /dev/null itself."""
    os.mkfifo(tmp_path / "pipe")
    result = run("plain-1g", "--output", str(tmp_path / place))
    assert isinstance(result.exception, UsageError)
    assert "--output" in result.exception.message
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_runtime_folder_that_cannot_be_used_is_a_check_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: (checked("runtime-folder", places.runtime_folder),))
    (tmp_path / "others").mkdir()
    (tmp_path / "others").chmod(0o777)
    for folder in ("relative", str(tmp_path / "others")):
        monkeypatch.setenv("VMMBACK_RUNTIME_DIR", folder)
        result = CliRunner().invoke(commands, ["host", "--json"])
        found = json.loads(result.stdout)
        assert "runtime-folder" in [check["name"] for check in found["checks"] if check["state"] == "missing"]
        assert (result.exit_code, found["secret_ram"]["guests"]) == (3, [])
