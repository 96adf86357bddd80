"""What a domain may hand through to QEMU is what docs/LIBVIRT.md lists, however it is written, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.markdown import tables
from vmmback.libvirt.domain_arguments import DEVICES, KNOWN, OPTIONS, refused_arguments

PAGE = (Path(__file__).parents[1] / "docs/LIBVIRT.md").read_text()


def shown(*arguments: str) -> list[tuple[int, str]]:
    return list(refused_arguments(arguments))


def test_the_page_lists_what_may_pass() -> None:
    (table,) = [rows for rows in tables(PAGE) if rows[0][0] == "`-fw_cfg`"]
    assert sorted(argument.strip("`") for argument, _, _ in table) == sorted(KNOWN)
    for driver, properties in DEVICES.items():
        (purpose,) = [purpose for argument, purpose, _ in table if argument == f"`-device {driver}`"]
        assert set(re.findall("`(.*?)`", purpose)) == {"id", *properties}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("-fw_cfg", "name=opt/com.coreos/config,file=/var/lib/libvirt/images/one.ign"),
        ("--fw_cfg", "opt/ovmf/X-PciMmio64Mb,string=65536"),
        ("-fw_cfg", "-gdb"),  # its value
        ("-smbios", "type=11,value=io.systemd.credential:a=b", "-acpitable", "file=/MSDM"),
        ("-device", "isa-applesmc,osk=x,,y(c)"),
        ("-device", "isa-debug-exit"),
        ("-device", "id=exit,iosize=0x04,driver=isa-debug-exit,iobase=0xf4"),
        ("-device", '{"iobase": 244, "driver": "isa-debug-exit"}'),
    ],
)
def test_what_may_pass(arguments: tuple[str, ...]) -> None:
    assert shown(*arguments) == []


ALONE = [
    "-S", "-s", "-daemonize", "-mem-prealloc", "-snapshot", "-enable-kvm", "-", "--", "", "/disk.img",
    "-fw_cfg", "-device", "-fw_cfg=name=a,string=b",
]  # fmt: skip
WITH_VALUES = [
    ("-m", "1G"), ("-mem-path", "/dev/shm"), ("-object", '{"qom-type":"memory-backend-file"}'), ("-M", "q35"),
    ("-machine", "memory-backend=x"), ("-numa", "node,memdev=x"), ("-readconfig", "/f"), ("-incoming", "tcp:0:1"),
    ("-set", "object.pc.ram.share=off"), ("-global", "VGA.vgamem_mb=16"), ("-vga", "std"), ("-loadvm", "s"),
    ("-netdev", "vhost-user,chardev=c"), ("-netdev", "vhost-vdpa,vhostdev=/dev/vhost-vdpa-0"), ("-spice", "port=1"),
    ("-blockdev", '{"driver":"file","cache":{"direct":true}}'), ("-drive", "file=/f,cache=none"), ("-accel", "kvm"),
    ("-gdb", "tcp::1"), ("-qmp", "stdio"), ("-chardev", "stdio,id=c"), ("-mon", "chardev=c"), ("-monitor", "stdio"),
    ("-qtest", "stdio"), ("-plugin", "/p.so"), ("-sandbox", "off"), ("-runas", "nobody"), ("-d", "in_asm"),
    ("-name", "guest=another"), ("-debugcon", "mon:stdio"), ("-trace", "*"), ("/fw_cfg", "x"), ("---fw_cfg", "x"),
    ("-Fw_cfg", "x"), ("-fw", "x"), ("-fw_cfg ", "x"),
]  # fmt: skip
NOT_LISTED = [
    "", "VGA", "id=v,driver=VGA", "driver=tpm-tis", "pc-dimm,memdev=x", "vfio-pci,host=1:0.0", "edu", "help",
    "vhost-user-fs-pci,tag=t", "ivshmem-plain,memdev=x", '{"id": "v", "driver": "VGA"}', "{'driver':'VGA'}",
]  # fmt: skip
NOT_AS_LISTED = [
    " isa-debug-exit", "isa-debug-exit,help", "isa-debug-exit,driver=VGA", "VGA,driver=isa-debug-exit",
    "driver=isa-debug-exit,driver=isa-debug-exit", "isa-debug-exit,,driver=VGA", "isa-debug-exit,romfile=/rom",
    "isa-debug-exit,iobase=1,iobase=2", "isa-debug-exit,", '{"driver": "VGA", "driver": "isa-debug-exit"}',
    "{'driver':'isa-debug-exit'}", '{"driver": "isa-debug-exit", "memdev": "m"}', '{"driver": ["isa-debug-exit"]}',
    "{", '{"a":' * 9999, '["isa-debug-exit"]',
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [*((one,) for one in ALONE), *WITH_VALUES, *(("-device", one) for one in NOT_LISTED + NOT_AS_LISTED)]
)
def test_what_may_not_pass_is_told_with_its_value(arguments: tuple[str, ...]) -> None:
    assert shown(*arguments) == [(0, " ".join(arguments))]


HARMLESS = [
    *(st.tuples(st.sampled_from([f"-{option}", f"--{option}"]), st.text()) for option in OPTIONS),
    *(st.tuples(st.sampled_from(["-device", "--device"]), st.just(driver)) for driver in DEVICES),
]


@given(st.lists(st.one_of(HARMLESS)), st.text())
def test_whatever_stands_where_an_option_does_is_refused_if_it_is_not_listed(
    before: list[tuple[str, str]], argument: str
) -> None:
    given_before = [one for pair in before for one in pair]
    assert shown(*given_before) == []
    if re.fullmatch(f"--?({'|'.join(OPTIONS)}|device)", argument) is None:
        assert shown(*given_before, argument, "-fw_cfg", "x") == [(len(given_before), argument)]


PROPERTY = st.text(st.characters(exclude_characters="=,\0", codec="utf-8"))


@given(st.dictionaries(PROPERTY, PROPERTY), PROPERTY, st.data())
def test_a_device_that_is_not_listed_is_refused_wherever_its_driver_stands(
    others: dict[str, str], driver: str, data: st.DataObject
) -> None:
    driver = data.draw(st.sampled_from(["VGA", "qxl", "ivshmem-plain"])) if driver in DEVICES else driver
    pairs = data.draw(st.permutations([*{**others, "driver": driver}.items()]))
    for value in (json.dumps(dict(pairs)), ",".join(f"{name}={said}" for name, said in pairs)):
        assert shown("-device", value)[0][0] == 0


@given(st.sampled_from(sorted(DEVICES)), st.data())
def test_a_listed_device_may_pass_in_any_order_and_with_no_other_property(driver: str, data: st.DataObject) -> None:
    known = {"driver": driver, "id": "a", **dict.fromkeys(DEVICES[driver], "1")}
    pairs = data.draw(st.permutations([*known.items()]))
    another = data.draw(PROPERTY.filter(lambda name: name not in known))
    for value, more in (
        (json.dumps(dict(pairs)), json.dumps({**dict(pairs), another: "x"})),
        (",".join(f"{name}={said}" for name, said in pairs), ",".join(f"{n}={v}" for n, v in [*pairs, (another, "x")])),
    ):
        assert shown("-device", value) == []
        assert shown("-device", more)[0][0] == 0
