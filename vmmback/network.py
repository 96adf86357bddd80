"""A guest's nics: taps that are made, put on their bridges, and passed to QEMU by descriptor. All netlink is here.

A tap is not persistent: QEMU alone holds it once it runs, and it goes with QEMU, however that ends; one that QEMU made
persistent is removed. A bridge that vmmback made goes with its last port; a process that outlives the supervisor sees
to it (linux/bridge_keeper.py).

To import this costs more than all else of a launch: launch.py does it only for a guest that has a nic.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import ipaddress
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2.iproute.linux import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmmback import command
from vmmback.config import GuestConfig
from vmmback.config.nic import IPV6_MIN_MTU, MAX_MTU, Nic
from vmmback.errors import HostUnfit, VmmbackError
from vmmback.linux import bridge_keeper
from vmmback.linux.network import LinkEvents
from vmmback.linux.tap import open_tap
from vmmback.report import Exposure

_LOCK_TIMEOUT_S = 10
_IPV6_SETTINGS = Path("/proc/sys/net/ipv6/conf")  # of the network that the reader is in
_ADDRGENMODE_NONE = 1  # IN6_ADDR_GEN_MODE_NONE, include/uapi/linux/if_link.h
_ETHERNET_MTU = 1500
_IFF_UP = 1
_CAP_NET_ADMIN_HINT = "run as root: taps and bridges need CAP_NET_ADMIN in the network's user namespace"


@dataclass
class _Port:
    """A tap on its bridge; the indices are the kernel's."""

    number: int
    tap: str
    tap_index: int
    bridge: str
    bridge_index: int
    attached: bool = True

    @property
    def put_back(self) -> str:
        return f"ip link set {self.tap} master {self.bridge}"


async def attach(
    config: GuestConfig, stack: AsyncExitStack, inherited: ExitStack, note: Callable[[str], None]
) -> list[command.Device]:
    """Make what the guest's nics need; return what QEMU needs for them.

    The taps' descriptors are closed with `inherited`, all else goes with `stack`. `note` is told when a nic loses its
    bridge. Raises HostUnfit; what was made until then goes with `stack` as well.
    """
    devices = []
    on_bridges = [nic for nic in config.nic if nic.mode == "bridge"]
    taps = {index: _new_name() for index, nic in enumerate(config.nic) if nic.mode == "bridge"}
    half_made = {str(nic.bridge): _new_name() for nic in on_bridges if nic.create}
    if half_made:
        await stack.enter_async_context(_kept(half_made, list(taps.values()), note))
    if on_bridges:
        netlink = await stack.enter_async_context(AsyncIPRoute())
        stack.push_async_callback(_remove, netlink, list(taps.values()))
        events = stack.enter_context(_events())
    ports = []
    for index, nic in enumerate(config.nic):
        if nic.mode == "user":
            devices.append(user_device(index, config.mac(index)))
            continue
        with _explained(f"nic {index}"):
            async with _locked():
                bridge = await _bridge(netlink, nic, half_made)
                mtu = nic.mtu or min(int(bridge.get("mtu")), MAX_MTU)  # a bridge can have a little more than a tap
                descriptors = _open_tap(taps[index], nic.queues, inherited)
                alias = f"vmmback: nic {index} of guest {config.name}"
                tap_index = await _put_on_bridge(netlink, taps[index], bridge["index"], mtu, alias)
        ports.append(_Port(index, taps[index], tap_index, str(nic.bridge), bridge["index"]))
        devices.append(tap_device(index, nic, config.mac(index), mtu, descriptors))
    if ports:
        await stack.enter_async_context(_watched(_Watch(netlink, events, ports, note)))
    return devices


def _new_name() -> str:
    """Return a name for an interface that none has: 13 of the 15 bytes that it may have."""
    return f"vmm{secrets.token_hex(5)}"


# --- What QEMU is told ------------------------------------------------------------------------------------------------


def tap_device(index: int, nic: Nic, mac: str, mtu: int, descriptors: list[int]) -> command.Device:
    """Return a nic on a bridge: virtio-net with `descriptors`, one for each of its tap's queues."""
    numbers = ":".join(str(descriptor) for descriptor in descriptors)
    # vhost would let a thread of the kernel move the packets: QEMU does, as it does for disks.
    netdev = f"tap,id=net{index},{'fds' if nic.queues > 1 else 'fd'}={numbers},vhost=off"
    card = _card(index, mac)
    if nic.queues > 1:
        # An interrupt for each queue of a pair, one for its control queue, one for changes of its configuration.
        card += f",mq=on,vectors={2 * nic.queues + 2}"
    if mtu != _ETHERNET_MTU:
        card += f",host_mtu={mtu}"
    exposure = Exposure(
        name="network",
        holders="the host kernel, root, all on the bridge",
        detail=f"nic {index} on bridge {nic.bridge}: what the guest sends and receives unencrypted is in the clear in "
        "QEMU's heap, the kernel's buffers and on the bridge",
    )
    return command.Device(("-netdev", netdev, "-device", card), tuple(descriptors), (exposure,))


def user_device(index: int, mac: str) -> command.Device:
    """Return a nic of user-mode networking."""
    exposure = Exposure(
        name="user-network",
        holders="the host kernel, root, the network",
        detail=f"nic {index} in user mode: QEMU's own network stack leaves copies of packets in its "
        "heap, also when it has ended, and speaks as the host, to what listens on its loopback, too",
    )
    return command.Device(("-netdev", f"user,id=net{index}", "-device", _card(index, mac)), (), (exposure,))


def _card(index: int, mac: str) -> str:
    # romfile: an option ROM would be one more block of ordinary memory before QEMU 10, and no guest boots from it.
    return f"virtio-net-pci,id=nic{index},netdev=net{index},mac={mac},romfile="


# --- Taps and bridges -------------------------------------------------------------------------------------------------


def _open_tap(name: str, queues: int, inherited: ExitStack) -> list[int]:
    descriptors = open_tap(name, queues)
    for descriptor in descriptors:
        inherited.callback(os.close, descriptor)
    return descriptors


async def _remove(netlink: AsyncIPRoute, taps: list[str]) -> None:
    """Remove taps that outlived QEMU: it needs no right to make one persistent (TUNSETPERSIST of drivers/net/tun.c)."""
    for name in taps:
        if tap := await _link(netlink, ifname=name):
            with suppress(NetlinkError):  # it went meanwhile
                await netlink.link("del", index=tap["index"])


async def _put_on_bridge(netlink: AsyncIPRoute, name: str, bridge: int, mtu: int, alias: str) -> int:
    """Bring a tap up on a bridge, silent itself; return its index."""
    tap = await _link(netlink, ifname=name)
    assert tap is not None
    # A bridge without an address of its own takes the least of its ports' (net/bridge/br_stp_if.c): with 0xfe in front
    # a tap changes no bridge's that has another port. It must not be the guest's: the bridge keeps that for itself.
    address = bytes([0xFE, *secrets.token_bytes(5)]).hex(":")
    # Else the host itself would speak on the guest's port: neighbour and router solicitations, multicast reports.
    # Not on a tap too small for IPv6: this very request takes IPv6 from it, and would then fail for want of it.
    silent = _NO_LINK_LOCAL if _has_ipv6() and mtu >= IPV6_MIN_MTU else {}
    await netlink.link("set", index=tap["index"], address=address, mtu=mtu, ifalias=alias, **silent)
    with suppress(OSError):  # a container's read-only /proc/sys: reports are left, and no address to solicit from
        _set_ipv6(name, disable_ipv6=1)
    await netlink.link("set", index=tap["index"], master=bridge)
    await netlink.link("set", index=tap["index"], state="up")
    return int(tap["index"])


_NO_LINK_LOCAL = {
    "IFLA_AF_SPEC": {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDRGENMODE_NONE)]})]}
}


def _has_ipv6() -> bool:
    return _IPV6_SETTINGS.exists()


def _set_ipv6(interface: str, **settings: int) -> None:
    """Change IPv6 settings of an interface; where the kernel has no IPv6 there is nothing to set. Raises OSError."""
    for name, value in settings.items():
        with suppress(FileNotFoundError):
            (_IPV6_SETTINGS / interface / name).write_text(str(value))


async def _bridge(netlink: AsyncIPRoute, nic: Nic, half_made: dict[str, str]) -> Any:
    """Return the nic's bridge, which is made if it is to be. Raises HostUnfit."""
    name = str(nic.bridge)
    bridge = await _link(netlink, ifname=name)
    if bridge is None and nic.create:
        await _make_bridge(netlink, name, half_made[name], str(nic.address))
        bridge = await _link(netlink, ifname=name)
    if bridge is None:
        hint = f'ip link add {name} type bridge && ip link set {name} up; or write create = true with its "address"'
        raise HostUnfit(f"there is no bridge {name}", f"make it: {hint}")
    if bridge.get(("linkinfo", "kind")) != "bridge":
        raise HostUnfit(f"{name} is an interface, but no bridge", "write the name of a bridge; `ip link` lists them")
    if not bridge["flags"] & _IFF_UP:
        raise HostUnfit(f"bridge {name} is down", f"bring it up: ip link set {name} up")
    if nic.create and not await _has_address(netlink, bridge["index"], str(nic.address)):
        raise HostUnfit(
            f"bridge {name} exists already, and its address is not {nic.address}",
            f"remove create and address to use it as it is, or: ip address add {nic.address} dev {name}",
        )
    return bridge


async def _make_bridge(netlink: AsyncIPRoute, name: str, half_made: str, address: str) -> None:
    """Make a bridge under another name, which its keeper knows, and give it its name, our mark and life in one step.

    So whenever this process is killed there is nothing that nobody removes: the kernel takes no alias, which the mark
    is, for what is to be made (net/core/rtnetlink.c, rtnl_create_link).
    """
    interface = ipaddress.ip_interface(address)
    # An address that is set stays, as guests know it; else it would change with the ports.
    await netlink.link("add", ifname=half_made, kind="bridge", address=bytes([0x52, *secrets.token_bytes(5)]).hex(":"))
    bridge = await _link(netlink, ifname=half_made)
    assert bridge is not None
    # A guest must not give the host a router.
    _set_ipv6(half_made, accept_ra=0, **({"disable_ipv6": 1} if interface.version == 4 else {}))
    # nodad: until there is a port nobody is there to have the same, and the kernel would wait for one.
    flags = {"flags": 0x02} if interface.version == 6 else {}
    await netlink.addr(
        "add", index=bridge["index"], address=str(interface.ip), prefixlen=interface.network.prefixlen, **flags
    )
    await netlink.link("set", index=bridge["index"], ifname=name, ifalias=bridge_keeper.MARK, state="up")


async def _link(netlink: AsyncIPRoute, **which: Any) -> Any:
    """Return an interface by `ifname` or `index`, None if there is none."""
    try:
        return (await netlink.link("get", **which))[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


async def _has_address(netlink: AsyncIPRoute, index: int, address: str) -> bool:
    wanted = ipaddress.ip_interface(address)
    async for found in await netlink.get_addr(index=index):
        if ipaddress.ip_interface(f"{found.get('address')}/{found['prefixlen']}") == wanted:
            return True
    return False


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise HostUnfit for what the kernel refuses while the block runs, and say that it was for `what`."""
    try:
        yield
    except VmmbackError as error:
        raise type(error)(f"{what}: {error.message}", error.hint) from error
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        place = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        hint = "does the kernel have taps and bridges? modprobe tun bridge"
        if code in (errno.EPERM, errno.EACCES):
            hint = _CAP_NET_ADMIN_HINT
        raise HostUnfit(f"{what} cannot be made: {os.strerror(code or errno.EIO)}{place}", hint) from error


@asynccontextmanager
async def _locked() -> AsyncIterator[None]:
    """Keep all others who handle bridges in this network from it while the block runs. Raises HostUnfit, OSError."""
    lock = bridge_keeper.network()
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # flock(1) takes the lock for all who have this open file: it can be waited for, with a deadline.
            waiting = ("flock", "-w", str(_LOCK_TIMEOUT_S), str(lock))
            flock = await asyncio.create_subprocess_exec(*waiting, pass_fds=[lock], start_new_session=True)
            try:
                status = await flock.wait()
            finally:
                if flock.returncode is None:
                    flock.kill()
                    await flock.wait()
            if status != 0:
                raise HostUnfit(
                    f"another process has held the lock on this network's bridges for {_LOCK_TIMEOUT_S} s",
                    "lsns -t net -o NS tells the number of the network; /proc/locks, who has the lock on that inode",
                ) from None
        yield
    finally:
        os.close(lock)


# --- While the guest lives, and after ---------------------------------------------------------------------------------


@asynccontextmanager
async def _kept(half_made: dict[str, str], taps: list[str], note: Callable[[str], None]) -> AsyncIterator[None]:
    """Have the bridges removed that vmmback made, once their last port is gone and the block was left.

    It happens also when this process is killed.
    """
    keeper = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", bridge_keeper.KEEPER, "vmmback-bridge-keeper",
        sys.executable, "-I", "-S", bridge_keeper.__file__,
        ",".join(half_made), ",".join([*half_made.values(), *taps]), str(_LOCK_TIMEOUT_S),
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True, cwd="/",
    )  # fmt: skip
    try:
        yield
    finally:
        assert keeper.stdin is not None
        assert keeper.stderr is not None
        keeper.stdin.close()
        complaint = (await keeper.stderr.read()).decode(errors="replace").strip()
        if await keeper.wait():
            why = complaint.rpartition("\n")[2] or f"its keeper ended with {keeper.returncode}"
            note(f"a bridge that vmmback made may be left ({', '.join(half_made)}): {why}")


@contextmanager
def _events() -> Iterator[LinkEvents]:
    events = LinkEvents()
    try:
        yield events
    finally:
        events.close()


class _Watch:
    """Sees to it that a guest's nics are on their bridges, and says when one is not."""

    def __init__(
        self, netlink: AsyncIPRoute, events: LinkEvents, ports: list[_Port], note: Callable[[str], None]
    ) -> None:
        self._netlink, self._note = netlink, note
        self.events, self._ports = events, ports
        self._news = asyncio.Event()

    def hear(self) -> None:
        """Take what the kernel tells. Where all is well only news of our taps counts: others' are not our business."""
        changed = self.events.read()
        if changed is None or changed & {port.tap_index for port in self._ports} or self._wants_a_bridge():
            self._news.set()

    async def run(self) -> None:
        """Look whenever there is news, until the taps are gone."""
        try:
            while self._ports:
                await self._news.wait()
                self._news.clear()
                for port in list(self._ports):
                    await self._look(port)
        except (NetlinkError, OSError) as error:
            self._note(f"whether the guest's nics are on their bridges is not watched any more: {error}")

    def _wants_a_bridge(self) -> bool:
        return any(not port.attached for port in self._ports)

    async def _look(self, port: _Port) -> None:
        tap = await _link(self._netlink, index=port.tap_index)
        if tap is None:  # with QEMU
            self._ports.remove(port)
            return
        master, nic = tap.get("master"), f"nic {port.number} ({port.tap})"
        if master == port.bridge_index:
            if not port.attached:
                port.attached = True
                self._note(f"{nic} is on bridge {port.bridge} again")
            return
        bridge = await _link(self._netlink, ifname=port.bridge)
        is_another = bridge is not None and bridge["index"] != port.bridge_index
        if port.attached:
            port.attached = False
            if master or (bridge is not None and not is_another):
                self._note(f"{nic} was taken off bridge {port.bridge}; the guest runs on; to undo it: {port.put_back}")
            else:
                make = f"ip link add {port.bridge} type bridge && ip link set {port.bridge} up"
                self._note(
                    f"{nic} has no network: bridge {port.bridge} was deleted; the guest runs on; "
                    f"make the bridge again ({make}), and vmmback puts the nic on it"
                )
        if is_another and not master and bridge.get(("linkinfo", "kind")) == "bridge":
            with suppress(NetlinkError):  # it is gone again: that is news, too
                await self._netlink.link("set", index=port.tap_index, master=bridge["index"])
                port.bridge_index = bridge["index"]


@asynccontextmanager
async def _watched(watch: _Watch) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    loop.add_reader(watch.events, watch.hear)
    task = asyncio.create_task(watch.run())
    try:
        yield
    finally:
        loop.remove_reader(watch.events)
        task.cancel()
        await asyncio.wait({task})
