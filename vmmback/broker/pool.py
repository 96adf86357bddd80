"""Prefaulted secret RAM that nobody ever had: what was lent once is never lent again.

A descriptor that was lent may have been kept by its borrower, or passed on, and the kernel gives no way to tell
(docs/BROKER.md). So what leaves the pool does not come back; its memory is the kernel's, which zeroes it, as soon as
the last who has it closes it.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Self

from vmmback import notify
from vmmback.admission import Promise
from vmmback.broker.closing import Closer
from vmmback.broker.config import BrokerConfig
from vmmback.errors import VmmbackError
from vmmback.linux import page_file, procfs
from vmmback.ram import SecretRam

_TRY_AGAIN_S = 5.0
_QUIET_S = 0.02  # who comes at the same time is served first: admission looks through all of /proc
# A guest that starts on what was taken is up by then. While a page leaves the direct map, all processors wait, whatever
# the priority of who touches it (arch/x86/mm/tlb.c, flush_tlb_kernel_range).
_START_S = 1.0
_MEMORY, _FRAMES, _HIDDEN = "memory", "frames", "hidden"
_KEPT = "ready-"  # and the inode: the name by which the service manager keeps a file


class Ready:
    """A file that nobody ever had, and what tells its borrower where its pages are: a file of page_file, for `frames`.

    Both are made before somebody asks, as that takes as long as all else of an answer.
    """

    def __init__(self, size: int, descriptors: dict[str, int]) -> None:
        """Take over the descriptors of a file of `size` bytes."""
        self.size, self._descriptors = size, descriptors
        self.inode = os.fstat(descriptors[_MEMORY]).st_ino
        self._name = f"{_KEPT}{self.inode}"
        self._kept = False

    @classmethod
    def of(cls, memory: SecretRam, *, others: bool) -> Self:
        """Take over a prefaulted file; `others` says whether others than root may borrow it. Raises OSError."""
        with ExitStack() as failed:
            descriptors = {_FRAMES: page_file.sealed(memory.frames)}
            failed.callback(os.close, descriptors[_FRAMES])
            if others:
                descriptors[_HIDDEN] = page_file.sealed(page_file.without_numbers(memory.frames))
            failed.pop_all()
        return cls(memory.size, descriptors | {_MEMORY: memory.detach()})

    @classmethod
    def kept(cls, passed: Iterable[tuple[str, int]]) -> list[Self]:
        """Take over what the manager kept (notify.stored); what is none of it is left alone."""
        by_name = defaultdict[str, list[int]](list)
        for name, descriptor in passed:
            if name.startswith(_KEPT):
                by_name[name].append(descriptor)
        found = []
        for name, descriptors in by_name.items():
            try:
                kinds = {_kind(descriptor): descriptor for descriptor in descriptors}
                ready = cls(os.fstat(kinds[_MEMORY]).st_size, kinds)
                whole = _FRAMES in kinds and len(kinds) == len(descriptors) and ready._name == name
            except (OSError, KeyError, ValueError):
                whole = False
            if whole:
                ready._kept = True
                found.append(ready)
            else:  # not what was stored
                notify.forget(name)
                for descriptor in descriptors:
                    os.close(descriptor)
        return found

    def fits(self, *, others: bool) -> bool:
        """Tell whether others than root may borrow it, if they are to."""
        return _HIDDEN in self._descriptors or not others

    def keep(self) -> None:
        """Have the service manager keep copies while the broker is not there; `forget` them before it is lent."""
        self._kept = notify.store(self._name, *self._descriptors.values())

    def forget(self) -> None:
        """Have the manager close its copies, before somebody gets it. Raises OSError where it cannot be told."""
        if self._kept and not notify.forget(self._name):
            raise BlockingIOError(errno.EAGAIN, "the service manager does not listen")
        self._kept = False

    @property
    def frames(self) -> int:
        """The descriptor of the frames with their numbers, still its own."""
        return self._descriptors[_FRAMES]

    def give(self, *, numbers: bool) -> tuple[int, int]:
        """Return the descriptors of the memory and of the frames, the caller's from now on; all else is closed."""
        given = self._descriptors.pop(_MEMORY), self._descriptors.pop(_FRAMES if numbers else _HIDDEN)
        self.close()
        return given

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Have all of it closed; the memory goes back to the kernel, unless the manager keeps it."""
        while self._descriptors:
            close(self._descriptors.popitem()[1])


def _kind(descriptor: int) -> str:
    """Tell which of the descriptors it is that were stored under one name. Raises OSError, ValueError."""
    if str(Path(f"/proc/self/fd/{descriptor}").readlink()) == procfs.SECRETMEM:
        return _MEMORY
    return _FRAMES if any(entry & procfs.PFN_MASK for entry in page_file.entries_in(descriptor)) else _HIDDEN


class Pool:
    """Keeps files of the sizes that are wanted ready. Use as `async with pool.filled()`."""

    def __init__(self, config: BrokerConfig, promise: Promise, note: Callable[[str], None]) -> None:
        self._wanted = {ready.size: ready.count for ready in config.pool}
        self._rate = config.fill_rate
        self._promise, self._note = promise, note
        self.closer = Closer()
        self._others = bool(config.allow)
        self._ready = list[Ready]()
        self._less = asyncio.Event()
        """Set when something was taken, or given back to the kernel by somebody else."""
        self._taken_s, self._lacks_since_s = 0.0, math.inf
        """When something was taken last, and first since something was made."""
        self._returned = set[int]()
        """Sizes of which a lease has ended, and nothing was made since."""
        self.filled_bytes = 0
        self.fill_seconds = 0.0

    @property
    def ready(self) -> Counter[int]:
        """How many files of each size are ready."""
        return Counter(each.size for each in self._ready)

    @property
    def wanted(self) -> dict[int, int]:
        """How many of each size are to be."""
        return dict(self._wanted)

    def recover(self, kept: Iterable[Ready], lent: Collection[int]) -> None:
        """Go on with what the broker before this one had ready, as far as it is wanted; `lent` are inodes."""
        for ready in kept:
            wanted = self.ready[ready.size] < self._wanted.get(ready.size, 0) and ready.inode not in lent
            if wanted and ready.fits(others=self._others):
                self._ready.append(ready)
            else:
                with suppress(OSError):
                    ready.forget()
                ready.close()
        self._promise.recover({ready.inode: ready.size for ready in self._ready}, lent)

    def take(self, size: int) -> Ready | None:
        """Return a file of this size that nobody ever had, the caller's from now on; None if none is ready.

        Raises OSError where the service manager, which keeps a copy, cannot be told to close it.
        """
        for index, ready in enumerate(self._ready):
            if ready.size == size:
                ready.forget()
                del self._ready[index]
                self._promise.handed_on(size, ready.inode)
                self._taken_s = time.monotonic()
                self._lacks_since_s = min(self._lacks_since_s, self._taken_s)
                self._less.set()
                return ready
        return None

    def reserve(self, size: int, number: int) -> Reserved:
        """Keep a file for somebody who comes later, made for him where none is ready; call `admitted` of it.

        `number` is nobody else's. Raises OSError as `take`.
        """
        return Reserved(self, size, self.take(size), self._promise.beside(number))

    def lends(self, ready: Ready) -> None:
        """Say that a file that was not the pool's is lent."""
        self._promise.lends(ready.inode)

    def not_lent(self, ready: Ready) -> None:
        """Give back a file that was taken, and that nobody has got."""
        self.ended(ready.size, ready.inode)
        ready.close(self.closer.close)

    def ended(self, size: int, inode: int) -> None:
        """Make one more of this size, at once: the lease of a file has ended, and its memory may be free.

        Its frames are out of the direct map's large pages already. As long as nobody else has them, they cost no split
        (docs/DIRECT-MAP.md); so one more than `wanted` is made of them where all are ready, and the next lease is no
        reason to take other frames.
        """
        self._promise.ended(inode)
        if size in self._wanted:
            self._returned.add(size)
        self._less.set()

    @asynccontextmanager
    async def filled(self) -> AsyncIterator[asyncio.Task[None]]:
        """Fill the pool in the background while the block runs; on exit its memory goes back to the kernel.

        Yields the task that does; should it end before, the exit raises its error.
        """
        filling = asyncio.create_task(self._fill())
        try:
            yield filling
        finally:
            filling.cancel()
            try:
                with suppress(asyncio.CancelledError):
                    await filling
            finally:
                for ready in self._ready:
                    ready.close()
                self._ready.clear()

    async def _fill(self) -> None:
        refused = set[int]()  # the sizes that there was no room for, until it is tried again
        noted = set[int]()
        while True:
            self._less.clear()
            ready = self.ready
            lacking = [size for size, count in self._wanted.items() if ready[size] < count]
            spare = [size for size in self._returned if ready[size] == self._wanted[size]]
            size = next((size for size in (*lacking, *spare) if size not in refused), None)
            if size is None:
                self._returned.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._less.wait(), _TRY_AGAIN_S if lacking else None)
                refused.clear()
                continue
            begin_s = self._taken_s + _QUIET_S
            if size not in self._returned and self._lacks_since_s < math.inf:
                begin_s = max(begin_s, self._lacks_since_s + _START_S)
            if (wait_s := begin_s - time.monotonic()) > 0:
                self._less.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._less.wait(), wait_s)
                continue
            self._returned.discard(size)
            try:
                seconds = await self._add(size)
            except (VmmbackError, OSError, MemoryError, RuntimeError) as error:  # out of descriptors or threads, say
                refused.add(size)
                if size in lacking and size not in noted:
                    self._note(f"the pool cannot be filled with {size >> 20} MiB: {error}")
                    noted.add(size)
            else:
                noted.discard(size)
                await asyncio.sleep(max(0.0, size / self._rate - seconds))  # the rate that was asked for, no wait

    async def _add(self, size: int) -> float:
        """Make one more file of `size` bytes; return the seconds that took. Raises VmmbackError, OSError."""
        started = time.monotonic()
        await self._promise.extend(size)
        try:
            self._ready.append(await self._prefaulted(size))
        except BaseException:
            self._promise.withdraw(size)
            raise
        finally:
            self._promise.settle(ready.inode for ready in self._ready)
        self._lacks_since_s = self._taken_s if self._taken_s >= started else math.inf
        self.filled_bytes += size
        self.fill_seconds += time.monotonic() - started
        return time.monotonic() - started

    async def _prefaulted(self, size: int) -> Ready:
        with SecretRam(size) as memory:
            self._promise.backed_by(memory.inode)
            await memory.prefault(self._promise.touched, idle=True, anew=self._promise.anew)
            ready = Ready.of(memory, others=self._others)
            ready.keep()
            return ready


class Reserved:
    """A file for somebody who comes later. Made by Pool.reserve; `given` or `give_up` is its end."""

    def __init__(self, pool: Pool, size: int, ready: Ready | None, promise: Promise) -> None:
        self._pool, self.size, self._ready, self._promise = pool, size, ready, promise
        self._made: asyncio.Task[Ready] | None = None

    async def admitted(self) -> None:
        """Begin to make it where it is not ready. Raises AdmissionRefused where it does not fit, HostUnfit."""
        if not self._ready:
            await self._promise.extend(self.size)
            self._made = asyncio.create_task(self._make())

    async def given(self) -> Ready:
        """Return the file, the caller's from now on, once it is there. Raises VmmbackError, OSError."""
        ready = self._ready
        if not ready:
            assert self._made is not None
            ready = await asyncio.shield(self._made)
            self._promise.forget()
            self._pool.lends(ready)
        self._ready = self._made = None
        return ready

    async def give_up(self) -> None:
        """Give its memory back to the kernel, unless it was given."""
        if self._ready:
            self._pool.not_lent(self._ready)
        elif self._made:
            self._made.cancel()
            await asyncio.wait({self._made})
            with suppress(asyncio.CancelledError, VmmbackError, OSError):
                self._made.result().close(self._pool.closer.close)
        self._promise.forget()
        self._ready = self._made = None

    async def _make(self) -> Ready:
        memory = SecretRam(self.size)
        try:
            self._promise.backed_by(memory.inode)
            await memory.prefault(self._promise.touched, anew=self._promise.anew)
            return Ready.of(memory, others=False)
        except BaseException:
            self._pool.closer.close(memory.detach())
            raise
