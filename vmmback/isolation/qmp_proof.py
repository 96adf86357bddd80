"""The QMP proof: where QEMU itself says the guest's memory lies, held against where the kernel says secret RAM lies.

query-memdev and qom-get repeat what QEMU was asked for and prove nothing. So the proof takes the flat views of the
guest's address spaces, asks the host virtual address of the first and the last byte of each range, and looks both up in
/proc/PID/maps: all of the guest's RAM must lie in mappings of the secretmem inodes that are ours, and a RAM block
beside it is secret only if it lies in the secretmem inodes that QEMU got for such blocks (docs/RAM-BLOCKS.md).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from vmmback.errors import QemuFailed
from vmmback.isolation.probe import Documented, Target
from vmmback.linux import procfs
from vmmback.report import MapRange, Observation, RamBlock, Verdict

# Blocks that no view shows, and that the guest cannot come to write to: files that fw_cfg lends read-only
# (hw/core/loader.c, rom_set_mr), the PC's firmware, which RAM may hide (hw/i386/pc.c, pc_sysfw.c), and a card's option
# ROM, which has a PCI address in its name (hw/pci/pci.c, pci_add_option_rom). Any other block may be mapped later, as
# video RAM is once firmware has set its address, so it counts as writable.
_NEVER_WRITABLE = re.compile(r"/rom@.*|pc\.rom|pc\.bios|isa-bios|[0-9a-f]{4}(:[0-9a-f.]+)+/[^/]+\.rom")

_LOOKS = 20

Hmp = Callable[[str], Awaitable[str]]


class QmpProof(Documented):
    """The proof as a vector of the catalogue; `observe` takes it."""

    name = "qmp-proof"
    vector = (
        "QEMU's own view of the guest's memory, address by address: does it lie in the secretmem files that are ours?"
    )
    control_is = "QEMU's firmware, or its heap, which the same look-up must find in ordinary memory"
    source = "info mtree -f, gpa2hva of QEMU's monitor (system/memory.c, monitor/hmp-cmds.c); proc_pid_maps(5)"


# system/memory.c, mtree_print_flatview: range (inclusive), priority, type, region's name, offset in the region.
_RANGE = re.compile(
    r"\s+(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?P<type>[^)]+)\): "
    r"(?P<name>.+?)(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?\s*"
)
_ADDRESS = re.compile(r"\s+[0-9a-f]+-[0-9a-f]+ ")
_ADDRESS_SPACE = re.compile(r'\s+AS "(?P<name>[^"]*)".*')
# system/physmem.c, ram_block_format: name, page size, offset, used and total length; since QEMU 8.0 the host virtual
# address, too.
_BLOCK = re.compile(
    r"\s*(?P<name>\S+)\s+\d+ \S+\s+0x[0-9a-f]+ 0x[0-9a-f]+ 0x(?P<total>[0-9a-f]+)(?: 0x(?P<hva>[0-9a-f]+))?.*"
)
# monitor/hmp-cmds.c, hmp_gpa2hva.
_HVA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((?P<name>.*)\) is 0x(?P<hva>[0-9a-f]+)\s*")


class Range(NamedTuple):
    """One range of a flat view: guest physical addresses in bytes, the last one inclusive, and what lies there."""

    first: int
    last: int
    type: str
    region: str
    offset: int

    @property
    def guest_writable(self) -> bool:
        """Tell whether the guest's stores change this memory (`nv-` and a trailing `d` mark variants of RAM)."""
        return self.type.removeprefix("nv-") in {"ram", "ramd"}

    @property
    def is_memory(self) -> bool:
        """Tell whether there is host memory behind it."""
        return self.guest_writable or self.type.removeprefix("nv-") in {"rom", "romd"}

    @property
    def kind(self) -> Literal["ram", "rom", "device"]:
        """What it is to the guest."""
        return "ram" if self.guest_writable else "rom" if self.is_memory else "device"


class Placement(NamedTuple):
    """Where a RAM block lies: QEMU's virtual addresses [start, end) in bytes, `start` None when QEMU does not tell."""

    name: str
    size: int
    start: int | None
    guest_writable: bool

    @property
    def end(self) -> int:
        """First address behind it."""
        return (self.start or 0) + self.size


class Proof(NamedTuple):
    """What was found: all RAM blocks, and what the guest's processor sees at which address.

    `secret` is how many bytes of blocks lie in the secret RAM of the guest. `ours` are, for each of its descriptors (by
    inode), name and bytes of the blocks in it, `auxiliary` those of the blocks in the other secret descriptors of QEMU.
    """

    observation: Observation
    ram_blocks: tuple[RamBlock, ...]
    memory_map: tuple[MapRange, ...]
    secret: int
    ours: dict[int, dict[str, int]]
    auxiliary: dict[str, int]


async def observe(target: Target, hmp: Hmp) -> Proof:
    """Take the proof of a paused or running guest.

    Raises QemuFailed when QEMU does not answer, and for a guest whose memory map does not stand still.
    """
    started = time.perf_counter()
    views, placements = await _standing_still(hmp)
    try:
        mappings = procfs.maps(target.pid)
    except OSError as error:
        raise QemuFailed("QEMU ended during the QMP proof") from error
    if not mappings:  # what a process that has dropped its memory, but was not reaped yet, shows
        raise QemuFailed("QEMU ended during the QMP proof")
    ram = [m for m in mappings if m.path == procfs.SECRETMEM and m.inode in target.ram]
    auxiliary = [m for m in mappings if m.path == procfs.SECRETMEM and m.inode in target.auxiliary]
    secret = [m for m in mappings if m in ram or m in auxiliary]

    blocks = tuple(
        RamBlock(
            name=placement.name,
            size=placement.size,
            backing=_backing(placement, secret),
            guest_writable=placement.guest_writable,
        )
        for placement in placements
    )
    secret_bytes = {
        inode: sum(_bytes_in(procfs.secret_mappings(mappings, inode), placements).values()) for inode in target.ram
    }
    verdict, detail = _judge(target, blocks, secret_bytes)
    control, told_apart = _control(placements, mappings, ram, secret)
    return Proof(
        observation=Observation(
            QmpProof.name, verdict, control, f"{detail}; {told_apart}", time.perf_counter() - started
        ),
        ram_blocks=blocks,
        memory_map=_memory_map(views[0], placements, secret),
        secret=sum(secret_bytes.values()),
        ours={inode: _bytes_in(procfs.memory_mappings(mappings, inode), placements) for inode in target.ram},
        auxiliary=_bytes_in(auxiliary, placements),
    )


async def _standing_still(hmp: Hmp) -> tuple[list[list[Range]], list[Placement]]:
    """Return the flat views, and where their blocks lie: of one moment, since the views are the same afterwards.

    A guest sets addresses of its devices and shadows its firmware while it runs. What was looked up in a view that is
    not there any more would not fit together, and secret memory would seem to be ordinary.
    """
    shown = await hmp("info mtree -f")
    for _ in range(_LOOKS):
        views = parse_flat_views(shown)
        listed = await hmp("info ramblock")
        placements = await _place(views, parse_ram_blocks(listed), parse_addresses(listed), hmp)
        before, shown = shown, await hmp("info mtree -f")
        if shown == before:
            return views, placements
    raise QemuFailed(f"the guest changed its memory map during each of {_LOOKS} looks at it")


def parse_flat_views(text: str) -> list[list[Range]]:
    """Return the ranges of each flat view of `info mtree -f`, the one of address space "memory" first.

    Raises QemuFailed when it is not there.
    """
    memory: list[list[Range]] = []
    others: list[list[Range]] = []
    for section in text.split("FlatView #")[1:]:
        lines = section.splitlines()
        ranges = [
            Range(
                int(match["first"], 16),
                int(match["last"], 16),
                match["type"],
                match["name"],
                int(match["offset"] or "0", 16),
            )
            for line in lines
            if (match := _RANGE.fullmatch(line))
        ]
        if unknown := [line for line in lines if _ADDRESS.match(line) and not _RANGE.fullmatch(line)]:
            raise QemuFailed(f"QEMU describes memory in a way not known here: {unknown[0].strip()!r}")
        spaces = {match["name"] for line in lines if (match := _ADDRESS_SPACE.fullmatch(line))}
        (memory if "memory" in spaces else others).append(ranges)
    if not memory or not memory[0]:
        raise QemuFailed('QEMU shows no flat view of address space "memory"', "this QEMU is not known to vmmback")
    return memory + others


def parse_ram_blocks(text: str) -> dict[str, int]:
    """Return the size in bytes (the largest it may grow to) of each RAM block of `info ramblock`."""
    return {match["name"]: int(match["total"], 16) for line in text.splitlines() if (match := _BLOCK.fullmatch(line))}


def parse_addresses(text: str) -> dict[str, int]:
    """Return QEMU's virtual address of each RAM block of `info ramblock`; none where QEMU is too old to tell them."""
    matches = [match for line in text.splitlines() if (match := _BLOCK.fullmatch(line))]
    return {match["name"]: int(match["hva"], 16) for match in matches if match["hva"]}


async def _place(
    views: Sequence[Sequence[Range]], sizes: dict[str, int], addresses: dict[str, int], hmp: Hmp
) -> list[Placement]:
    """Find where each RAM block lies, by the ranges of it that the guest can reach in any of its address spaces.

    `addresses` are of the list of blocks: for those that are in no view, and never at odds with one that is.
    """
    blocks = dict(sizes)
    writable: set[str] = set()
    shown: set[str] = set()
    for memory in (memory for view in views for memory in view if memory.is_memory):
        name = _block_of(memory.region, sizes)
        shown.add(name)
        if name not in sizes:  # what no block is known for is taken at what can be seen of it
            blocks[name] = max(blocks.get(name, 0), memory.offset + memory.last - memory.first + 1)
        if memory.guest_writable:
            writable.add(name)
    starts: dict[str, int] = {}
    contradictory: set[str] = set()
    ranges = [memory for memory in views[0] if memory.is_memory]
    # All at once: each answer waits for QEMU's main loop, and a launch waits for all of them.
    for memory, start in zip(ranges, await asyncio.gather(*(_start(memory, hmp) for memory in ranges)), strict=True):
        name = _block_of(memory.region, sizes)
        if start is None or starts.setdefault(name, start) != start:
            contradictory.add(name)
    for name, start in addresses.items():
        if starts.setdefault(name, start) != start:
            contradictory.add(name)
    return [
        Placement(
            name,
            size,
            None if name in contradictory else starts.get(name),
            name in writable or (name not in shown and not _NEVER_WRITABLE.fullmatch(name)),
        )
        for name, size in blocks.items()
    ]


def _block_of(region: str, sizes: Iterable[str]) -> str:
    """Return the RAM block of a region: a device's block carries the device's path before the region's name."""
    return next((name for name in sizes if name == region or name.endswith(f"/{region}")), region)


async def _start(memory: Range, hmp: Hmp) -> int | None:
    """Return the address of the block's first byte, None unless both ends of the range agree on it."""
    answers = await asyncio.gather(*(hmp(f"gpa2hva {address:#x}") for address in (memory.first, memory.last)))
    first, last = (_HVA.fullmatch(answer) for answer in answers)
    if first is None or last is None or {first["name"], last["name"]} != {memory.region}:
        return None
    if int(last["hva"], 16) - int(first["hva"], 16) != memory.last - memory.first:
        return None
    return int(first["hva"], 16) - memory.offset


def _lies_in(placement: Placement, mappings: Sequence[procfs.Mapping]) -> bool:
    """Tell whether every byte of the block lies in one of the mappings, which are in the order of their addresses."""
    if placement.start is None:
        return False
    position = placement.start
    for mapping in mappings:
        if mapping.start <= position < mapping.end:
            position = mapping.end
    return position >= placement.end


def _bytes_in(mappings: Sequence[procfs.Mapping], placements: Sequence[Placement]) -> dict[str, int]:
    """Return name and size in bytes of the blocks that lie in the mappings."""
    return {placement.name: placement.size for placement in placements if _lies_in(placement, mappings)}


def _backing(placement: Placement, secret: Sequence[procfs.Mapping]) -> Literal["secretmem", "ordinary"]:
    return "secretmem" if _lies_in(placement, secret) else "ordinary"


def _control(
    placements: Sequence[Placement],
    mappings: Sequence[procfs.Mapping],
    ram: Sequence[procfs.Mapping],
    secret: Sequence[procfs.Mapping],
) -> tuple[Verdict, str]:
    """Tell whether the same look-up finds what is not the guest's RAM, its firmware, elsewhere, and ordinary memory so.

    Ordinary memory is the firmware itself, or QEMU's heap where the firmware is secret as well.
    """
    firmware = [p for p in placements if p.start is not None and not p.guest_writable]
    elsewhere = [p for p in firmware if not _lies_in(p, ram) and _lies_in(p, mappings)]
    heap = [Placement("QEMU's heap", m.size, m.start, guest_writable=False) for m in mappings if m.path == "[heap]"]
    ordinary = [p.name for p in (*elsewhere, *heap) if _backing(p, secret) == "ordinary"]
    if elsewhere and ordinary:
        return Verdict.READABLE, f"{ordinary[0]} was told apart as ordinary"
    return Verdict.INCONCLUSIVE, "the control failed: no firmware block was found outside of RAM, or no ordinary memory"


def _memory_map(
    view: Sequence[Range], placements: Sequence[Placement], secret: Sequence[procfs.Mapping]
) -> tuple[MapRange, ...]:
    """Describe a flat view, whose ranges are in the order of their addresses."""
    blocks = {placement.name: placement for placement in placements}
    described: list[MapRange] = []
    for memory in view:
        block = _block_of(memory.region, blocks) if memory.is_memory else ""
        backing: Literal["secretmem", "ordinary", "none"] = "none"
        if block:
            whole = blocks[block]
            start = None if whole.start is None else whole.start + memory.offset
            backing = _backing(whole._replace(start=start, size=memory.last - memory.first + 1), secret)
        described.append(
            MapRange(
                first=memory.first,
                last=memory.last,
                kind=memory.kind,
                region=memory.region,
                block=block,
                backing=backing,
                guest_writable=memory.guest_writable,
            )
        )
    return tuple(described)


def _judge(target: Target, blocks: Sequence[RamBlock], secret: Mapping[int, int]) -> tuple[Verdict, str]:
    writable = [block for block in blocks if block.guest_writable]
    ordinary = [block.name for block in writable if block.backing != "secretmem"]
    if ordinary:
        return Verdict.READABLE, f"the guest can write to ordinary memory: {', '.join(ordinary)}"
    if not writable or secret != target.ram:
        return Verdict.INCONCLUSIVE, f"{sum(secret.values())} of {target.size} bytes of RAM were found in secret RAM"
    return Verdict.BLOCKED, f"all {target.size >> 10} KiB lie in secretmem inode {', '.join(map(str, target.ram))}"
