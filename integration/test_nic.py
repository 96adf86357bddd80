"""Nics of real guests on real bridges, each test in a network namespace of its own."""

from __future__ import annotations

import asyncio
import fcntl
import gzip
import json
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from msgspec.structs import replace

from integration import capabilities
from integration.conftest import (
    ROOT,
    LiveGuest,
    Start,
    Supervisor,
    children,
    eventually,
    guest_file,
    prepared,
    processes_of,
    qemu_of,
)
from vmmback import command, config, console, handoff, monitor, network
from vmmback.config.guest import MAX_DEVICES
from vmmback.config.nic import MAX_NICS, generated_mac
from vmmback.errors import HostUnfit, QemuFailed
from vmmback.isolation import qmp_proof
from vmmback.linux import bridge_keeper, tap
from vmmback.linux.network import in_new_network

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_network")

CREATED = 'bridge = "vmm0"\ncreate = true\naddress = "10.77.0.1/24"\n'
EXISTING = 'bridge = "br0"\n'
TUNSETPERSIST = 0x400454CB


@pytest.fixture(scope="module")
def needs_network() -> None:
    for capability in (capabilities.NETWORK_NAMESPACE, capabilities.TAPS, capabilities.IPROUTE2):
        capabilities.require(capability)


Launch: TypeAlias = Callable[..., Supervisor]


@dataclass
class Network:
    """A network of a test's own: a namespace with `lo` alone, that lives as long as its descriptor."""

    descriptor: int

    def enter(self, *argv: str | Path) -> tuple[str | Path, ...]:
        """Return the command that runs `argv` in it."""
        return "nsenter", f"--net=/proc/{os.getpid()}/fd/{self.descriptor}", "--", *argv

    def ip(self, arguments: str) -> str:
        """Run ip(8) in it; return what it prints."""
        argv = self.enter("ip", *arguments.split())
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout

    def links(self) -> dict[str, dict[str, Any]]:
        """Return what ip(8) says of each interface but lo."""
        found = json.loads(self.ip("-json -details link show"))
        return {link["ifname"]: link for link in found if link.get("ifname", "lo") != "lo"}

    def taps(self) -> list[dict[str, Any]]:
        """Return what ip(8) says of each tap of ours."""
        return [link for link in self.links().values() if link.get("ifalias", "").startswith("vmmback: nic")]


@pytest.fixture
def net() -> Iterator[Network]:
    descriptor = in_new_network(bridge_keeper.network)
    yield Network(descriptor)
    os.close(descriptor)


@pytest.fixture
def launch(net: Network, start: Start) -> Launch:
    """Launch a guest file in the test's network, with other variables in the environment if need be."""
    return lambda file, *variables: start(
        "env", *variables, *net.enter(sys.executable, "-m", "vmmback", "launch", file, "--json")
    )


def with_nics(file: Path, *nics: str, more: str = "") -> Path:
    """Add nics to a guest file."""
    file.write_text(file.read_text() + more + "".join(f"[[nic]]\n{nic}" for nic in nics))
    return file


def exposures(report: dict[str, Any]) -> list[str]:
    return [exposure["name"] for exposure in report["exposures"]]


def end(supervisor: Supervisor) -> dict[str, Any]:
    """Have QEMU told to quit, and return the report."""
    supervisor.signal(signal.SIGINT)
    supervisor.signal(signal.SIGTERM)  # another, for two of a kind may arrive as one (signal(7))
    ended = supervisor.ended()
    assert ended.code == 0, ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


# --- Two Linux guests -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo guest's initrd, and behind it our init and the modules that it lacks."""
    capabilities.require(capabilities.GUEST_KERNEL)
    folder = tmp_path_factory.mktemp("net")
    modules = folder / "tree/lib/modules"
    modules.mkdir(parents=True)
    for module in (ROOT / "build/guest/modules").glob("*.ko"):
        shutil.copy(module, modules)
    shutil.copy(ROOT / "integration/guest/net-init", folder / "tree/init")
    (folder / "tree/init").chmod(0o755)
    names = "\n".join(str(path.relative_to(folder / "tree")) for path in sorted((folder / "tree").rglob("*")))
    packed = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc", "-R", "0:0"],
        cwd=folder / "tree", input=names.encode(), capture_output=True, check=True,
    ).stdout  # fmt: skip
    image = folder / "net.img"
    image.write_bytes(capabilities.INITRD.read_bytes() + gzip.compress(packed, 1))
    return image


def linux(folder: Path, initrd: Path, words: str, nic: str, cpus: int = 1) -> Path:
    """Write the guest file of a Linux guest on the network."""
    name = f"net-{secrets.token_hex(4)}"
    file = folder / f"{name}.toml"
    file.write_text(
        f'name = "{name}"\n[memory]\nsize = "128MiB"\n[cpu]\nmodel = "max,-erms,-fsrm"\ncount = {cpus}\n'
        f'[machine]\naccel = "tcg"\n[boot]\nkernel = "{capabilities.KERNEL}"\ninitrd = "{initrd}"\n'
        f'cmdline = "console=ttyS0 quiet panic=-1 no_timer_check {words}"\n'
        f'[console]\nlog = "{name}.serial.log"\n[isolation]\nready = "GUEST READY"\n[[nic]]\n{nic}'
    )
    return file


def test_two_guests_talk_to_each_other_and_to_the_host(
    tmp_path: Path, runtime_dir: Path, net: Network, launch: Launch, initrd: Path
) -> None:
    serving = linux(tmp_path, initrd, "net.address=10.77.0.2/24 net.host=10.77.0.1", CREATED + "mtu = 1500\n")
    fetching = linux(
        tmp_path, initrd, "net.address=10.77.0.3/24 net.host=10.77.0.1 net.peer=10.77.0.2",
        CREATED + 'mac = "52:54:00:77:00:03"\nmtu = 1400\nqueues = 2\n', cpus=2,
    )  # fmt: skip
    first, second = launch(serving), launch(fetching)
    log = {file: file.with_suffix(".serial.log") for file in (serving, fetching)}

    def printed(file: Path) -> str:
        return log[file].read_text(errors="replace") if log[file].exists() else ""

    def said(file: Path, pattern: str) -> str:
        found = re.search(pattern, printed(file))
        assert found, printed(file)
        return found[1]

    # The report goes to standard output at the end; that it was validated is told at once.
    for supervisor, file in ((first, serving), (second, fetching)):
        supervisor.wait_until(lambda file=file: "ANSWER 1" in printed(file), "the host answers the guest", 60)  # type: ignore[misc]
    assert said(fetching, r"FETCHED ([0-9a-f]{64})") == said(serving, r"OFFERS ([0-9a-f]{64})")
    assert said(fetching, r"NIC (.*?)\r?\n") == "mac=52:54:00:77:00:03 mtu=1400 queues=2"
    assert said(serving, r"NIC (.*?)\r?\n") == f"mac={generated_mac(serving.stem, 0)} mtu=1500 queues=1"
    assert {tap["mtu"] for tap in net.taps()} == {1500, 1400}
    assert {tap["master"] for tap in net.taps()} == {"vmm0"}

    # Each QEMU is in a network of its own, with nothing in it: it has the tap as a descriptor.
    networks = {Path(f"/proc/{pid}/ns/net").stat().st_ino for pid in qemu_of(runtime_dir)}
    assert len(networks - {os.fstat(net.descriptor).st_ino, Path("/proc/self/ns/net").stat().st_ino}) == 2

    # The bridge is deleted under both, and made again.
    net.ip("link delete vmm0")
    for supervisor in (first, second):
        supervisor.wait_for("has no network: bridge vmm0 was deleted; the guest runs on; make the bridge again")
        assert supervisor.stderr.count("nic 0") == 1
    answers = {file: printed(file).count("ANSWER") for file in log}
    for line in ("link add vmm0 type bridge", "address add 10.77.0.1/24 dev vmm0", "link set vmm0 up"):
        net.ip(line)
    for supervisor, file in ((first, serving), (second, fetching)):
        supervisor.wait_for("is on bridge vmm0 again")
        supervisor.wait_until(
            lambda file=file: printed(file).count("ANSWER") > answers[file] + 1,  # type: ignore[misc]
            "the host answers again",
        )

    for supervisor in (first, second):
        report = end(supervisor)
        assert report["verdict"] == "isolated"
        assert exposures(report).count("network") == 1
        assert "guest FAILED" not in supervisor.stderr
    assert list(net.links()) == ["vmm0"]  # it is not the one that vmmback made


# --- What is left -----------------------------------------------------------------------------------------------------


def test_all_is_gone_after_the_guests_end(tmp_path: Path, net: Network, launch: Launch) -> None:
    file = with_nics(guest_file(tmp_path), CREATED, 'bridge = "vmm1"\ncreate = true\naddress = "fd00:77::1/64"\n')
    supervisor = launch(file)
    supervisor.wait_for("isolated")
    assert net.links()["vmm0"]["ifalias"] == bridge_keeper.MARK
    assert "10.77.0.1/24" in net.ip("address show vmm0")
    assert "fd00:77::1/64" in net.ip("address show vmm1")
    assert "tentative" not in net.ip("address show vmm1 scope global")
    for tap_link in net.taps():
        assert tap_link["inet6_addr_gen_mode"] == "none"
        assert tap_link["address"].startswith("fe:")
        assert net.ip(f"-6 address show dev {tap_link['ifname']}") == ""
    report = end(supervisor)
    assert exposures(report).count("network") == 2
    assert report["timings"]["network"] > 0
    assert net.links() == {}


@pytest.mark.parametrize("victim", ["qemu", "supervisor", "both"])
def test_all_is_gone_after_sigkill(
    tmp_path: Path, runtime_dir: Path, net: Network, launch: Launch, victim: str
) -> None:
    supervisor = launch(with_nics(guest_file(tmp_path), CREATED))
    supervisor.wait_for("isolated")
    assert len(net.links()) == 2
    (qemu,) = qemu_of(runtime_dir)
    for pid in {"qemu": [qemu], "supervisor": [supervisor.process.pid], "both": [supervisor.process.pid, qemu]}[victim]:
        os.kill(pid, signal.SIGKILL)
    assert supervisor.ended().code == (6 if victim == "qemu" else -signal.SIGKILL)
    eventually(lambda: net.links() == {}, "tap and bridge are gone")


def test_a_bridge_that_was_there_is_left_as_it_was(tmp_path: Path, net: Network, launch: Launch) -> None:
    for line in (
        "link add br0 address 52:54:00:00:00:01 type bridge",
        "link add port type veth peer name far",
        "link set far up",
        "link set port master br0 up",
        "address add 10.88.0.1/24 dev br0",
        "link set br0 up",
    ):
        net.ip(line)

    def state() -> tuple[str, str]:
        links = re.sub(r'"\w+_timer":[0-9.]+', "", net.ip("-json -details link show"))
        return links, net.ip("address show scope global")  # the kernel looks at its link-local ones meanwhile

    eventually(
        lambda: {net.links()[name]["operstate"] for name in ("br0", "port", "far")} == {"UP"},
        "the bridge has a carrier",
    )
    before = state()
    supervisor = launch(with_nics(guest_file(tmp_path), EXISTING))
    supervisor.wait_for("isolated")
    assert [port["master"] for port in net.taps()] == ["br0"]
    bridge = net.links()["br0"]
    assert (bridge["address"], bridge.get("ifalias")) == ("52:54:00:00:00:01", None)
    assert end(supervisor)["verdict"] == "isolated"
    assert state() == before


WRONG_BRIDGES = [
    (EXISTING, "", "nic 0: there is no bridge br0"),
    (EXISTING, "link add br0 type bridge", "nic 0: bridge br0 is down"),
    (EXISTING, "tuntap add br0 mode tap", "nic 0: br0 is an interface, but no bridge"),
    (
        EXISTING + 'create = true\naddress = "10.77.0.1/24"\n',
        "link add br0 up type bridge",
        "nic 0: bridge br0 exists already, and its address is not 10.77.0.1/24",
    ),
]


@pytest.mark.parametrize(("nic", "made", "message"), WRONG_BRIDGES, ids=[row[2] for row in WRONG_BRIDGES])
def test_a_bridge_that_will_not_do(
    tmp_path: Path, net: Network, launch: Launch, nic: str, made: str, message: str
) -> None:
    if made:
        net.ip(made)
    before = net.links().keys()
    ended = launch(with_nics(guest_file(tmp_path), nic)).ended()
    assert ended.code == 3
    assert ended.has_one_error()
    assert message in ended.stderr
    assert "hint: " in ended.stderr
    assert net.links().keys() == before


def test_without_the_right_to_make_taps(tmp_path: Path, net: Network, start: Start) -> None:
    file = with_nics(guest_file(tmp_path), CREATED)
    argv = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-m", "vmmback")
    ended = start(*net.enter(*argv, "launch", file)).ended()
    assert (ended.code, ended.has_one_error()) == (3, True)
    assert "CAP_NET_ADMIN" in ended.stderr
    assert net.links() == {}


def keepers_of(runtime_dir: Path) -> list[int]:
    """Return the pids of the processes that see to a runtime folder's bridges."""
    return [pid for pid, line in processes_of(runtime_dir).items() if "bridge_keeper.py" in line]


def mtu_of(interface: str) -> int:
    """Return the MTU in bytes of an interface of this thread's network (SIOCGIFMTU of netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, 0x8921, struct.pack("=16s24x", interface.encode()))
    return int(struct.unpack_from("=i", answer, 16)[0])


def nothing_but_loopback() -> bool:
    return [name for _, name in socket.if_nameindex()] == ["lo"]


STEPS: list[tuple[Any, str]] = [
    (network, "open_tap"),
    (network, "_put_on_bridge"),
    (network, "_watched"),
    (console, "attach"),
    (command, "build"),
    (handoff, "start"),
    (monitor, "connect"),
    (qmp_proof, "observe"),
]


@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
def test_nothing_is_left_of_a_launch_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, step: str
) -> None:
    file = with_nics(guest_file(tmp_path), CREATED)

    def fail(*_: object, **__: object) -> None:
        raise QemuFailed("this step fails", "as the test wants")

    monkeypatch.setattr(module, step, fail)

    def run() -> None:
        with pytest.raises(QemuFailed, match="this step fails"), prepared(file):
            pass
        assert nothing_but_loopback()  # when the launch has ended, not some time later

    in_new_network(run)


def test_as_many_devices_as_a_guest_file_may_have_fit_on_the_board(tmp_path: Path) -> None:
    nics = [CREATED] * MAX_NICS
    disks = ""
    for number in range(MAX_DEVICES - len(nics)):
        (tmp_path / f"disk{number}").write_bytes(bytes(512))
        disks += f'[[disk]]\npath = "disk{number}"\nformat = "raw"\nplaintext = "allowed"\n'
    file = with_nics(guest_file(tmp_path), *nics, more=disks)

    def run() -> None:
        with prepared(file):
            pass

    in_new_network(run)


def test_a_tap_whose_name_is_taken_is_not_shared() -> None:
    def run() -> None:
        descriptors = tap.open_tap("vmmtest", 2)
        with pytest.raises(OSError, match="busy"):
            tap.open_tap("vmmtest", 2)
        for descriptor in descriptors:
            assert not nothing_but_loopback()
            os.close(descriptor)
        assert nothing_but_loopback()

    in_new_network(run)


# --- Guests beside each other -----------------------------------------------------------------------------------------


def nics(*tables: str) -> config.GuestConfig:
    return config.GuestConfig.of(
        {
            "name": f"g-{secrets.token_hex(4)}",
            "memory": {"size": "16MiB"},
            "boot": {"firmware": "/none"},
            "nic": [
                {"bridge": "vmm0", "create": True, "address": "10.77.0.1/24"} if table == "vmm0" else {"bridge": table}
                for table in tables
            ],
        }
    )


@asynccontextmanager
async def attached(guest: config.GuestConfig, notes: list[str]) -> AsyncIterator[None]:
    """Make the nics of a guest that has no QEMU: its taps are held here, and closed first."""
    async with AsyncExitStack() as stack:
        inherited = stack.enter_context(ExitStack())
        await network.attach(guest, stack, inherited, notes.append)
        yield


def test_guests_come_and_go_at_once_and_the_bridge_goes_with_the_last() -> None:
    async def one(notes: list[str]) -> None:
        async with attached(nics("vmm0"), notes):
            assert socket.if_nametoindex("vmm0")

    async def many() -> list[str]:
        notes: list[str] = []
        for _ in range(3):
            await asyncio.gather(*(one(notes) for _ in range(4)))
            assert nothing_but_loopback()
        async with attached(nics("vmm0"), notes):
            index = socket.if_nametoindex("vmm0")
            await asyncio.gather(*(one(notes) for _ in range(3)))
            assert socket.if_nametoindex("vmm0") == index
        assert nothing_but_loopback()
        return notes

    assert in_new_network(lambda: asyncio.run(many())) == []


@pytest.mark.parametrize(("bridge", "nic", "card"), [(1500, 68, 68), (1500, 1279, 1279), (1000, None, 1000),
                                                     (65535, None, 65521)])  # fmt: skip
def test_an_mtu_too_small_for_ipv6_and_one_too_large_for_a_tap(bridge: int, nic: int | None, card: int) -> None:
    guest = nics("br0")
    if nic:
        guest = replace(guest, nic=(replace(guest.nic[0], mtu=nic),))

    async def attach() -> None:
        async with AsyncExitStack() as stack:
            (device,) = await network.attach(guest, stack, stack.enter_context(ExitStack()), pytest.fail)
            assert device.argv[-1].endswith(f",host_mtu={card}")
            (tap_name,) = (name for _, name in socket.if_nameindex() if name.startswith("vmm"))
            assert mtu_of(tap_name) == card

    def run() -> None:
        subprocess.run(["ip", "link", "add", "br0", "up", "mtu", str(bridge), "type", "bridge"], check=True)
        asyncio.run(attach())

    in_new_network(run)


def test_a_bridge_without_our_mark_is_used_and_left() -> None:
    def interfaces() -> set[str]:
        return {name for _, name in socket.if_nameindex()}

    async def use() -> None:
        async with attached(nics("vmm0"), []):
            assert len(interfaces()) == 3

    def run() -> set[str]:
        subprocess.run(["ip", "link", "add", "vmm0", "up", "type", "bridge"], check=True)
        subprocess.run(["ip", "address", "add", "10.77.0.1/24", "dev", "vmm0"], check=True)
        asyncio.run(use())
        return interfaces()

    assert in_new_network(run) == {"lo", "vmm0"}


@pytest.mark.parametrize("held", [True, False], ids=["held", "persistent"])
def test_the_keeper_removes_the_taps_first(held: bool) -> None:
    def run() -> None:
        subprocess.run(["ip", "link", "add", "vmm0", "up", "type", "bridge"], check=True)
        subprocess.run(["ip", "link", "set", "vmm0", "alias", bridge_keeper.MARK], check=True)
        (descriptor,) = tap.open_tap("vmmtest")
        subprocess.run(["ip", "link", "set", "vmmtest", "master", "vmm0"], check=True)
        if not held:
            fcntl.ioctl(descriptor, TUNSETPERSIST, 1)
            os.close(descriptor)
        worker = [sys.executable, "-I", "-S", str(bridge_keeper.__file__), "vmm0", "vmmtest,vmmnone", "10"]
        assert subprocess.run(worker, check=True, capture_output=True).stderr == b""
        assert nothing_but_loopback()
        if held:
            os.close(descriptor)

    in_new_network(run)


@pytest.mark.parametrize("bridge", ["vmm0", "br0"])
def test_a_tap_that_qemu_made_persistent_goes_all_the_same(bridge: str) -> None:
    """What a guest could do that has taken over its QEMU: the ioctl asks for no right."""

    async def hold() -> None:
        async with AsyncExitStack() as stack:
            inherited = stack.enter_context(ExitStack())
            (device,) = await network.attach(nics(bridge), stack, inherited, pytest.fail)
            fcntl.ioctl(device.descriptors[0], TUNSETPERSIST, 1)
            inherited.close()
            assert any(name.startswith("vmm") and name != "vmm0" for _, name in socket.if_nameindex())

    def run() -> set[str]:
        subprocess.run(["ip", "link", "add", "br0", "up", "type", "bridge"], check=True)
        asyncio.run(hold())
        return {name for _, name in socket.if_nameindex()}

    assert in_new_network(run) == {"lo", "br0"}


def test_the_first_guest_to_end_leaves_the_bridge_to_the_others(
    tmp_path: Path, runtime_dir: Path, net: Network, launch: Launch
) -> None:
    guests = [launch(with_nics(guest_file(tmp_path), CREATED)) for _ in range(2)]
    for guest in guests:
        guest.wait_for("isolated")
    index = net.links()["vmm0"]["ifindex"]
    guests[0].process.kill()
    guests[0].ended()
    eventually(lambda: len(keepers_of(runtime_dir)) == 1, "the first guest's keeper has done its work")
    assert len(net.taps()) == 1
    assert net.links()["vmm0"]["ifindex"] == index
    end(guests[1])
    assert "nic 0" not in guests[1].stderr
    eventually(lambda: net.links() == {}, "the bridge is gone")


def test_a_launch_waits_for_the_lock_of_the_network_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    async def launched() -> None:
        async with attached(nics("vmm0"), notes):
            pass

    async def run() -> None:
        lock = bridge_keeper.network()
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = children()

        async def see(count: int, what: str) -> None:
            await asyncio.to_thread(eventually, lambda: len(children() - before) == count, what)

        waiting = asyncio.create_task(launched())
        try:
            await see(2, "flock(1) waits, beside the keeper")
            assert not waiting.done()
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
        await waiting
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(network, "_LOCK_TIMEOUT_S", 0.1)
        try:
            with pytest.raises(HostUnfit, match="has held the lock"):
                await launched()
        finally:
            os.close(lock)
        (note,) = notes  # the keeper does not wait for ever either
        assert "may be left (vmm0)" in note
        assert "another process holds the lock" in note

    in_new_network(lambda: asyncio.run(run()))


# --- The bridge goes, and other networks ------------------------------------------------------------------------------


def test_a_tap_that_somebody_moved_stays_there(tmp_path: Path, net: Network, launch: Launch) -> None:
    for name in ("br0", "br1"):
        net.ip(f"link add {name} up type bridge")
    supervisor = launch(with_nics(guest_file(tmp_path), EXISTING))
    supervisor.wait_for("isolated")
    (port,) = net.taps()
    net.ip(f"link set {port['ifname']} master br1")
    supervisor.wait_for("was taken off bridge br0; the guest runs on; to undo it: ip link set")
    assert net.taps()[0]["master"] == "br1"
    net.ip(f"link set {port['ifname']} master br0")
    supervisor.wait_for("is on bridge br0 again")
    end(supervisor)


@pytest.fixture
def user_guest(tmp_path: Path) -> Iterator[LiveGuest]:
    with prepared(with_nics(guest_file(tmp_path), 'mode = "user"\nplaintext = "allowed"\n')) as guest:
        yield guest


def test_user_mode_runs_where_its_plaintext_is_allowed(user_guest: LiveGuest) -> None:
    user_guest.start()
    report = user_guest.run(user_guest.guest.examine())
    assert report.verdict == "isolated"
    assert [exposure.name for exposure in report.exposures].count("user-network") == 1
