"""The tables of a guest file that every guest has or may have once; those of its devices have modules of their own.

Each field's description is its documentation; the JSON Schema hands it to editors.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, field

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
from vmmback.toml_errors import Problem
from vmmback.toml_tables import Table


class Memory(Table, frozen=True):
    """The guest's RAM."""

    size: Annotated[
        Size, Meta(description="All of the guest's RAM, in multiples of 8KiB, from 1MiB to 16TiB.", examples=["256MiB"])
    ]
    max: Annotated[
        Size | None,
        Meta(
            description="The most RAM that the guest may grow to while it runs (vmmback grow): size and a multiple of "
            "128MiB. Without it, the guest cannot grow.",
            examples=["2GiB"],
        ),
    ] = None
    prefault: Annotated[
        bool,
        Meta(description="Allocate every page before the guest starts, so that it cannot run out of memory later."),
    ] = True
    backing: Annotated[
        Literal["secret", "ordinary"],
        Meta(
            description="What holds the RAM: secret is memfd_secret, which the host kernel cannot read. ordinary is a "
            "plain memfd, the control that shows what an exposed guest looks like: its report says exposed."
        ),
    ] = "secret"

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell whether the guest cannot grow to its `max`."""
        size, largest = good.get("size"), good.get("max")  # not there if they are wrong themselves
        if size is None or largest is None:
            return
        room = largest - size
        if room < 0:
            yield ("max",), f"is less than size; write at least {shown_size(size)}"
        elif room % DIMM_GRAIN_BYTES:
            near = [size + room // DIMM_GRAIN_BYTES * DIMM_GRAIN_BYTES]
            near.append(near[0] + DIMM_GRAIN_BYTES)
            wanted = " or ".join(shown_size(bytes_) for bytes_ in near if bytes_ <= MAX_MEMORY_BYTES)
            yield ("max",), f"is not size and a multiple of 128MiB, in which a guest grows; write {wanted}"

    @property
    def largest(self) -> int:
        """Bytes that the guest may grow to."""
        return self.max or self.size

    @property
    def slots(self) -> int:
        """How many times it may grow: QEMU takes no more DIMMs (ACPI_MAX_RAM_SLOTS of include/hw/acpi/acpi.h)."""
        return min((self.largest - self.size) // DIMM_GRAIN_BYTES, 256)


class Cpu(Table, frozen=True):
    """The guest's processors."""

    count: Annotated[int, Meta(ge=1, le=255, description="How many virtual CPUs the guest has.")] = 1
    model: Annotated[CpuModel, Meta(description="QEMU's CPU model, with features such as max,-avx.")] = "max"


class Machine(Table, frozen=True):
    """The board, and what runs the guest's instructions."""

    type: Annotated[Literal["q35"], Meta(description="QEMU's machine type.")] = "q35"
    accel: Annotated[
        Literal["auto", "tcg", "kvm"],
        Meta(
            description="What runs the guest's instructions. auto takes kvm only where a probe shows that it can map "
            "secret RAM, and tcg elsewhere."
        ),
    ] = "auto"


class Boot(Table, frozen=True):
    """What the guest boots: a kernel, or a firmware. Paths are absolute or relative to the guest file's folder.

    Without either, QEMU's own firmware boots a disk: the top of the file (guest.py) sees to it that there is one.
    """

    more_schema: ClassVar[Mapping[str, object]] = {
        "not": {"required": ["kernel", "firmware"]},
        "dependentRequired": {"initrd": ["kernel"], "cmdline": ["kernel"]},
    }

    kernel: Annotated[InputFile | None, Meta(description="The Linux kernel that QEMU loads.", examples=["vmlinuz"])] = (
        None
    )
    initrd: Annotated[InputFile | None, Meta(description="The kernel's initial RAM disk.", examples=["initrd.img"])] = (
        None
    )
    cmdline: Annotated[CommandLine, Meta(description="The kernel's command line.", examples=["console=ttyS0"])] = ""
    firmware: Annotated[
        InputFile | None,
        Meta(description="The firmware to boot instead of a kernel, such as OVMF.", examples=["OVMF.fd"]),
    ] = None

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell which keys are for another way to boot."""
        if "kernel" in written and "firmware" in written:
            yield ("firmware",), "does not go with kernel; keep one of the two"
        elif "kernel" not in written:
            for key in ("initrd", "cmdline"):
                if key in written:
                    yield (key,), "goes with a kernel, not with firmware; remove it, or boot a kernel"


class Isolation(Table, frozen=True):
    """How the guest's isolation is proved, and what follows."""

    more_schema: ClassVar[Mapping[str, object]] = {
        "not": {"required": ["validate", "every"], "properties": {"validate": {"const": "never"}}}
    }

    validate_at: Annotated[Literal["boot", "never"], Meta(description="When the guest's isolation is measured.")] = (
        field(default="boot", name="validate")
    )
    every: Annotated[
        WatchPeriod | None,
        Meta(
            description="Repeat the probes so often while the guest runs, from 1s to 24h. Without it, they run once.",
            examples=["60s"],
        ),
    ] = None
    on_exposed: Annotated[
        Literal["kill", "pause", "warn"],
        Meta(description="What happens to a guest that is exposed, be it when it is validated or later."),
    ] = "kill"
    ready: Annotated[
        ReadyText | None,
        Meta(
            description="The text on the guest's serial console after which it is validated. "
            "Without it, the guest is validated after its first output, or after 10 s.",
            examples=["login:"],
        ),
    ] = None
    ready_timeout_s: Annotated[
        Seconds,
        Meta(
            description="How long to wait for the ready text, from 1ms to 24h.",
            examples=["120s"],
            extra_json_schema={"default": "120s"},
        ),
    ] = field(default=120.0, name="ready-timeout")
    after_validation: Annotated[
        Literal["run", "powerdown"],
        Meta(description="Let the guest run once it was validated, or ask it to power off."),
    ] = "run"

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell whether something is to be repeated that is never done."""
        if good.get("every") and good.get("validate_at") == "never":
            yield ("every",), 'does not go with validate = "never"; remove one of the two'


class Console(Table, frozen=True):
    """The guest's serial console."""

    log: Annotated[
        OutputFile | None,
        Meta(
            description="The file that keeps the console's output: absolute, or relative to the guest file's folder. "
            "Its folder must exist.",
            examples=["console.log"],
        ),
    ] = None


class Qmp(Table, frozen=True):
    """What other processes may ask of the guest on its socket qmp.sock."""

    allow: Annotated[
        AllowedCommands,
        Meta(
            description="QMP commands that pass besides the default ones (status, pause, resume, power, quit): names, "
            "or the start of names and a star. docs/QMP.md lists them, and those which nothing allows.",
            examples=[["device_del", "job-*"]],
        ),
    ] = ()
