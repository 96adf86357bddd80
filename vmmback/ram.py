"""A guest's RAM: one descriptor, its owner, and the work of making its pages present."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal, Self

from vmmback.errors import AdmissionRefused, HostUnfit
from vmmback.linux import arch, cgroups, direct_map_use, kernel_image, memlock, prefault_worker, procfs
from vmmback.linux.memfd_secret import memfd_secret
from vmmback.report import DirectMap

_RETRIES = 3


class Ram(ABC):
    """Owns one descriptor of a guest's RAM; closing it (and the end of QEMU) gives the memory back to the kernel."""

    backing: ClassVar[Literal["secret", "ordinary"]]

    def __init__(self, size: int) -> None:
        """Make a descriptor of `size` bytes, a multiple of the page; no page is allocated yet.

        Raises HostUnfit where the kernel or a limit refuses, AdmissionRefused when it is out of memory or descriptors.
        """
        self.size = size
        self.frames = array("Q")
        """The pagemap entries (procfs.pagemap) of all pages once they are prefaulted; secret RAM never moves."""
        self._regions: frozenset[int] | None = None
        self.direct_map: tuple[direct_map_use.DirectMapUse, direct_map_use.DirectMapUse] | None = None
        """The host's direct map before and after the prefault; None until then."""
        self._descriptor = -1
        try:
            self._descriptor = self._create()
            self.inode = os.fstat(self._descriptor).st_ino
            with mmap.mmap(self._descriptor, size):  # shows now, and not inside QEMU, whether it may be mapped
                pass
        except OSError as error:
            self.close()
            if error.errno == errno.EAGAIN:  # mmap(2): too much memory has been locked
                raise memlock.too_small(size) from error
            raise AdmissionRefused(
                f"the kernel refused {size >> 10} KiB of {self.backing} RAM: {error.strerror}",
                "choose a smaller [memory] size, or free memory or descriptors on the host",
            ) from error
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _create(self) -> int:
        """Return a close-on-exec descriptor of `size` bytes."""

    @property
    def regions(self) -> frozenset[int]:
        """The 2 MiB of the physical addresses (direct_map_use.region_numbers) that hold its pages once prefaulted.

        They are counted when they are first asked for: those of RAM that was lent hardly ever are.
        """
        if self._regions is None:
            self._regions = frozenset(direct_map_use.region_numbers(self.frames))
        return self._regions

    def fileno(self) -> int:
        """Return the descriptor. It stays this object's own."""
        return self._descriptor

    def detach(self) -> int:
        """Return the descriptor, which is the caller's to close from now on, as socket.detach does."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        """Close the descriptor; the pages are zeroed and freed when QEMU's copy is closed too."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def prefault(
        self,
        progress: Callable[[int], None],
        threads: int | None = None,
        group: Path | None = None,
        anew: Callable[[], Awaitable[None]] | None = None,
        *,
        idle: bool = False,
    ) -> None:
        """Make all pages present, a thread for each core this process may use; `progress` gets the bytes done so far.

        The memory cgroup whose folder is `group` pays for them, this process's own without one. `idle` leaves it
        the processors that nobody else wants (SCHED_IDLE of sched(7)).

        The pages are touched by a process of its own (linux/prefault_worker.py): its page tables go with it, and when
        memory runs out it is that process which fails or is killed. Raises AdmissionRefused then, HostUnfit when the
        mapping is refused, or it may not join the group. Cancelling it ends the process.

        Where the kernel gave frames that it can read elsewhere (linux/kernel_image.py), it starts again with a new
        file, having set such frames aside: up to three times, for more can become free meanwhile. `anew` is awaited
        before the old file's pages are given back. Probes tell what is left of them.
        """
        before = direct_map_use.of()
        image = self._shunned()
        frames = await self._touch(progress, threads, group, idle)
        for _ in range(_RETRIES):
            if image is None or not kernel_image.frames_in(image, frames):
                break
            if anew:
                await anew()
            self._renew()
            frames = await self._touch(progress, threads, group, idle, image)
        self.direct_map = before, direct_map_use.of()
        await self._lies_in(frames)

    async def _lies_in(self, frames: array[int]) -> None:
        self.frames = frames
        self._regions = frozenset(await asyncio.to_thread(direct_map_use.region_numbers, frames))

    def _shunned(self) -> kernel_image.ImageRange | None:
        """Return the physical addresses where no page may lie, None if any place will do."""
        return None

    def _renew(self) -> None:
        """Put a new file in the place of the old one, at the same descriptor; all pages are given back."""
        descriptor = self._create()
        try:
            os.dup2(descriptor, self._descriptor, inheritable=False)
        finally:
            os.close(descriptor)
        self.inode = os.fstat(self._descriptor).st_ino

    async def _touch(
        self,
        progress: Callable[[int], None],
        threads: int | None,
        group: Path | None,
        idle: bool,
        shunned: kernel_image.ImageRange | None = None,
    ) -> array[int]:
        set_aside = []
        if shunned is not None:
            frames = shunned.start // mmap.PAGESIZE, shunned.end // mmap.PAGESIZE
            set_aside = [str(number) for number in (arch.current().memfd_secret, *frames)]
        procs = str(group / cgroups.PROCS) if group else ""
        threads = threads or len(os.sched_getaffinity(0))
        worker = await asyncio.create_subprocess_exec(
            *(("chrt", "--idle", "0") if idle else ()), sys.executable, "-I", "-S", prefault_worker.__file__,
            str(self._descriptor), str(self.size), str(threads), procs, *set_aside,
            pass_fds=[self._descriptor],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C on the terminal is for the supervisor to handle
        )  # fmt: skip
        try:
            assert worker.stdout is not None
            assert worker.stderr is not None
            done = 0
            end = entries = b""
            while not end and (output := await worker.stdout.read(1 << 16)):
                dots, end, entries = output.partition(prefault_worker.END)
                done = min(done + len(dots) * prefault_worker.CHUNK, self.size)
                if dots:
                    progress(done)
            entries += await worker.stdout.read()
            complaint = await worker.stderr.read()
            status = await worker.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()
            raise
        if status != 0:
            raise self._prefault_error(status, complaint.decode(errors="replace"), done, group)
        if len(entries) != self.size // mmap.PAGESIZE * 8:
            raise HostUnfit(f"the prefault of {self.backing} RAM did not tell where all of its pages are")
        return array("Q", entries)

    def _prefault_error(
        self, status: int, complaint: str, done: int, group: Path | None
    ) -> AdmissionRefused | HostUnfit:
        if group and status == prefault_worker.NOT_JOINED:
            return cgroups.not_joined(group, OSError(int(complaint), os.strerror(int(complaint))))
        progress = f"after {done >> 20} of {self.size >> 20} MiB"
        if status == -signal.SIGKILL or status == prefault_worker.EXHAUSTED:
            cause = "the OOM killer ended the prefault" if status < 0 else "the kernel had no page left"
            limited = f"the cgroup {group}" if group else "this cgroup"
            hint = f"choose a smaller [memory] size, free memory on the host, or raise the memory limit of {limited}"
            if status > 0 and self.backing == "secret" and memlock.falls_short(self.size):
                hint += f"; some kernels hold RLIMIT_MEMLOCK against root too: {memlock.remedy(self.size)}"
            return AdmissionRefused(
                f"the host ran out of memory while {self.backing} RAM was prefaulted: {cause} {progress}", hint
            )
        reason = os.strerror(int(complaint)) if complaint.isdecimal() else f"exit status {status} {complaint[-500:]}"
        return HostUnfit(
            f"{self.backing} RAM could not be prefaulted: {reason} {progress}",
            "check RLIMIT_MEMLOCK and what confines this process (seccomp, cgroup, container)",
        )


class SecretRam(Ram):
    """RAM from memfd_secret(2)."""

    backing = "secret"

    def _create(self) -> int:
        memlock.ensure(self.size)
        return _sized(memfd_secret(), self.size)

    def _shunned(self) -> kernel_image.ImageRange | None:
        return kernel_image.image_range()


class LentRam(SecretRam):
    """Secret RAM that the broker has lent: prefaulted, and never lent to anybody before."""

    def __init__(self, descriptor: int, size: int, frames: array[int]) -> None:
        """Take over its descriptor, and the pagemap entries of its pages. Raises HostUnfit where it is not that."""
        self._lent = descriptor
        try:
            super().__init__(size)
        except BaseException:
            if self._lent >= 0:  # else it was closed as any Ram's is
                os.close(self._lent)
            raise
        self.frames = frames

    def _create(self) -> int:
        memlock.ensure(self.size)
        link, size = str(Path(f"/proc/self/fd/{self._lent}").readlink()), os.fstat(self._lent).st_size
        if link != procfs.SECRETMEM or size != self.size:
            raise HostUnfit(
                f"the broker lent {size >> 20} MiB of {link} instead of {self.size >> 20} MiB of secret RAM",
                "is it the broker of this host, and of this version?",
            )
        lent, self._lent = self._lent, -1
        return lent


class OrdinaryRam(Ram):
    """RAM from memfd_create(2): the control, on which every probe must succeed."""

    backing = "ordinary"

    def _create(self) -> int:
        return _sized(os.memfd_create("vmmback-ordinary", os.MFD_CLOEXEC), self.size)


def _sized(descriptor: int, size: int) -> int:
    """Give a new file its size, which secretmem takes once (mm/secretmem.c, secretmem_setattr)."""
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def allocate(backing: Literal["secret", "ordinary"], size: int) -> Ram:
    """Return RAM of `size` bytes of the kind asked for; one never stands in for the other."""
    return SecretRam(size) if backing == "secret" else OrdinaryRam(size)


@contextmanager
def closed_together() -> Iterator[list[Ram]]:
    """Yield a list for the RAM of one guest; what is in it on exit is closed, the last first."""
    memories: list[Ram] = []
    try:
        yield memories
    finally:
        for memory in reversed(memories):
            memory.close()


def direct_map(memories: Sequence[Ram]) -> DirectMap | None:
    """Return what the prefaults of a guest's secret RAM did to the direct map; None if there was none."""
    secret = [memory for memory in memories if memory.backing == "secret"]
    spans = [memory.direct_map for memory in secret if memory.direct_map]
    if not spans:
        return None
    return DirectMap(
        regions=len(frozenset[int]().union(*(memory.regions for memory in secret))) or None,
        ideal=sum(direct_map_use.ideal_regions(memory.size) for memory in secret if memory.direct_map),
        splits_2m=_sum(_grown(before.splits_2m, after.splits_2m) for before, after in spans),
        splits_1g=_sum(_grown(before.splits_1g, after.splits_1g) for before, after in spans),
        huge_before=spans[0][0].in_huge_pages,
        huge_after=spans[-1][1].in_huge_pages,
    )


def _grown(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
