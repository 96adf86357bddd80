"""The QMP proof: where QEMU itself says the guest's memory lies, held against where the kernel says secret RAM lies.

query-memdev and qom-get repeat what QEMU was asked for and prove nothing. So the proof takes the flat views of the
guest's address spaces, asks the host virtual address of the first and the last byte of each range, and looks both up in
/proc/PID/maps: all of a RAM block must lie in mappings of the one secretmem inode that is ours.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from vmmback.errors import QemuFailed
from vmmback.isolation.probe import Target
from vmmback.linux import procfs
from vmmback.report import Observation, RamBlock, Verdict

# Blocks that no view shows, and that the guest cannot come to write to: files that fw_cfg lends read-only
# (hw/core/loader.c, rom_set_mr) and the PC's firmware, which RAM may hide (hw/i386/pc.c). Any other block may be mapped
# later, as video RAM is once firmware has set its address, so it counts as writable.
_NEVER_WRITABLE = re.compile(r"/rom@.*|pc\.rom|pc\.bios|.*/vga\.rom")

Hmp = Callable[[str], Awaitable[str]]

NAME = "qmp-proof"

# system/memory.c, mtree_print_flatview: range (inclusive), priority, type, region's name, offset in the region.
_RANGE = re.compile(
    r"\s+(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?P<type>[^)]+)\): "
    r"(?P<name>.+?)(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?\s*"
)
_ADDRESS = re.compile(r"\s+[0-9a-f]+-[0-9a-f]+ ")
_ADDRESS_SPACE = re.compile(r'\s+AS "(?P<name>[^"]*)".*')
# migration/ram-block or system/physmem.c, ram_block_format: name, page size, offset, used and total length.
_BLOCK = re.compile(r"\s*(?P<name>\S+)\s+\d+ \S+\s+0x[0-9a-f]+ 0x[0-9a-f]+ 0x(?P<total>[0-9a-f]+).*")
# monitor/hmp-cmds.c, hmp_gpa2hva.
_HVA = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((?P<name>.*)\) is 0x(?P<hva>[0-9a-f]+)\s*")


@dataclass(frozen=True)
class Range:
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


@dataclass(frozen=True)
class Placement:
    """Where a RAM block lies: QEMU's virtual addresses [start, end) in bytes, `start` None when no view maps it."""

    name: str
    size: int
    start: int | None
    guest_writable: bool

    @property
    def end(self) -> int:
        """First address behind it."""
        return (self.start or 0) + self.size


@dataclass(frozen=True)
class Proof:
    """What was found: all RAM blocks; bytes of them in our secret RAM; name and bytes of those in our descriptor."""

    observation: Observation
    ram_blocks: tuple[RamBlock, ...]
    secret: int
    ours: dict[str, int]


async def observe(target: Target, hmp: Hmp) -> Proof:
    """Take the proof of a paused or running guest. Raises QemuFailed when QEMU does not answer."""
    started = time.perf_counter()
    views = parse_flat_views(await hmp("info mtree -f"))
    sizes = parse_ram_blocks(await hmp("info ramblock"))
    placements = await _place(views, sizes, hmp)
    try:
        mappings = procfs.maps(target.pid)
    except OSError as error:
        raise QemuFailed("QEMU ended during the QMP proof") from error
    if not mappings:  # what a process that has dropped its memory, but was not reaped yet, shows
        raise QemuFailed("QEMU ended during the QMP proof")
    secret = procfs.secret_mappings(mappings, target.inode)
    ours = procfs.memory_mappings(mappings, target.inode)

    blocks = tuple(
        RamBlock(
            name=placement.name,
            size=placement.size,
            backing="secretmem" if _lies_in(placement, secret) else "ordinary",
            guest_writable=placement.guest_writable,
        )
        for placement in placements
    )
    secret_bytes = sum(block.size for block in blocks if block.backing == "secretmem")
    our_blocks = {placement.name: placement.size for placement in placements if _lies_in(placement, ours)}
    verdict, detail = _judge(target, blocks, secret_bytes)
    # The control: of the memory that is not the guest's RAM (its firmware), the same look-up must say so.
    firmware = [p for p in placements if p.start is not None and not p.guest_writable]
    found_ordinary = [p for p in firmware if not _lies_in(p, secret) and _lies_in(p, mappings)]
    control = Verdict.READABLE if found_ordinary else Verdict.INCONCLUSIVE
    if control is Verdict.READABLE:
        detail += f"; {found_ordinary[0].name} was told apart as ordinary"
    else:
        detail += "; the control failed: no firmware block was found in ordinary memory"
    seconds = time.perf_counter() - started
    return Proof(Observation(NAME, verdict, control, detail, seconds), blocks, secret_bytes, our_blocks)


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


async def _place(views: Sequence[Sequence[Range]], sizes: dict[str, int], hmp: Hmp) -> list[Placement]:
    """Find where each RAM block lies, by the ranges of it that the guest can reach in any of its address spaces."""
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


def _judge(target: Target, blocks: Sequence[RamBlock], secret: int) -> tuple[Verdict, str]:
    writable = [block for block in blocks if block.guest_writable]
    ordinary = [block.name for block in writable if block.backing != "secretmem"]
    if ordinary:
        return Verdict.READABLE, f"the guest can write to ordinary memory: {', '.join(ordinary)}"
    if not writable or secret != target.size:
        return Verdict.INCONCLUSIVE, f"{secret} of {target.size} bytes of RAM were found in secret RAM"
    return Verdict.BLOCKED, f"all {target.size >> 10} KiB lie in secretmem inode {target.inode}"
