"""Memory cgroups read from made-up trees: both versions, both at once, namespaces, limits within limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmback.errors import HostUnfit
from vmmback.linux import cgroups

MIB = 1 << 20
NO_LIMIT = 9223372036854771712  # what version 1 shows with pages of 4 KiB

# Lines of this shape, of other mounts too, are in proc_pid_mountinfo(5).
OTHERS = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n24 22 0:22 / /sys rw shared:2 - sysfs sysfs rw\n"
V2 = OTHERS + "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
V1 = (
    OTHERS + "31 24 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


def tree(root: Path, mountinfo: str, cgroup: str, files: dict[str, str | int]) -> Path:
    """Make a host: its mounts, the groups of process 7, which is our own, and files below /sys/fs/cgroup."""
    for pid in ("7", "self"):
        (root / f"proc/{pid}").mkdir(parents=True)
        (root / f"proc/{pid}/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def v2(group: str, limit: int | str, usage: int, high: int | str = "max", **stat: int) -> dict[str, str | int]:
    lines = "\n".join(f"{name} {value}" for name, value in {"anon": 5, **stat}.items())
    return {
        f"{group}/memory.max": limit, f"{group}/memory.high": high, f"{group}/memory.current": usage,
        f"{group}/memory.stat": lines,
    }  # fmt: skip


def v1(group: str, limit: int, usage: int, swap: tuple[int, int] | None = None, **stat: int) -> dict[str, str | int]:
    files: dict[str, str | int] = {
        f"{group}/memory.limit_in_bytes": limit, f"{group}/memory.usage_in_bytes": usage,
        f"{group}/memory.stat": "\n".join(f"{name} {value}" for name, value in {"cache": 9 * MIB, **stat}.items()),
    }  # fmt: skip
    if swap:
        files[f"{group}/memory.memsw.limit_in_bytes"], files[f"{group}/memory.memsw.usage_in_bytes"] = swap
    return files


ROOT_OF_V2: dict[str, str | int] = {"cgroup.controllers": "cpuset cpu io memory pids", "memory.stat": "anon 1"}


def test_version_2_with_limits_within_limits(tmp_path: Path) -> None:
    files = {
        **ROOT_OF_V2,
        **v2("machine", 1000 * MIB, 900 * MIB),
        **v2("machine/a", "max", 500 * MIB),
        **v2("machine/a/demo", 400 * MIB, 100 * MIB, 350 * MIB),
    }
    root = tree(tmp_path, V2, "0::/machine/a/demo\n", files)
    group = cgroups.of(7, root)
    assert group == cgroups.MemoryCgroup(
        path="/machine/a/demo",
        folder=root / "sys/fs/cgroup/machine/a/demo",
        version=2,
        limit=400 * MIB,
        high=350 * MIB,
        usage=100 * MIB,
        reclaimable=0,
        room=100 * MIB,  # which is left at the top, while 300 MiB are by its own limit
    )
    assert cgroups.room(None, root) == 100 * MIB
    above = cgroups.named("/machine/a", root)
    assert (above.limit, above.high, above.room) == (None, None, 100 * MIB)


def test_what_would_be_held_up_does_not_fit(tmp_path: Path) -> None:
    files = {**ROOT_OF_V2, **v2("a", "max", 50 * MIB, 80 * MIB), **v2("a/b", 60 * MIB, 0)}
    assert cgroups.room("/a/b", tree(tmp_path, V2, "0::/\n", files)) == 30 * MIB


def test_where_nothing_limits_there_is_no_figure(tmp_path: Path) -> None:
    root = tree(tmp_path, V2, "0::/a\n", {**ROOT_OF_V2, **v2("a", "max", 500 * MIB)})
    assert cgroups.room(None, root) is None
    top = tree(tmp_path / "root", V2, "0::/\n", ROOT_OF_V2)
    group = cgroups.of("self", top)
    assert group
    assert (group.path, group.limit, group.usage, group.room) == ("/", None, None, None)


def test_a_group_that_is_over_its_limit_has_no_room(tmp_path: Path) -> None:
    root = tree(tmp_path, V2, "0::/a\n", {**ROOT_OF_V2, **v2("a", 0, 5 * MIB)})
    assert cgroups.room(None, root) == 0


def test_file_cache_makes_room_as_far_as_it_surely_can(tmp_path: Path) -> None:
    """`file` has secret and shared memory in it, too."""
    stat = {"file": 90 * MIB, "inactive_file": 40 * MIB, "active_file": 20 * MIB, "file_dirty": 7 * MIB}
    files = v2("a", 100 * MIB, 95 * MIB, **stat, file_writeback=MIB, unevictable=30 * MIB)
    group = cgroups.of("self", tree(tmp_path, V2, "0::/a\n", {**ROOT_OF_V2, **files}))
    assert group
    assert (group.reclaimable, group.room) == (42 * MIB, 47 * MIB)


def test_version_1(tmp_path: Path) -> None:
    stat = {"inactive_file": 90 * MIB, "total_inactive_file": 4 * MIB, "total_active_file": 2 * MIB, "total_dirty": MIB}
    files = {
        **v1("memory", NO_LIMIT, 4000 * MIB),
        **v1("memory/machine", NO_LIMIT, 2000 * MIB),
        **v1("memory/machine/demo", 300 * MIB, 100 * MIB, None, **stat, total_writeback=MIB),
    }
    root = tree(tmp_path, V1, "5:devices:/\n4:cpu,memory:/machine/demo\n1:name=systemd:/\n", files)
    assert cgroups.of(7, root) == cgroups.MemoryCgroup(
        path="/machine/demo",
        folder=root / "sys/fs/cgroup/memory/machine/demo",
        version=1,
        limit=300 * MIB,
        high=None,
        usage=100 * MIB,
        reclaimable=3 * MIB,
        room=203 * MIB,
    )
    assert cgroups.room("/machine", root) is None


def test_version_1_counts_what_is_swapped_out_against_a_limit_of_its_own(tmp_path: Path) -> None:
    files = v1("memory/demo", 300 * MIB, 100 * MIB, (310 * MIB, 150 * MIB))
    assert cgroups.room(None, tree(tmp_path, V1, "4:memory:/demo\n", files)) == 160 * MIB


def test_a_hybrid_host_has_the_controller_in_version_1(tmp_path: Path) -> None:
    files = {
        **v1("memory/demo", 300 * MIB, 100 * MIB),
        "unified/cgroup.controllers": "hugetlb",
        "unified/demo/cgroup.procs": "",
    }
    root = tree(tmp_path, HYBRID, "4:memory:/demo\n0::/other\n", files)
    group = cgroups.named("/demo", root)
    assert (group.version, group.folder) == (1, root / "sys/fs/cgroup/memory/demo")
    assert cgroups.path_of(7, root=root) == "/demo"


def test_a_hybrid_host_may_have_it_in_version_2(tmp_path: Path) -> None:
    mounts = HYBRID.replace("cgroup rw,memory", "cgroup rw,freezer")
    files = {"unified/cgroup.controllers": "memory", **v2("unified/demo", 300 * MIB, 100 * MIB)}
    root = tree(tmp_path, mounts, "4:freezer:/x\n0::/demo\n", files)
    assert cgroups.room(None, root) == 200 * MIB
    assert cgroups.path_of("self", root=root) == "/demo"


def test_a_container_without_a_namespace_sees_a_part_mounted(tmp_path: Path) -> None:
    mounts = V1.replace("0:32 / /sys", "0:32 /docker/abc /sys")
    files = {**v1("memory", 300 * MIB, 100 * MIB), **v1("memory/demo", 250 * MIB, 10 * MIB)}
    root = tree(tmp_path, mounts, "4:memory:/docker/abc\n", files)
    group = cgroups.of("self", root)
    assert group
    assert (group.folder, group.room) == (root / "sys/fs/cgroup/memory", 200 * MIB)
    assert cgroups.room("/docker/abc/demo", root) == 200 * MIB
    with pytest.raises(HostUnfit, match=r"^process.cgroup: /docker/other is outside of what is mounted"):
        cgroups.named("/docker/other", root)


def test_in_a_namespace_paths_begin_at_its_root(tmp_path: Path) -> None:
    """A group outside, such as that of a process which was left there, is `/../NAME` (cgroup_namespaces(7))."""
    files = {"cgroup.controllers": "memory", **v2(".", 300 * MIB, 100 * MIB), **v2("demo", 50 * MIB, 10 * MIB)}
    root = tree(tmp_path, V2, "0::/\n", files)
    assert cgroups.room(None, root) == 200 * MIB
    assert cgroups.room("/demo", root) == 40 * MIB
    (root / "proc/7/cgroup").write_text("0::/../outside\n")
    assert cgroups.of(7, root) is None


def test_a_mount_from_outside_of_the_namespace(tmp_path: Path) -> None:
    """What is at the mount point is above the namespace's root, whose name there nobody tells."""
    mounts = V2.replace("0:26 / /sys", "0:26 /.. /sys")
    files = {"cgroup.controllers": "memory", **v2("demo", 300 * MIB, 100 * MIB)}
    root = tree(tmp_path, mounts, "0::/../demo\n", files)
    assert cgroups.room(None, root) == 200 * MIB
    (root / "proc/self/cgroup").write_text("0::/\n")
    assert cgroups.of("self", root) is None


def test_of_two_mounts_the_one_that_shows_more_is_taken(tmp_path: Path) -> None:
    mounts = V2 + "50 24 0:26 /a /mnt/with\\040space rw - cgroup2 none rw\n" + "51 24 0:26 /a /gone rw - cgroup2 n rw\n"
    files = {**ROOT_OF_V2, **v2("a", 300 * MIB, 100 * MIB)}
    root = tree(tmp_path, mounts, "0::/a\n", files)
    assert cgroups.named("/a", root).folder == root / "sys/fs/cgroup/a"
    (root / "proc/self/mountinfo").write_text(mounts.replace("/sys/fs/cgroup rw", "/elsewhere rw"))
    (root / "mnt").mkdir()
    (root / "mnt/with space").symlink_to(root / "sys/fs/cgroup/a")
    (root / "sys/fs/cgroup/a/cgroup.controllers").write_text("memory\n")
    assert cgroups.named("/a", root).folder == root / "mnt/with space"
    assert cgroups.room(None, root) == 200 * MIB


@pytest.mark.parametrize(("mounts", "cgroup"), [(OTHERS, ""), (V1.replace("rw,memory", "rw,pids"), "4:pids:/\n")])
def test_a_host_without_the_controller(tmp_path: Path, mounts: str, cgroup: str) -> None:
    root = tree(tmp_path, mounts, cgroup, {})
    assert cgroups.of("self", root) is None
    assert cgroups.room(None, root) is None
    assert cgroups.path_of("self", root=root) == ""
    with pytest.raises(HostUnfit, match=r"^process.cgroup: /demo cannot be: no memory controller is mounted$"):
        cgroups.room("/demo", root)


def test_a_group_that_is_not_there_is_named_with_what_makes_it(tmp_path: Path) -> None:
    root = tree(tmp_path, V2, "0::/\n", ROOT_OF_V2)
    folder = root / "sys/fs/cgroup/machine/demo"
    with pytest.raises(HostUnfit) as refused:
        cgroups.room("/machine/demo", root)
    assert refused.value.message == f"process.cgroup: there is no group /machine/demo: {folder} does not exist"
    assert refused.value.hint == f"make it, and say what it may have: mkdir {folder}; echo BYTES >{folder}/memory.max"


def test_a_group_without_the_controller_is_named_with_what_turns_it_on(tmp_path: Path) -> None:
    root = tree(tmp_path, V2, "0::/\n", {**ROOT_OF_V2, "machine/demo/cgroup.procs": ""})
    with pytest.raises(HostUnfit, match="counts no memory of its own") as refused:
        cgroups.named("/machine/demo", root)
    assert refused.value.hint == f"let it: echo +memory >{root}/sys/fs/cgroup/machine/cgroup.subtree_control"


def test_who_joins_is_written_to_the_group_that_was_opened(tmp_path: Path) -> None:
    procs = tmp_path / "demo/cgroup.procs"
    procs.parent.mkdir()
    procs.touch()
    with cgroups.entrance(procs.parent) as put:
        procs.rename(tmp_path / "elsewhere")  # out of sight, as from within QEMU's own root
        put(42)
    assert (tmp_path / "elsewhere").read_text() == "42"
    with cgroups.entrance(None) as put:
        put(42)


def test_a_group_that_lets_nobody_in_says_why(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit) as refused, cgroups.entrance(tmp_path):
        pass
    assert refused.value.message.endswith(f"{tmp_path}/cgroup.procs: No such file or directory")
    (tmp_path / "cgroup.procs").symlink_to("/dev/full")
    with pytest.raises(HostUnfit, match="No space left on device"), cgroups.entrance(tmp_path) as put:
        put(42)
