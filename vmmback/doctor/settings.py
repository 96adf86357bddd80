"""The settings of the host that a report names, as checks: with what can be done about each."""

from __future__ import annotations

from pathlib import Path

from vmmback.doctor.finding import Check
from vmmback.isolation import settings

REMEDIES = {
    "swap": "swapoff -a, and take swap out of /etc/fstab; or use an encrypted swap with a random key (crypttab(5))",
    "hibernation": "boot with nohibernate on the kernel command line",
    "zswap": "echo N >/sys/module/zswap/parameters/enabled, and boot with zswap.enabled=0",
    "crash-kernel": "kexec -p -u unloads it; disable kdump: systemctl disable --now kdump-tools",
    "crash-kernel-memory": "boot without crashkernel= on the kernel command line",
    "kexec-kernel": "kexec -u unloads it; reboot through the firmware",
    "kexec-load-disabled": "sysctl -w kernel.kexec_load_disabled=1 (until the next boot)",
    "lockdown": "boot with lockdown=integrity; lockdown=confidentiality makes audits inconclusive",
    "ptrace-scope": "sysctl -w kernel.yama.ptrace_scope=1 (a kernel with CONFIG_SECURITY_YAMA)",
    "core-pattern": "nothing for QEMU, which vmmback gives a core limit of 0 when it runs as root; for other programs: "
    "sysctl -w kernel.core_pattern='' and ulimit -c 0",
    "perf-event-paranoid": "sysctl -w kernel.perf_event_paranoid=2",
    "unprivileged-bpf-disabled": "sysctl -w kernel.unprivileged_bpf_disabled=1 (until the next boot), or 2",
    "kptr-restrict": "sysctl -w kernel.kptr_restrict=1",
    "ksm": "echo 2 >/sys/kernel/mm/ksm/run parts what was merged, and merges no more",
    "tdx": "look for copies (audit --hunt, ./dev residue) on a host without confidential guests",
    "sev-snp": "look for copies (audit --hunt, ./dev residue) on a host without confidential guests",
    "soft-offline": "sysctl -w vm.enable_soft_offline=0, where this kernel has it (Linux 6.11)",
    "proc-kcore": "boot with lockdown=confidentiality, which closes it, but makes audits inconclusive",
    "init-on-free": "boot with init_on_free=1",
    "dev-mem": "run a kernel built with CONFIG_STRICT_DEVMEM; boot with lockdown=integrity, which closes /dev/mem",
}
"""By the name of the setting; a setting that is missing here is always ok, if it can be read."""

_UNREADABLE = "run it as root, on the host itself"


def checks(root: Path = Path("/")) -> tuple[Check, ...]:
    """Read all settings; none of them makes a launch fail."""
    return tuple(_check(setting) for setting in settings.read(root))


def _check(setting: settings.Setting) -> Check:
    evidence = f"{setting.value}: {setting.detail}"
    if setting.risk == "ok":
        return Check(setting.name, "ok", evidence, "")
    return Check(setting.name, "note", evidence, REMEDIES.get(setting.name, _UNREADABLE))
