"""[[nic]]: what it may say, what it means when it says nothing, and what QEMU is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmback import network
from vmmback.config import GuestConfig, load
from vmmback.config.nic import MAX_NICS, Nic, generated_mac
from vmmback.errors import ConfigError

GUEST = {"name": "demo", "memory": {"size": "256MiB"}, "boot": {"kernel": "vmlinuz"}}
GUEST_LINES = 8  # of the text below, before the first nic
BRIDGE = 'bridge = "br0"\n'


def guest(*nics: dict[str, object], cpus: int = 1) -> GuestConfig:
    return GuestConfig.of({**GUEST, "cpu": {"count": cpus}, "nic": list(nics)})


def message_of(folder: Path, nics: str) -> str:
    """What is wrong with a guest file with this after its other tables; lines are counted from there."""
    (folder / "vmlinuz").touch()
    file = folder / "guest.toml"
    file.write_text('name = "demo"\n[memory]\nsize = "256MiB"\n[boot]\nkernel = "vmlinuz"\n[cpu]\ncount = 2\n\n' + nics)
    with pytest.raises(ConfigError) as raised:
        load(file)
    return re.sub(
        r"^.*?toml:([0-9]+)", lambda found: str(int(found[1]) - GUEST_LINES), raised.value.message, flags=re.M
    )


def test_a_guest_has_no_nic_unless_it_asks() -> None:
    assert GuestConfig.of(GUEST).nic == ()
    assert not GuestConfig.of(GUEST).needs_host_network


def test_a_bridge_alone_is_enough(tmp_path: Path) -> None:
    (nic,) = guest({"bridge": "br0"}).nic
    assert nic == Nic(bridge="br0", mode="bridge", create=False, address=None, mac=None, mtu=None, queues=1)


def test_all_keys() -> None:
    keys = {"bridge": "vmm0", "create": True, "address": "fd00:77::1/64", "mac": "52:54:00:AB:cd:ef", "mtu": 9000}
    config = guest({**keys, "queues": 2}, cpus=2)
    assert config.nic[0] == Nic(**{**keys, "queues": 2, "mac": "52:54:00:ab:cd:ef"})  # type: ignore[arg-type]
    assert config.mac(0) == "52:54:00:ab:cd:ef"


def test_user_mode_needs_the_hosts_network() -> None:
    assert guest({"mode": "user", "plaintext": "allowed"}).needs_host_network
    assert not guest({"bridge": "br0"}).needs_host_network


# What a file says, and its errors: lines from the first [[nic]] on.
WRONG = [
    ("[nic]\nbridge = 'a'\n", "1: nic: is a table; write [[nic]] with two brackets"),
    ("[[nic]]\n", '1: nic[0].bridge: missing; write bridge = "br0"'),
    (f'[[nic]]\n{BRIDGE}[[nic]]\nmac = "x"\n', '3: nic[1].bridge: missing; write bridge = "br0"'),
    ('[[nic]]\nbridge = ""\n', '2: nic[0].bridge: "" is no name for a bridge'),
    (
        '[[nic]]\nbridge = "sixteen-letters-"\n',
        '2: nic[0].bridge: "sixteen-letters-" is no name for a bridge',
    ),
    ('[[nic]]\nbridge = ".."\n', '2: nic[0].bridge: ".." is no name for a bridge'),
    ('[[nic]]\nbridge = "a/b"\n', '2: nic[0].bridge: "a/b" is no name for a bridge'),
    ('[[nic]]\nbridge = "a,b"\n', '2: nic[0].bridge: "a,b" is no name for a bridge'),
    ("[[nic]]\nbridge = 1\n", "2: nic[0].bridge: 1 is an integer; write a string in quotes"),
    (f"[[nic]]\n{BRIDGE}create = true\n", "3: nic[0].create: needs the bridge's address; write address = \"10.77.0.1/"),
    (f'[[nic]]\n{BRIDGE}address = "10.0.0.1/8"\n', "1: nic[0].create: the address is for a bridge that is made; write"),
    (f'[[nic]]\n{BRIDGE}create = true\naddress = "10.0.0.1"\n', '4: nic[0].address: "10.0.0.1" has no prefix; write'),
    (f'[[nic]]\n{BRIDGE}create = true\naddress = "10.0.0.0/8"\n', '4: nic[0].address: "10.0.0.0/8" is the network\'s'),
    (f'[[nic]]\n{BRIDGE}create = true\naddress = "10.0.0.255/24"\n', "4: nic[0].address: "),
    (f'[[nic]]\n{BRIDGE}create = true\naddress = "224.0.0.1/24"\n', "4: nic[0].address: "),
    (f'[[nic]]\n{BRIDGE}create = true\naddress = "::1/64"\n', "4: nic[0].address: "),
    (f'[[nic]]\n{BRIDGE}create = true\naddress = "fd00::/64"\n', "4: nic[0].address: "),
    (f'[[nic]]\n{BRIDGE}create = true\naddress = "fe80::1%eth0/64"\n', "4: nic[0].address: "),
    (f'[[nic]]\n{BRIDGE}mac = "52:54:00:00:00"\n', '3: nic[0].mac: "52:54:00:00:00" is not a MAC address; write one'),
    (f'[[nic]]\n{BRIDGE}mac = "01:00:5e:00:00:01"\n', '3: nic[0].mac: "01:00:5e:00:00:01" is a group\'s address'),
    (f'[[nic]]\n{BRIDGE}mac = "00:00:00:00:00:00"\n', '3: nic[0].mac: "00:00:00:00:00:00" is nobody\'s address'),
    (f"[[nic]]\n{BRIDGE}mtu = 67\n", "3: nic[0].mtu: 67 is too small; write 68 or more"),
    (f"[[nic]]\n{BRIDGE}mtu = 65522\n", "3: nic[0].mtu: 65522 is too large; write 65521 or less"),
    (f"[[nic]]\n{BRIDGE}queues = 0\n", "3: nic[0].queues: 0 is too small; write 1 or more"),
    (f"[[nic]]\n{BRIDGE}queues = 3\n", "3: nic[0].queues: 3 are more than the guest's 2 processor(s); write"),
    (f'[[nic]]\n{BRIDGE}plaintext = "allowed"\n', '2: nic[0].bridge: a bridge needs no plaintext = "allowed"; remove'),
    (f'[[nic]]\n{BRIDGE}plaintext = "no"\n', '3: nic[0].plaintext: is "no"; write "allowed"'),
    (f'[[nic]]\n{BRIDGE}mode = "bridged"\n', '3: nic[0].mode: is "bridged"; write "bridge" or "user"'),
    ('[[nic]]\nmode = "user"\n', '2: nic[0].mode: is "user", which leaves copies of the guest\'s packets in'),
    (
        f'[[nic]]\n{BRIDGE}mode = "user"\nplaintext = "allowed"\n',
        '2: nic[0].bridge: does not go with mode = "user"; remove it',
    ),
    (
        '[[nic]]\nmode = "user"\nplaintext = "allowed"\nmtu = 1400\nqueues = 2\n',
        '4: nic[0].mtu: does not go with mode = "user"; remove it\n5: nic[0].queues: does not go with mode = "user"',
    ),
    (
        f'[[nic]]\n{BRIDGE}mac = "52:54:00:00:00:0a"\n[[nic]]\n{BRIDGE}mac = "52:54:00:00:00:0A"\n',
        "6: nic[1].mac: 52:54:00:00:00:0a is that of nic[0] already; write another one",
    ),
    (
        f'[[nic]]\n{BRIDGE}[[nic]]\n{BRIDGE}mac = "{generated_mac("demo", 0)}"\n',
        f"5: nic[1].mac: {generated_mac('demo', 0)} is that of nic[0] already; write another one",
    ),
    (
        f'[[nic]]\n{BRIDGE}create = true\naddress = "10.0.0.1/24"\n[[nic]]\n{BRIDGE}',
        "5: nic[1].address: another nic has bridge br0 made with 10.0.0.1/24; write the same for all of its",
    ),
    (f"[[nic]]\n{BRIDGE}" * (MAX_NICS + 1), f"1: nic: there are {MAX_NICS + 1} nics; {MAX_NICS} is the most"),
    (
        f'[[nic]]\n{BRIDGE}create = true\naddress = "fd00::1/64"\nmtu = 1279\n',
        "5: nic[0].mtu: 1279 is less than IPv6 needs, and address is one of it; write 1280 or more",
    ),
    (f"[[nic]]\n{BRIDGE}brigde = 1\n", '3: nic[0].brigde: unknown key "brigde"; did you mean "bridge"?'),
]


@pytest.mark.parametrize(("nics", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_what_cannot_work_is_refused_with_its_table_and_key(tmp_path: Path, nics: str, message: str) -> None:
    assert message_of(tmp_path, nics).startswith(message)


@pytest.mark.parametrize("address", ["10.77.0.1/24", "10.0.0.0/31", "10.0.0.1/32", "fd00:77::1/64", "fd00::ffff/112"])
def test_good_addresses(address: str) -> None:
    assert guest({"bridge": "br0", "create": True, "address": address}).nic[0].address == address


# --- MAC addresses ----------------------------------------------------------------------------------------------------

names = st.from_regex(r"\A[a-z0-9][a-z0-9.-]{0,62}\Z").filter(lambda name: ".." not in name)


def test_generated_addresses_stay_as_they_are() -> None:
    # Guests know theirs: another way to make them would rename the interfaces of all guests there are.
    assert generated_mac("demo", 0) == "52:54:00:8c:7d:82"
    assert generated_mac("demo", 1) == "52:54:00:3a:66:5d"


@given(names, st.integers(0, MAX_NICS - 1))
def test_any_generated_address_is_local_unicast_and_good_as_a_mac(name: str, index: int) -> None:
    mac = generated_mac(name, index)
    first = int(mac[:2], 16)
    assert first & 0b11 == 0b10
    assert guest({"bridge": "br0", "mac": mac}).mac(0) == mac == generated_mac(name, index)


# --- What QEMU is told ------------------------------------------------------------------------------------------------


def test_one_queue() -> None:
    device = network.tap_device(0, Nic(bridge="br0"), "52:54:00:00:00:01", 1500, [7])
    assert device.argv == (
        "-netdev",
        "tap,id=net0,fd=7,vhost=off",
        "-device",
        "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:00:00:01,romfile=",
    )
    assert device.descriptors == (7,)
    assert [exposure.name for exposure in device.exposures] == ["network"]


def test_several_queues_and_an_mtu() -> None:
    device = network.tap_device(1, Nic(bridge="br0", queues=3), "52:54:00:00:00:01", 9000, [7, 8, 9])
    assert device.argv[1] == "tap,id=net1,fds=7:8:9,vhost=off"
    assert device.argv[3].endswith("romfile=,mq=on,vectors=8,host_mtu=9000")
    assert device.descriptors == (7, 8, 9)


def test_user_mode_inherits_nothing_and_names_what_it_leaves() -> None:
    device = network.user_device(0, "52:54:00:00:00:01")
    assert device.argv[1] == "user,id=net0"
    assert device.descriptors == ()
    assert [exposure.name for exposure in device.exposures] == ["user-network"]
