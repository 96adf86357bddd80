"""What is read of a domain's XML: what it asks for, and the RAM blocks that libvirt 9.0 would give its QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmback.errors import ConfigError
from vmmback.libvirt.domain_edit import enabled
from vmmback.libvirt.domain_xml import NAMESPACE, Domain, Policy, domain_of, mentions, parse

MIB = 1 << 20
DOMAINS = Path(__file__).parent / "domains"
DEBIAN = (DOMAINS / "debian.xml").read_text()
WRAPPER = Path("/usr/local/libexec/vmmback/qemu")
QEMU = Path("/usr/bin/qemu-system-x86_64")

ASKING = f'<v:secret-ram xmlns:v="{NAMESPACE}" emulator="{QEMU}"/>'


def asking(xml: str = DEBIAN) -> str:
    return enabled(xml, WRAPPER, "kill")


def read(xml: str) -> Domain | None:
    return domain_of(parse(xml))


def with_memory(memory: str, cells: str = "", devices: str = "") -> str:
    xml = asking().replace("<memory unit='KiB'>524288</memory>", memory)
    cpu = "<cpu mode='maximum' check='none' migratable='on'/>"
    assert cpu in xml
    return xml.replace(cpu, f"<cpu><numa>{cells}</numa></cpu>").replace("</devices>", f"{devices}</devices>")


def blocks(xml: str) -> list[tuple[str, int]]:
    domain = read(xml)
    assert domain
    return [(block.name, block.size) for block in domain.ram]


def dimm(size: str, more: str = "", unit: str = "MiB", attributes: str = "") -> str:
    target = f"<target><size unit='{unit}'>{size}</size><node>0</node></target>"
    return f"<memory model='dimm'{attributes}>{target}{more}</memory>"


def test_a_domain_that_does_not_ask() -> None:
    assert not mentions(DEBIAN)
    assert read(DEBIAN) is None
    described = DEBIAN.replace("alle", NAMESPACE)
    assert mentions(described)
    assert read(described) is None


def test_a_domain_that_asks() -> None:
    domain = read(asking())
    assert domain
    assert domain[:3] == ("debian", "7464fd0f-c99b-479d-9fbc-3829271897b4", "qemu")
    assert domain.policy == Policy("kill", QEMU)
    assert (domain.source, domain.room) == ("memfd", 0)


def test_what_becomes_of_an_exposed_domain() -> None:
    for xml, wanted in (
        (asking(), "kill"),
        (asking().replace(' on-exposed="kill"', ""), "kill"),
        (asking().replace('"kill"', '"warn"'), "warn"),
    ):
        domain = read(xml)
        assert domain
        assert domain.policy.on_exposed == wanted


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('on-exposed="kill"', 'on-exposed="kil"', 'value "kil"; did you mean "kill"?'),
        ('on-exposed="kill"', 'on-exposed="xyz"', 'value "xyz"; known here: "kill", "warn"'),
        ("on-exposed=", "on-expose=", 'attribute "on-expose"; did you mean "on-exposed"?'),
        ("vmmback:secret-ram", "vmmback:secretram", 'element "secretram"; did you mean "secret-ram"?'),
        ("vmmback:before", "vmmback:befor", 'element "befor"; did you mean "before"?'),
        (f'emulator="{QEMU}"', 'emulator="qemu"', '"qemu" is not the absolute path'),
        (f'emulator="{QEMU}"', "", '"" is not the absolute path'),
        ("  </metadata>", f'<v:secret-ram xmlns:v="{NAMESPACE}" emulator="/q"/></metadata>', "twice"),
    ],
)
def test_a_wrong_word_is_an_error_that_names_the_right_one(old: str, new: str, said: str) -> None:
    xml = asking()
    assert old in xml
    with pytest.raises(ConfigError) as raised:
        read(xml.replace(old, new))
    assert said in raised.value.message
    assert raised.value.message.startswith('domain "debian": metadata')


@pytest.mark.parametrize(
    ("before", "place"),
    [
        ("<metadata><o:app xmlns:o='urn:o'>@</o:app></metadata>", "metadata/app/secret-ram"),
        (f"<metadata><o:app xmlns:o='urn:o'>@</o:app>{ASKING}</metadata>", "metadata/app/secret-ram"),
        (
            f"<metadata><o:app xmlns:o='urn:o'><metadata>{ASKING}</metadata></o:app></metadata>",
            "metadata/app/metadata/",
        ),
        ("<devices>@</devices>", "devices/secret-ram"),
        ("@", "secret-ram"),
    ],
)
def test_it_asks_directly_below_metadata_or_is_refused(before: str, place: str) -> None:
    """The hook announces what has the element anywhere; were it not refused, QEMU would have ordinary memory."""
    with pytest.raises(ConfigError) as raised:
        read(f"<domain><name>x</name>{before.replace('@', ASKING)}</domain>")
    assert raised.value.message.startswith(f'domain "x": {place}')
    assert "move it directly below metadata" in raised.value.message
    assert "virsh edit" in raised.value.hint


def test_all_wrong_words_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        read(asking().replace('"kill"', '"x"').replace(f'"{QEMU}"', '"x"'))
    assert len(raised.value.message.splitlines()) == 2


@pytest.mark.parametrize("xml", [f"<domain>{NAMESPACE}", f"<network>{NAMESPACE}</network>"])
def test_what_is_no_domain(xml: str) -> None:
    with pytest.raises(ConfigError, match="domain"):
        read(xml)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("<memory>1024</memory>", MIB),
        ("<memory unit=''>1024</memory>", MIB),
        ("<memory unit='bytes'>1048577</memory>", 2 * MIB),
        ("<memory unit='b'>1</memory>", MIB),
        ("<memory unit='KiB'>1025</memory>", 2 * MIB),
        ("<memory unit='k'>2048</memory>", 2 * MIB),
        ("<memory unit='KB'>1024</memory>", MIB),
        ("<memory unit='KB'>1050</memory>", 2 * MIB),
        ("<memory unit='MiB'>3</memory>", 3 * MIB),
        ("<memory unit='mb'>3</memory>", 3 * MIB),
        ("<memory unit='G'>1</memory>", 1024 * MIB),
        ("<memory unit='TiB'> 1 </memory>", MIB * MIB),
    ],
)
def test_sizes_are_those_of_libvirt(written: str, size: int) -> None:
    assert blocks(with_memory(written)) == [("pc.ram", size)]


@pytest.mark.parametrize("written", ["", "<memory/>", "<memory>x</memory>", "<memory unit='x'>1</memory>"])
def test_no_size(written: str) -> None:
    with pytest.raises(ConfigError, match="is not a size of memory"):
        read(with_memory(written))


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("arch='x86_64' machine='pc-i440fx-7.2'", "pc.ram"),
        ("arch='i686' machine='q35'", "pc.ram"),
        ("arch='x86_64' machine='microvm'", "microvm.ram"),
        ("arch='aarch64' machine='virt-7.2'", "mach-virt.ram"),
    ],
)
def test_ram_without_cells_is_named_by_the_machine(machine: str, name: str) -> None:
    assert blocks(asking().replace("arch='x86_64' machine='pc-q35-7.2'", machine)) == [(name, 512 * MIB)]


def test_each_cell_has_its_ram_in_the_order_of_their_ids() -> None:
    cells = "<cell id='1' cpus='1' memory='2049' unit='KiB'/><cell id='0' cpus='0' memory='1' unit='MiB'/>"
    assert blocks(with_memory("", cells)) == [("ram-node0", MIB), ("ram-node1", 3 * MIB)]
    assert blocks(with_memory("", "<cell cpus='1' memory='1' unit='GiB'/>")) == [("ram-node0", 1024 * MIB)]


def test_a_real_domain_with_a_cell() -> None:
    domain = read(asking((DOMAINS / "cells.xml").read_text()))
    assert domain
    assert [(block.name, block.size) for block in domain.ram] == [("ram-node0", 96 * MIB)]
    assert domain.room == 416 * MIB


def test_dimms_are_named_by_alias_or_slot() -> None:
    devices = dimm("2") + dimm("3", "<address type='dimm' slot='0'/>") + dimm("3", "<alias name='ua-big'/>")
    devices += dimm("2", "<address type='dimm' slot='0x4'/>") + dimm("2")
    assert blocks(with_memory("", "<cell cpus='0' memory='1' unit='MiB'/>", devices)) == [
        ("ram-node0", MIB), ("memdimm1", 2 * MIB), ("memdimm0", 4 * MIB), ("memua-big", 4 * MIB), ("memdimm4", 2 * MIB),
        ("memdimm3", 2 * MIB),
    ]  # fmt: skip


def test_memory_has_the_dimms_in_it() -> None:
    xml = with_memory("<memory unit='MiB'>64</memory>", "", dimm("16"))
    assert blocks(xml) == [("pc.ram", 48 * MIB), ("memdimm0", 16 * MIB)]


def test_room_is_what_is_not_in_use_as_long_as_there_are_slots() -> None:
    def room(slots: int, dimms: int) -> int:
        most = f"<maxMemory slots='{slots}' unit='MiB'>64</maxMemory>"
        domain = read(with_memory(most, "<cell cpus='0' memory='1' unit='MiB'/>", dimm("16") * dimms))
        assert domain
        return domain.room

    assert (room(1, 0), room(2, 1), room(1, 1), room(8, 4)) == (63 * MIB, 47 * MIB, 0, 0)


@pytest.mark.parametrize(
    ("backing", "source", "access", "place"),
    [
        ("<source type='memfd'/>", "memfd", "", "memoryBacking/access"),
        ("<source type='file'/>", "file", "", "memoryBacking/access"),
        ("<access mode='shared'/>", "file", "shared", "memoryBacking/access"),
        ("<nosharepages/>", None, "", "memoryBacking/access"),
    ],
)
def test_what_backs_ram(backing: str, source: str | None, access: str, place: str) -> None:
    there = "<nosharepages/>\n    <source type='memfd'/>\n    <access mode='shared'/>"
    domain = read(asking().replace(there, backing))
    assert domain
    assert (domain.source, domain.ram[0][2:]) == (source, (source, access, place))


def test_of_access_the_nearest_counts() -> None:
    cell = "<cell cpus='0' memory='1' unit='MiB' memAccess='private'/>"
    domain = read(with_memory("", cell, dimm("2") + dimm("2", attributes=" access='shared'")))
    assert domain
    assert [block[3:] for block in domain.ram] == [
        ("private", "cpu/numa/cell[0]"), ("private", "cpu/numa/cell[0]"), ("shared", "devices/memory[dimm1]"),
    ]  # fmt: skip
