"""[[nic]]: a network card of the guest."""

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from vmmback.toml_errors import Problem, quote
from vmmback.toml_tables import Checked, Table, keys_of

MAX_NICS = 16
"""Each is a PCI device, and a guest has others (guest.py has the most of all)."""

MIN_MTU, MAX_MTU = 68, 65521
"""IPv4's least (RFC 791), and the most that Linux gives a tap: 65535 less an Ethernet header (drivers/net/tun.c)."""
IPV6_MIN_MTU = 1280
"""Below it (RFC 8200) Linux takes IPv6 off an interface (net/ipv6/addrconf.c, addrconf_notify)."""

# IFNAMSIZ is 16, with the NUL. The kernel takes more (net/core/dev.c, dev_valid_name), which tools then cannot write.
# It has settings of its own by the names "all" and "default" (net/ipv6/addrconf.c, addrconf_sysctl_register).
_BRIDGE_PATTERN = r"(?!(\.{1,2}|all|default)$)[A-Za-z0-9_.-]{1,15}"
_MAC_PATTERN = "[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}"
# QEMU's own (net/net.c, qemu_macaddr_default_if_unset); the second bit of 0x52 says: locally administered.
_QEMU_PREFIX = "52:54:00"
_EVERYBODY = ipaddress.IPv4Address("255.255.255.255")
_OF_BRIDGES_ALONE = ("bridge", "create", "address", "mtu", "queues")


def generated_mac(guest: str, index: int) -> str:
    """Return the MAC address of a guest's nic that has none of its own: always the same for a name and an index.

    52:54:00, then the first three bytes of SHA-256 of "NAME/INDEX".
    """
    import hashlib  # for guests with a nic alone: it takes 2 ms

    digest = hashlib.sha256(f"{guest}/{index}".encode()).digest()
    return f"{_QEMU_PREFIX}:{digest[:3].hex(':')}"


def _bridge(name: str) -> str:
    if not re.fullmatch(_BRIDGE_PATTERN, name):
        raise ValueError(
            f'{quote(name)} is no name for a bridge; write 1 to 15 of letters, digits, ".", "_" and "-", like "br0"'
        )
    return name


def _mac(text: str) -> str:
    example = 'write one like "52:54:00:12:34:56"'
    if not re.fullmatch(_MAC_PATTERN, text):
        raise ValueError(f"{quote(text)} is not a MAC address; {example}")
    if int(text[:2], 16) & 1:
        raise ValueError(f"{quote(text)} is a group's address, of which the first byte is odd; {example}")
    if not int(text.replace(":", ""), 16):
        raise ValueError(f"{quote(text)} is nobody's address; {example}")
    return text.lower()


def _address(text: str) -> str:
    example = 'write the bridge\'s own address and its prefix, like "10.77.0.1/24" or "fd00:77::1/64"'
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise ValueError(f"{quote(text)} is not an address; {example}") from None
    if "/" not in text:
        raise ValueError(f"{quote(text)} has no prefix; {example}")
    ip, network = interface.ip, interface.network
    if ip.is_multicast or ip.is_unspecified or ip.is_loopback or "%" in text or ip == _EVERYBODY:
        raise ValueError(f"{quote(text)} is no address that a bridge can have; {example}")
    if not network.prefixlen:
        raise ValueError(f"{quote(text)} would send all that leaves the host to the bridge; {example}")
    if network.num_addresses > 2 and (
        ip == network.network_address or (ip.version == 4 and ip == network.broadcast_address)
    ):
        raise ValueError(f"{quote(text)} is the network's address, not one of a host in it; {example}")
    return str(interface)


class Nic(Table, frozen=True):
    """A network card of the guest (virtio-net), on a bridge of the host."""

    more_schema: ClassVar[Mapping[str, object]] = {
        "dependentRequired": {"address": ["create"]},
        "if": {"required": ["mode"], "properties": {"mode": {"const": "user"}}},
        "then": {"required": ["plaintext"], "not": {"anyOf": [{"required": [key]} for key in _OF_BRIDGES_ALONE]}},
        "else": {"required": ["bridge"], "not": {"required": ["plaintext"]}},
    }

    plaintext: Annotated[
        Literal["allowed"] | None,
        Meta(description="Allows what leaves the guest's data on the host in the clear: user-mode networking."),
    ] = None
    mode: Annotated[
        Literal["bridge", "user"],
        Meta(
            description="bridge puts the nic on a bridge of the host. user is QEMU's own network stack, which leaves "
            'copies of packets in QEMU\'s own memory, and needs plaintext = "allowed".'
        ),
    ] = "bridge"
    bridge: Annotated[
        str | None,
        Checked(_bridge, pattern=f"^{_BRIDGE_PATTERN}$"),
        Meta(
            description="The bridge that the nic is on. It must exist and be up, unless create is true.",
            examples=["br0"],
        ),
    ] = None
    address: Annotated[
        str | None,
        Checked(_address),
        Meta(
            description="The address of the bridge itself, IPv4 or IPv6, with its prefix; only with create.",
            examples=["10.77.0.1/24"],
        ),
    ] = None
    create: Annotated[
        bool,
        Meta(
            description="Make the bridge, with this address, if there is none of its name; it goes with its last port."
        ),
    ] = False
    mac: Annotated[
        str | None,
        Checked(_mac, pattern=f"^{_MAC_PATTERN}$"),
        Meta(
            description="The guest's MAC address. Without it: 52:54:00 and three bytes made from the guest's name and "
            "the nic's number, always the same.",
            examples=["52:54:00:12:34:56"],
        ),
    ] = None
    mtu: Annotated[
        int | None,
        Meta(
            ge=MIN_MTU,
            le=MAX_MTU,
            description="The largest packet in bytes, 68 to 65521, for the tap and the guest. Without it, the "
            "bridge's.",
            examples=[1500],
        ),
    ] = None
    queues: Annotated[
        int,
        Meta(
            ge=1,
            le=255,
            description="Pairs of queues (multiqueue), of which a guest uses one for each of its processors at most.",
        ),
    ] = 1

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell what does not go with the mode, or with a bridge that is there, or that is made."""
        mode, mtu, address = good.get("mode"), good.get("mtu"), good.get("address") or ""
        if mode == "user" and good.get("plaintext", "allowed") is None:  # not there if it is wrong itself
            yield (
                ("mode",),
                "is \"user\", which leaves copies of the guest's packets in QEMU's own memory; "
                'write a bridge instead, or plaintext = "allowed" to accept that',
            )
        elif mode == "user":
            for key in _OF_BRIDGES_ALONE:
                if key in good and good[key] != keys_of(cls)[key].default:
                    yield (key,), 'does not go with mode = "user"; remove it'
            return
        elif mode == "bridge":
            yield from _bridge_conflicts(good)
        if mtu and mtu < IPV6_MIN_MTU and ":" in address:
            problem = f"{mtu} is less than IPv6 needs, and address is one of it; write {IPV6_MIN_MTU} or more"
            yield ("mtu",), problem


def _bridge_conflicts(good: Mapping[str, Any]) -> Iterator[Problem]:
    if "bridge" in good and good["bridge"] is None:
        yield ("bridge",), 'missing; write bridge = "br0", the name of a bridge of this host'
    elif "bridge" in good and good.get("plaintext"):
        yield ("bridge",), 'a bridge needs no plaintext = "allowed"; remove that'
    if "address" not in good or "create" not in good:  # wrong themselves
        return
    if good["create"] and not good["address"]:
        yield ("create",), 'needs the bridge\'s address; write address = "10.77.0.1/24"'
    elif good["address"] and not good["create"]:
        yield ("create",), "the address is for a bridge that is made; write create = true, or remove address"


def nic_conflicts(nics: Sequence[Nic], guest: str, cpus: int) -> Iterator[Problem]:
    """Compare the nics of a guest of this name with each other, and with the number of its processors."""
    if len(nics) > MAX_NICS:
        yield ("nic",), f"there are {len(nics)} nics; {MAX_NICS} is the most that a guest can have"
    macs: dict[str, int] = {}
    addresses = {nic.bridge: nic.address for nic in reversed(nics) if nic.create}
    for number, nic in enumerate(nics):
        mac = nic.mac or generated_mac(guest, number)
        if (first := macs.setdefault(mac, number)) != number:
            yield ("nic", number, "mac"), f"{mac} is that of nic[{first}] already; write another one"
        if nic.queues > cpus:
            yield ("nic", number, "queues"), f"{nic.queues} are more than the guest's {cpus} processor(s); write fewer"
        if nic.bridge in addresses and nic.address != addresses[nic.bridge]:
            yield (
                ("nic", number, "address"),
                f"another nic has bridge {nic.bridge} made with {addresses[nic.bridge]}; write the same for all of its",
            )
