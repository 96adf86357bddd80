"""guest.toml -> GuestConfig: what the user wants, checked and frozen. It knows nothing of what the host can do.

Without a folder as validation context (`GuestConfig.model_validate(tables)`), paths are kept as written and no file is
looked at.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from vmmback.config.process import Process
from vmmback.config.refused import REFUSED_TABLES
from vmmback.config.tables import Boot, Console, Cpu, Isolation, Machine, Memory, Qmp, Table
from vmmback.config.values import GuestName
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


class GuestConfig(Table):
    """One guest file: what the user wants of a guest."""

    name: GuestName = Field(
        description="The guest's name, which is also the name of its runtime folder.", examples=["demo"]
    )
    memory: Memory = Field(description="The guest's RAM.", examples=[{"size": "256MiB"}])
    cpu: Cpu = Field(default_factory=Cpu, description="The guest's processors.")
    machine: Machine = Field(default_factory=Machine, description="The board, and what runs the guest's instructions.")
    boot: Boot = Field(description="What the guest boots: a kernel or a firmware.", examples=[{"kernel": "vmlinuz"}])
    isolation: Isolation = Field(
        default_factory=Isolation, description="How the guest's isolation is proved, and what follows."
    )
    console: Console = Field(default_factory=Console, description="The guest's serial console.")
    qmp: Qmp = Field(default_factory=Qmp, description="What other processes may ask of the guest on its socket.")
    vsock: Vsock | None = Field(
        default=None, description="Sockets between the guest and the host, without a network.", examples=[{"cid": 3}]
    )
    process: Process = Field(default_factory=Process, description="As whom QEMU runs.")


_TABLES: dict[str, type[Table]] = {
    "": GuestConfig,
    "memory": Memory,
    "cpu": Cpu,
    "machine": Machine,
    "boot": Boot,
    "isolation": Isolation,
    "console": Console,
    "qmp": Qmp,
    "vsock": Vsock,
    "process": Process,
}
_GRAMMAR = Grammar(
    tables={
        name: {field.alias or key: field for key, field in table.model_fields.items()}
        for name, table in _TABLES.items()
    },
    not_built={
        ("disk",): "[[disk]]",
        ("nic",): "[[nic]]",
        ("share",): "[[share]]",
    },
    refused={(name,): reason for name, reason in REFUSED_TABLES.items()},
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
