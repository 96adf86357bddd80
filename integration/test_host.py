"""What `vmmback host` says of this host, each figure against a second source of the kernel's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import ROOT, LiveGuest, MemoryGroup, Start, eventually
from vmmback.linux import procfs

pytestmark = pytest.mark.usefixtures("needs_qemu")

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
VMMBACK = [sys.executable, "-m", "vmmback"]
# What the rest of the machine does between one reading and the next.
SLACK = 48 * MIB


def host_json(*prefix: str) -> dict[str, Any]:
    argv = [*prefix, *VMMBACK, "host", "--json"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def output_of(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, check=True, text=True, timeout=60).stdout


def node_meminfo() -> dict[str, int]:
    """Return what sysfs says of all nodes together: another file, made by other code (drivers/base/node.c)."""
    sums: dict[str, int] = {}
    for file in Path("/sys/devices/system/node").glob("node*/meminfo"):
        for name, kib in re.findall(r"^Node \d+ (\w+): +(\d+) kB$", file.read_text(), re.MULTILINE):
            sums[name] = sums.get(name, 0) + int(kib) * 1024
    return sums


def told_by_kernel() -> dict[str, int]:
    """Return each figure of `host --json` by a source that it does not read for it."""
    nodes, vmstat = node_meminfo(), procfs.vmstat()
    blocks = re.findall(r"^Node.*zone +\w+ +(.*)$", Path("/proc/buddyinfo").read_text(), re.MULTILINE)
    return {
        "free by zones": sum(int(n) << order for row in blocks for order, n in enumerate(row.split())) * PAGE,
        # By sysinfo(2): a hypervisor's balloon may be missing in the nodes' figures, and be there in the host's.
        "free": os.sysconf("SC_AVPHYS_PAGES") * PAGE,
        "total": os.sysconf("SC_PHYS_PAGES") * PAGE,
        "unevictable": vmstat["nr_unevictable"] * PAGE,
        "mlocked": vmstat["nr_mlock"] * PAGE,
        "page_tables": nodes["PageTables"],
        "kernel_stacks": nodes["KernelStack"],
        "slab_unreclaimable": nodes["SUnreclaim"],
        "slab_reclaimable by nodes": nodes["SReclaimable"],
        "page_tables by nodes": vmstat["nr_page_table_pages"] * PAGE,
        "cache by zones": nodes["Active(file)"] + nodes["Inactive(file)"] if "Active(file)" in nodes else
        (vmstat["nr_active_file"] + vmstat["nr_inactive_file"]) * PAGE,
    }  # fmt: skip


def told_by_vmmback() -> dict[str, int]:
    found = host_json()
    zones = [zone for node in found["nodes"] for zone in node["zones"]]
    return {
        "free by zones": sum(zone["free"] for zone in zones),
        "slab_reclaimable by nodes": sum(node["slab_reclaimable"] for node in found["nodes"]),
        "page_tables by nodes": sum(node["page_tables"] for node in found["nodes"]),
        "cache by zones": sum(zone["file"] for zone in zones),
        **{name: found["memory"][name] for name in ("free", "total", "unevictable", "mlocked", "page_tables")},
        **{name: found["memory"][name] for name in ("kernel_stacks", "slab_unreclaimable")},
    }


@pytest.mark.alone
def test_memory_agrees_with_the_kernel_s_other_files() -> None:
    """The machine goes on meanwhile: of a few readings one must agree in all figures."""
    differences: dict[str, int] = {}

    def agree() -> bool:
        before, told, after = told_by_kernel(), told_by_vmmback(), told_by_kernel()
        differences.clear()
        for name, size in told.items():
            low, high = sorted((before[name], after[name]))
            if not low - SLACK <= size <= high + SLACK:
                differences[name] = size - low
        return not differences

    for _ in range(5):
        if agree():
            break
    assert differences == {}


def test_what_stays_as_it_is_agrees_to_the_byte() -> None:
    found = host_json()
    zones = {(node["number"], zone["name"]): zone for node in found["nodes"] for zone in node["zones"]}
    present = sum(zone["present"] for zone in zones.values())
    assert abs(present - sum(end - start for start, end in procfs.ram_ranges())) <= MIB
    for (node, name), zone in zones.items():
        free = zone["free_blocks"]
        assert free is not None
        assert sum(map(bool, free)) == 0 or zone["managed"] > 0, (node, name)
    use, vmstat = found["direct_map"], procfs.vmstat()
    if use["in_4k"] is not None:  # the whole of it maps all RAM, and holes between
        mapped = sum(size for name, size in use.items() if name.startswith("in_") and size)
        assert present <= mapped < present + 8 * GIB
        assert 0 <= vmstat["direct_map_level2_splits"] - use["splits_2m"] < 20_000
    assert found["memory"]["overcommit"] == int(output_of("sysctl", "-n", "vm.overcommit_memory"))
    ratio, kbytes = (int(output_of("sysctl", "-n", f"vm.overcommit_{name}")) for name in ("ratio", "kbytes"))
    limit = kbytes * 1024 or found["memory"]["total"] * ratio // 100
    swap = procfs.meminfo()["SwapTotal"]
    assert abs(found["memory"]["commit_limit"] - limit - swap) <= MIB
    soft, hard = output_of("prlimit", "--memlock", "--raw", "--noheadings", "--output", "SOFT,HARD").split()
    assert [found["locking"]["soft"], found["locking"]["hard"]] == [
        None if value in ("unlimited", str(2**64 - 1)) else int(value) for value in (soft, hard)
    ]
    capabilities = re.search(r"^CapEff:\s+(\w+)$", output_of("cat", "/proc/self/status"), re.MULTILINE)
    assert capabilities
    assert found["locking"]["cap_ipc_lock"] is bool(int(capabilities[1], 16) >> 14 & 1)


def test_a_guest_s_secret_ram_is_found_by_its_inode(guest_running: LiveGuest) -> None:
    """A second source: the supervisor's own view of its descriptor, and the report."""
    secret = host_json()["secret_ram"]
    (memory,) = guest_running.guest.ram
    name = guest_running.guest.config.name
    (file,) = [each for each in secret["files"] if each["inode"] == memory.inode]
    assert file["mapped"] == memory.size
    assert file["pids"] == [guest_running.guest.qemu.pid]
    assert file["touched"] is None  # its supervisor tells
    assert secret["guests"] == [{"name": name, "promised": memory.size, "touched": memory.size}]
    assert secret["present"] >= memory.size


@pytest.mark.alone
def test_secret_ram_is_unevictable_and_the_twin_on_ordinary_memory_is_not(
    request: pytest.FixtureRequest,
) -> None:
    for name, more in (("ordinary_guest_running", False), ("guest_running", True)):
        before = host_json()["memory"]["unevictable"]
        guest: LiveGuest = request.getfixturevalue(name)
        rise = host_json()["memory"]["unevictable"] - before
        assert (rise > guest.guest.config.memory.size // 2) is more, (name, rise)


def test_a_host_without_qemu_says_so_and_exits_with_3(start: Start, tmp_path: Path) -> None:
    ended = start("env", f"PATH={tmp_path}", *VMMBACK, "host", "--json").ended()
    assert ended.code == 3
    found = json.loads(ended.stdout)
    assert found["launch_possible"] is False
    assert "missing" in {check["state"] for check in found["checks"]}


def test_the_room_of_the_memory_cgroup_is_told_and_decides(memory_group: MemoryGroup) -> None:
    free = host_json()["secret_ram"]
    memory_group.limit(512 * MIB)
    tight = host_json(*memory_group.command([])[:4])["secret_ram"]
    assert 300 * MIB < tight["group_room"] <= 512 * MIB
    assert 200 * MIB < tight["largest_guest"] < tight["group_room"] < free["largest_guest"]


def test_metrics_are_written_as_a_whole_again_and_again_until_it_is_stopped(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "vmmback.prom"
    watching = start(*VMMBACK, "host", "--prometheus", "--output", str(file), "--watch", "--every", "100ms")
    watching.wait_until(file.exists, "the first metrics")
    first = file.stat().st_ino
    eventually(lambda: file.stat().st_ino != first, "they are written anew", 60)
    text = file.read_text()
    assert text.endswith("\n")
    assert re.search(r"^vmmback_host_largest_guest_bytes [0-9.e+]+$", text, re.MULTILINE)
    assert 'vmmback_host_node_free_bytes{node="0"}' in text
    watching.signal(signal.SIGINT)
    assert watching.ended().code == 0
    assert [path.name for path in tmp_path.glob("*.prom*")] == [file.name]
