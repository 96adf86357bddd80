"""Reports for the tests of pages and XML: what a Linux guest on q35 shows (addresses as QEMU 7.2 lays them out)."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from vmmback.report import (
    DirectMap,
    Drift,
    Exposure,
    GuestVerdict,
    Host,
    HostSetting,
    Hunt,
    HuntPlace,
    IsolationReport,
    MapRange,
    Memory,
    ProbeResult,
    Process,
    RamBlock,
    SelftestReport,
    VectorResult,
    Verdict,
    judge_guest,
    judge_selftest,
)

MIB = 1 << 20
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></table></svg><iframe srcdoc='x'>",
    "<!--",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "&lt;b&gt; &amp; ]]>",
    "\x00\x1b[2J\x07\x7f\x9b",
    "\u202etxt.exe\u2066\u200b",
    "\ud800\ufffe\uffff",
    "W" * 2000,
    "\r\n\t",
)
"""What a guest or a host may put into a name or a detail, to get out of a page or to break XML."""

DOCS = {
    "direct-map": (
        "the kernel reads every present page of the guest through its direct map (a BPF program)",
        "pages of our own, whose random contents must come back",
        "mm/secretmem.c, secretmem_fault; kernel/trace/bpf_trace.c",
    ),
    "proc-mem": ("/proc/PID/mem: first, middle and last page", "QEMU's heap and stack", "mm/gup.c, check_vma_flags"),
}

_SETTINGS = (
    HostSetting(
        name="kernel.kexec_load_disabled",
        value="0",
        risk="note",
        detail="root can load another kernel, which finds the frames of a guest that runs",
        source="Documentation/admin-guide/sysctl/kernel.rst",
    ),
    HostSetting(
        name="swap", value="none", risk="ok", detail="nothing of QEMU's heap is written to a disk", source="proc(5)"
    ),
    HostSetting(
        name="hibernation",
        value="[disabled] platform",
        risk="risk",
        detail="a hibernation image holds QEMU's heap",
        source="kernel/power/hibernate.c",
    ),
)
HOST = Host(kernel="6.1.0-18-amd64", qemu="7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", accel="tcg", settings=_SETTINGS)


def q35_map(ram_mib: int = 256, backing: str = "secretmem") -> tuple[MapRange, ...]:
    """Return the flat view of a q35 guest after its firmware has run."""
    ram = {"region": "ram0", "block": "ram0", "backing": backing}
    bios = {"region": "pc.bios", "block": "pc.bios", "backing": "ordinary"}
    below_4g = min(ram_mib, 2048) * MIB
    rows: list[tuple[int, int, str, dict[str, str], bool]] = [
        (0x0, 0xC2FFF, "ram", ram, True),
        (0xC3000, 0xE7FFF, "rom", ram, False),
        (0xE8000, 0xEFFFF, "ram", ram, True),
        (0xF0000, 0xFFFFF, "rom", ram, False),
        (0x100000, below_4g - 1, "ram", ram, True),
        (0xB0000000, 0xBFFFFFFF, "device", {"region": "pcie-mmcfg-mmio"}, True),
        (0xFEBFF000, 0xFEBFFFFF, "device", {"region": "ahci"}, True),
        (0xFEC00000, 0xFEC00FFF, "device", {"region": "ioapic"}, True),
        (0xFED00000, 0xFED003FF, "device", {"region": "hpet"}, True),
        (0xFED1C000, 0xFED1FFFF, "device", {"region": "lpc-rcrb-mmio"}, True),
        (0xFEE00000, 0xFEEFFFFF, "device", {"region": "apic-msi"}, True),
        (0xFFFC0000, 0xFFFFFFFF, "rom", bios, False),
    ]
    if ram_mib > 2048:
        rows.append((1 << 32, (1 << 32) + (ram_mib - 2048) * MIB - 1, "ram", ram, True))
    none = {"block": "", "backing": "none"}
    return tuple(
        MapRange.of({"first": first, "last": last, "kind": kind, "guest_writable": writable, **none, **fields})
        for first, last, kind, fields, writable in rows
    )


def probe(name: str, verdict: Verdict, detail: str, **fields: Any) -> ProbeResult:
    values = {"control": Verdict.READABLE, "seconds": 0.0123, **fields}
    return ProbeResult(name=name, verdict=verdict, detail=detail, **values)


_BLOCKED = (
    probe("direct-map", Verdict.BLOCKED, "0 of 65536 present pages readable (EFAULT)", errno="EFAULT", seconds=0.0518),
    probe("proc-mem", Verdict.BLOCKED, "3 sampled pages refused, EIO", errno="EIO"),
    probe("process-vm-readv", Verdict.BLOCKED, "3 sampled pages refused, EFAULT", errno="EFAULT"),
    probe("fd-reopen", Verdict.BLOCKED, "1 file(s) refused, ENXIO", errno="ENXIO", seconds=0.0003),
    probe("vma-flags", Verdict.BLOCKED, "locked (lo) and left out of dumps (dd): 1 mapping(s)"),
    probe("qmp-proof", Verdict.BLOCKED, "all 262144 KiB lie in secretmem inode 1231280"),
    probe(
        "kcore",
        Verdict.INCONCLUSIVE,
        "not tried: this host has no /proc/kcore",
        control=Verdict.INCONCLUSIVE,
        missing="/proc/kcore",
        seconds=0.0,
    ),
)
_READABLE = (
    probe("direct-map", Verdict.READABLE, "65536 of 65536 present pages readable"),
    probe("proc-mem", Verdict.READABLE, "3 of 3 sampled pages were read"),
    probe("fd-reopen", Verdict.READABLE, "/proc/1890/fd/3 could be opened"),
    probe(
        "process-vm-readv",
        Verdict.INCONCLUSIVE,
        "refused, EPERM; the control failed: EPERM",
        control=Verdict.BLOCKED,
        errno="EPERM",
    ),
)
_EXPOSURES = (
    Exposure(
        name="pidfd-getfd",
        holders="root, CAP_SYS_PTRACE",
        detail="tried as uid 0: 1 descriptor(s) copied; with one of them the guest's RAM can be mapped",
    ),
    Exposure(
        name="serial-console",
        holders="the host kernel, root, who reads the log",
        detail="22495 bytes that the guest printed went through QEMU and vmmback in ordinary memory",
    ),
)


def hunt(guest_hits: int) -> Hunt:
    """Return a hunt that found two copies in QEMU's heap, and so many in the guest."""
    places = [HuntPlace(place="process", owner="1890 (qemu-system-x86): [heap]", hits=2, examples=(0x1D2C4A,))]
    if guest_hits:
        places.append(HuntPlace(place="guest", owner="demo", hits=guest_hits, examples=(0x52F, 0x530)))
    return Hunt(
        needle_bytes=64,
        scanned_bytes=24 << 30,
        unreadable_bytes=256 * MIB,
        seconds=3.21,
        gib_per_s=7.5,
        hits=2 + guest_hits,
        guest_hits=guest_hits,
        places=tuple(places),
    )


def process(**fields: Any) -> Process:
    """Return what the kernel shows of a QEMU as it should be, with some fields as given."""
    values: dict[str, Any] = {
        "uid": 1_900_000_042,
        "gid": 1_900_000_042,
        "groups": (),
        "capabilities": (),
        "bounding_set": (),
        "no_new_privs": True,
        "seccomp_filtered": True,
        "dumpable": False,
        "memlock": 256 * MIB,
        "core": 0,
        "locks_by": "limit",
        "own_namespaces": ("mnt", "net", "ipc", "uts", "cgroup"),
    }
    return Process(**{**values, **fields})


def guest_report(**fields: Any) -> IsolationReport:
    """Return the report of an isolated guest, with some fields as given; its verdict is judged."""
    values: dict[str, Any] = {
        "guest": "demo",
        "validated_after": "'GUEST READY' on the console",
        "memory": Memory(size=256 * MIB, secret=256 * MIB, present_pages=65536, checked_pages=65536, readable_pages=0),
        "ram_blocks": (
            RamBlock(name="ram0", size=256 * MIB, backing="secretmem", guest_writable=True),
            RamBlock(name="/rom@etc/acpi/tables", size=2 * MIB, backing="ordinary", guest_writable=False),
            RamBlock(name="pc.bios", size=256 << 10, backing="ordinary", guest_writable=False),
        ),
        "probes": _BLOCKED,
        "exposures": _EXPOSURES,
        "process": process(),
        "direct_map": DirectMap(
            regions=140, ideal=128, splits_2m=131, splits_1g=1, huge_before=16 << 30, huge_after=15 << 30
        ),
        "host": HOST,
        "timings": {"prefault": 0.66029, "qmp_ready": 0.059444, "boot": 3.79333, "validate": 0.144316},
        "memory_map": q35_map(),
        "hunt": hunt(0),
        **fields,
    }
    if "verdict" not in values:
        verdict, reasons = judge_guest(values["memory"], values["ram_blocks"], values["probes"], ())
        values.update(verdict=verdict, reasons=reasons)
    return IsolationReport(**values)


def exposed_report() -> IsolationReport:
    """Return the report of a guest on ordinary memory."""
    return guest_report(
        memory=Memory(size=6144 * MIB, secret=0, present_pages=65536, checked_pages=65536, readable_pages=65536),
        ram_blocks=(RamBlock(name="ram0", size=6144 * MIB, backing="ordinary", guest_writable=True),),
        probes=_READABLE,
        memory_map=q35_map(6144, "ordinary"),
        hunt=hunt(16128),
        drifts=(Drift(at="2026-01-02T03:04:05Z", probe="vma-flags", detail="flags missing: dd"),),
        denied_commands={"(unknown)": 2, "pmemsave": 1234},
    )


def bare_report() -> IsolationReport:
    """Return a report of a guest that was not validated, without any field that may be absent."""
    host = replace(HOST, settings=())
    memory = Memory(size=256 * MIB, secret=256 * MIB, present_pages=0, checked_pages=0, readable_pages=0)
    absent: dict[str, Any] = {
        "probes": (),
        "exposures": (),
        "ram_blocks": (),
        "memory_map": (),
        "hunt": None,
        "process": None,
        "direct_map": None,
    }
    return guest_report(**absent, host=host, memory=memory, validated_after="", timings={})


def hostile_report(text: str) -> IsolationReport:
    """Return a report in which `text` stands wherever a guest or a host can put one."""
    return IsolationReport(
        guest=text,
        verdict=GuestVerdict.EXPOSED,
        validated_after=text,
        reasons=(text,),
        memory=Memory(size=4096, secret=0, present_pages=1, checked_pages=1, readable_pages=1),
        ram_blocks=(RamBlock(name=text, size=4096, backing="ordinary", guest_writable=True),),
        probes=tuple(
            probe(text, verdict, text, control=control, errno=text, missing=text)
            for verdict in Verdict
            for control in Verdict
        ),
        exposures=(Exposure(name=text, holders=text, detail=text),),
        process=process(capabilities=(text,), own_namespaces=(text,), lacking=(text,)),
        host=Host(kernel=text, qemu=text, accel=text, settings=(hostile_setting(text),)),
        timings={text: 1.0},
        memory_map=(
            MapRange(
                first=0, last=4095, kind="ram", region=text, block=f"a{text}", backing="ordinary", guest_writable=True
            ),
            MapRange(first=8192, last=9000, kind="device", region=text, block="", backing="none", guest_writable=True),
        ),
        hunt=Hunt(
            needle_bytes=64,
            scanned_bytes=4096,
            unreadable_bytes=0,
            seconds=0.1,
            gib_per_s=7.0,
            hits=1,
            guest_hits=1,
            places=(HuntPlace(place="slab", owner=text, hits=1, examples=(4096,)),),
        ),
        drifts=(Drift(at=text, probe=text, detail=text),),
        denied_commands={text: 1},
    )


def hostile_setting(text: str) -> HostSetting:
    return HostSetting(name=text, value=text, risk="risk", detail=text, source=text)


def vector(name: str, verdict: Verdict = Verdict.BLOCKED, **fields: Any) -> VectorResult:
    """Return what a self-test saw of one vector."""
    return VectorResult.of(
        {
            "name": name,
            "kind": "probe",
            "vector": f"{name} is tried on a page of a child",
            "verdict": verdict,
            "control": Verdict.READABLE,
            "errno": "EFAULT" if verdict is Verdict.BLOCKED else "",
            "missing": "",
            "detail": f"{name}: {verdict.value}",
            "seconds": 0.02,
            "live_safe": False,
            "holders": "",
            "source": "mm/gup.c, check_vma_flags",
            **fields,
        }
    )


def selftest_report(*more: VectorResult) -> SelftestReport:
    """Return the report of a self-test that passed, unless `more` vectors say otherwise."""
    lacking = {"control": Verdict.INCONCLUSIVE, "missing": "/dev/mem"}
    vectors = (
        vector("ptrace-peek", errno="EIO"),
        vector("process-vm-writev"),
        vector("o-direct"),
        vector("vmsplice"),
        vector("dev-mem", Verdict.INCONCLUSIVE, **lacking, detail="not tried: this host has no /dev/mem"),
        vector("pidfd-getfd", Verdict.READABLE, kind="exposure", holders="root, CAP_SYS_PTRACE"),
        vector("same-uid-pidfd-getfd", kind="exposure", holders="the same uid", errno="EPERM"),
        *more,
    )
    verdict, reasons = judge_selftest(vectors, ("ptrace-peek",))
    return SelftestReport(
        verdict=verdict, reasons=reasons, vectors=vectors, settings=_SETTINGS, host=HOST, seconds=12.3
    )
