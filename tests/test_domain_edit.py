"""enable and disable on a domain's XML: only what they are about changes, and all comes back byte for byte."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmmback.errors import ConfigError
from vmmback.libvirt.domain_edit import difference, disabled, enabled
from vmmback.libvirt.domain_xml import OnExposed, Source, domain_of, parse

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
        '+      <vmmback:before added="memoryBacking nosharepages source access seclabel"/>',
        "+    </vmmback:secret-ram>",
        "+  <memoryBacking>",
        "+    <nosharepages/>",
        "+    <source type='memfd'/>",
        "+    <access mode='shared'/>",
        "+  </memoryBacking>",
        "-    <emulator>/usr/bin/qemu-system-x86_64</emulator>",
        "+    <emulator>/usr/local/libexec/vmmback/qemu</emulator>",
        "+  <seclabel type='static' model='dac' relabel='yes'>",
        "+    <label>+1885632029:libvirt-qemu</label>",
        "+  </seclabel>",
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
    assert domain_of(parse(xml))
    assert disabled(xml) == DEBIAN


APPARMOR = "  <seclabel type='dynamic' model='apparmor' relabel='yes'/>\n"


def test_a_domain_gets_a_user_of_its_own_in_the_group_of_all_qemus() -> None:
    xml = DEBIAN.replace("  <qemu:commandline>", f"{APPARMOR}  <qemu:commandline>")
    made = enabled(xml, WRAPPER, "kill", group="+64055")
    label = (
        "  <seclabel type='static' model='dac' relabel='yes'>\n    <label>+1885632029:+64055</label>\n  </seclabel>\n"
    )
    assert f"</devices>\n{APPARMOR}{label}  <qemu:commandline>" in made  # as libvirt writes it
    assert enabled(made, WRAPPER, "kill", group="+64055") == made
    assert disabled(made) == xml
    another = DEBIAN.replace("7464fd0f", "7464fd0e")
    assert "<label>+1885632029:" not in enabled(another, WRAPPER, "kill")


def test_a_copy_of_a_domain_gets_another_user_when_it_is_enabled() -> None:
    another = DEBIAN.replace("7464fd0f", "7464fd0e")
    made = enabled(DEBIAN, WRAPPER, "kill").replace("7464fd0f", "7464fd0e")
    assert enabled(made, WRAPPER, "kill") == enabled(another, WRAPPER, "kill") != made


def test_a_label_of_users_that_was_there_stays() -> None:
    label = "  <seclabel type='static' model='dac' relabel='no'>\n    <label>web:web</label>\n  </seclabel>\n"
    xml = DEBIAN.replace("  <qemu:commandline>", f"{label}  <qemu:commandline>")
    made = enabled(xml, WRAPPER, "kill")
    assert (made.count(label), made.count("<seclabel")) == (1, 1)
    assert disabled(made) == xml


def test_a_label_that_a_domain_had_while_it_ran_gives_way() -> None:
    label = "<seclabel type='dynamic' model='dac' relabel='yes'>\n    <label>+64055:+64055</label>\n  </seclabel>"
    xml = DEBIAN.replace("  <qemu:commandline>", f"  {label}\n  <qemu:commandline>")
    made = enabled(xml, WRAPPER, "kill")
    body = made.partition("</metadata>")[2]
    assert body == enabled(DEBIAN, WRAPPER, "kill").partition("</metadata>")[2]
    assert enabled(made, WRAPPER, "kill") == made
    assert disabled(made) == xml


def test_a_domain_without_a_uuid_is_to_be_defined_first() -> None:
    for none in ("", "<uuid/>"):
        with pytest.raises(ConfigError, match=r'^domain "debian": uuid: .*; define the domain first'):
            enabled(re.sub("<uuid>.*</uuid>", none, DEBIAN), WRAPPER, "kill")


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
LABELS = [
    "<seclabel model='apparmor' />",
    "<seclabel type='none' model='dac'/>",
    "<seclabel  model='dac' type='dynamic'><label>+1:+1</label> </seclabel>",
    "<!-- <seclabel model='dac'/> -->",
]
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
        "<uuid>7464fd0f-c99b-479d-9fbc-3829271897b4</uuid>",
        parent("metadata", draw(st.lists(st.sampled_from(OTHERS), max_size=3))),
        "<memory unit='KiB'>1024</memory>",
        parent("memoryBacking", backing),
        "<devices>",
        "<emulator>/usr/bin/qemu</emulator>",
        "</devices>",
        *draw(st.lists(st.sampled_from(LABELS), max_size=2, unique=True)),
    ]
    return "".join(part + draw(SPACES) for part in parts) + "</domain>" + draw(st.sampled_from(["", "\n"]))


@given(domains(), st.sampled_from(["kill", "warn"]), st.sampled_from(["file", "memfd", None]))
@example(DEBIAN.replace("\n", "\r\n").replace("/qemu-system-x86_64", "/qemu"), "kill", None)
def test_disable_puts_all_back_byte_for_byte(xml: str, on_exposed: OnExposed, source: Source | None) -> None:
    made = enabled(xml, WRAPPER, on_exposed, source)
    assert enabled(made, WRAPPER, on_exposed) == made
    assert disabled(made) == xml
    domain = domain_of(parse(made.replace("<domain type='kvm'>", "<domain type='kvm'><os><type arch='i686'/></os>")))
    assert domain
    assert domain.policy == (on_exposed, Path("/usr/bin/qemu"))
    assert parse(made).findtext("devices/emulator") == str(WRAPPER)
    assert (domain.source, domain.ram[0].access) == (source or domain.source, "shared")
