"""[[nic]]: a network card of the guest."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

from vmmback.config.tables import Conflict, Table
from vmmback.toml_errors import quote

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


class Nic(Table):
    """A network card of the guest (virtio-net), on a bridge of the host."""

    model_config = ConfigDict(
        json_schema_extra={
            "dependentRequired": {"address": ["create"]},
            "if": {"required": ["mode"], "properties": {"mode": {"const": "user"}}},
            "then": {
                "required": ["plaintext"],
                "not": {"anyOf": [{"required": [key]} for key in _OF_BRIDGES_ALONE]},
            },
            "else": {"required": ["bridge"], "not": {"required": ["plaintext"]}},
        }
    )

    plaintext: Literal["allowed"] | None = Field(
        default=None,
        description="Allows what leaves the guest's data on the host in the clear: user-mode networking.",
    )
    mode: Literal["bridge", "user"] = Field(
        default="bridge",
        description="bridge puts the nic on a bridge of the host. user is QEMU's own network stack, which leaves "
        'copies of packets in QEMU\'s own memory, and needs plaintext = "allowed".',
    )
    bridge: Annotated[
        str | None,
        AfterValidator(lambda name: name if name is None else _bridge(name)),
        WithJsonSchema({"type": "string", "pattern": f"^{_BRIDGE_PATTERN}$"}),
    ] = Field(
        default=None,
        validate_default=True,
        description="The bridge that the nic is on. It must exist and be up, unless create is true.",
        examples=["br0"],
    )
    address: Annotated[
        str | None,
        AfterValidator(lambda text: text if text is None else _address(text)),
        WithJsonSchema({"type": "string"}),
    ] = Field(
        default=None,
        description="The address of the bridge itself, IPv4 or IPv6, with its prefix; only with create.",
        examples=["10.77.0.1/24"],
    )
    create: bool = Field(
        default=False,
        validate_default=True,
        description="Make the bridge, with this address, if there is none of its name; it goes with its last port.",
    )
    mac: Annotated[
        str | None,
        AfterValidator(lambda text: text if text is None else _mac(text)),
        WithJsonSchema({"type": "string", "pattern": f"^{_MAC_PATTERN}$"}),
    ] = Field(
        default=None,
        description="The guest's MAC address. Without it: 52:54:00 and three bytes made from the guest's name and the "
        "nic's number, always the same.",
        examples=["52:54:00:12:34:56"],
    )
    mtu: int | None = Field(
        default=None,
        ge=MIN_MTU,
        le=MAX_MTU,
        description="The largest packet in bytes, 68 to 65521, for the tap and the guest. Without it, the bridge's.",
        examples=[1500],
    )
    queues: int = Field(
        default=1,
        ge=1,
        le=255,
        description="Pairs of queues (multiqueue), of which a guest uses one for each of its processors at most.",
    )

    @field_validator("mode")
    @classmethod
    def _what_user_mode_leaves(cls, mode: str, info: ValidationInfo) -> str:
        plaintext = info.data.get("plaintext", "allowed")  # a key before this one in the class; else it is wrong itself
        if mode == "user" and plaintext is None:
            raise ValueError(
                "is \"user\", which leaves copies of the guest's packets in QEMU's own memory; "
                'write a bridge instead, or plaintext = "allowed" to accept that'
            )
        return mode

    @field_validator("bridge", "create", "address", "mtu", "queues")
    @classmethod
    def _goes_with_a_bridge(cls, value: object, info: ValidationInfo) -> object:
        default = cls.model_fields[info.field_name or ""].default
        mode = info.data.get("mode")
        if mode == "user" and value != default:
            raise ValueError('does not go with mode = "user"; remove it')
        if mode == "bridge" and info.field_name == "bridge" and value is None:
            raise ValueError('missing; write bridge = "br0", the name of a bridge of this host')
        return value

    @field_validator("bridge")
    @classmethod
    def _nothing_to_allow(cls, bridge: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("mode") == "bridge" and info.data.get("plaintext"):
            raise ValueError('a bridge needs no plaintext = "allowed"; remove that')
        return bridge

    @field_validator("mtu")
    @classmethod
    def _room_for_ipv6(cls, mtu: int | None, info: ValidationInfo) -> int | None:
        if mtu and mtu < IPV6_MIN_MTU and ":" in (info.data.get("address") or ""):
            raise ValueError(f"{mtu} is less than IPv6 needs, and address is one of it; write {IPV6_MIN_MTU} or more")
        return mtu

    @field_validator("create")
    @classmethod
    def _made_with_an_address(cls, create: bool, info: ValidationInfo) -> bool:
        if "address" not in info.data or info.data.get("mode") != "bridge":  # wrong themselves, or of no use
            return create
        if create and not info.data["address"]:
            raise ValueError('needs the bridge\'s address; write address = "10.77.0.1/24"')
        if info.data["address"] and not create:
            raise ValueError("the address is for a bridge that is made; write create = true, or remove address")
        return create


def nic_conflicts(nics: Sequence[Nic], guest: str, cpus: int) -> Iterator[Conflict]:
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
