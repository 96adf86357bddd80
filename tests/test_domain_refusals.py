"""docs/LIBVIRT.md and the code say the same of what a domain's XML may not have: row by row, refusal by refusal."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

from tests.markdown import tables
from vmmback.errors import ConfigError
from vmmback.libvirt import domain_refusals
from vmmback.libvirt.domain_edit import enabled
from vmmback.libvirt.domain_refusals import Problem, refusals, refused
from vmmback.libvirt.domain_xml import domain_of, parse

ROOT = Path(__file__).parents[1]
WRAPPER = Path("/usr/local/libexec/vmmback/qemu")
DOMAIN = enabled((ROOT / "tests/domains/debian.xml").read_text(), WRAPPER, "kill")
BACKING = "<source type='memfd'/>\n    <access mode='shared'/>"


class Row(NamedTuple):
    """A row of the table, without its reason."""

    place: str
    refused: str


def all_rows() -> list[Row]:
    section = (ROOT / "docs/LIBVIRT.md").read_text().split("## What the XML may not have")[1].split("\n## ")[0]
    return [Row(*row[:2]) for row in tables(section)[0]]


class Try(NamedTuple):
    """What a domain says instead of what it should: `good` is the twin that is accepted."""

    place: str
    bad: str
    good: str
    there: str = "</devices>"
    """The text of DOMAIN in whose place they stand; devices stand before the end of <devices>."""

    def domain(self, text: str) -> str:
        assert DOMAIN.count(self.there) == 1
        return DOMAIN.replace(self.there, f"{text}</devices>" if self.there == "</devices>" else text)


def disk(attributes: str = "type='file' device='disk'", driver: str = "", more: str = "") -> str:
    of_disk = "backingStore" in more or "shareable" in more
    source = f"<source file='/i'/>{more}" if of_disk else f"<source file='/i'>{more}</source>"
    return f"<disk {attributes}><driver {driver}/>{source}<target dev='vdb'/></disk>"


def below(encrypted: bool) -> str:
    luks = "<encryption format='luks'/>"
    source = f"<source file='/base'>{luks if encrypted else ''}</source>"
    return f"{luks}<backingStore type='file'>{source}<backingStore/></backingStore>"


def cells(access: str) -> str:
    return f"<cpu><numa><cell id='0' cpus='0' memory='1' unit='GiB'{access}/></numa></cpu>"


def dimm(attributes: str, source: str = "") -> str:
    return f"<memory {attributes}>{source}<target><size unit='MiB'>128</size></target></memory>"


def args(*values: str) -> str:
    return "".join(f"<qemu:arg value='{value}'/>" for value in values)


EMULATOR = f"<emulator>{WRAPPER}</emulator>"
MEMFD, SHARED = "<source type='memfd'/>", "<access mode='shared'/>"
CPU = "<cpu mode='maximum' check='none' migratable='on'/>"
LABEL = "<label>+1885632029:libvirt-qemu</label>"
STATIC = "<seclabel type='static' model='dac' relabel='yes'>"
MACHINE = "machine='pc-q35-7.2'"
LUKS = "<encryption format='luks'/>"
ARGS = "<qemu:arg value='-fw_cfg'/>\n    <qemu:arg value='name=opt/org.example/role,string=web'/>"
CRASH = "<on_crash>destroy</on_crash>"
HARMLESS = args("-fw_cfg", "name=opt/org.example/role,file=/role", "--device", "isa-debug-exit,iobase=0xf4")

# For each row: its place and a word of what is refused; then what is refused and what is not, each in DOMAIN.
TRIES: dict[tuple[str, str], list[Try]] = {
    ("devices/emulator", "another program"): [
        Try("devices/emulator", "<emulator>/usr/bin/qemu</emulator>", EMULATOR, EMULATOR),
        Try("devices/emulator", "", EMULATOR, EMULATOR),
    ],
    ("metadata/secret-ram emulator", "the wrapper"): [
        Try(
            "metadata/secret-ram emulator",
            f'emulator="{WRAPPER}"',
            'emulator="/opt/qemu"',
            'emulator="/usr/bin/qemu-system-x86_64"',
        ),
    ],
    ("type", "kvm"): [Try("type='kvm'", "<domain type='kvm' ", "<domain type='qemu' ", "<domain type='qemu' ")],
    ("memoryBacking/source", "none"): [
        Try("memoryBacking/source", "<nosharepages/>", "<access mode='shared'/>", BACKING),
        Try("memoryBacking/source", f"<source type='anonymous'/>{SHARED}", f"<source type='file'/>{SHARED}", BACKING),
    ],
    ("memoryBacking/access, cpu/numa/cell, devices/memory", "private"): [
        Try("memoryBacking/access", "<source type='file'/>", "<source type='memfd'/>", BACKING),
        Try("memoryBacking/access", f"{MEMFD}<access mode='private'/>", MEMFD + SHARED, BACKING),
        Try("cpu/numa/cell[0]", cells(" memAccess='private'"), cells(" memAccess='shared'"), CPU),
        Try("devices/memory[dimm0]", dimm("model='dimm' access='private'"), dimm("model='dimm'")),
    ],
    ("memoryBacking/hugepages, devices/memory/source/pagesize", "always"): [
        Try(
            "memoryBacking/hugepages",
            f"<hugepages/>{BACKING}",
            f"<locked/>{BACKING}<allocation mode='immediate'/>",
            BACKING,
        ),
        Try(
            "devices/memory[0]/source/pagesize",
            dimm("model='dimm'", "<source><pagesize>2048</pagesize></source>"),
            dimm("model='dimm'", "<source><nodemask>0</nodemask></source>"),
        ),
    ],
    ("devices/memory model", "dimm"): [
        Try("devices/memory[0] model", dimm(f"model='{model}'"), dimm("model='dimm'"))
        for model in ("nvdimm", "virtio-pmem", "virtio-mem", "sgx-epc")
    ],
    ("os/type machine", "another"): [
        Try("os/type machine", f"machine='{bad}'", f"machine='{good}'", MACHINE)
        for bad, good in [
            ("microvm", "pc-i440fx-7.2"),
            ("isapc", "pc-q35-rhel9.2.0"),
            ("nitro-enclave", "q35"),
            ("x-remote", "pc"),
            ("", "pc-i440fx-jammy"),
        ]
    ],
    ("seclabel model='dac'", "static"): [
        *(
            Try("seclabel model='dac'", f"<label>{bad}</label>", f"<label>{good}</label>", LABEL)
            for bad, good in [
                ("+0:+0", "+1000:+0"),
                ("root:libvirt-qemu", "web1:libvirt-qemu"),
                ("", "1"),
                ("00", "+2147483647"),
                ("libvirt-qemu:libvirt-qemu", "web1"),
                ("qemu:qemu", "1879048191"),
                ("+1885632030:libvirt-qemu", "1885632029"),  # of another domain
            ]
        ),
        Try("seclabel model='dac'", STATIC.replace("static", "dynamic"), STATIC.replace("yes", "no"), STATIC),
        Try("seclabel model='dac'", STATIC.replace("dac", "apparmor"), STATIC, STATIC),
    ],
    ("launchSecurity", "always"): [Try("launchSecurity", f"{CRASH}<launchSecurity type='sev'/>", CRASH, CRASH)],
    ("devices/disk/driver cache", "network"): [
        Try(
            "devices/disk[vdb]/driver cache='none'",
            disk(driver="cache='none' io='native'"),
            disk(driver="cache='none' io='native'", more=LUKS),
        ),
        Try(
            "devices/disk[vdb]/driver cache='directsync'",
            disk(driver="cache='directsync'"),
            disk(driver="cache='writethrough'"),
        ),
        Try(
            "devices/disk[vdb]/driver cache='none'",
            disk("type='block' device='disk'", "cache='none'"),
            disk("type='network' device='disk'", "cache='none'"),
        ),
        Try(
            "devices/disk[vdb]/driver cache='none'",
            disk(driver="cache='none'", more=below(False)),
            disk(driver="cache='none'", more=below(True)),
        ),
        Try(
            "devices/disk[vdb]/driver cache='none'",
            disk("type='network' device='disk'", "cache='none'", below(False)),
            disk("type='network' device='disk'", "cache='none'", below(True)),
        ),
        Try("devices/disk[vdb]/shareable", disk(more="<shareable/>"), disk(more="<shareable/><readonly/>")),
        Try(
            "devices/disk[vdb]/shareable",
            disk(driver="cache='default'", more="<shareable/>"),
            disk(driver="cache='writeback'", more="<shareable/>"),
        ),
        Try("devices/disk[vdb]/shareable", disk(more="<shareable/>"), disk(more=f"<shareable/>{LUKS}")),
        Try(
            "devices/disk[vdb]/shareable",
            "<disk type='file' device='disk'><target dev='vdb'/><shareable/></disk>",
            "<disk type='file' device='disk'><target dev='vdb'/></disk>",
        ),
        Try(
            "devices/disk[sdb]/driver cache='none'",
            "<disk type='file' device='cdrom'><driver cache='none'/><target dev='sdb'/><readonly/></disk>",
            "<disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>",
        ),
    ],
    ("devices/disk device", "lun"): [
        Try(
            "devices/disk[vdb] device='lun'",
            disk("type='block' device='lun'"),
            disk("type='block' device='disk'", "io='io_uring'"),
        ),
    ],
    ("devices/disk type", "nvme"): [
        Try(
            f"devices/disk[vdb] type='{kind}'", disk(f"type='{kind}' device='disk'"), disk("type='block' device='disk'")
        )
        for kind in ("nvme", "vhostvdpa")
    ],
    ("devices/disk type, devices/interface type", "vhostuser"): [
        Try("devices/disk[vdb] type='vhostuser'", disk("type='vhostuser' device='disk'"), disk()),
        Try("devices/interface[1] type='vhostuser'", "<interface type='vhostuser'/>", "<interface type='bridge'/>"),
    ],
    ("devices/hostdev type", "mdev"): [
        Try(
            f"devices/hostdev[0] type='{kind}'",
            f"<hostdev mode='subsystem' type='{kind}'/>",
            f"<hostdev mode='subsystem' type='{twin}'/>",
        )
        for kind, twin in (("pci", "usb"), ("mdev", "usb"), ("scsi_host", "scsi"))
    ],
    ("devices/interface type", "vdpa"): [
        Try(
            f"devices/interface[02::1] type='{kind}'",
            f"<interface type='{kind}'><mac address='02::1'/></interface>",
            "<interface type='user'><mac address='02::1'/></interface>",
        )
        for kind in ("hostdev", "vdpa")
    ],
    ("devices/filesystem/driver type", "virtiofs"): [
        Try(
            "devices/filesystem[t]/driver type='virtiofs'",
            "<filesystem><driver type='virtiofs'/><target dir='t'/></filesystem>",
            "<filesystem><driver type='path'/><target dir='t'/></filesystem>",
        ),
    ],
    ("devices/video/model", "none"): [
        Try(
            "devices/video[0]/model",
            "<video><model type='virtio' primary='yes'/></video>",
            "<video><model type='none'/></video>",
        ),
        Try("devices/video[0]/model", "<video/>", "<video><model type='ramfb'/></video>"),
    ],
    ("devices/tpm", "always"): [Try("devices/tpm[0]", "<tpm model='tpm-crb'/>", "<rng model='virtio'/>")],
    ("devices/shmem", "always"): [Try("devices/shmem[0]", "<shmem name='s'/>", "<vsock model='virtio'/>")],
    ("devices", "pstore"): [
        Try(f"devices/{kind}", f"<{kind}/>", "<crypto/><panic/>") for kind in ("pstore", "of-tomorrow")
    ],
    ("features/hyperv", "synic"): [
        Try(
            "features/hyperv",
            f"<hyperv{mode}>{synic}</hyperv><acpi/>",
            f"<hyperv{twin}><synic state='off'/><relaxed state='on'/></hyperv><acpi/>",
            "<acpi/>",
        )
        for mode, synic, twin in (
            ("", "<synic state='on'/>", " mode='custom'"),
            (" mode='custom'", "<synic state='on'/>", ""),
            (" mode='passthrough'", "", ""),
            (" mode='host-model'", "", ""),
        )
    ],
    ("on_crash", "coredump"): [
        Try("on_crash", f"<on_crash>coredump-{then}</on_crash>", f"<on_crash>{then}</on_crash>", CRASH)
        for then in ("destroy", "restart")
    ],
    ("devices/watchdog action", "dump"): [
        Try(
            "devices/watchdog[0] action='dump'",
            "<watchdog model='itco' action='dump'/>",
            "<watchdog model='itco' action='reset'/>",
        ),
    ],
    ("qemu:commandline/qemu:arg", "next table"): [
        Try("qemu:commandline/qemu:arg[0]", args("-S"), HARMLESS, ARGS),
        Try("qemu:commandline/qemu:arg[2]", args("-smbios", "type=11,value=-gdb", "-gdb", "tcp::1"), HARMLESS, ARGS),
        Try("qemu:commandline/qemu:arg[0]", args("-device", "isa-debug-exit,driver=VGA"), HARMLESS, ARGS),
    ],
    ("qemu:commandline/qemu:env", "always"): [
        Try("qemu:commandline/qemu:env[LD_PRELOAD]", "<qemu:env name='LD_PRELOAD' value='/x.so'/>", HARMLESS, ARGS),
        Try("qemu:commandline/qemu:env[X]", f"<qemu:env name='X'/>{HARMLESS}", HARMLESS, ARGS),
    ],
    ("qemu:capabilities, qemu:deprecation, qemu:override", "always"): [
        Try(f"qemu:{name}", f"<qemu:{name}/><qemu:commandline>", "<qemu:commandline>", "<qemu:commandline>")
        for name in ("capabilities", "deprecation", "override", "of-tomorrow")
    ],
}

# What an error tells of before anything else is looked at.
ERRORS: dict[tuple[str, str], list[Try]] = {
    ("metadata/secret-ram", "not known"): [
        Try("metadata/secret-ram on-exposed", 'on-exposed="stop"', 'on-exposed="warn"', 'on-exposed="kill"'),
    ],
    ("os/type", "aarch64"): [
        Try(
            "os/type",
            "arch='ppc64' machine='pseries'",
            "arch='aarch64' machine='virt'",
            "arch='x86_64' machine='pc-q35-7.2'",
        ),
    ],
}


def row_of(place: str, word: str) -> Row:
    found = [row for row in all_rows() if row.place.replace("`", "") == place and word in row.refused]
    assert len(found) == 1, f"{len(found)} rows of {place} speak of {word}"
    return found[0]


def test_each_row_is_tried_and_each_try_has_its_row() -> None:
    assert sorted(row_of(*about) for about in [*TRIES, *ERRORS]) == sorted(all_rows())


def problems_of(xml: str) -> list[Problem]:
    return refusals(parse(xml), WRAPPER, kvm_maps_secret=False)


def cases(tries: dict[tuple[str, str], list[Try]]) -> list[Any]:
    return [
        pytest.param(one, id=f"{about[0]} {about[1]} {n}")
        for about, all_of in tries.items()
        for n, one in enumerate(all_of)
    ]


@pytest.mark.parametrize("one", cases(TRIES))
def test_what_a_row_says_is_refused_at_its_place_and_its_twin_is_not(one: Try) -> None:
    problems = problems_of(one.domain(one.bad))
    assert [problem.place for problem in problems] == [one.place]
    assert all(problems[0])
    assert problems_of(one.domain(one.good)) == []


@pytest.mark.parametrize("one", cases(ERRORS))
def test_what_an_error_says(one: Try) -> None:
    for look in (lambda xml: domain_of(parse(xml)), problems_of):
        with pytest.raises(ConfigError, match=f'domain "debian": {re.escape(one.place)}: '):
            look(one.domain(one.bad))
        assert look(one.domain(one.good)) is not None


@pytest.mark.parametrize("name", ["debian", "cells"])
def test_a_domain_needs_no_more_than_to_be_enabled(name: str) -> None:
    xml = (ROOT / f"tests/domains/{name}.xml").read_text()
    assert {problem.place for problem in problems_of(xml)} == {
        "devices/emulator",
        "memoryBacking/source",
        "seclabel model='dac'",
    }
    assert problems_of(enabled(xml, WRAPPER, "kill")) == []


def test_enabling_once_more_is_advised_where_it_helps() -> None:
    for there in (STATIC.replace("dac", "selinux"), STATIC.replace("static", "dynamic")):
        (problem,) = problems_of(DOMAIN.replace(STATIC, there))
        assert problem.advice == "run vmmback libvirt enable once more"
    (problem,) = problems_of(DOMAIN.replace("+1885632029:", "root:"))
    assert problem.advice == "remove it, and run vmmback libvirt enable once more"


def test_kvm_where_it_can_map_secret_ram() -> None:
    kvm = DOMAIN.replace("type='qemu'", "type='kvm'", 1)
    assert refusals(parse(kvm), WRAPPER, kvm_maps_secret=True) == []


def test_all_problems_are_told_at_once_each_on_a_line() -> None:
    devices = "<video/><tpm/><shmem/>" + disk(driver="cache='none'") + "</devices>"
    everything = DOMAIN.replace("</devices>", devices).replace(CRASH, "<on_crash>coredump-destroy</on_crash>")
    error = refused(parse(everything), problems_of(everything))
    assert isinstance(error, ConfigError)
    places = [re.match(r'domain "debian": (\S+?)[:/ ].*; \w', line) for line in error.message.splitlines()]
    assert len(places) == 5
    assert all(places)


def test_names_of_devices_are_shown_as_ascii() -> None:
    share = "<filesystem><driver type='virtiofs'/><target dir='\u202eé'/></filesystem>"
    (problem,) = problems_of(DOMAIN.replace("</devices>", f"{share}</devices>"))
    assert problem.place == r"devices/filesystem[\u202e\u00e9]/driver type='virtiofs'"


def refusing_lines() -> Iterator[range]:
    """Yield the lines of each place in the code that tells a problem."""
    for node in ast.walk(ast.parse(Path(domain_refusals.__file__).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Problem":
            yield range(node.lineno, (node.end_lineno or node.lineno) + 1)


@contextmanager
def traced() -> Iterator[set[int]]:
    """Collect which lines of the module run while the block does."""
    ran: set[int] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != domain_refusals.__file__:
            return None
        if event == "line":
            ran.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield ran
    finally:
        sys.settrace(before)


def test_there_is_no_refusal_in_the_code_that_the_table_lacks() -> None:
    with traced() as ran:
        for tries in TRIES.values():
            for one in tries:
                problems_of(one.domain(one.bad))
    lines = list(refusing_lines())
    assert len(lines) > 15
    assert [tells[0] for tells in lines if not ran & set(tells)] == []
