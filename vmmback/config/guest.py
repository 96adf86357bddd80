"""guest.toml -> GuestConfig: what the user wants, checked and frozen. It knows nothing of what the host can do."""

from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from vmmback.config.disk import Disk, disk_conflicts
from vmmback.config.nic import Nic, generated_mac, nic_conflicts
from vmmback.config.process import Process
from vmmback.config.refused import REFUSED_TABLES
from vmmback.config.share import Share, share_conflicts
from vmmback.config.tables import Boot, Console, Cpu, Isolation, Machine, Memory, Qmp
from vmmback.config.values import GuestName
from vmmback.config.vsock import Vsock
from vmmback.errors import ConfigError
from vmmback.toml_errors import Problem, ascii_path, explain, read
from vmmback.toml_tables import Table, WrongTables

SMALLEST = """\
name = "demo"

[memory]
size = "256MiB"

[boot]
kernel = "vmlinuz"
"""


# q35's bus has 32 places (hw/pci/pci.c): its chipset has two of them (hw/pci-host/q35.c, hw/isa/lpc_ich9.c), the
# virtio-rng that every guest has one.
MAX_DEVICES = 29


class GuestConfig(Table, frozen=True):
    """One guest file: what the user wants of a guest."""

    refused: ClassVar[Mapping[str, str]] = REFUSED_TABLES
    more_schema: ClassVar[Mapping[str, object]] = {
        "anyOf": [
            {
                "required": ["boot"],
                "properties": {"boot": {"anyOf": [{"required": ["kernel"]}, {"required": ["firmware"]}]}},
            },
            {"required": ["disk"]},
        ]
    }

    name: Annotated[
        GuestName,
        Meta(description="The guest's name, which is also the name of its runtime folder.", examples=["demo"]),
    ]
    memory: Annotated[Memory, Meta(examples=[{"size": "256MiB"}])]
    cpu: Cpu = Cpu()
    machine: Machine = Machine()
    boot: Annotated[
        Boot,
        Meta(
            description="What the guest boots: a kernel or a firmware. Without it, QEMU's own firmware boots a disk.",
            examples=[{"kernel": "vmlinuz"}],
        ),
    ] = Boot()
    disk: Annotated[
        tuple[Disk, ...],
        Meta(description="The guest's disks, in the order in which it sees them: /dev/vda, /dev/vdb and so on."),
    ] = ()
    nic: Annotated[
        tuple[Nic, ...], Meta(description="The guest's network cards, in the order in which it finds them.")
    ] = ()
    isolation: Isolation = Isolation()
    console: Console = Console()
    qmp: Annotated[Qmp, Meta(description="What other processes may ask of the guest on its socket.")] = Qmp()
    share: Annotated[tuple[Share, ...], Meta(description="Folders of the host that the guest can mount.")] = ()
    vsock: Annotated[Vsock | None, Meta(examples=[{"cid": 3}])] = None
    process: Annotated[Process, Meta(description="As whom QEMU runs, and whose memory it uses.")] = Process()

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell whether there is nothing to boot."""
        boot = written.get("boot")
        if written.get("disk") or (isinstance(boot, dict) and ("kernel" in boot or "firmware" in boot)):
            return
        if "boot" not in written:
            yield ("boot",), 'the table is missing; write [boot] and under it kernel = "vmlinuz", or a [[disk]] to boot'
        elif isinstance(boot, dict):
            yield ("boot",), 'has neither kernel nor firmware; write one of them, like kernel = "vmlinuz"'

    def problems(self, folder: Path | None) -> Iterator[Problem]:
        """Tell which tables do not go together."""
        others = {"[boot] kernel": self.boot.kernel, "[boot] initrd": self.boot.initrd}
        others |= {"[boot] firmware": self.boot.firmware, "[console] log": self.console.log}
        return chain(
            disk_conflicts(self.disk, others, kernel=bool(self.boot.kernel), look=folder is not None),
            nic_conflicts(self.nic, self.name, self.cpu.count),
            share_conflicts(self.share),
            _too_many_devices(self),
        )

    def mac(self, index: int) -> str:
        """Return the MAC address of a nic, counted from 0."""
        return self.nic[index].mac or generated_mac(self.name, index)

    @property
    def needs_host_network(self) -> bool:
        """Tell whether QEMU itself opens connections to the network, so that it must see the host's."""
        return any(nic.mode == "user" for nic in self.nic)


def _too_many_devices(guest: GuestConfig) -> Iterator[Problem]:
    devices: dict[str, Collection[object]] = {"disk": guest.disk, "nic": guest.nic, "share": guest.share}
    count = sum(map(len, devices.values())) + (guest.vsock is not None)
    if count > MAX_DEVICES:
        most = max(devices, key=lambda name: len(devices[name]))
        yield (most,), f"with it the guest has {count} disks, nics, shares and vsocks; {MAX_DEVICES} is the most"


def load(path: Path) -> GuestConfig:
    """Return what a guest file says, with its paths resolved from the file's own folder.

    Raises ConfigError with every error of the file, one a line.
    """
    text, tables = read(path)
    if not tables:
        raise ConfigError(f"{ascii_path(path)}: is empty", hint=f"the smallest guest file is:\n\n{SMALLEST}")
    hint = "`vmmback schema` describes every table and key"
    try:
        guest = GuestConfig.of(tables, path.absolute().parent)
    except WrongTables as error:
        raise ConfigError(explain(path, text, error.problems), hint) from error
    inputs = (path, guest.boot.kernel, guest.boot.initrd, guest.boot.firmware)
    log = guest.console.log
    if log and log.exists() and any(log.samefile(file) for file in inputs if file):
        problem = f"{ascii_path(log)}: is a file that the guest is made of, and would be overwritten"
        raise ConfigError(f"{ascii_path(path)}: console.log: {problem}; write another path", hint)
    return guest
