"""enable and disable on a domain's XML: only what they are about changes, and all comes back byte for byte."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmmback.errors import ConfigError
from vmmback.libvirt.domain_edit import difference, disabled, enabled
from vmmback.libvirt.domain_xml import OnExposed, Source, read

DEBIAN = (Path(__file__).parent / "domains/debian.xml").read_text()
WRAPPER = Path("/usr/local/libexec/vmmback/qemu")
SHARED = "<access mode='shared'/>"


def with_backing(*children: str) -> str:
    inner = "".join(f"    {child}\n" for child in children)
    return DEBIAN.replace("  <vcpu", f"  <memoryBacking>\n{inner}  </memoryBacking>\n  <vcpu")


def children_of_backing(xml: str) -> list[str]:
    found = re.search(r"(?s)<memoryBacking>(.*)</memoryBacking>", xml)
    assert found
    return [line.strip() for line in found[1].strip().splitlines()]


def test_a_user_sees_what_enable_changes_and_nothing_else() -> None:
    changed = [
        line
        for line in difference(DEBIAN, enabled(DEBIAN, WRAPPER, "warn"), "debian").splitlines()
        if line.startswith(("+", "-"))
    ]
    assert changed == [
        "--- debian before",
        "+++ debian after",
        '+    <vmmback:secret-ram xmlns:vmmback="urn:vmmback:domain:1.0" on-exposed="warn" '
        'emulator="/usr/bin/qemu-system-x86_64">',
        '+      <vmmback:before added="memoryBacking nosharepages source access"/>',
        "+    </vmmback:secret-ram>",
        "+  <memoryBacking>",
        "+    <nosharepages/>",
        "+    <source type='memfd'/>",
        "+    <access mode='shared'/>",
        "+  </memoryBacking>",
        "-    <emulator>/usr/bin/qemu-system-x86_64</emulator>",
        "+    <emulator>/usr/local/libexec/vmmback/qemu</emulator>",
    ]
    assert difference(DEBIAN, DEBIAN, "debian") == ""


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        (["<locked/>"], None, ["<nosharepages/>", "<locked/>", "<source type='memfd'/>", SHARED]),
        (["<source type='file'/>"], None, ["<nosharepages/>", "<source type='file'/>", SHARED]),
        (["<source type='file'/>"], "memfd", ["<nosharepages/>", "<source type='memfd'/>", SHARED]),
        (["<source type='anonymous'/>"], None, ["<nosharepages/>", "<source type='memfd'/>", SHARED]),
        (["<source type='memfd'/>"], "file", ["<nosharepages/>", "<source type='file'/>", SHARED]),
        (["<access mode='private'/>"], None, ["<nosharepages/>", "<source type='memfd'/>", SHARED]),
        (
            ["<nosharepages/>", "<allocation mode='immediate'/>"],
            None,
            ["<nosharepages/>", "<source type='memfd'/>", SHARED, "<allocation mode='immediate'/>"],
        ),
    ],
)
def test_ram_becomes_such_that_it_can_be_secret(before: list[str], wanted: Source | None, after: list[str]) -> None:
    xml = with_backing(*before)
    made = enabled(xml, WRAPPER, "kill", wanted)
    assert children_of_backing(made) == after
    assert disabled(made) == xml


def test_enabling_twice_changes_the_policy_alone() -> None:
    once = enabled(with_backing("<locked/>"), WRAPPER, "kill", "file")
    assert enabled(once, WRAPPER, "kill") == once
    assert enabled(once, WRAPPER, "warn") == once.replace('"kill"', '"warn"')
    assert children_of_backing(enabled(once, WRAPPER, "kill", "memfd"))[2] == "<source type='memfd'/>"


def test_what_was_changed_after_enable_stays() -> None:
    made = enabled(DEBIAN, WRAPPER, "kill").replace("<nosharepages/>", "<nosharepages/>\n    <locked/>")
    assert disabled(made) == with_backing("<locked/>")
    made = enabled(with_backing("<access mode='private'/>"), WRAPPER, "kill").replace("<memory ", "<memory a='b' ")
    assert disabled(made) == with_backing("<access mode='private'/>").replace("<memory ", "<memory a='b' ")


def test_another_qemu_that_was_written_into_the_metadata_is_kept() -> None:
    made = enabled(DEBIAN, WRAPPER, "kill").replace('emulator="/usr/bin/qemu-system-x86_64"', 'emulator="/opt/qemu"')
    assert enabled(made, WRAPPER, "kill") == made
    assert disabled(made) == DEBIAN.replace("/usr/bin/qemu-system-x86_64", "/opt/qemu")


def test_metadata_by_hand_has_nothing_to_put_back_but_the_emulator() -> None:
    ours = '<v:secret-ram xmlns:v="urn:vmmback:domain:1.0" emulator="/usr/bin/qemu-system-x86_64"/>'
    xml = DEBIAN.replace("/usr/bin/qemu-system-x86_64", str(WRAPPER)).replace(
        "  </metadata>", f"    {ours}\n  </metadata>"
    )
    assert read(xml)
    assert disabled(xml) == DEBIAN


def test_disabling_what_is_not_enabled_changes_nothing() -> None:
    assert disabled(DEBIAN) == DEBIAN


@pytest.mark.parametrize(
    ("emulator", "said"),
    [
        ("", "is not there"),
        ("<emulator/>", "is not there"),
        (f"<emulator>{WRAPPER}</emulator>", "is the wrapper already"),
        ("<emulator>qemu</emulator>", '"qemu" is not a path'),
        ("<emulator>/a&amp;b</emulator>", "is not a path"),
    ],
)
def test_no_qemu_to_start(emulator: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        enabled(DEBIAN.replace("<emulator>/usr/bin/qemu-system-x86_64</emulator>", emulator), WRAPPER, "kill")
    assert raised.value.message.startswith('domain "debian": devices/emulator: ')


def test_what_is_not_xml() -> None:
    for change in (lambda xml: enabled(xml, WRAPPER, "kill"), disabled):
        with pytest.raises(ConfigError, match="is not XML"):
            change(DEBIAN[:-20])


NOISE = [
    "<!-- <access mode='no'/> -->",
    "<locked/>",
    "<hugepages/>",
    "<discard />",
    "<allocation threads='2'>\n</allocation>",
]
BACKING = [
    "<nosharepages></nosharepages>", '<source   type="anonymous" />', "<source type='file'/>",
    "<access mode = 'private'/>", "<access mode='shared'></access>",
]  # fmt: skip
OTHERS = ["<o:thing xmlns:o='urn:o' a='&gt;>&quot;' b=\"'>\"/>", "<!-- > -->", "<o:é xmlns:o='urn:ö'>ü &lt;</o:é>"]
SPACES = st.sampled_from(["", " ", "\n", "\n  ", "\r\n\t", "\n\n    "])


@st.composite
def domains(draw: st.DrawFn) -> str:
    """A domain as no libvirt writes it, but as XML may be."""

    def parent(tag: str, children: list[str]) -> str:
        kind = draw(st.sampled_from(["none", "childless", "empty", "children"]))
        inner = "".join(draw(SPACES) + child for child in children) + draw(SPACES)
        made = {
            "none": "",
            "childless": f"<{tag} />",
            "empty": f"<{tag}></{tag}>",
            "children": f"<{tag}>{inner}</{tag}>",
        }
        return made[kind]

    backing = draw(st.permutations(NOISE + BACKING))[: draw(st.integers(0, 6))]
    # libvirt has one of each.
    backing = [child for n, child in enumerate(backing) if child[:5] not in {other[:5] for other in backing[:n]}]
    parts = [
        draw(st.sampled_from(["", "<?xml version='1.0'?>\n"])) + "<domain type='kvm'>",
        "<name>ä</name>",
        parent("metadata", draw(st.lists(st.sampled_from(OTHERS), max_size=3))),
        "<memory unit='KiB'>1024</memory>",
        parent("memoryBacking", backing),
        "<devices>",
        "<emulator>/usr/bin/qemu</emulator>",
        "</devices>",
    ]
    return "".join(part + draw(SPACES) for part in parts) + "</domain>" + draw(st.sampled_from(["", "\n"]))


@given(domains(), st.sampled_from(["kill", "warn"]), st.sampled_from(["file", "memfd", None]))
@example(DEBIAN.replace("\n", "\r\n").replace("/qemu-system-x86_64", "/qemu"), "kill", None)
def test_disable_puts_all_back_byte_for_byte(xml: str, on_exposed: OnExposed, source: Source | None) -> None:
    made = enabled(xml, WRAPPER, on_exposed, source)
    assert enabled(made, WRAPPER, on_exposed) == made
    assert disabled(made) == xml
    domain = read(made.replace("<domain type='kvm'>", "<domain type='kvm'><os><type arch='i686'/></os>"))
    assert domain
    assert domain.policy == (on_exposed, Path("/usr/bin/qemu"))
    assert (domain.emulator, domain.source, domain.ram[0].access) == (WRAPPER, source or domain.source, "shared")
