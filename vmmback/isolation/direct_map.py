"""The strongest probe: read every page of the guest's RAM as the kernel would, through its direct map."""

from __future__ import annotations

import errno
import mmap
import os
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from vmmback.errors import HostUnfit, VmmbackError
from vmmback.isolation.probe import Place, Probe, Reading, Target
from vmmback.linux import kernel_image, procfs
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Observation, Verdict

_CONTROL_PAGES = 64
_ALIKE = 512  # pages whose entries are looked at together


class PageCount(NamedTuple):
    """How many pages are present, how many could be tried, how many of these the kernel could read."""

    present: int
    checked: int
    readable: int


_NONE = PageCount(0, 0, 0)


@dataclass
class Pages:
    """Memory as raw pagemap entries (see procfs.pagemap), a page each, and what the attempt on it counted.

    `auxiliary` are those of QEMU's other secret RAM blocks; they are tried as well, but not counted.
    """

    entries: array[int]
    auxiliary: array[int] = field(default_factory=lambda: array("Q"))
    count: PageCount = _NONE


class _Found(NamedTuple):
    """What was counted, how much of it through the kernel image's mapping alone, and what could not be tried."""

    pages: PageCount
    through_image: int = 0
    problems: tuple[str, ...] = ()


class FrameProbe(Probe[Place]):
    """A probe that reads frames: the direct map is open while it observes."""

    def observe(self, target: Target) -> Observation:
        """Attempt the control, then the guest's RAM; inconclusive where the direct map cannot be read at all."""
        started = time.perf_counter()
        try:
            with DirectMap.open(spare=int(self.live_safe)) as self._direct_map:
                return super().observe(target)
        except (VmmbackError, OSError) as error:
            inconclusive = Verdict.INCONCLUSIVE
            seconds = time.perf_counter() - started
            missing = error.message if isinstance(error, HostUnfit) else ""
            return Observation(self.name, inconclusive, inconclusive, str(error), seconds, missing=missing)


class DirectMapProbe(FrameProbe[Pages]):
    """Reads 8 bytes of each present page, of the guest and of a memfd of our own whose contents come back.

    Pages in frames that were the kernel's image once are read through its mapping as well (linux/kernel_image.py). That
    mapping's control is the image's own code and rodata, which must look the same there.
    """

    name = "direct-map"
    vector = "the kernel reads every present page through its direct map, and through its image's mapping (BPF)"
    control_is = "pages of our own, whose random contents must come back"
    source = "mm/secretmem.c, secretmem_fault: set_direct_map_invalid_noflush"

    def __init__(self, prefaulted: Mapping[int, array[int]]) -> None:
        """`prefaulted` are the pagemap entries of pages that were made present before QEMU mapped them, by inode."""
        self._prefaulted = prefaulted
        self._target = Pages(array("Q"))

    @property
    def pages(self) -> PageCount:
        """What the last observation counted of the guest's RAM; all 0 where it came to no attempt."""
        return self._target.count

    @property
    def frames(self) -> array[int]:
        """The guest's raw pagemap entries of the last observation, for a look at the same frames after its end."""
        return self._target.entries

    def observe(self, target: Target) -> Observation:
        self._target = Pages(array("Q"))
        return super().observe(target)

    def target(self, target: Target) -> Pages:
        """Return all pages of the RAM: where QEMU has touched them yet, else where they were prefaulted."""
        self._target = Pages(guest_frames(target, self._prefaulted), _auxiliary_entries(target))
        return self._target

    def control(self, target: Target) -> Pages:  # noqa: ARG002 - any ordinary memory will do
        """Return the pages of a memfd of our own, once each has shown through the direct map what we wrote into it."""
        contents = os.urandom(_CONTROL_PAGES * PAGE_SIZE)
        _, inode = self._resources.enter_context(ordinary_memory(contents))
        pages = Pages(pagemap_entries(os.getpid(), inode))
        shown = [page for _, page in self._direct_map.read_frames(pages.entries)]
        wrong = sum(page != contents[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] for n, page in enumerate(shown))
        if wrong or len(shown) != _CONTROL_PAGES:
            raise OSError(errno.EIO, f"{len(shown) - wrong} of {_CONTROL_PAGES} pages of our own showed their contents")
        return pages

    def attempt(self, place: Pages) -> Reading:
        """Try to read each present page, and those in frames of the kernel's image through that one's mapping too."""
        found = self._check(place.entries)
        count = place.count = found.pages
        if not count.present:
            return Reading(Verdict.INCONCLUSIVE, f"none of {len(place.entries)} pages is present")
        detail = f"{count.readable} of {count.present} present pages readable"
        auxiliary = self._check(place.auxiliary)
        others = auxiliary.pages
        if others.present:
            detail += f", and {others.readable} of {others.present} of QEMU's other secret RAM blocks"
        if through_image := found.through_image + auxiliary.through_image:
            detail += f", {through_image} through the kernel image's mapping"
        if count.readable or others.readable:
            return Reading(Verdict.READABLE, detail)
        if (count.checked, others.checked) != (count.present, others.present):
            problem = f"but only {count.checked + others.checked} could be tried"
            return Reading(Verdict.INCONCLUSIVE, "; ".join([f"{detail}, {problem}", *found.problems]))
        return Reading(Verdict.BLOCKED, f"{detail} (EFAULT)", "EFAULT")

    def _check(self, entries: array[int]) -> _Found:
        result = self._direct_map.check(entries)
        count = PageCount(result.present, result.checked, result.readable)
        image = kernel_image.image_range()
        within = kernel_image.frames_in(image, entries) if image else array("Q")
        if image is None or not within:
            return _Found(count)
        hidden = array("Q", [within[index] for index, page in self._direct_map.read_frames(within) if page is None])
        try:
            through_image = kernel_image.mapping(self._direct_map, image).check(hidden).readable
        except HostUnfit as error:
            return _Found(count._replace(checked=count.checked - len(hidden)), problems=(error.message,))
        return _Found(count._replace(readable=count.readable + through_image), through_image)


def guest_frames(target: Target, prefaulted: Mapping[int, array[int]]) -> array[int]:
    """Return the raw pagemap entry of each page of a guest's RAM: of QEMU's where it has touched it, else `prefaulted`.

    They come descriptor by descriptor. Raises OSError as pagemap_entries does.
    """
    frames = array("Q")
    for inode in target.ram:
        entries = pagemap_entries(target.pid, inode)
        earlier = prefaulted.get(inode)
        if earlier is not None and len(earlier) == len(entries):
            _fill(entries, 0, earlier)
        frames.extend(entries)
    return frames


def _auxiliary_entries(target: Target) -> array[int]:
    """Return the raw pagemap entries of QEMU's other secret RAM blocks, as far as it maps them still."""
    entries = array("Q")
    for inode in target.auxiliary:
        with suppress(FileNotFoundError):
            entries.extend(pagemap_entries(target.pid, inode))
    return entries


def pagemap_entries(pid: int, inode: int) -> array[int]:
    """Return the raw pagemap entries of all pages of a memfd or memfd_secret file that a process maps, each once.

    They come in the order of their offset in the file. Raises OSError: FileNotFoundError where it maps nothing of it.
    """
    mappings = procfs.memory_mappings(procfs.maps(pid), inode)
    if not mappings:
        raise FileNotFoundError(errno.ENOENT, f"process {pid} maps no memory with inode {inode}")
    if len({mapping.device for mapping in mappings}) > 1:
        # secretmem and memfd are two file systems, which number their inodes apart.
        raise OSError(errno.ENOTUNIQ, f"process {pid} maps two files with inode {inode}")
    entries = array("Q")
    end = 0
    for mapping in sorted(mappings, key=_offset):
        part = procfs.pagemap(pid, mapping.start, mapping.size)
        if len(part) != mapping.size // PAGE_SIZE:  # the memory of a process that ends meanwhile reads as nothing
            raise ProcessLookupError(errno.ESRCH, f"process {pid} ended")
        again = max(end - mapping.offset, 0) // PAGE_SIZE  # pages up to `end` that an earlier VMA maps as well
        _fill(entries, len(entries) - again, part[:again])
        entries.extend(part[again:])
        end = max(end, mapping.offset + mapping.size)
    return entries


def _fill(entries: array[int], at: int, others: array[int]) -> None:
    """Take over what is present in another mapping: a page is present only in those through which it was touched."""
    for start in range(0, len(others), _ALIKE):
        other = others[start : start + _ALIKE]
        first = at + start
        here = entries[first : first + len(other)]
        if not here[0] & procfs.PRESENT and here == here[:1] * len(here):  # QEMU has touched none of them: most often
            entries[first : first + len(other)] = other
            continue
        for index, entry in enumerate(other, first):
            if not entries[index] & procfs.PRESENT:
                entries[index] = entry


def _offset(mapping: procfs.Mapping) -> int:
    return mapping.offset


@contextmanager
def ordinary_memory(contents: bytes) -> Iterator[tuple[mmap.mmap, int]]:
    """Put `contents` into a memfd that this process maps, the twin of secret RAM; yield mapping and inode."""
    descriptor = os.memfd_create("vmmback-control", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, len(contents))
        with mmap.mmap(descriptor, len(contents)) as memory:
            memory[:] = contents
            yield memory, os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)
