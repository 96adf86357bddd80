"""The hunt: a needle searched for in all of the host's RAM, and for every hit, whose memory it is.

What is looked at, and what is not found, is in docs/HUNT.md. Run it before anything else reads guest memory on this
host, so that no copies of that are found.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vmmback.errors import HostUnfit
from vmmback.isolation.frame_owners import FrameOwners, Owner
from vmmback.isolation.needle import Needle
from vmmback.linux import procfs
from vmmback.linux.direct_map import Entries, own_pages
from vmmback.linux.direct_map_scan import Cancelled, Progress, Scanner
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Hunt, HuntPlace

_EXAMPLES = 4
_MODULES = Path("/sys/module")
_CONFIDENTIAL = {
    "kvm_intel/parameters/tdx": "TDX",  # vt_init() of arch/x86/kvm/vmx
    "kvm_amd/parameters/sev_snp": "SEV-SNP",  # arch/x86/kvm/svm/sev.c
}


def hunt(
    needle: Needle, guest_frames: Mapping[str, Entries], progress: Progress, stop: threading.Event | None = None
) -> Hunt:
    """Search all RAM for the needle, about 10 GiB a second; tell guest RAM by its raw pagemap entries, a name each.

    `progress` is called ten times a second in the caller's thread. Takes about 5 MiB, 7 more while it names owners, and
    for a hit 30 bytes in guests, 300 elsewhere. Raises HostUnfit where the direct map cannot be read, or should not be;
    Cancelled within about 0.1 s after `stop` is set.
    """
    refuse_confidential()
    stop = stop or threading.Event()
    with Scanner.open() as scanner:
        _check(scanner)
        with needle.anchored():
            scan = scanner.scan(needle, progress, stop)
            in_guests, rest = _by_guest(scan.frames, guest_frames)
            others = _by_owner(scanner, needle, rest, stop) if rest else ()
    return Hunt(
        needle_bytes=needle.size,
        scanned_bytes=scan.scanned,
        unreadable_bytes=scan.unreadable,
        seconds=round(scan.seconds, 6),
        gib_per_s=round((scan.scanned + scan.unreadable) / scan.seconds / (1 << 30), 3),
        hits=len(scan.frames),
        guest_hits=sum(place.hits for place in in_guests),
        places=(*in_guests, *others),
    )


def refuse_confidential(modules: Path = _MODULES, proc: Path = procfs.PROC) -> None:
    """Raise HostUnfit where a read of some frames is worse than a fault.

    A host of TDX guests: their private memory poisons what reads it (Documentation/arch/x86/tdx.rst). A host of SEV-SNP
    guests: a read does no harm, but returns ciphertext, which proves nothing. A guest of either with memory that it
    has not accepted yet: a read of that ends it (Documentation/arch/x86/tdx.rst, "#VE").
    """
    for parameter, kind in _CONFIDENTIAL.items():
        with suppress(OSError):
            if (modules / parameter).read_text().strip() in ("Y", "1"):
                raise HostUnfit(
                    f"this host can run {kind} guests, whose memory must not be read (/sys/module/{parameter})",
                    "hunt on a host that does not run them, or switch them off",
                )
    if procfs.meminfo(proc).get("Unaccepted", 0):
        raise HostUnfit(
            "some of this machine's memory is not accepted yet (Unaccepted in /proc/meminfo), and a read would end it",
            "boot it with accept_memory=eager",
        )


def _check(scanner: Scanner) -> None:
    """Raise HostUnfit unless a canary of ours in ordinary memory is found; it is the control of the hunt."""
    halves = hashlib.shake_256(b"one").digest(64), hashlib.shake_256(b"the other").digest(64)
    contents = bytes(a ^ b for a, b in zip(*halves, strict=True))
    with Needle.xor(*halves) as control, control.anchored(), own_pages(contents.rjust(PAGE_SIZE)) as entries:
        if not scanner.holds(control, entries[0] & procfs.PFN_MASK):
            raise HostUnfit("a canary of our own in ordinary memory was not found", "the hunt can prove nothing here")


def _by_guest(frames: array[int], guests: Mapping[str, Entries]) -> tuple[list[HuntPlace], array[int]]:
    """Part the hits in guest RAM from all others."""
    places = []
    for name, entries in guests.items():
        theirs = _bitmap(entries, frames[-1] if frames else 0)
        inside = array("Q", (frame for frame in frames if theirs[frame >> 3] >> (frame & 7) & 1))
        frames = array("Q", (frame for frame in frames if not theirs[frame >> 3] >> (frame & 7) & 1))
        if inside:
            places.append(HuntPlace(place="guest", owner=name, hits=len(inside), examples=tuple(inside[:_EXAMPLES])))
    return places, frames


def _bitmap(entries: Entries, last: int) -> bytearray:
    """Return a bit for each frame up to `last`, set where the entries have it."""
    bits = bytearray((last >> 3) + 1)
    for entry in memoryview(entries).cast("B").cast("Q"):
        frame = entry & procfs.PFN_MASK
        if entry & procfs.PRESENT and frame <= last:
            bits[frame >> 3] |= 1 << (frame & 7)
    return bits


def _by_owner(scanner: Scanner, needle: Needle, frames: array[int], stop: threading.Event) -> tuple[HuntPlace, ...]:
    """Group hits by owner, most hits first; a frame that no longer has the needle may have another owner now."""
    groups: dict[Owner | None, array[int]] = {}
    with FrameOwners(scanner, frames, lambda: not stop.is_set()) as owners:
        for frame in frames:
            if stop.is_set():
                raise Cancelled
            owner = owners.of(frame)
            groups.setdefault(owner if scanner.holds(needle, frame) else None, array("Q")).append(frame)
    return tuple(
        HuntPlace(
            place=owner.place if owner else "gone",
            owner=owner.name if owner else "",
            hits=len(found),
            examples=tuple(found[:_EXAMPLES]),
        )
        for owner, found in sorted(groups.items(), key=lambda group: -len(group[1]))
    )
