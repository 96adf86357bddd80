"""Domains of a real libvirtd on secret RAM: hook, emulator and broker, each with what must not work beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.conftest import MIB, Supervisor, eventually
from integration.leftovers import command_line, descendants, descriptors_of
from vmmback import tiny_guest
from vmmback.libvirt import domain_edit, installed_files, programs
from vmmback.libvirt.own_user import own_uid
from vmmback.libvirt.places import EMULATOR, Places
from vmmback.libvirt.qemu_user import QemuUser
from vmmback.linux import procfs

if TYPE_CHECKING:
    from integration.libvirtd import Libvirtd

READY = "GUEST READY"
SIZE = 96 * MIB
WRAPPER = Path("/usr/local/libexec/vmmback/qemu-system-x86_64")
CPU = "--cpu=mode=maximum,disable=erms,disable=fsrm"
TWO_CELLS = f"{CPU},numa.cell0.memory=49152,numa.cell0.cpus=0,numa.cell1.memory=49152,numa.cell1.cpus=1"
ROOMY = 160 * MIB  # what a guest can grow from that has to describe more memory than it has
ONE_CELL = f"{CPU},numa.cell0.memory={ROOMY >> 10},numa.cell0.cpus=0"
CAN_GROW = ("--xml=./maxMemory=524288", "--xml=./maxMemory/@slots=2", ONE_CELL)
DIMM_BYTES = 128 * MIB
DIMM = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>"
BROKER = '[[pool]]\nsize = "96MiB"\ncount = 1\n'


def vmmback(libvirtd: Libvirtd, *arguments: str | Path, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    ended = libvirtd.run(sys.executable, "-m", "vmmback", *arguments, check=False)
    assert ended.returncode == exit_code, (ended.returncode, ended.stdout, ended.stderr)
    return ended


def recompiled(name: str, folder: Path, old: str, new: str) -> bytes:
    """Return what libvirt executes, with something else in its text."""
    shutil.copytree(programs.SOURCES, folder / name, dirs_exist_ok=True)
    source = folder / name / f"{name}.c"
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    host = installed_files.Host([], [sys.executable, "-I", "-m", "vmmback"], QemuUser(0, 0))
    return installed_files.program(name, host, folder / name)


class Host:
    """A host with libvirt, vmmback installed for it, and a broker, all private to the test."""

    def __init__(self, libvirtd: Libvirtd) -> None:
        self.libvirtd = libvirtd
        self.broker: Supervisor | None = None
        (libvirtd.inside / "run/broker.toml").write_text(BROKER)
        vmmback(libvirtd, "libvirt", "install")
        libvirtd.restart()

    def start_broker(self, *, filled: bool = True) -> None:
        self.broker = self.libvirtd.start(sys.executable, "-m", "vmmback", "broker", "/run/broker.toml")
        self.broker.wait_until(self._answers, "the broker answers")
        if filled:
            eventually(lambda: all(each["ready"] >= each["wanted"] for each in self.pool()["pool"]), "it is filled", 60)

    def _answers(self) -> bool:
        return (self.libvirtd.inside / "run/vmmback-broker/socket").is_socket() and self.libvirtd.run(
            sys.executable, "-m", "vmmback", "pool", "--json", check=False
        ).returncode == 0

    def close(self) -> None:
        """End the domains, and see that nothing of theirs is left in the broker."""
        if self.broker and self.broker.process.poll() is None:
            for name in self.libvirtd.virsh("list", "--name").split():
                self.libvirtd.virsh_ended("destroy", name)  # it fails where the domain has ended meanwhile
            eventually(lambda: self.leases() == [], "all leases have ended")
            self.end_broker(signal.SIGTERM)

    @property
    def broker_pid(self) -> int:
        assert self.broker is not None
        return self.broker.process.pid

    def end_broker(self, signum: signal.Signals = signal.SIGKILL) -> None:
        assert self.broker is not None
        os.kill(self.broker_pid, signum)
        self.broker.ended()

    def pool(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(vmmback(self.libvirtd, "pool", "--json").stdout)
        return found

    def leases(self) -> list[tuple[str, int]]:
        """Return purpose and size of each lease."""
        return sorted((lease["purpose"], lease["size"]) for lease in self.pool()["leases"])

    def define_roomy(self, name: str, source: str = "memfd") -> None:
        """Define a domain that memory can be plugged into."""
        self.define(name, *CAN_GROW, source=source, memory_mib=ROOMY >> 20)

    def define(self, name: str, *options: str, source: str = "memfd", memory_mib: int = 96, vcpus: int = 1) -> None:
        self.libvirtd.define(self.libvirtd.domain_xml(name, *options, memory_mib=memory_mib, vcpus=vcpus))
        vmmback(self.libvirtd, "libvirt", "enable", name, "--source", source)

    def refused(self, name: str) -> str:
        """Return why a domain does not start, in libvirt's own words; nothing of it is left."""
        ended = self.libvirtd.virsh_ended("start", name)
        assert ended.returncode == 1, ended.stdout
        assert self.libvirtd.qemu_pid(name) == 0
        return ended.stderr

    def report(self, name: str, exit_code: int = 0) -> dict[str, Any]:
        done = vmmback(self.libvirtd, "libvirt", "audit", name, "--json", exit_code=exit_code)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def recorded(self, name: str) -> str:
        """Return the verdict of the last audit that nobody asked for."""
        (row,) = [row for row in json.loads(vmmback(self.libvirtd, "libvirt", "list", "--json").stdout)
                  if row["name"] == name]  # fmt: skip
        return str(row["verdict"])


@pytest.fixture
def host(libvirtd: Libvirtd) -> Iterator[Host]:
    """It has no broker yet."""
    host = Host(libvirtd)
    yield host
    host.close()


@pytest.fixture
def ready(host: Host) -> Host:
    host.start_broker()
    return host


def secret_bytes(pid: int) -> int:
    mappings = [each for each in procfs.maps(pid) if each.path == procfs.SECRETMEM]
    return sum(each.size for each in mappings)


@pytest.mark.parametrize("source", ["memfd", "file"])
@pytest.mark.parametrize("cells", [(), (TWO_CELLS,)], ids=["no-cells", "two-cells"])
def test_a_domain_of_virt_install_boots_on_secret_ram_and_is_isolated(
    ready: Host, source: str, cells: tuple[str, ...]
) -> None:
    libvirtd = ready.libvirtd
    ready.define("one", *cells, source=source, vcpus=2 if cells else 1)
    libvirtd.virsh("start", "one")
    libvirtd.wait_for("one", READY)
    pid = libvirtd.qemu_pid("one")
    assert secret_bytes(pid) == SIZE
    assert sum(size for purpose, size in ready.leases() if purpose == "domain one") == SIZE
    report = ready.report("one")
    assert (report["verdict"], report["reasons"]) == ("isolated", [])
    assert report["memory"] == {
        "size": SIZE, "secret": SIZE, "present_pages": SIZE // 4096, "checked_pages": SIZE // 4096, "readable_pages": 0,
    }  # fmt: skip
    assert {each["name"] for each in report["exposures"]} >= {"libvirt-dump", "libvirt-save", "libvirt-migrate"}
    vmmback(libvirtd, "libvirt", "disable", "one")  # for its next start: it runs as it was
    assert ready.report("one")["verdict"] == "isolated"
    refused = vmmback(libvirtd, "libvirt", "uninstall", exit_code=2).stderr
    assert "polkit's rule would be gone: one\n" in refused
    assert report["process"]["capabilities"] == ["CAP_IPC_LOCK"]
    libvirtd.define(libvirtd.domain_xml("plain"))
    libvirtd.virsh("start", "plain")
    # Its group is that of all domains, its user is not.
    assert procfs.status(pid)["Uid"].split() == [str(own_uid(libvirtd.virsh("domuuid", "one")))] * 4
    shared = procfs.status(libvirtd.qemu_pid("plain"))
    assert shared["Uid"] != procfs.status(pid)["Uid"]
    assert shared["Gid"] == procfs.status(pid)["Gid"]
    libvirtd.virsh("destroy", "plain")
    libvirtd.virsh("destroy", "one")
    eventually(lambda: ready.leases() == [], "its leases have ended")


ON_ORDINARY = """
import asyncio, sys
from vmmback.libvirt import audit, records
from vmmback.libvirt.domain import Libvirt
from vmmback.isolation.direct_map import pagemap_entries
from vmmback.linux import page_file
uuid, pid, inode, size = sys.argv[1], *map(int, sys.argv[2:])
records.begin(uuid)
folder = records.new_frames(uuid)
records.write_frames(folder, {inode: page_file.sealed(pagemap_entries(pid, inode))})
records.name_frames(folder, uuid, pid)
with Libvirt(None) as connection:
    report = asyncio.run(audit.examine(audit.Subject("plain", uuid, "qemu", pid), connection.hmp("plain")))
print(report.as_json())
"""


def test_roms_that_the_guest_cannot_write_to_expose_no_domain(ready: Host) -> None:
    """Its nic has an option ROM, as each of libvirt's has, and its firmware is in flash, as UEFI's."""
    libvirtd = ready.libvirtd
    ready.define("one", "--network=user,model=virtio")
    loader = "<loader readonly='yes' type='pflash' stateless='yes'>/usr/share/seabios/bios-256k.bin</loader>"
    libvirtd.define(libvirtd.virsh("dumpxml", "--inactive", "one").replace("</type>", f"</type>{loader}"))
    libvirtd.virsh("start", "one")
    libvirtd.wait_for("one", READY)
    report = ready.report("one")
    assert report["verdict"] == "isolated"
    roms = [block for block in report["ram_blocks"] if block["name"].endswith(("flash0", "/virtio-net-pci.rom"))]
    assert [(rom["backing"], rom["guest_writable"]) for rom in roms] == [("ordinary", False)] * 2


def test_the_same_on_ordinary_memory_is_exposed(ready: Host) -> None:
    libvirtd = ready.libvirtd
    libvirtd.define(
        libvirtd.domain_xml("plain", "--memorybacking=source.type=memfd,access.mode=shared,allocation.mode=immediate")
    )
    libvirtd.virsh("start", "plain")
    libvirtd.wait_for("plain", READY)
    pid = libvirtd.qemu_pid("plain")
    (memory,) = [each for each in procfs.maps(pid) if each.path.startswith("/memfd:memory-backend-memfd")]
    uuid = libvirtd.virsh("domuuid", "plain")
    done = libvirtd.run(sys.executable, "-c", ON_ORDINARY, uuid, str(pid), str(memory.inode), str(SIZE))
    report = json.loads(done.stdout)
    assert report["verdict"] == "exposed"
    readable = {probe["name"] for probe in report["probes"] if probe["verdict"] == "readable"}
    assert readable >= {"direct-map", "qmp-proof", "proc-mem", "process-vm-readv"}
    assert ready.leases() == []
    refused = vmmback(libvirtd, "libvirt", "audit", "plain", exit_code=2)
    assert "does not ask for secret RAM" in refused.stderr


def normal(argv: list[str]) -> list[str]:
    """Return an argv without what differs at each start: the domain's number, and descriptors."""
    return [re.sub(r"fd=\d+", "fd=N", re.sub(r"domain-\d+-|/ram/\d+-", "N-", word)) for word in argv]


def test_a_domain_that_did_not_ask_is_as_it_was(libvirtd: Libvirtd) -> None:
    libvirtd.define(libvirtd.domain_xml("plain", "--memorybacking=source.type=file,access.mode=shared"))
    libvirtd.virsh("start", "plain")
    before = libvirtd.argv("plain")
    libvirtd.virsh("destroy", "plain")
    host = Host(libvirtd)
    libvirtd.virsh("start", "plain")  # no broker is there
    assert normal(libvirtd.argv("plain")) == normal(before)
    libvirtd.virsh("destroy", "plain")
    host.start_broker(filled=False)
    host.define("asks")
    libvirtd.virsh("start", "asks")
    libvirtd.virsh("start", "plain")
    assert normal(libvirtd.argv("plain")) == normal(before)
    assert secret_bytes(libvirtd.qemu_pid("plain")) == 0
    assert [purpose for purpose, _ in host.leases()] == ["domain asks"]
    host.close()


def test_libvirt_adds_direct_io_to_a_shareable_disk(libvirtd: Libvirtd) -> None:
    """What docs/LIBVIRT.md refuses such a disk for; the twin is read-only."""
    (libvirtd.inside / "run/disk.img").write_bytes(bytes(MIB))
    xml = libvirtd.domain_xml("one")
    for marks, is_direct in (("<shareable/>", True), ("<shareable/><readonly/>", False)):
        disk = f"<disk type='file'><source file='/run/disk.img'/><target dev='vdb' bus='virtio'/>{marks}</disk>"
        libvirtd.create(xml.replace("</devices>", f"{disk}</devices>"))
        assert ('"cache":{"direct":true' in " ".join(libvirtd.argv("one"))) is is_direct
        libvirtd.virsh("destroy", "one")


def test_qemus_arguments_are_those_that_libvirt_gave(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("secret", "--sysinfo=system.manufacturer=a b 'c' \"d\"", TWO_CELLS, vcpus=2)
    libvirtd.virsh("start", "secret")
    argv = libvirtd.argv("secret")
    xml = libvirtd.virsh("dumpxml", "--inactive", "secret")
    libvirtd.virsh("destroy", "secret")
    vmmback(libvirtd, "libvirt", "disable", "secret")
    # The same domain on ordinary memory, of the kind that was asked for.
    stock = re.sub(r"<(metadata|seclabel)\b.*?</\1>", "", xml, flags=re.DOTALL).replace(
        str(WRAPPER), "/usr/bin/qemu-system-x86_64"
    )
    libvirtd.define(stock)
    libvirtd.virsh("start", "secret")
    assert secret_bytes(libvirtd.qemu_pid("secret")) == 0
    assert normal(libvirtd.argv("secret")) == normal(argv)


RECORDS = """#!/bin/sh
cat >/dev/null
echo "$2" >>/run/calls
"""


def test_leases_follow_the_domain_through_its_life(ready: Host) -> None:
    libvirtd = ready.libvirtd
    record = libvirtd.hooks / "qemu.d/90-record"
    record.write_text(RECORDS)
    record.chmod(0o755)
    called = libvirtd.inside / "run/calls"

    def calls() -> list[str]:
        found = called.read_text().split() if called.exists() else []
        called.unlink(missing_ok=True)
        return found

    def leased(*sizes: int) -> None:
        eventually(lambda: ready.leases() == sorted(("domain one", size) for size in sizes), f"leases are {sizes}", 30)

    ready.define_roomy("one")
    dimm = libvirtd.folder / "dimm.xml"
    dimm.write_text(DIMM)
    libvirtd.virsh("start", "one")
    assert calls() == ["prepare", "start", "started"]
    leased(ROOMY)
    libvirtd.wait_for("one", READY)

    # What is plugged in when an audit looks stays mapped (docs/LIBVIRT.md, "How a domain gets its RAM").
    eventually(lambda: libvirtd.qemu_log("one").count("is isolated while it runs") == 2, "both audits have ended", 60)
    for _ in range(2):
        libvirtd.virsh("attach-device", "one", dimm)
        leased(ROOMY, DIMM_BYTES)
        assert secret_bytes(libvirtd.qemu_pid("one")) == ROOMY + DIMM_BYTES
        libvirtd.virsh("detach-device", "one", dimm)
        leased(ROOMY)
    assert calls() == []

    for signum in (signal.SIGTERM, signal.SIGKILL):
        libvirtd.restart(signum)
        leased(ROOMY)
    eventually(
        lambda: called.exists() and called.read_text().split()[-1:] == ["reconnect"], "libvirtd has its domain again"
    )
    assert ready.report("one")["verdict"] == "isolated"
    calls()

    saved = libvirtd.inside / "run/saved"
    libvirtd.virsh("save", "one", "/run/saved")
    assert saved.exists()
    leased()
    libvirtd.virsh("restore", "/run/saved")
    leased(ROOMY)
    assert calls() == ["stopped", "release", "restore", "prepare", "start", "started"]
    assert secret_bytes(libvirtd.qemu_pid("one")) == ROOMY
    saved.unlink()

    os.kill(libvirtd.qemu_pid("one"), signal.SIGKILL)
    leased()
    eventually(lambda: called.exists() and called.read_text().split() == ["stopped", "release"], "it has ended")
    calls()

    libvirtd.virsh("start", "one")
    leased(ROOMY)
    libvirtd.virsh("destroy", "one")
    leased()
    assert calls() == ["prepare", "start", "started", "stopped", "release"]


def test_what_was_plugged_in_is_proved_and_leased_as_long_as_qemu_has_it(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define_roomy("one", "file")
    libvirtd.virsh("start", "one")
    libvirtd.wait_for("one", READY)
    dimm = libvirtd.folder / "dimm.xml"
    dimm.write_text(DIMM)
    libvirtd.virsh("attach-device", "one", dimm)
    grown = ready.report("one")
    assert (grown["verdict"], grown["memory"]["secret"]) == ("isolated", ROOMY + DIMM_BYTES)
    # The look at QEMU's flat views keeps it mapped: system/memory.c, mtree_info, drops one reference of several.
    libvirtd.virsh("detach-device", "one", dimm)
    eventually(lambda: "model='dimm'" not in libvirtd.virsh("dumpxml", "one"), "the guest has let it go")
    pid = libvirtd.qemu_pid("one")

    def leased_is_what_is_mapped() -> bool:
        return sum(size for _, size in ready.leases()) == secret_bytes(pid)

    eventually(leased_is_what_is_mapped, "the lease ends with the mapping")
    after = ready.report("one")
    eventually(leased_is_what_is_mapped, "the lease has not ended before the mapping")
    assert (after["verdict"], after["memory"]["secret"]) == ("isolated", ROOMY)
    libvirtd.virsh("destroy", "one")
    eventually(lambda: ready.leases() == [], "its leases have ended")


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_without_a_broker_that_answers_a_domain_does_not_start(host: Host, tmp_path: Path) -> None:
    host.libvirtd.define(host.libvirtd.domain_xml("one"))
    vmmback(host.libvirtd, "libvirt", "enable", "one")
    assert "no broker can be reached at /run/vmmback-broker/socket" in host.refused("one")

    host.start_broker()
    hook = Places(host.libvirtd.inside).hook
    content = hook.read_bytes()
    hook.write_bytes(recompiled("hook", tmp_path, "ANNOUNCE_S = 10", "ANNOUNCE_S = 1"))
    os.kill(host.broker_pid, signal.SIGSTOP)
    assert "the broker did not answer" in host.refused("one")
    os.kill(host.broker_pid, signal.SIGCONT)
    hook.write_bytes(content)
    eventually(lambda: host.leases() == [], "nothing is lent")
    host.libvirtd.virsh("start", "one")

    host.end_broker()
    host.libvirtd.wait_for("one", READY)  # it lives on
    assert secret_bytes(host.libvirtd.qemu_pid("one")) == SIZE
    host.start_broker(filled=False)
    assert host.leases() == [("domain one", SIZE)]
    assert host.report("one")["verdict"] == "isolated"


def test_a_domain_that_does_not_fit_is_refused_with_the_reason(ready: Host) -> None:
    ready.define("large", memory_mib=1 << 20)
    error = ready.refused("large")
    assert re.search(r"vmmback: error: 1048576 MiB of secret RAM do not fit: \d+ MiB do\.", error), error
    assert "give the domain less <memory> (virsh edit), or free memory on the host" in error
    assert ready.leases() == []


def test_what_speaks_against_a_domain_is_in_libvirts_error(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("one")
    xml = libvirtd.virsh("dumpxml", "--inactive", "one")
    libvirtd.define(xml.replace("</devices>", "<video><model type='vga'/></video></devices>"))
    assert "devices/video[0]/model" in ready.refused("one")
    libvirtd.define(xml.replace(str(WRAPPER), "/usr/bin/qemu-system-x86_64", 1))
    assert "vmmback libvirt enable" in ready.refused("one")
    libvirtd.define(handing_through(xml, "-device", "isa-debug-exit,driver=VGA"))
    assert "qemu:commandline/qemu:arg[0]" in ready.refused("one")


def handing_through(xml: str, *arguments: str) -> str:
    """Return a domain whose QEMU gets these arguments past libvirt's XML."""
    handed = "".join(f"<qemu:arg value='{argument}'/>" for argument in arguments)
    with_namespace = xml.replace("<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ", 1)
    return with_namespace.replace("</domain>", f"<qemu:commandline>{handed}</qemu:commandline></domain>")


def test_what_is_handed_through_to_qemu_leaves_a_domain_isolated(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("one")
    libvirtd.define(handing_through(
        libvirtd.virsh("dumpxml", "--inactive", "one"),
        "-fw_cfg", "name=opt/org.example/role,string=web", "-smbios", "type=11,value=one",
        "-device", f"isa-applesmc,osk={'x' * 64}", "-device", "isa-debug-exit",
    ))  # fmt: skip
    libvirtd.virsh("start", "one")
    assert "isa-debug-exit" in libvirtd.argv("one")
    assert ready.report("one")["verdict"] == "isolated"


BY_HAND = ["-name", "guest=one,debug-threads=on", "-object"]
BACKEND = json.dumps({"qom-type": "memory-backend-memfd", "id": "pc.ram", "size": SIZE})


# An emulator of domain one that waits, and one of domain two that says it is domain one's.
STEALS = """
    for (char **told = arguments; *told; told++) {
        while (strncmp(*told, "guest=one,", 10) == 0 && access("/run/go", F_OK) != 0) usleep(100000);
        static char *others[] = {OTHERS, NULL};
        if (strncmp(*told, "guest=two,", 10) == 0) arguments = others;
    }
    long ram_mib = 0;"""


def test_nobody_but_what_libvirt_starts_gets_a_domains_ram(ready: Host, tmp_path: Path) -> None:
    libvirtd = ready.libvirtd
    ready.define("one")
    ready.define("two")
    as_qemu = ["setpriv", "--reuid=libvirt-qemu", "--regid=libvirt-qemu", "--clear-groups"]
    by_hand = libvirtd.run(*as_qemu, WRAPPER, *BY_HAND, BACKEND, check=False)
    assert by_hand.returncode == 4
    assert "no domain 'one' was announced" in by_hand.stderr

    # Between the hook and the emulator: libvirt's emulator waits, and others try.
    emulator = Places(libvirtd.inside).emulator
    quick = emulator.with_name("emulator-of-a-test")
    emulator.rename(quick)
    others = ", ".join(json.dumps(argument) for argument in (*BY_HAND, BACKEND))
    emulator.write_bytes(recompiled("emulator", tmp_path, "\n    long ram_mib = 0;", STEALS.replace("OTHERS", others)))
    os.chown(emulator, 0, quick.stat().st_gid)
    emulator.chmod(0o750)
    os.setxattr(emulator, "security.capability", programs.CAPABILITY)
    program = libvirtd.start("virsh", "-c", libvirtd.uri, "start", "one")
    eventually(lambda: libvirtd.qemu_pid("one") != 0, "libvirt has started its emulator")
    by_quick = libvirtd.inside / "usr/local/libexec/vmmback/qemu-of-a-test"
    by_quick.write_text(f"#!{EMULATOR}-of-a-test /usr/bin/qemu-system-x86_64\n")
    by_quick.chmod(0o755)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    not_the_one = (4, "is not the one that libvirt has started for domain 'one'")
    for user, (code, said) in (
        (as_qemu, not_the_one),
        (["env"], not_the_one),
        ([*nobody, "sh", "-c", 'exec "$@"', "sh"], (126, "Permission denied")),
    ):
        stolen = libvirtd.run(*user, "/usr/local/libexec/vmmback/qemu-of-a-test", *BY_HAND, BACKEND, check=False)
        assert (stolen.returncode, said in stolen.stderr) == (code, True), (user, stolen.stderr)
    assert not_the_one[1] in ready.refused("two")
    (libvirtd.inside / "run/go").touch()
    assert program.process.wait(60) == 0, program.stderr
    libvirtd.wait_for("one", READY)
    # Its own claim cannot be made twice.
    again = libvirtd.run(*as_qemu, WRAPPER, *BY_HAND, BACKEND, check=False)
    assert "no domain 'one' was announced" in again.stderr
    assert ready.leases() == [("domain one", SIZE)]


def test_a_start_that_is_broken_off_while_its_ram_is_made_holds_none_of_it(ready: Host) -> None:
    """The pool has none of this size."""
    libvirtd = ready.libvirtd
    ready.define("big", memory_mib=512)
    starting = libvirtd.start("virsh", "-c", libvirtd.uri, "start", "big")
    workers = list[int]()

    def made() -> bool:
        for pid, program in descendants(ready.broker_pid).items():
            if "prefault_worker" in program:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)  # so that it does not end by itself
                    workers.append(pid)
        return bool(workers)

    def waits_for_it() -> bool:
        with suppress(FileNotFoundError):  # it is not there yet
            return Path(f"/proc/{libvirtd.qemu_pid('big')}/wchan").read_text().startswith("unix_stream")
        return False

    eventually(made, "its RAM is being made")
    eventually(waits_for_it, "its emulator waits for the broker's answer")
    libvirtd.virsh("destroy", "big")
    assert starting.process.wait(30) == 1
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "nobody makes it any more")
    assert ready.leases() == []
    uuid = libvirtd.virsh("domuuid", "big")
    assert list((libvirtd.inside / "run/vmmback-libvirt/records").glob(f"{uuid}*")) == []


def test_no_two_domains_have_one_user(ready: Host) -> None:
    """They could take each other's RAM, capability or not."""
    libvirtd = ready.libvirtd
    for name in ("one", "two"):
        ready.define(name)
        xml = libvirtd.virsh("dumpxml", "--inactive", name)
        libvirtd.define(xml.replace(f"+{own_uid(libvirtd.virsh('domuuid', name))}:", "+5000:"))
    libvirtd.virsh("start", "one")
    assert "would run as user 5000, as domain one does" in ready.refused("two")
    libvirtd.virsh("destroy", "one")
    libvirtd.virsh("start", "two")
    assert ready.report("two")["verdict"] == "isolated"
    libvirtd.virsh("destroy", "two")
    by_number = libvirtd.run("id", "--user", "libvirt-qemu").stdout.strip()
    libvirtd.define(libvirtd.virsh("dumpxml", "--inactive", "two").replace("+5000:", f"+{by_number}:"))
    assert "as all domains do by default" in ready.refused("two")


TAKES = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).syscall(438, os.pidfd_open(int(sys.argv[1])), 0, 0) < 0:  # pidfd_getfd
    sys.exit(os.strerror(ctypes.get_errno()))
"""


def test_nobody_but_root_takes_a_descriptor_of_qemus(ready: Host) -> None:
    """Not who runs as other domains do, were it with the same capability, and not who runs as its own user."""
    libvirtd = ready.libvirtd
    ready.define("one")
    libvirtd.virsh("start", "one")
    pid = libvirtd.qemu_pid("one")
    takes = ["/usr/bin/python3", "-c", TAKES, str(pid)]
    own = own_uid(libvirtd.virsh("domuuid", "one"))
    with_it = ["--inh-caps=+ipc_lock", "--ambient-caps=+ipc_lock"]
    for uid, by in (("libvirt-qemu", []), ("libvirt-qemu", with_it), (str(own), [])):
        as_user = ["setpriv", f"--reuid={uid}", "--regid=libvirt-qemu", "--clear-groups", *by, "--"]
        assert libvirtd.run(*as_user, *takes, check=False).stderr == "Operation not permitted\n"
    libvirtd.run(*takes)


def test_more_memory_waits_for_the_next_broker_or_is_refused(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define_roomy("one")
    libvirtd.virsh("start", "one")
    libvirtd.wait_for("one", READY)
    dimm = libvirtd.folder / "dimm.xml"
    dimm.write_text(DIMM)
    ready.end_broker()
    refused = libvirtd.virsh_ended("attach-device", "one", dimm)
    assert refused.returncode == 1
    assert "Cannot allocate memory" in refused.stderr
    pid = libvirtd.qemu_pid("one")
    assert secret_bytes(pid) == ROOMY
    assert not [
        each for each in procfs.maps(pid) if each.size >= DIMM_BYTES and each.path.startswith(("/memfd", "/var"))
    ]

    attaching = libvirtd.start("virsh", "-c", libvirtd.uri, "attach-device", "one", str(dimm))
    ready.start_broker(filled=False)
    assert attaching.process.wait(60) == 0, attaching.stderr
    eventually(lambda: ready.leases() == sorted([("domain one", ROOMY), ("domain one", DIMM_BYTES)]), "it is lent")

    # What nobody can tell of a domain is no verdict on it.
    ready.end_broker()
    untold = vmmback(libvirtd, "libvirt", "audit", "one", exit_code=3)
    assert "no broker says whose it is" in untold.stderr
    assert libvirtd.virsh("domstate", "one") == "running"
    ready.start_broker(filled=False)
    assert ready.report("one")["verdict"] == "isolated"


def test_a_domain_that_asks_no_longer_is_left_alone_also_if_it_was_changed_while_it_ran(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("one")
    libvirtd.virsh("start", "one")
    vmmback(libvirtd, "libvirt", "disable", "one")
    libvirtd.virsh("metadata", "one", "urn:vmmback:domain:1.0", "--live", "--remove")
    libvirtd.virsh("destroy", "one")
    eventually(lambda: ready.leases() == [], "its leases have ended")
    run = libvirtd.inside / "run/vmmback-libvirt"
    assert [path for name in ("names", "secret") for path in (run / name).iterdir()] == []
    libvirtd.virsh("start", "one")
    assert command_line(libvirtd.qemu_pid("one")).startswith("/usr/bin/qemu-system-x86_64 ")
    assert [path for name in ("names", "secret") for path in (run / name).iterdir()] == []
    libvirtd.wait_for("one", READY)


def test_another_qemu_of_the_same_name_is_not_started_in_the_place_of_the_domains_own(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("one")
    xml = libvirtd.virsh("dumpxml", "--inactive", "one")
    (own,) = re.findall('emulator="([^"]+)"', xml)
    other = Path("/usr/local/other") / Path(own).name
    libvirtd.run("mkdir", str(other.parent))
    libvirtd.run("ln", "-s", own, str(other))  # a copy would not find its modules
    libvirtd.define(xml.replace(f'emulator="{own}"', f'emulator="{other}"'))
    error = ready.refused("one")
    assert f"is the wrapper of {own}" in error
    assert f"vmmback libvirt install --emulator {other}" in error
    assert "is the wrapper of" in vmmback(libvirtd, "libvirt", "enable", "one", exit_code=2).stderr
    vmmback(libvirtd, "libvirt", "install", "--emulator", other)
    libvirtd.virsh("start", "one")
    libvirtd.wait_for("one", READY)
    assert command_line(libvirtd.qemu_pid("one")).split()[0] == str(other)
    libvirtd.virsh("destroy", "one")
    vmmback(libvirtd, "libvirt", "disable", "one")
    assert f"<emulator>{other}</emulator>" in libvirtd.virsh("dumpxml", "one")


def test_the_hook_has_it_audited_and_what_was_its_ram_looked_at(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("one")
    libvirtd.virsh("start", "one")
    eventually(lambda: ready.recorded("one") == "isolated", "the hook's audit is there", 60)
    uuid = libvirtd.virsh("domuuid", "one")
    records = libvirtd.inside / "run/vmmback-libvirt"
    assert (records / "secret" / uuid).exists()
    frames = records / "records" / f"{uuid}.{libvirtd.qemu_pid('one')}.frames"
    assert frames.is_dir()
    libvirtd.virsh("destroy", "one")
    eventually(lambda: not frames.exists(), "its frames are forgotten", 30)
    eventually(lambda: "freed-frames" in (records / "records" / f"{uuid}.json").read_text(), "they were looked at", 30)
    assert not (records / "secret" / uuid).exists()


def answering(ready: Host) -> set[int]:
    """Return the broker's processes that answer the calls of QEMUs, or wait for one."""
    return {pid for pid, line in descendants(ready.broker_pid).items() if "handoff_worker" in line}


def test_of_a_qemu_that_dies_with_libvirtd_nothing_is_left_and_another_one_runs_on(ready: Host) -> None:
    libvirtd = ready.libvirtd
    for name in ("dies", "lives"):
        ready.define(name)
        libvirtd.virsh("start", name)
    uuids = {name: libvirtd.virsh("domuuid", name) for name in ("dies", "lives")}
    eventually(lambda: {ready.recorded(name) for name in uuids} == {"isolated"}, "the hook's audits are there", 60)
    pids = {name: libvirtd.qemu_pid(name) for name in uuids}
    workers = answering(ready)
    libvirtd.stop(signal.SIGKILL)
    os.kill(pids["dies"], signal.SIGKILL)
    lives = [("domain lives", 96 * MIB)]
    eventually(lambda: ready.leases() == lives, "the lease of the dead one ends without libvirtd")

    libvirtd.begin()
    eventually(lambda: libvirtd.virsh("domstate", "dies") == "shut off", "libvirtd knows that it died")
    assert libvirtd.qemu_pid("lives") == pids["lives"]
    assert ready.report("lives")["verdict"] == "isolated"
    run = libvirtd.inside / "run/vmmback-libvirt"
    of_the_dead = f"{uuids['dies']}.{pids['dies']}.frames"
    eventually(lambda: not (run / "records" / of_the_dead).exists(), "what was its RAM was looked at")
    assert [path.name for path in (run / "secret").iterdir()] == [uuids["lives"]]
    assert [path.name for path in (run / "names").iterdir()] == ["lives"]
    assert len(workers - answering(ready)) == 1  # who answered its calls
    libvirtd.virsh("start", "dies")
    eventually(lambda: ready.leases() == sorted([*lives, ("domain dies", 96 * MIB)]), "it is lent to again")


AT_ONCE = 20
SMALL = 32 * MIB


@pytest.mark.timeout_s(480)
def test_many_domains_that_start_at_once_are_all_isolated(host: Host) -> None:
    """Tiny guests, whose boot takes nothing from the others: a ROM that fills its RAM, says READY and halts."""
    libvirtd = host.libvirtd
    rom = libvirtd.inside / "var/lib/libvirt/boot/tiny.rom"
    rom.write_bytes(tiny_guest.rom())
    (libvirtd.inside / "run/broker.toml").write_text(f'[[pool]]\nsize = "{SMALL >> 20}MiB"\ncount = {AT_ONCE // 2}\n')
    host.start_broker()  # half of them are ready, the others are made
    xml = libvirtd.domain_xml("0", memory_mib=SMALL >> 20)
    xml = re.sub(
        r"<kernel>.*?</cmdline>", "<loader type='rom'>/var/lib/libvirt/boot/tiny.rom</loader>", xml, flags=re.S
    )
    names = [f"n{number}" for number in range(AT_ONCE)]
    for name in names:
        own = re.sub("<uuid>.*?</uuid>", "", xml).replace("<name>0<", f"<name>{name}<")
        libvirtd.define(own.replace("/0.serial", f"/{name}.serial"))
        defined = libvirtd.virsh("dumpxml", "--inactive", name)
        libvirtd.define(domain_edit.enabled(defined, WRAPPER, "kill"))
    starting = [libvirtd.start("virsh", "-c", libvirtd.uri, "start", name) for name in names]
    for name, start in zip(names, starting, strict=True):
        assert start.process.wait(120) == 0, (name, start.stderr)
    assert host.leases() == sorted((f"domain {name}", SMALL) for name in names)

    def verdicts() -> set[str]:
        rows = json.loads(vmmback(libvirtd, "libvirt", "list", "--json").stdout)
        return {row["verdict"] for row in rows}

    eventually(lambda: verdicts() == {"isolated"}, "all were audited", 120)
    eventually(lambda: all("READY" in libvirtd.console(name) for name in names), "all have filled their RAM", 60)


def test_a_name_is_a_name_whatever_signs_are_in_it(ready: Host) -> None:
    name = 'a\'b "c" & <d>, e'
    xml = ready.libvirtd.domain_xml("plain")
    written = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    ready.libvirtd.define(re.sub("<uuid>.*?</uuid>", "", xml).replace("<name>plain<", f"<name>{written}<"))
    vmmback(ready.libvirtd, "libvirt", "enable", name)
    ready.libvirtd.virsh("start", name)
    assert ready.leases() == [(f"domain {name}", SIZE)]
    assert ready.report(name)["verdict"] == "isolated"
    ready.libvirtd.virsh("destroy", name)


def secret_files(pid: int) -> int:
    """Return how many descriptors of secret RAM a process has."""
    return sum(link == procfs.SECRETMEM for link in descriptors_of(pid).values())


def test_a_start_that_fails_half_way_keeps_no_memory(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("one", TWO_CELLS, vcpus=2)
    records = libvirtd.inside / "run/vmmback-libvirt/records"
    records.parent.mkdir(exist_ok=True)
    records.write_text("in the way")
    for _ in range(2):
        assert "vmmback: error" in ready.refused("one")
    records.unlink()

    def as_much_as_is_ready() -> bool:
        pool = ready.pool()
        ready_files = sum(each["ready"] for each in pool["pool"])
        return not pool["leases"] and secret_files(ready.broker_pid) == int(ready_files)

    eventually(as_much_as_is_ready, "the broker has nothing but its pool", 30)
    libvirtd.virsh("start", "one")
    assert len(ready.leases()) == 2


def test_what_was_found_is_of_the_run_that_it_is_shown_for(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("one")
    libvirtd.virsh("start", "one")
    eventually(lambda: ready.recorded("one") == "isolated", "the hook's audit is there", 60)
    libvirtd.virsh("destroy", "one")
    libvirtd.virsh("start", "one")  # before anybody looked at what was its RAM
    frames = f"{libvirtd.virsh('domuuid', 'one')}.{libvirtd.qemu_pid('one')}.frames"
    records = libvirtd.inside / "run/vmmback-libvirt/records"
    eventually(
        lambda: [each.name for each in records.glob("*.frames")] == [frames], "the first run's are forgotten", 30
    )
    eventually(lambda: ready.recorded("one") == "isolated", "the second run is audited", 60)
    libvirtd.virsh("destroy", "one")

    vmmback(libvirtd, "libvirt", "disable", "one")
    libvirtd.virsh("start", "one")
    vmmback(libvirtd, "libvirt", "enable", "one")  # for its next start
    assert secret_bytes(libvirtd.qemu_pid("one")) == 0
    assert ready.recorded("one") == ""


def test_an_audit_that_comes_to_nothing_is_tried_again(ready: Host) -> None:
    libvirtd = ready.libvirtd
    ready.define("one")
    libvirtd.virsh("start", "one")
    libvirtd.stop(signal.SIGKILL)  # before the hook's audit, which comes a second later
    eventually(
        lambda: "one could not be examined: libvirt cannot be reached" in libvirtd.qemu_log("one"), "it was tried", 30
    )
    libvirtd.begin()
    eventually(lambda: ready.recorded("one") == "isolated", "it is tried again", 60)
    assert libvirtd.virsh("domstate", "one") == "running"


IMPATIENT = """
import sys
from vmmback.cli import run
from vmmback.libvirt import started_audit
started_audit._PATIENCE_S, started_audit._PATIENCE_S_PER_GIB, started_audit._BOOTED_S = 3.0, 0.0, 0.1
sys.argv[1:] = ["libvirt", "audit", "--started", "--", "one"]
run()
"""


@pytest.mark.parametrize(
    ("signum", "reason", "on_exposed"),
    [(signal.SIGSTOP, "no answer within 3 s", "kill"), (signal.SIGTERM, "libvirt cannot be reached", "warn")],
    ids=["hung", "gone"],
)
def test_a_domain_that_is_never_examined_does_not_go_on_unless_it_may(
    ready: Host, signum: signal.Signals, reason: str, on_exposed: str, tmp_path: Path
) -> None:
    libvirtd = ready.libvirtd
    hook = libvirtd.hooks / "qemu.d/50-vmmback"
    hook.write_bytes(recompiled("hook", tmp_path, "if (is_there(mark)) audit(", "if (false) audit("))
    ready.define("one")
    vmmback(libvirtd, "libvirt", "enable", "one", "--on-exposed", on_exposed)
    libvirtd.virsh("start", "one")
    pid = libvirtd.qemu_pid("one")
    libvirtd.stop(signum) if signum == signal.SIGTERM else os.kill(libvirtd.pid, signum)
    audited = libvirtd.run(sys.executable, "-c", IMPATIENT, check=False)
    if on_exposed == "kill":
        assert audited.stderr.endswith("domain one was never examined and is ended (on-exposed is kill)\n")
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "its QEMU has ended")
    libvirtd.begin() if signum == signal.SIGTERM else os.kill(libvirtd.pid, signal.SIGCONT)
    eventually(lambda: ready.recorded("one") == "inconclusive", "that is kept", 30)
    (row,) = json.loads(vmmback(libvirtd, "libvirt", "list", "--json").stdout)
    assert [each[: len(f"not examined: {reason}")] for each in row["reasons"]] == [f"not examined: {reason}"]
    if on_exposed == "warn":
        assert (row["state"], libvirtd.qemu_pid("one")) == ("running", pid)
        assert ready.report("one")["verdict"] == "isolated"
        assert ready.recorded("one") == "isolated"


def test_who_may_change_a_domain_can_have_its_memory_dumped(ready: Host) -> None:
    """The way that the table of docs/LIBVIRT.md has beside QEMU's monitor; `enable` refuses it in a domain's XML."""
    libvirtd = ready.libvirtd
    ready.define("one", "--panic=default")
    libvirtd.virsh("start", "one")
    libvirtd.wait_for("one", READY)
    libvirtd.virsh("set-lifecycle-action", "one", "crash", "coredump-destroy", "--live")
    # What the guest's own driver does when it panics (docs/specs/pvpanic.txt of QEMU).
    libvirtd.virsh("qemu-monitor-command", "one", "--hmp", "o /b 0x505 1")
    dumps = libvirtd.inside / "var/lib/libvirt/qemu/dump"
    eventually(lambda: libvirtd.virsh("domstate", "one", "--reason") == "shut off (crashed)", "it has panicked", 30)
    (dump,) = dumps.iterdir()
    assert dump.stat().st_size > SIZE
    assert READY.encode() in dump.read_bytes()
    dump.unlink()
