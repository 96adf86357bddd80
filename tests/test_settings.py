"""Settings of hosts of several shapes, each a folder with files as the kernel shows them."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import pytest

from vmmback.isolation.settings import ABSENT, observe
from vmmback.report import HostSetting

SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"

SERVER = {
    "proc/swaps": SWAPS + "/dev/nvme0n1p2  partition\t8388604\t0\t-2\n/swapfile  file\t1024\t0\t-3\n",
    "proc/cmdline": "BOOT_IMAGE=/vmlinuz root=/dev/sda1 crashkernel=256M quiet",
    "proc/kcore": "",
    "proc/sys/kernel/core_pattern": "|/usr/lib/systemd/systemd-coredump %P %u\n",
    "proc/sys/kernel/kexec_load_disabled": "0\n",
    "proc/sys/kernel/kptr_restrict": "0\n",
    "proc/sys/kernel/numa_balancing": "1\n",
    "proc/sys/kernel/osrelease": "6.1.0-18-amd64\n",
    "proc/sys/kernel/perf_event_paranoid": "-1\n",
    "proc/sys/kernel/unprivileged_bpf_disabled": "0\n",
    "proc/sys/kernel/yama/ptrace_scope": "0\n",
    "boot/config-6.1.0-18-amd64": "CONFIG_STRICT_DEVMEM=y\n# CONFIG_INIT_ON_FREE_DEFAULT_ON is not set\n",
    "dev/mem": "",
    "sys/power/state": "freeze mem disk\n",
    "sys/power/disk": "[platform] shutdown reboot suspend\n",
    "sys/kernel/kexec_crash_loaded": "1\n",
    "sys/kernel/kexec_crash_size": "268435456\n",
    "sys/kernel/kexec_loaded": "1\n",
    "sys/kernel/mm/ksm/run": "1\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
    "sys/kernel/security/lockdown": "[none] integrity confidentiality\n",
    "sys/module/kvm_amd/parameters/sev_snp": "Y\n",
    "sys/module/kvm_intel/parameters/tdx": "Y\n",
    "sys/module/zswap/parameters/enabled": "Y\n",
    "sys/devices/system/node/online": "0-1\n",
    "sys/devices/system/memory/memory0/valid_zones": "DMA32\n",
    "sys/devices/system/memory/memory32/valid_zones": "Movable Normal\n",
    "sys/devices/system/memory/soft_offline_page": "",
}
"""A server with everything on, and nothing hardened."""

HARDENED = {
    "proc/swaps": SWAPS,
    "proc/cmdline": "init_on_free=0 lockdown=confidentiality init_on_free=1",
    "proc/sys/kernel/core_pattern": "\n",
    "proc/sys/kernel/kexec_load_disabled": "1\n",
    "proc/sys/kernel/kptr_restrict": "2\n",
    "proc/sys/kernel/numa_balancing": "0\n",
    "proc/sys/kernel/perf_event_paranoid": "3\n",
    "proc/sys/kernel/unprivileged_bpf_disabled": "2\n",
    "proc/sys/kernel/yama/ptrace_scope": "2\n",
    "sys/power/state": "freeze mem disk\n",
    "sys/power/disk": "[disabled]\n",
    "sys/kernel/kexec_crash_loaded": "0\n",
    "sys/kernel/kexec_crash_size": "0\n",
    "sys/kernel/kexec_loaded": "0\n",
    "sys/kernel/mm/ksm/run": "0\n",
    "sys/kernel/security/lockdown": "none integrity [confidentiality]\n",
    "sys/module/kvm_intel/parameters/tdx": "N\n",
    "sys/module/kvm_amd/parameters/sev_snp": "N\n",
    "sys/module/zswap/parameters/enabled": "N\n",
    "sys/devices/system/node/online": "0\n",
}


def host(root: Path, files: Mapping[str, str]) -> dict[str, HostSetting]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {setting.name: setting for setting in observe(root)}


def test_a_server_with_everything_on(tmp_path: Path) -> None:
    seen = host(tmp_path, SERVER)
    assert {name: (setting.value, setting.risk) for name, setting in seen.items()} == {
        "swap": ("/dev/nvme0n1p2, /swapfile", "note"),
        "hibernation": ("platform", "note"),
        "zswap": ("Y", "note"),
        "crash-kernel": ("1", "risk"),
        "crash-kernel-memory": ("268435456", "note"),
        "kexec-kernel": ("1", "risk"),
        "kexec-load-disabled": ("0", "note"),
        "lockdown": ("[none] integrity confidentiality", "note"),
        "ptrace-scope": ("0", "note"),
        "core-pattern": ("|/usr/lib/systemd/systemd-coredump %P %u", "note"),
        "perf-event-paranoid": ("-1", "note"),
        "unprivileged-bpf-disabled": ("0", "note"),
        "kptr-restrict": ("0", "note"),
        "ksm": ("1", "note"),
        "transparent-huge-pages": ("[always] madvise never", "ok"),
        "numa-nodes": ("0-1", "ok"),
        "numa-balancing": ("1", "ok"),
        "tdx": ("Y", "note"),
        "sev-snp": ("Y", "note"),
        "soft-offline": ("present", "note"),
        "proc-kcore": ("present", "note"),
        "dev-mem": ("strict", "ok"),
        "memory-hot-remove": ("2 blocks, 1 of them movable", "ok"),
        "init-on-free": ("off", "note"),
    }
    assert all(setting.detail and setting.source for setting in seen.values())


def test_a_hardened_host_has_no_notes(tmp_path: Path) -> None:
    seen = host(tmp_path, HARDENED)
    assert {name for name, setting in seen.items() if setting.risk != "ok"} == set()
    assert seen["swap"].value == "none"
    assert seen["init-on-free"].value == "on"  # the last of the command line holds


def test_a_kernel_with_none_of_it(tmp_path: Path) -> None:
    seen = host(tmp_path, {})
    assert {name: setting.value for name, setting in seen.items() if setting.value != ABSENT} == {
        "init-on-free": "unknown"
    }
    # What would protect is missing too.
    assert {name for name, setting in seen.items() if setting.risk != "ok"} == {
        "lockdown",
        "ptrace-scope",
        "init-on-free",
    }
    assert len(seen) == 24


@pytest.mark.parametrize(
    ("configuration", "value", "risk"),
    [
        ("CONFIG_DEVMEM=y\n# CONFIG_STRICT_DEVMEM is not set\n", "not strict", "risk"),
        ("CONFIG_DEVMEM=y\nCONFIG_STRICT_DEVMEM=y\n", "strict", "ok"),
        ("", "present", "note"),
    ],
)
def test_dev_mem_is_judged_by_how_the_kernel_was_built(
    configuration: str, value: str, risk: str, tmp_path: Path
) -> None:
    seen = host(tmp_path, {"dev/mem": "", "proc/sys/kernel/osrelease": "6.1\n", "boot/config-6.1": configuration})
    assert (seen["dev-mem"].value, seen["dev-mem"].risk) == (value, risk)


@pytest.mark.parametrize(
    ("cmdline", "built_on", "value"),
    [
        ("quiet", True, "on"),
        ("quiet", False, "off"),
        ("quiet init_on_free=1", False, "on"),
        ("init_on_free=off", True, "off"),
        ("no_init_on_free=1", False, "off"),
    ],
)
def test_init_on_free_is_of_the_command_line_or_else_as_built(
    cmdline: str, built_on: bool, value: str, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    built = "CONFIG_INIT_ON_FREE_DEFAULT_ON=y" if built_on else "# CONFIG_INIT_ON_FREE_DEFAULT_ON is not set"
    (tmp_path / "proc/config.gz").write_bytes(gzip.compress(f"CONFIG_X=y\n{built}\n".encode()))
    assert host(tmp_path, {"proc/cmdline": cmdline})["init-on-free"].value == value


def test_a_file_that_is_refused_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "sys/kernel/mm/ksm/run").mkdir(parents=True)  # read(2) fails, for root too
    seen = host(tmp_path, {})["ksm"]
    assert (seen.value, seen.risk) == ("unreadable (EISDIR)", "note")


def test_this_host() -> None:
    assert len(observe()) == 24
