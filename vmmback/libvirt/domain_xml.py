"""Reading a domain's XML: whether it asks for secret RAM, and which RAM blocks its QEMU will have.

A domain asks by an element of our namespace in its <metadata>, which libvirt keeps and does not read::

    <vmmback:secret-ram xmlns:vmmback="urn:vmmback:domain:1.0" on-exposed="kill" emulator="/usr/bin/qemu-system-x86_64">

The XML is libvirt's own: it has parsed and written it. Sizes and names follow src/qemu/qemu_domain.c
(qemuDomainAlignMemorySizes), qemu_command.c (qemuBuildMemoryBackendProps) and qemu_alias.c of libvirt 9.0.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, cast

from vmmback.errors import ConfigError
from vmmback.toml_errors import quote

NAMESPACE = "urn:vmmback:domain:1.0"
ASKS = f"{{{NAMESPACE}}}secret-ram"
BEFORE = f"{{{NAMESPACE}}}before"
ON_EXPOSED = ("kill", "warn")

OnExposed = Literal["kill", "warn"]
Source = Literal["file", "memfd"]

_KIB, _MIB = 1 << 10, 1 << 20
_RAM_GRAIN, _DIMM_GRAIN = _MIB, 2 * _MIB
_SHOWN_NAME = 64


class Policy(NamedTuple):
    """What a domain asks for."""

    on_exposed: OnExposed
    emulator: Path
    """The QEMU that the wrapper is to execute."""


class RamBlock(NamedTuple):
    """A piece of the guest's RAM, as QEMU will have it when it starts."""

    name: str
    """The id of its memory backend."""
    size: int
    """In bytes."""
    source: Source | None
    """What backs it; None is anonymous memory."""
    access: str
    """What is said of it: shared, private, or nothing."""
    place: str
    """Where in the XML its access is said, or could be."""


class Domain(NamedTuple):
    """A domain that asks for secret RAM."""

    name: str
    uuid: str
    type: str
    """What runs the guest's code: "qemu" is TCG."""
    policy: Policy
    ram: tuple[RamBlock, ...]
    room: int
    """Bytes of RAM that may still be plugged in while the guest runs."""

    @property
    def source(self) -> Source | None:
        """What backs the guest's RAM, None if nothing can that is secret."""
        return self.ram[0].source


def mentions(xml: str) -> bool:
    """Tell quickly whether a domain may ask for secret RAM; where not, it surely does not."""
    return NAMESPACE in xml


def domain_of(root: ET.Element) -> Domain | None:
    """Return the domain, None if it does not ask for secret RAM. Raises ConfigError."""
    policy = policy_of(root)
    if not policy:
        return None
    ram = ram_of(root)
    return Domain(
        name_of(root),
        _text(root, "uuid"),
        root.get("type", ""),
        policy,
        ram,
        _room(root, sum(block.size for block in ram)),
    )


def parse(xml: str) -> ET.Element:
    """Return the root of a domain's XML. Raises ConfigError."""
    try:
        root = ET.fromstring(xml)  # noqa: S314 (libvirt, which is root's, has written it)
    except ET.ParseError as error:
        raise ConfigError(f"the domain is not XML: {error}", "give it as `virsh dumpxml` prints it") from error
    if root.tag != "domain":
        raise ConfigError(f"{quote(root.tag)} is no domain", "give XML as `virsh dumpxml` prints it")
    return root


def name_of(root: ET.Element) -> str:
    """Return the domain's name, blanks at its ends included: libvirt tells domains apart by them."""
    return root.findtext("name") or ""


def wrong_domain(name: str, problems: Iterable[tuple[str, str]], hint: str = "") -> ConfigError:
    """Return an error that lists what is wrong with a domain: the place in its XML, and what is wrong there."""
    about = quote(name, _SHOWN_NAME)
    return ConfigError("\n".join(f"domain {about}: {place}: {said}" for place, said in problems), hint)


def policy_of(root: ET.Element) -> Policy | None:
    """Return what a domain asks for, None if it does not ask for secret RAM. Raises ConfigError."""
    ours = [element for element in root.findall("metadata/*") if element.tag.startswith(f"{{{NAMESPACE}}}")]
    problems = [*_misplaced(root, ours), *_policy_problems(ours)]
    if problems:
        raise wrong_domain(name_of(root), problems, "correct it by virsh edit")
    if not ours:
        return None
    # What could be something else is a problem.
    return Policy(cast("OnExposed", ours[0].get("on-exposed", ON_EXPOSED[0])), Path(ours[0].get("emulator", "")))


def _misplaced(root: ET.Element, ours: list[ET.Element]) -> Iterator[tuple[str, str]]:
    # The hook announces a domain that has our element, wherever that is (configs/libvirt/hook.c).
    misplaced = [element for element in root.iter(ASKS) if element not in ours]
    above = {child: element for element in root.iter() for child in element} if misplaced else {}
    for element in misplaced:
        path, at = [], element
        while at is not root:
            path.append(_local(at))
            at = above[at]
        yield "/".join(reversed(path)), "it asks for nothing here; move it directly below metadata, or remove it"


def _policy_problems(ours: list[ET.Element]) -> Iterator[tuple[str, str]]:
    for element in ours:
        if element.tag != ASKS:
            yield "metadata", _unknown("element", _local(element), [_local_name(ASKS)])
    asks = [element for element in ours if element.tag == ASKS]
    if len(asks) > 1:
        yield "metadata", "secret-ram is there twice; keep one"
    for element in asks:
        for name in sorted(set(element.keys()) - {"on-exposed", "emulator"}):
            yield "metadata/secret-ram", _unknown("attribute", name, ["on-exposed", "emulator"])
        for inner in element:
            if inner.tag != BEFORE:
                yield "metadata/secret-ram", _unknown("element", _local(inner), [_local_name(BEFORE)])
        if (wanted := element.get("on-exposed", ON_EXPOSED[0])) not in ON_EXPOSED:
            yield "metadata/secret-ram on-exposed", _unknown("value", wanted, ON_EXPOSED)
        if not (emulator := element.get("emulator", "")).startswith("/"):
            yield (
                "metadata/secret-ram emulator",
                f"{quote(emulator)} is not the absolute path of a QEMU; write it like /usr/bin/qemu-system-x86_64",
            )


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    import difflib  # for errors alone: it takes longer than reading a domain

    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    advice = f"did you mean {quote(near[0])}?" if near else f"known here: {', '.join(map(quote, known))}"
    return f"unknown {what} {quote(name)}; {advice}"


def _local(element: ET.Element) -> str:
    return _local_name(element.tag)


def _local_name(tag: str) -> str:
    return tag.rpartition("}")[2]


def _text(root: ET.Element, path: str) -> str:
    return (root.findtext(path) or "").strip()


def ram_of(root: ET.Element) -> tuple[RamBlock, ...]:
    """Return the RAM blocks that QEMU starts with, in its order. Raises ConfigError."""
    access = _attribute(root, "memoryBacking/access", "mode")
    cells = _cells(root)
    blocks = [
        _block(root, f"ram-node{number}", _rounded(_size(root, cell, "memory"), _RAM_GRAIN), [
            (cell.get("memAccess", ""), f"cpu/numa/cell[{number}]"), (access, "memoryBacking/access"),
        ])
        for number, cell in enumerate(cells)
    ]  # fmt: skip
    if not cells:
        # <memory> has the DIMMs in it (docs/formatdomain.rst of libvirt).
        size = _size(root, root.find("memory")) - sum(_size(root, dimm.find("target/size")) for dimm in dimms_of(root))
        ram = _block(root, _default_ram_id(root), _rounded(size, _RAM_GRAIN), [(access, "memoryBacking/access")])
        blocks.append(ram)
    for alias, dimm in _named(dimms_of(root)):
        if dimm.get("model") == "dimm":
            node = int(_text(dimm, "target/node") or -1)
            of_cell = [cells[node].get("memAccess", "")] if 0 <= node < len(cells) else []
            said = [(dimm.get("access", ""), f"devices/memory[{alias}]")]
            said += [(mode, f"cpu/numa/cell[{node}]") for mode in of_cell]
            size = _rounded(_size(root, dimm.find("target/size")), _DIMM_GRAIN)
            blocks.append(_block(root, f"mem{alias}", size, [*said, (access, "memoryBacking/access")]))
    return tuple(blocks)


def dimms_of(root: ET.Element) -> list[ET.Element]:
    """Return the memory devices, of whatever model."""
    return root.findall("devices/memory")


def _block(root: ET.Element, name: str, size: int, said: list[tuple[str, str]]) -> RamBlock:
    """Return a RAM block; of what is said about its access, the nearest first, the first counts."""
    access, place = next(((mode, place) for mode, place in said if mode), ("", said[-1][1]))
    source = _attribute(root, "memoryBacking/source", "type")
    if source == "memfd":
        return RamBlock(name, size, "memfd", access, place)
    # Whatever says how memory is accessed makes it a file's (qemuBuildMemoryBackendProps).
    return RamBlock(name, size, "file" if access or source == "file" else None, access, place)


def _cells(root: ET.Element) -> list[ET.Element]:
    cells = root.findall("cpu/numa/cell")
    return [cell for _, cell in sorted(enumerate(cells), key=lambda one: int(one[1].get("id", one[0])))]


def _named(dimms: list[ET.Element]) -> Iterator[tuple[str, ET.Element]]:
    """Yield memory devices with their aliases: given ones, or by the slot, a given one or the next that is free."""
    slots = {int(address.get("slot", "-1"), 0) for dimm in dimms for address in dimm.findall("address[@type='dimm']")}
    free = (slot for slot in range(len(dimms) + len(slots)) if slot not in slots)
    for dimm in dimms:
        own = _attribute(dimm, "address[@type='dimm']", "slot")
        slot = int(own, 0) if own else next(free) if dimm.get("model") in {"dimm", "nvdimm"} else 0
        yield _attribute(dimm, "alias", "name") or f"{dimm.get('model')}{slot}", dimm


def _default_ram_id(root: ET.Element) -> str:
    """Return QEMU's own name for the RAM of a machine without NUMA cells, which libvirt asks QEMU for.

    It is `default_ram_id` in hw/i386/pc.c, hw/i386/microvm.c and hw/arm/virt.c of QEMU.
    """
    arch, machine = (_attribute(root, "os/type", name) for name in ("arch", "machine"))
    if arch in {"x86_64", "i686"}:
        return "microvm.ram" if machine.startswith("microvm") else "pc.ram"
    if arch == "aarch64" and machine.split("-")[0] == "virt":
        return "mach-virt.ram"
    said = f"the RAM of machine {quote(machine)} of {quote(arch)} has a name that is not known here"
    raise wrong_domain(name_of(root), [("os/type", f"{said}; give it NUMA cells (<cpu><numa><cell …>)")])


def _room(root: ET.Element, in_use: int) -> int:
    most = root.find("maxMemory")
    if most is None or len(dimms_of(root)) >= int(most.get("slots", "0")):
        return 0
    return max(0, _rounded(_size(root, most), _RAM_GRAIN) - in_use)


def _attribute(root: ET.Element, path: str, name: str) -> str:
    found = root.find(path)
    return "" if found is None else found.get(name, "")


def _rounded(size: int, grain: int) -> int:
    return -(-size // grain) * grain


def _size(root: ET.Element, element: ET.Element | None, attribute: str = "") -> int:
    """Return the bytes that an element, or its attribute, says, in whole KiB, as libvirt counts (virScaleInteger)."""
    said = "" if element is None else (element.get(attribute, "") if attribute else element.text or "").strip()
    unit = "" if element is None else element.get("unit", "")
    found = re.fullmatch(r"(b|bytes?)|([kmgtpe])(ib|b|)", unit or "KiB", re.IGNORECASE)
    if not found or not re.fullmatch("[0-9]{1,20}", said):
        where = "memory" if element is None else element.tag
        raise wrong_domain(name_of(root), [(where, f"{quote(f'{said} {unit}'.strip())} is not a size of memory")])
    power = "kmgtpe".index(found[2].lower()) + 1 if found[2] else 0
    return _rounded(int(said) * (1000 if found[3] and found[3].lower() == "b" else 1024) ** power, _KIB)
