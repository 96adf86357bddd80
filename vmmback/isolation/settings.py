"""Settings of the host that bear on secrets: read, not tried. `risk` of HostSetting (report.py) says how they bear.

`read` is for those who cannot wait for msgspec, which a report needs.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from vmmback.report import HostSetting

ABSENT = "not in this kernel"
Risk = Literal["ok", "note", "risk"]
Judgement = tuple[Risk, str]


class Setting(NamedTuple):
    """What HostSetting has, before it is part of a report."""

    name: str
    value: str
    risk: Risk
    detail: str
    source: str


class _File(NamedTuple):
    """A setting that is one file. `absent` judges a kernel without it, `judge` what the file says."""

    name: str
    path: str
    source: str
    absent: Judgement
    judge: Callable[[str], Judgement]

    def observe(self, root: Path) -> Setting:
        value = _read(root, self.path)
        if value is None:
            return _setting(self.name, ABSENT, self.absent, self.source)
        if value.startswith("unreadable"):
            return _setting(self.name, value, ("note", f"/{self.path} cannot be read"), self.source)
        return _setting(self.name, value, self.judge(value), self.source)


class _Presence(NamedTuple):
    """A setting that is a file's being there; `detail` says what it then means."""

    name: str
    path: str
    source: str
    detail: str

    def observe(self, root: Path) -> Setting:
        try:
            (root / self.path).stat()
        except OSError:
            return _setting(self.name, ABSENT, _NOTHING, self.source)
        return _setting(self.name, "present", ("note", self.detail), self.source)


def observe(root: Path = Path("/")) -> tuple[HostSetting, ...]:
    """Read all settings, for a report; `root` is as for read()."""
    from vmmback.report import HostSetting

    return tuple(HostSetting(**setting._asdict()) for setting in read(root))


def read(root: Path = Path("/")) -> tuple[Setting, ...]:
    """Read all settings; `root` is another folder with files of the same shape, for tests. Never raises OSError."""
    return tuple(_every(root))


def _every(root: Path) -> Iterator[Setting]:
    yield _swap(root)
    yield _hibernation(root)
    for file in _FILES:
        yield file.observe(root)
    yield _hot_remove(root)
    yield _init_on_free(root)
    for presence in _PRESENCES:
        yield presence.observe(root)
    yield _dev_mem(root)


def _setting(name: str, value: str, judgement: Judgement, source: str) -> Setting:
    risk, detail = judgement
    return Setting(name=name, value=value, risk=risk, detail=detail, source=source)


def _read(root: Path, path: str) -> str | None:
    """Return a file's text, "unreadable (…)" with the errno if it is refused, None if it is not there."""
    try:
        return (root / path).read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"unreadable ({errno.errorcode.get(error.errno or 0, '')})"


def _chosen(text: str) -> str:
    """Return the word in brackets: `none [integrity] confidentiality`."""
    match = re.search(r"\[(\S+)\]", text)
    return match[1] if match else text


# --- Settings that are one file ---------------------------------------------------------------------------------------


def _when(value: str, judgement: Judgement, otherwise: Judgement) -> Callable[[str], Judgement]:
    return lambda text: judgement if text == value else otherwise


def _lockdown(text: str) -> Judgement:
    mode = _chosen(text)
    if mode == "none":
        return "note", "root may load unsigned kernel modules, and write to kernel memory"
    if mode == "confidentiality":
        return "ok", "BPF cannot read kernel memory: the probes that need it are inconclusive"
    return "ok", "root cannot change the running kernel"


def _core_pattern(text: str) -> Judgement:
    if not text:
        return "ok", "no core dumps"
    where = "are given to a program" if text.startswith(("|", "@")) else "are written to disk"
    return "note", f"core dumps of QEMU {where}: without secret RAM, but with QEMU's heap and registers"


def _perf(text: str) -> Judgement:
    if text.lstrip("-").isdecimal() and int(text) >= 2:
        return "ok", "without CAP_PERFMON processes profile themselves at most"
    return "note", "any user may profile the kernel, or all processors"


def _nodes(text: str) -> Judgement:
    if text.isdecimal():
        return "ok", "one node: no memory is moved between nodes"
    return "ok", "several nodes: secret RAM is not moved between them, QEMU's own memory may be"


def _crash_size(text: str) -> Judgement:
    if text == "0":
        return "ok", "no memory is reserved for a crash kernel"
    return "note", "memory is reserved for a crash kernel: root can load one"


_NOTHING: Judgement = ("ok", "this kernel cannot do it")
_SYSCTL = "Documentation/admin-guide/sysctl/kernel.rst"
_MM = "Documentation/admin-guide/mm"

_FILES = (
    _File(
        "zswap", "sys/module/zswap/parameters/enabled", f"{_MM}/zswap.rst", _NOTHING,
        _when("Y", ("note", "QEMU's own memory may be kept compressed in other frames; secret RAM is locked"),
              ("ok", "nothing is kept compressed in memory")),
    ),
    _File(
        "crash-kernel", "sys/kernel/kexec_crash_loaded", "Documentation/admin-guide/kdump/kdump.rst", _NOTHING,
        _when("0", ("ok", "no crash kernel is loaded"),
              ("risk", "after a panic the crash kernel reads all of RAM, secret RAM too, and may write it to disk")),
    ),
    _File(
        "crash-kernel-memory", "sys/kernel/kexec_crash_size", "Documentation/admin-guide/kdump/kdump.rst", _NOTHING,
        _crash_size,
    ),
    _File(
        "kexec-kernel", "sys/kernel/kexec_loaded", "kexec_load(2)", _NOTHING,
        _when("0", ("ok", "no kernel is loaded that a reboot would start"),
              ("risk", "the next reboot starts a kernel without the memory being cleared by firmware")),
    ),
    _File(
        "kexec-load-disabled", "proc/sys/kernel/kexec_load_disabled", _SYSCTL, _NOTHING,
        _when("0", ("note", "root may load a kernel that takes over, or that reads all of RAM after a panic"),
              ("ok", "no other kernel can be loaded until the next boot")),
    ),
    _File(
        "lockdown", "sys/kernel/security/lockdown", "kernel_lockdown(7)",
        ("note", "no lockdown, or securityfs is not mounted: root may change the running kernel"), _lockdown,
    ),
    _File(
        "ptrace-scope", "proc/sys/kernel/yama/ptrace_scope", "Documentation/admin-guide/LSM/Yama.rst",
        ("note", "processes of QEMU's own user may trace it, and take its descriptors"),
        lambda text: ("note", "processes of QEMU's own user may trace it, and take its descriptors")
        if text == "0" else ("ok", "a process of QEMU's own user may not trace it without CAP_SYS_PTRACE"),
    ),
    _File("core-pattern", "proc/sys/kernel/core_pattern", "core(5)", _NOTHING, _core_pattern),
    _File("perf-event-paranoid", "proc/sys/kernel/perf_event_paranoid", "perf_event_open(2)", _NOTHING, _perf),
    _File(
        "unprivileged-bpf-disabled", "proc/sys/kernel/unprivileged_bpf_disabled", _SYSCTL, _NOTHING,
        _when("0", ("note", "any user may load BPF programs of some types; none of them reads other processes"),
              ("ok", "BPF programs need CAP_BPF")),
    ),
    _File(
        "kptr-restrict", "proc/sys/kernel/kptr_restrict", _SYSCTL, _NOTHING,
        _when("0", ("note", "kernel addresses are shown to all: an exploit need not guess them"),
              ("ok", "kernel addresses are hidden from unprivileged users")),
    ),
    _File(
        "ksm", "sys/kernel/mm/ksm/run", f"{_MM}/ksm.rst", _NOTHING,
        _when("1", ("note", "equal pages are merged where a process asks for it; secret RAM cannot be"),
              ("ok", "no pages are merged")),
    ),
    _File(
        "transparent-huge-pages", "sys/kernel/mm/transparent_hugepage/enabled", f"{_MM}/transhuge.rst", _NOTHING,
        lambda _: ("ok", "secret RAM has none: its pages are never collapsed, which would copy them"),
    ),
    _File(
        "numa-nodes", "sys/devices/system/node/online", "Documentation/ABI/stable/sysfs-devices-node", _NOTHING, _nodes
    ),
    _File(
        "numa-balancing", "proc/sys/kernel/numa_balancing", _SYSCTL, _NOTHING,
        _when("0", ("ok", "no memory is moved between nodes by itself"),
              ("ok", "secret RAM is not moved (mm/secretmem.c, secretmem_migrate_folio); QEMU's own memory may be")),
    ),
    _File(
        "tdx", "sys/module/kvm_intel/parameters/tdx", "Documentation/arch/x86/tdx.rst",
        ("ok", "no TDX guests: kvm_intel is not loaded, or knows none"),
        _when("Y", ("note", "frames of TDX guests must not be read: do not search this host's memory"),
              ("ok", "no TDX guests")),
    ),
    _File(
        "sev-snp", "sys/module/kvm_amd/parameters/sev_snp", "Documentation/arch/x86/amd-memory-encryption.rst",
        ("ok", "no SEV-SNP guests: kvm_amd is not loaded, or knows none"),
        _when("Y", ("note", "frames of SEV-SNP guests must not be read: do not search this host's memory"),
              ("ok", "no SEV-SNP guests")),
    ),
)  # fmt: skip

_PRESENCES = (
    _Presence(
        "soft-offline", "sys/devices/system/memory/soft_offline_page",
        "Documentation/ABI/testing/sysfs-memory-page-offline",
        "root may move what a frame holds and take the frame away; secret RAM refuses to be moved",
    ),
    _Presence(
        "proc-kcore", "proc/kcore", "proc_kcore(5)",
        "shows root the kernel's memory; of secret RAM only frames that were once part of the kernel's image",
    ),
)  # fmt: skip


# --- Settings that are more than one file -----------------------------------------------------------------------------


def _swap(root: Path) -> Setting:
    text = _read(root, "proc/swaps")
    if text is None:
        return _setting("swap", ABSENT, _NOTHING, "swapon(8)")
    areas = [line.split()[0] for line in text.splitlines()[1:] if line]
    if not areas:
        return _setting("swap", "none", ("ok", "nothing is written to swap"), "swapon(8)")
    detail = "secret RAM is locked and never swapped; QEMU's own memory may be written to it"
    return _setting("swap", ", ".join(areas), ("note", detail), "swapon(8)")


def _hibernation(root: Path) -> Setting:
    source = "kernel/power/hibernate.c, hibernation_available"
    states = _read(root, "sys/power/state")
    if states is None or "disk" not in states.split():
        return _setting("hibernation", ABSENT, ("ok", "memory cannot be written to disk as a whole"), source)
    mode = _chosen(_read(root, "sys/power/disk") or "")
    if mode == "disabled":
        return _setting("hibernation", mode, ("ok", "refused: by lockdown, or because secret RAM is in use"), source)
    detail = "refused as long as secret RAM is in use; afterwards it writes what QEMU left in its own memory to disk"
    return _setting("hibernation", mode or "possible", ("note", detail), source)


def _hot_remove(root: Path) -> Setting:
    name, source = "memory-hot-remove", "Documentation/admin-guide/mm/memory-hotplug.rst"
    blocks = _memory_blocks(root / "sys/devices/system/memory")
    if not blocks:
        return _setting(name, ABSENT, _NOTHING, source)
    movable = sum(zones.split()[:1] == [b"Movable"] for zones in blocks)
    detail = "memory can be taken away while the host runs; a block with secret RAM cannot be, it is not moved"
    return _setting(name, f"{len(blocks)} blocks, {movable} of them movable", ("ok", detail), source)


def _memory_blocks(folder: Path) -> list[bytes]:
    """Return the zones that each block of memory may be in. A host has hundreds: few system calls for each."""
    try:
        with os.scandir(folder) as entries:
            return [_zones(entry.path) for entry in entries if re.fullmatch("memory[0-9]+", entry.name)]
    except OSError:
        return []


def _zones(block: str) -> bytes:
    try:
        descriptor = os.open(f"{block}/valid_zones", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _init_on_free(root: Path) -> Setting:
    name, source = "init-on-free", "Documentation/admin-guide/kernel-parameters.txt"
    value = _boot_value(root)
    if value is None:
        return _setting(
            name, "unknown", ("note", "neither the command line nor the kernel's configuration says"), source
        )
    if value:
        return _setting(name, "on", ("ok", "all freed memory is zeroed, also what QEMU held"), source)
    detail = "secret RAM is zeroed all the same; what QEMU's own memory held stays in freed frames for a while"
    return _setting(name, "off", ("note", detail), source)


def _dev_mem(root: Path) -> Setting:
    name, source = "dev-mem", "drivers/char/mem.c, mmap_mem; mem(4)"
    try:
        (root / "dev/mem").stat()
    except OSError:
        return _setting(name, ABSENT, _NOTHING, source)
    configuration = _configuration(root).split("\n")
    if "CONFIG_STRICT_DEVMEM=y" in configuration:
        return _setting(name, "strict", ("ok", "it shows devices, and no RAM"), source)
    if configuration == [""]:
        detail = "if this kernel was built without CONFIG_STRICT_DEVMEM, mmap(2) of it shows root secret RAM too"
        return _setting(name, "present", ("note", detail), source)
    detail = "mmap(2) of it shows root all of physical memory, secret RAM too: build with CONFIG_STRICT_DEVMEM"
    return _setting(name, "not strict", ("risk", detail), source)


def _boot_value(root: Path) -> bool | None:
    given = re.findall(r"(?:^|\s)init_on_free=(\S+)", _read(root, "proc/cmdline") or "")
    if given:
        return given[-1].lower() in ("1", "y", "on", "t", "true")
    configuration = _configuration(root)
    return "CONFIG_INIT_ON_FREE_DEFAULT_ON=y" in configuration.split("\n") if configuration else None


def _configuration(root: Path) -> str:
    """Return the configuration that the running kernel was built with, "" where it is nowhere to be found."""
    try:
        return gzip.decompress((root / "proc/config.gz").read_bytes()).decode()
    except OSError:
        return _read(root, f"boot/config-{_read(root, 'proc/sys/kernel/osrelease')}") or ""
