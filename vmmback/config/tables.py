"""The tables of a guest file that every guest has or may have once; those of its devices have modules of their own.

Each field's description is its documentation; the JSON Schema hands it to editors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from vmmback.config.values import (
    DIMM_GRAIN_BYTES,
    MAX_MEMORY_BYTES,
    AllowedCommands,
    CommandLine,
    CpuModel,
    InputFile,
    OutputFile,
    ReadyText,
    Seconds,
    Size,
    WatchPeriod,
    shown_size,
)

Model = TypeVar("Model", bound=BaseModel)
Conflict = tuple[tuple[str | int, ...], str]
"""What is wrong with keys of a table that do not go together: where it is said, and what."""


class Table(BaseModel):
    """Base of all tables: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def with_conflicts(
    cls: type[Model], value: object, handler: Callable[[Any], Model], conflicts: Iterable[Conflict]
) -> Model:
    """Validate a table; raise ValidationError with its conflicts and with what else is wrong in it, all at once."""
    errors = [
        InitErrorDetails(type="value_error", loc=keys, input=value, ctx={"error": ValueError(problem)})
        for keys, problem in conflicts
    ]
    if not errors:
        return handler(value)
    try:
        handler(value)
    except ValidationError as error:
        errors += [
            InitErrorDetails(type=seen["type"], loc=seen["loc"], input=seen["input"], ctx=seen.get("ctx", {}))
            for seen in error.errors(include_url=False)
        ]
    raise ValidationError.from_exception_data(cls.__name__, errors)


class Memory(Table):
    """The guest's RAM."""

    size: Size = Field(
        description="All of the guest's RAM, in multiples of 8KiB, from 1MiB to 16TiB.", examples=["256MiB"]
    )
    max: Size | None = Field(
        default=None,
        description="The most RAM that the guest may grow to while it runs (vmmback grow): size and a multiple of "
        "128MiB. Without it, the guest cannot grow.",
        examples=["2GiB"],
    )
    prefault: bool = Field(
        default=True,
        description="Allocate every page before the guest starts, so that it cannot run out of memory later.",
    )
    backing: Literal["secret", "ordinary"] = Field(
        default="secret",
        description="What holds the RAM: secret is memfd_secret, which the host kernel cannot read. "
        "ordinary is a plain memfd, the control that shows what an exposed guest looks like: its report says exposed.",
    )

    @field_validator("max")
    @classmethod
    def _room_for_dimms(cls, largest: int | None, info: ValidationInfo) -> int | None:
        size = info.data.get("size")  # not there if it is wrong itself
        if largest is None or size is None:
            return largest
        if largest < size:
            raise ValueError(f"is less than size; write at least {shown_size(size)}")
        room = largest - size
        if room % DIMM_GRAIN_BYTES:
            near = [size + room // DIMM_GRAIN_BYTES * DIMM_GRAIN_BYTES]
            near.append(near[0] + DIMM_GRAIN_BYTES)
            wanted = " or ".join(shown_size(bytes_) for bytes_ in near if bytes_ <= MAX_MEMORY_BYTES)
            raise ValueError(f"is not size and a multiple of 128MiB, in which a guest grows; write {wanted}")
        return largest

    @property
    def largest(self) -> int:
        """Bytes that the guest may grow to."""
        return self.max or self.size

    @property
    def slots(self) -> int:
        """How many times it may grow: QEMU takes no more DIMMs (ACPI_MAX_RAM_SLOTS of include/hw/acpi/acpi.h)."""
        return min((self.largest - self.size) // DIMM_GRAIN_BYTES, 256)


class Cpu(Table):
    """The guest's processors."""

    count: int = Field(default=1, ge=1, le=255, description="How many virtual CPUs the guest has.")
    model: CpuModel = Field(default="max", description="QEMU's CPU model, with features such as max,-avx.")


class Machine(Table):
    """The board, and what runs the guest's instructions."""

    type: Literal["q35"] = Field(default="q35", description="QEMU's machine type.")
    accel: Literal["auto", "tcg", "kvm"] = Field(
        default="auto",
        description="What runs the guest's instructions. auto takes kvm only where a probe shows that it can map "
        "secret RAM, and tcg elsewhere.",
    )


class Boot(Table):
    """What the guest boots: a kernel, or a firmware. Paths are absolute or relative to the guest file's folder.

    Without either, QEMU's own firmware boots a disk: the top of the file (guest.py) sees to it that there is one.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "not": {"required": ["kernel", "firmware"]},
            "dependentRequired": {"initrd": ["kernel"], "cmdline": ["kernel"]},
        }
    )

    kernel: InputFile = Field(default=None, description="The Linux kernel that QEMU loads.", examples=["vmlinuz"])
    initrd: InputFile = Field(default=None, description="The kernel's initial RAM disk.", examples=["initrd.img"])
    cmdline: CommandLine = Field(default="", description="The kernel's command line.", examples=["console=ttyS0"])
    firmware: InputFile = Field(
        default=None, description="The firmware to boot instead of a kernel, such as OVMF.", examples=["OVMF.fd"]
    )

    @model_validator(mode="wrap")
    @classmethod
    def _one_way_to_boot(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Check the keys against each other also when one of them is wrong, so that all errors show at once."""
        return with_conflicts(cls, value, handler, _boot_conflicts(value) if isinstance(value, dict) else ())


def _boot_conflicts(keys: dict[str, object]) -> Iterator[Conflict]:
    if "kernel" in keys and "firmware" in keys:
        yield ("firmware",), "does not go with kernel; keep one of the two"
    elif "kernel" not in keys:
        for key in ("initrd", "cmdline"):
            if key in keys:
                yield (key,), "goes with a kernel, not with firmware; remove it, or boot a kernel"


class Isolation(Table):
    """How the guest's isolation is proved, and what follows."""

    model_config = ConfigDict(
        json_schema_extra={"not": {"required": ["validate", "every"], "properties": {"validate": {"const": "never"}}}}
    )

    validate_at: Literal["boot", "never"] = Field(
        default="boot", alias="validate", description="When the guest's isolation is measured."
    )
    every: WatchPeriod | None = Field(
        default=None,
        description="Repeat the probes so often while the guest runs, from 1s to 24h. Without it, they run once.",
        examples=["60s"],
    )
    on_exposed: Literal["kill", "pause", "warn"] = Field(
        default="kill",
        alias="on-exposed",
        description="What happens to a guest that is exposed, be it when it is validated or later.",
    )
    ready: ReadyText | None = Field(
        default=None,
        description="The text on the guest's serial console after which it is validated. "
        "Without it, the guest is validated after its first output, or after 10 s.",
        examples=["login:"],
    )
    ready_timeout_s: Seconds = Field(
        default=120.0,
        alias="ready-timeout",
        description="How long to wait for the ready text, from 1ms to 24h.",
        examples=["120s"],
        json_schema_extra={"default": "120s"},
    )
    after_validation: Literal["run", "powerdown"] = Field(
        default="run",
        alias="after-validation",
        description="Let the guest run once it was validated, or ask it to power off.",
    )

    @field_validator("every")
    @classmethod
    def _what_is_repeated(cls, every: float | None, info: ValidationInfo) -> float | None:
        if every and info.data.get("validate_at") == "never":  # a key before this one in the class
            raise ValueError('does not go with validate = "never"; remove one of the two')
        return every


class Console(Table):
    """The guest's serial console."""

    log: OutputFile = Field(
        default=None,
        description="The file that keeps the console's output: absolute, or relative to the guest file's folder. "
        "Its folder must exist.",
        examples=["console.log"],
    )


class Qmp(Table):
    """What other processes may ask of the guest on its socket qmp.sock."""

    allow: AllowedCommands = Field(
        default=(),
        description="QMP commands that pass besides the default ones (status, pause, resume, power, quit): names, or "
        "the start of names and a star. docs/QMP.md lists them, and those which nothing allows.",
        examples=[["device_del", "job-*"]],
        json_schema_extra={"default": []},
    )
