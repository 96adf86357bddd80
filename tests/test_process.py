"""What QEMU is started with, what may be written in [process], and how it is judged what the kernel shows."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from tests.sample_reports import guest_report, process
from vmmback import jail, uids
from vmmback.cli.tables import rendered, while_it_runs
from vmmback.config import GuestConfig
from vmmback.config.process import Process
from vmmback.errors import HostUnfit
from vmmback.ids import DEFAULT_UIDS
from vmmback.linux import capabilities
from vmmback.process import Plan, memory_group, planned
from vmmback.render.html import guest_page
from vmmback.render.text import process_facts
from vmmback.report import judge_process

MIB = 1 << 20
KINDS = ("mnt", "net", "ipc", "uts", "cgroup")
TABLES: dict[str, Any] = {"name": "demo", "memory": {"size": "256MiB"}, "boot": {"kernel": "/g/vmlinuz"}}


def jail_of(**fields: Any) -> jail.Jail:
    program = Path("/usr/bin/qemu-system-x86_64")
    return jail.Jail(**{"uid": 7, "gid": 9, "root": Path("/g"), "program": program, "locked": 256 * MIB, **fields})


@pytest.mark.parametrize(
    ("hard", "memlock", "kept"),
    [
        (resource.RLIM_INFINITY, ["--memlock=268435456:268435456"], ""),
        (256 * MIB, ["--memlock=268435456:268435456"], ""),
        (256 * MIB - 1, [], ",+ipc_lock"),
    ],
)
def test_the_whole_command(hard: int, memlock: list[str], kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_MEMLOCK: hard, resource.RLIMIT_NOFILE: 512}
    monkeypatch.setattr(resource, "prlimit", lambda _, which: (limits[which], limits[which]))
    assert jail_of().command(["qemu", "-S"]) == [
        *("setpriv", "--reuid", "7", "--regid", "9", "--clear-groups"),
        *(f"--inh-caps=-all{kept}", f"--ambient-caps=-all{kept}", f"--bounding-set=-all{kept}"),
        *("--no-new-privs", "--pdeathsig", "KILL", "--"),
        *("prlimit", "--core=0:0", "--msgqueue=0:0", "--nofile=512:512", *memlock, "--", "qemu", "-S"),
    ]


def test_it_may_lock_what_it_maps_and_no_more() -> None:
    def locked(*, secret_aux: bool, **memory: str) -> int:
        config = GuestConfig.of({**TABLES, "memory": {"size": "256MiB", **memory}})
        made = Plan((7, 9), config, {}).jail(Path("/g"), Path("/q"), "tcg", secret_aux=secret_aux)
        assert made is not None
        return made.locked

    assert locked(secret_aux=False) == 256 * MIB
    assert locked(secret_aux=True) == (256 + 32) * MIB
    assert locked(secret_aux=False, max="384MiB") == 384 * MIB
    assert locked(secret_aux=False, backing="ordinary") == 0


def test_kvm_is_there_for_who_uses_it_and_the_hosts_network_for_who_asks() -> None:
    plan = Plan((7, 9), GuestConfig.of(TABLES), {})
    made = plan.jail(Path("/g"), Path("/q"), "kvm", secret_aux=False)
    assert made is not None
    assert (made.uid, made.gid, made.kvm, made.host_network) == (7, 9, True, False)
    nic = {"mode": "user", "plaintext": "allowed"}
    plan = Plan((7, 9), GuestConfig.of({**TABLES, "nic": [nic]}), {})
    made = plan.jail(Path("/g"), Path("/q"), "tcg", secret_aux=False)
    assert made is not None
    assert (made.kvm, made.host_network) == (False, True)


@pytest.mark.parametrize(
    ("mode", "owner", "group", "readable"),
    [(0o604, 1, 1, True), (0o640, 1, 1, False), (0o640, 1, 9, True), (0o604, 1, 9, False), (0o400, 7, 1, True),
     (0o044, 7, 9, False)],
)  # fmt: skip
def test_the_first_class_of_permissions_that_fits_decides(mode: int, owner: int, group: int, readable: bool) -> None:
    status = os.stat_result((mode, 0, 0, 1, owner, group, 0, 0, 0, 0))
    assert jail._may_read(status, 7, 9) is readable


def test_an_unreadable_file_is_named_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "vmlinuz"
    file.touch(0o600)
    file.chmod(0o600)
    with pytest.raises(HostUnfit) as refused:
        jail.check_readable({"boot.kernel": file}, 1_900_000_000, 1_900_000_000)
    assert refused.value.message.startswith(f"boot.kernel: {file} cannot be read by QEMU")
    assert refused.value.hint == f"let others read it: chmod o+r {file}"


def test_without_the_rights_for_it_there_is_no_jail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "missing_rights", lambda: ["CAP_SETUID"])
    config = GuestConfig.of(TABLES)
    with planned(config) as plan:
        assert plan.config == config
        assert plan.jail(Path("/g"), Path("/q"), "tcg", secret_aux=False) is None
    wants = GuestConfig.of({**TABLES, "process": {"user": "vmm-demo"}})
    with pytest.raises(HostUnfit, match=r"^process.user: .*CAP_SETUID"), planned(wants):
        pass


def test_qemu_sees_the_boot_files_at_places_of_the_jail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "missing_rights", list)
    monkeypatch.setattr(uids, "LOCKS", tmp_path / "locks")
    (tmp_path / "k").touch(0o644)
    tables = {**TABLES, "boot": {"kernel": str(tmp_path / "k"), "cmdline": "quiet"}}
    with planned(GuestConfig.of(tables)) as plan:
        assert plan.files == {Path("/boot/kernel"): tmp_path / "k"}
        assert (plan.config.boot.kernel, plan.config.boot.cmdline) == (Path("/boot/kernel"), "quiet")
        assert plan.config.boot.initrd is None


@pytest.mark.parametrize(
    "path", ["/demo", "/machine.slice/demo.scope", "/a/.b/..c/d..", r"/system.slice/x\x2dy@1.service"]
)
def test_a_cgroup_is_named_by_its_path(path: str) -> None:
    config = GuestConfig.of({**TABLES, "process": {"cgroup": path}})
    assert config.process.cgroup == path


def test_without_a_cgroup_our_own_pays() -> None:
    assert memory_group(GuestConfig.of(TABLES)) is None


def test_every_uid_of_the_range_comes_once() -> None:
    assert sorted(uids._from_anywhere(5, 9)) == [5, 6, 7, 8, 9]
    assert {next(uids._from_anywhere(5, 9)) for _ in range(200)} == {5, 6, 7, 8, 9}


def test_the_default_range_is_in_no_other_ones() -> None:
    """systemd's UIDS-GIDS: containers end at 1879048191, what is foreign begins at 2147352576."""
    assert 1_879_048_191 < DEFAULT_UIDS[0] < DEFAULT_UIDS[1] < 2_147_352_576
    assert Process().uids == DEFAULT_UIDS


def test_capabilities_have_names() -> None:
    assert capabilities.names(1 << 14) == (capabilities.IPC_LOCK,)
    assert capabilities.names((1 << 41) - 1)[21] == "CAP_SYS_ADMIN"
    assert capabilities.names((1 << 41) - 1)[40] == "CAP_CHECKPOINT_RESTORE"
    assert capabilities.names(1 << 63) == ("CAP_63",)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, ""),
        ({"capabilities": ("CAP_IPC_LOCK",), "bounding_set": ("CAP_IPC_LOCK",), "locks_by": "CAP_IPC_LOCK"}, ""),
        ({"uid": 0}, "it runs as uid 0, as its supervisor does"),
        ({"groups": (6,)}, "it has supplementary groups"),
        ({"capabilities": ("CAP_KILL", "CAP_IPC_LOCK")}, "it has 1 capabilities"),
        ({"bounding_set": ("CAP_KILL",)}, "it could gain capabilities (bounding set)"),
        ({"no_new_privs": False}, "it could gain privileges by what it executes (no_new_privs is off)"),
        ({"seccomp_filtered": False}, "no seccomp filter is on it"),
        ({"dumpable": True}, "it is dumpable: a process of its uid may trace it"),
        ({"dumpable": None}, ""),
        ({"core": None}, "it may dump core"),
        ({"own_namespaces": ("mnt", "uts", "cgroup")}, "it shares namespaces: net, ipc"),
    ],
)
def test_what_qemu_should_not_have(fields: dict[str, Any], says: str) -> None:
    assert judge_process(process(**fields), 0, KINDS) == ((says,) if says else ())


def test_what_is_wrong_is_in_the_tables_and_on_the_page() -> None:
    seen = process(dumpable=True, locks_by="CAP_IPC_LOCK", cgroup="/machine/demo", lacking=("it is dumpable",))
    report = guest_report(process=seen)
    for text in (rendered(*while_it_runs(report)), guest_page(report)):
        for word in (
            "1900000042",
            "CAP_IPC_LOCK",
            "not as it should be",
            "it is dumpable",
            "namespaces of its own",
            "/machine/demo",
        ):
            assert word in text
    assert dict(process_facts(seen))["memory cgroup"] == "/machine/demo"
    assert "memory cgroup" not in dict(process_facts(process()))
    assert dict(process_facts(seen))["locks memory by"] == "CAP_IPC_LOCK (RLIMIT_MEMLOCK: 256 MiB)"
    assert "QEMU's process" not in rendered(*while_it_runs(guest_report(process=None)))
