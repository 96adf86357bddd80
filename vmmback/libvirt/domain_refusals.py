"""What a domain's XML may not have if its RAM is to be secret: what cannot work, and what would break the promise.

docs/LIBVIRT.md has the table; tests/test_domain_refusals.py holds the two together.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vmmback.errors import ConfigError
from vmmback.libvirt.domain_arguments import KNOWN, refused_arguments
from vmmback.libvirt.domain_xml import name_of, policy_of, ram_of, wrong_domain
from vmmback.libvirt.own_user import is_own
from vmmback.toml_errors import ascii_path, quote

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_NO_PINS = "the kernel refuses to pin secret pages (EFAULT)"
_DEVICE_PINS = f"the device reads and writes the guest's RAM itself, and {_NO_PINS}"
_IO_ERRORS = "the guest would see I/O errors, not always"
_SMALL_PAGES = "secret RAM comes in pages of 4 KiB only"
_DUMPED = "libvirt would write the guest's RAM to a file"
_ORDINARY = "ordinary memory that the guest can write to"
_KINDS = {
    "audio", "channel", "console", "controller", "crypto", "disk", "emulator", "filesystem", "graphics", "hostdev",
    "hub", "input", "interface", "iommu", "lease", "memballoon", "memory", "nvram", "panic", "parallel", "redirdev",
    "redirfilter", "rng", "serial", "shmem", "smartcard", "sound", "tpm", "video", "vsock", "watchdog",
}  # fmt: skip
"""The kinds of devices of libvirt 9.0, and <crypto>, whatever is refused of them elsewhere."""
_ANOTHER_PROCESS = "a process beside QEMU would map the guest's RAM, which no lease and no report knows"


class Problem(NamedTuple):
    """Something in a domain's XML that secret RAM forbids."""

    place: str
    """Where in the XML, below <domain>; a device by its target, address or number."""
    reason: str
    """What is there, and why it cannot be."""
    advice: str
    """What to write instead."""

    @property
    def said(self) -> str:
        """Reason and advice in one."""
        return f"{self.reason}; {self.advice}"


def refusals(root: ET.Element, wrapper: Path, kvm_maps_secret: bool) -> list[Problem]:
    """Return all that is wrong with a domain whose RAM is to be secret, in no order. Raises ConfigError.

    `wrapper` is the emulator that it must have; `kvm_maps_secret` says whether KVM of this host can map secret RAM.
    """
    problems = [*_emulator(root, wrapper), *_memory(root), *_disks(root), *_devices(root), *_brings_memory(root)]
    problems += [*_machine(root), *_user(root), *_dumps(root), *_past_libvirt(root)]
    if root.get("type") == "kvm" and not kvm_maps_secret:
        reason = "KVM of this host cannot map secret RAM: the guest would end at its first instruction (EFAULT)"
        problems.append(Problem("type='kvm'", reason, "write <domain type='qemu'>"))
    if root.find("launchSecurity") is not None:
        problems.append(Problem("launchSecurity", f"it works on pinned memory, and {_NO_PINS}", "remove it"))
    return list(dict.fromkeys(problems))


def refused(root: ET.Element, problems: Sequence[Problem]) -> ConfigError:
    """Return the error that tells all problems of a domain, one a line."""
    return wrong_domain(name_of(root), [(problem.place, problem.said) for problem in problems])


def _emulator(root: ET.Element, wrapper: Path) -> Iterator[Problem]:
    policy = policy_of(root)
    emulator = (root.findtext("devices/emulator") or "").strip()
    if emulator != str(wrapper):
        what = f"is {quote(emulator)}" if emulator else "is not there"
        yield Problem(
            "devices/emulator",
            f"{what}, not {ascii_path(wrapper)}: QEMU would start with ordinary memory",
            "run vmmback libvirt enable",
        )
    if policy and policy.emulator == wrapper:
        yield Problem(
            "metadata/secret-ram emulator",
            "is the wrapper itself, which would start itself for ever",
            "write the path of QEMU",
        )


def _machine(root: ET.Element) -> Iterator[Problem]:
    kind = root.find("os/type")
    arch, machine = ("" if kind is None else kind.get(name, "") for name in ("arch", "machine"))
    if arch in {"x86_64", "i686"} and not re.fullmatch("q35|pc|pc-.+", machine):
        reason = f"the firmware of {quote(machine)} may be {_ORDINARY}, and nothing tells it from the guest's RAM"
        yield Problem("os/type machine", reason, "write machine='q35' or machine='pc'")


def _user(root: ET.Element) -> Iterator[Problem]:
    label = root.find("seclabel[@model='dac']")
    is_static = label is not None and label.get("type") == "static"
    user = (root.findtext("seclabel[@model='dac']/label") or "").strip() if is_static else ""
    if is_own(user, (root.findtext("uuid") or "").strip()):
        return
    what = f"its user is that of {quote(user)}" if user else "it has no user of its own"
    enable = "run vmmback libvirt enable once more"
    yield Problem(
        "seclabel model='dac'",
        f"{what}, as whom other domains run, and a process of QEMU's own user can take the descriptor of its RAM",
        enable if label is None or label.get("type") == "dynamic" else f"remove it, and {enable}",
    )


def _memory(root: ET.Element) -> Iterator[Problem]:
    yield from _backing(root)
    if root.find("memoryBacking/hugepages") is not None:
        yield Problem("memoryBacking/hugepages", _SMALL_PAGES, "remove it")
    for place, dimm in _each(root, "memory"):
        if dimm.find("source/pagesize") is not None:
            yield Problem(f"{place}/source/pagesize", _SMALL_PAGES, "remove it")
        if (model := dimm.get("model", "")) != "dimm":
            reason = f"memory of model {quote(model)} is a file of its own, or gives pages back to the host"
            yield Problem(f"{place} model", reason, "write model='dimm', or remove it")


def _backing(root: ET.Element) -> Iterator[Problem]:
    source = root.find("memoryBacking/source")
    said = "" if source is None else source.get("type", "")
    if said not in {"", "file", "memfd"}:
        yield Problem(
            "memoryBacking/source",
            f"the RAM of type {quote(said)} is made by no call that could be answered with secret RAM",
            "write <source type='memfd'/>",
        )
        return
    for block in ram_of(root):
        if not block.source:
            yield Problem(
                "memoryBacking/source",
                "is not there, and anonymous RAM is made by no call that could be answered with secret RAM",
                "write <source type='memfd'/>",
            )
        elif block.access == "private" or (block.source == "file" and block.access != "shared"):
            what = f"is {quote(block.access)}" if block.access else "is not there"
            write = "<access mode='shared'/>" if block.place.startswith("memoryBacking") else "shared"
            yield Problem(block.place, f"the access {what}, and secret RAM can only be mapped shared", f"write {write}")


def _disks(root: ET.Element) -> Iterator[Problem]:
    for place, disk in _each(root, "disk", "target", "dev"):
        kind, driver = disk.get("type", ""), disk.find("driver")
        cache = "default" if driver is None else driver.get("cache", "default")
        implied = cache == "default" and disk.find("shareable") is not None and disk.find("readonly") is None
        if kind in {"nvme", "vhostvdpa"}:
            yield Problem(f"{place} type='{kind}'", _DEVICE_PINS, "write type='block', with a driver of the kernel's")
        elif kind == "vhostuser":
            yield Problem(f"{place} type='{kind}'", _ANOTHER_PROCESS, "write type='file' or type='block'")
        elif disk.get("device") == "lun":
            reason = f"SCSI commands take the guest's own pages to the device (SG_IO), and {_NO_PINS}: {_IO_ERRORS}"
            yield Problem(f"{place} device='lun'", reason, "write device='disk'")
        elif (implied or cache in {"none", "directsync"}) and not _bounces(disk):
            yield Problem(
                f"{place}/shareable" if implied else f"{place}/driver cache='{cache}'",
                ("libvirt would add cache='none', and " if implied else "")
                + f"QEMU would give the kernel the guest's own pages (O_DIRECT), and {_NO_PINS}: {_IO_ERRORS}",
                "write cache='writeback', or encrypt the image, and all below it, with LUKS",
            )


def _bounces(image: ET.Element) -> bool:
    """Tell whether the kernel never gets the guest's own pages, as QEMU copies all for this image and those below it.

    It does if it encrypts, and if it, or a library in it, sends and receives (block/nbd.c, block/rbd.c of QEMU).
    """
    encrypted = [f"{place}[@format='luks']" for place in ("encryption", "source/encryption")]
    if image.get("type") != "network" and all(image.find(path) is None for path in encrypted):
        return False
    return all(_bounces(below) for below in image.findall("backingStore") if below.find("source") is not None)


def _devices(root: ET.Element) -> Iterator[Problem]:
    for place, device in _each(root, "hostdev"):
        if (kind := device.get("type", "")) in {"pci", "mdev", "scsi_host"}:
            yield Problem(f"{place} type='{kind}'", _DEVICE_PINS, "remove it; give the guest a virtio device")
    for place, nic in _each(root, "interface", "mac", "address"):
        kind, advice = nic.get("type", ""), "write type='bridge' or type='network'"
        if kind in {"hostdev", "vdpa"}:
            yield Problem(f"{place} type='{kind}'", _DEVICE_PINS, advice)
        elif kind == "vhostuser":
            yield Problem(f"{place} type='{kind}'", _ANOTHER_PROCESS, advice)
    for place, share in _each(root, "filesystem", "target", "dir"):
        if share.find("driver[@type='virtiofs']") is not None:
            advice = "write <driver type='path'/>, or remove it"
            yield Problem(f"{place}/driver type='virtiofs'", _ANOTHER_PROCESS, advice)


def _brings_memory(root: ET.Element) -> Iterator[Problem]:
    for hyperv in root.findall("features/hyperv"):
        if hyperv.get("mode", "custom") != "custom" or hyperv.find("synic[@state='on']") is not None:
            reason = f"synic gives each virtual CPU two pages of {_ORDINARY}"
            yield Problem("features/hyperv", reason, "write mode='custom', and <synic state='off'/>")
    for place, video in _each(root, "video"):
        model = video.find("model")
        if model is None or model.get("type") not in {"none", "ramfb"}:
            yield Problem(
                f"{place}/model",
                f"video memory is {_ORDINARY}",
                "write <model type='none'/>, or type='ramfb', whose picture lies in the guest's RAM",
            )
    for place, _ in _each(root, "tpm"):
        yield Problem(place, f"its pages tpm-ppi, and tpm-crb-cmd of a CRB, are {_ORDINARY}", "remove it")
    for place, _ in _each(root, "shmem"):
        yield Problem(place, f"it is {_ORDINARY}, and that other processes have", "remove it; <vsock> may do instead")
    for device in root.findall("devices/*"):
        if device.tag not in _KINDS:
            reason = f"a device of a kind that is not known here: it could bring {_ORDINARY}"
            yield Problem(f"devices/{_named(device.tag)}", reason, "remove it")


def _dumps(root: ET.Element) -> Iterator[Problem]:
    if (crash := (root.findtext("on_crash") or "").strip()).startswith("coredump-"):
        yield Problem("on_crash", f"{quote(crash)}: {_DUMPED}", f"write {crash.removeprefix('coredump-')}")
    for place, watchdog in _each(root, "watchdog"):
        if watchdog.get("action") == "dump":
            yield Problem(f"{place} action='dump'", _DUMPED, "write action='reset'")


def _each(root: ET.Element, kind: str, named_by: str = "", attribute: str = "") -> Iterator[tuple[str, ET.Element]]:
    """Yield the devices of a kind with their places, by a name, if they have one, else by number."""
    for number, device in enumerate(root.findall(f"devices/{kind}")):
        named = device.find(named_by) if named_by else None
        name = "" if named is None else named.get(attribute, "")
        yield f"devices/{kind}[{_named(name) or number}]", device


def _named(name: str) -> str:
    """Return a name out of the XML as it can stand in a place: printable, and cut when it is long."""
    return quote(name)[1:-1]


def _past_libvirt(root: ET.Element) -> Iterator[Problem]:
    """Yield what goes to QEMU past what libvirt itself, and this module, know of: only some arguments may."""
    given = [argument.get("value", "") for argument in root.findall(f"{_QEMU}commandline/{_QEMU}arg")]
    for number, said in refused_arguments(given):
        yield Problem(
            f"qemu:commandline/qemu:arg[{number}]",
            f"{quote(said)} is none of what is known to leave the guest's RAM secret ({', '.join(KNOWN)})",
            "remove it, or write the element that libvirt has for it",
        )
    for variable in root.findall(f"{_QEMU}commandline/{_QEMU}env"):
        yield Problem(
            f"qemu:commandline/qemu:env[{_named(variable.get('name', ''))}]",
            "it could have QEMU, and the wrapper, load code of somebody else's",
            "remove it",
        )
    for element in root:
        if element.tag.startswith(_QEMU) and element.tag != f"{_QEMU}commandline":
            reason = "libvirt would start QEMU with other arguments than follow from the rest of the XML"
            yield Problem(f"qemu:{_named(element.tag.removeprefix(_QEMU))}", reason, "remove it")
