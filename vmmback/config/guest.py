"""guest.toml -> GuestConfig: what the user wants, checked and frozen. It knows nothing of what the host can do.

Without a folder as validation context (`GuestConfig.model_validate(tables)`), paths are kept as written and no file is
looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from vmmback.config.disk import Disk, disk_conflicts
from vmmback.config.nic import Nic, generated_mac, nic_conflicts
from vmmback.config.process import Process
from vmmback.config.refused import REFUSED_TABLES
from vmmback.config.share import Share, share_conflicts
from vmmback.config.tables import (
    Boot,
    Conflict,
    Console,
    Cpu,
    Isolation,
    Machine,
    Memory,
    Qmp,
    Table,
    with_conflicts,
)
from vmmback.config.values import GuestName, Tables
from vmmback.config.vsock import Vsock
from vmmback.errors import ConfigError
from vmmback.toml_errors import Grammar, ascii_path, explain, read

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


class GuestConfig(Table):
    """One guest file: what the user wants of a guest."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {
                    "required": ["boot"],
                    "properties": {"boot": {"anyOf": [{"required": ["kernel"]}, {"required": ["firmware"]}]}},
                },
                {"required": ["disk"]},
            ]
        }
    )

    name: GuestName = Field(
        description="The guest's name, which is also the name of its runtime folder.", examples=["demo"]
    )
    memory: Memory = Field(description="The guest's RAM.", examples=[{"size": "256MiB"}])
    cpu: Cpu = Field(default_factory=Cpu, description="The guest's processors.")
    machine: Machine = Field(default_factory=Machine, description="The board, and what runs the guest's instructions.")
    boot: Boot = Field(
        default_factory=Boot,
        description="What the guest boots: a kernel or a firmware. Without it, QEMU's own firmware boots a disk.",
        examples=[{"kernel": "vmlinuz"}],
    )
    disk: Annotated[tuple[Disk, ...], Tables] = Field(
        default_factory=tuple,
        description="The guest's disks, in the order in which it sees them: /dev/vda, /dev/vdb and so on.",
    )
    nic: Annotated[tuple[Nic, ...], Tables] = Field(
        default_factory=tuple, description="The guest's network cards, in the order in which it finds them."
    )
    isolation: Isolation = Field(
        default_factory=Isolation, description="How the guest's isolation is proved, and what follows."
    )
    console: Console = Field(default_factory=Console, description="The guest's serial console.")
    qmp: Qmp = Field(default_factory=Qmp, description="What other processes may ask of the guest on its socket.")
    share: Annotated[tuple[Share, ...], Tables] = Field(
        default_factory=tuple, description="Folders of the host that the guest can mount."
    )
    vsock: Vsock | None = Field(
        default=None, description="Sockets between the guest and the host, without a network.", examples=[{"cid": 3}]
    )
    process: Process = Field(default_factory=Process, description="As whom QEMU runs, and whose memory it uses.")

    @model_validator(mode="wrap")
    @classmethod
    def _tables_together(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Check the tables against each other."""
        guest = with_conflicts(cls, value, handler, _nothing_to_boot(value) if isinstance(value, dict) else ())
        others = {"[boot] kernel": guest.boot.kernel, "[boot] initrd": guest.boot.initrd}
        others |= {"[boot] firmware": guest.boot.firmware, "[console] log": guest.console.log}
        found = chain(
            disk_conflicts(guest.disk, others, kernel=bool(guest.boot.kernel), look=info.context is not None),
            nic_conflicts(guest.nic, guest.name, guest.cpu.count),
            share_conflicts(guest.share),
            _too_many_devices(guest),
        )
        return with_conflicts(cls, guest, lambda _: guest, found)

    def mac(self, index: int) -> str:
        """Return the MAC address of a nic, counted from 0."""
        return self.nic[index].mac or generated_mac(self.name, index)

    @property
    def needs_host_network(self) -> bool:
        """Tell whether QEMU itself opens connections to the network, so that it must see the host's."""
        return any(nic.mode == "user" for nic in self.nic)


def _too_many_devices(guest: GuestConfig) -> Iterator[Conflict]:
    devices: dict[str, Collection[object]] = {"disk": guest.disk, "nic": guest.nic, "share": guest.share}
    count = sum(map(len, devices.values())) + (guest.vsock is not None)
    if count > MAX_DEVICES:
        most = max(devices, key=lambda name: len(devices[name]))
        yield (most,), f"with it the guest has {count} disks, nics, shares and vsocks; {MAX_DEVICES} is the most"


def _nothing_to_boot(tables: Mapping[str, object]) -> Iterator[Conflict]:
    boot = tables.get("boot")
    if tables.get("disk") or (isinstance(boot, dict) and ("kernel" in boot or "firmware" in boot)):
        return
    if "boot" not in tables:
        yield ("boot",), 'the table is missing; write [boot] and under it kernel = "vmlinuz", or a [[disk]] to boot'
    elif isinstance(boot, dict):
        yield ("boot",), 'has neither kernel nor firmware; write one of them, like kernel = "vmlinuz"'


_TABLES: dict[str, type[Table]] = {
    "": GuestConfig,
    "memory": Memory,
    "cpu": Cpu,
    "machine": Machine,
    "boot": Boot,
    "disk": Disk,
    "nic": Nic,
    "isolation": Isolation,
    "console": Console,
    "qmp": Qmp,
    "share": Share,
    "vsock": Vsock,
    "process": Process,
}
_GRAMMAR = Grammar(
    tables={
        name: {field.alias or key: field for key, field in table.model_fields.items()}
        for name, table in _TABLES.items()
    },
    refused={(name,): reason for name, reason in REFUSED_TABLES.items()},
    arrays={"disk", "nic", "share"},
)


def load(path: Path) -> GuestConfig:
    """Return what a guest file says, with its paths resolved from the file's own folder.

    Raises ConfigError with every error of the file, one a line.
    """
    text, tables = read(path)
    if not tables:
        raise ConfigError(f"{ascii_path(path)}: is empty", hint=f"the smallest guest file is:\n\n{SMALLEST}")
    hint = "`vmmback schema` describes every table and key"
    try:
        guest = GuestConfig.model_validate(tables, context=path.absolute().parent)
    except ValidationError as error:
        raise ConfigError(explain(path, text, error, _GRAMMAR), hint) from error
    inputs = (path, guest.boot.kernel, guest.boot.initrd, guest.boot.firmware)
    log = guest.console.log
    if log and log.exists() and any(log.samefile(file) for file in inputs if file):
        problem = f"{ascii_path(log)}: is a file that the guest is made of, and would be overwritten"
        raise ConfigError(f"{ascii_path(path)}: console.log: {problem}; write another path", hint)
    return guest


class _TomlSchema(GenerateJsonSchema):
    """JSON Schema of a format that has no null."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        written = super().default_schema(schema)
        return {key: value for key, value in written.items() if key != "default" or value is not None}


def json_schema() -> dict[str, object]:
    """Return the JSON Schema (draft 2020-12) of guest files, for editors."""
    schema = GuestConfig.model_json_schema(by_alias=True, schema_generator=_TomlSchema)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "vmmback guest file"}
