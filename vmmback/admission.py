"""Admission across supervisors: who promises memory to a guest counts what others were promised, one at a time.

A lock on the runtime folder itself (flock(2)) makes it one at a time. What a guest was promised is a file in its own
folder, which counts as long as somebody holds that folder: the supervisor, and after it the keeper. So a crash leaves
neither a lock nor a promise behind. docs/ADMISSION.md.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmmback.errors import HostUnfit
from vmmback.host.budget import Backing, Budget, with_page_tables
from vmmback.host.memory import HostMemory
from vmmback.linux import cgroups, procfs, secret_use
from vmmback.linux.secret_use import SecretFile
from vmmback.runtime import BROKER, live_guests, runtime_folder

if TYPE_CHECKING:
    from asyncio import TimerHandle

# Held for milliseconds; but many launches at once wait for each other, and for the processors.
_LOCK_TIMEOUT_S = 120.0
_PROMISE_FILE = "promise.json"
_MORE_PROMISES = "promise-*.json"
# The file is written anew after so much more has been touched; until then that counts twice.
_STEP_BYTES = 64 << 20
_LATER_S = 1.0
# What must be left besides for a guest whose RAM is there already: as little as the smallest guest.
_LEAST_BYTES = 1 << 20


@dataclass
class Record:
    """What a supervisor was promised for its guest, in bytes; `touched` of `size` are present, as far as it knows.

    `inodes` are the files of the guest's RAM, once its processes run; `lent` are those that the broker has lent, all
    present, whose borrowers need have no record. `group` is the path of the memory cgroup that
    pays for it.
    """

    pid: int
    size: int
    touched: int
    overhead: int
    inodes: list[int]
    backing: Backing = "secret"
    group: str = "/"
    lent: list[int] = field(default_factory=list)


class Promise:
    """What one guest was promised and has not touched yet. Made by `admit`; gone with the guest's folder."""

    def __init__(self, folder: Path, backing: Backing, *, file: str = _PROMISE_FILE) -> None:
        self._file, self._backing = folder / file, backing
        self._record = Record(os.getpid(), 0, 0, 0, [], backing)
        self._later: TimerHandle | None = None
        self._before = 0  # touched when the RAM was added that is prefaulted now

    def beside(self, number: int) -> Promise:
        """Return one more of the same folder, which can be extended at the same time, and lasts until `forget`."""
        return Promise(self._file.parent, self._backing, file=_MORE_PROMISES.replace("*", str(number)))

    def forget(self) -> None:
        """Remove it: another has what was promised, or it was given back."""
        self._file.unlink(missing_ok=True)

    async def extend(self, size: int, group: str | None = None) -> None:
        """Promise `size` bytes (more), for which the memory cgroup with this path pays, this process's own without one.

        Raises AdmissionRefused when they do not fit, HostUnfit when nobody can tell.
        """
        files = secret_files()  # before the lock, as it takes longest
        async with _lock(self._file.parents[1]):
            budget = Budget.of(reckon(promises().values(), files, group))
            budget.admit(size, self._backing)
            before = replace(self._record)
            self._record.group = _paid_by(group)
            if not self._record.size:
                self._record.overhead = budget.overhead
            self._record.size += size
            try:
                self._write()
            except HostUnfit:
                self._record = before
                raise
        self._before = self._record.touched

    async def take_over(self, size: int, inode: int) -> None:
        """Count `size` bytes that are present already, in the file `inode`; promise what a guest takes besides.

        Raises AdmissionRefused when that does not fit, HostUnfit when nobody can tell.
        """
        files = secret_files()
        async with _lock(self._file.parents[1]):
            budget = Budget.of(reckon(promises().values(), files))
            budget.admit(_LEAST_BYTES, self._backing)
            record = Record(os.getpid(), size, size, budget.overhead, [inode], self._backing, _paid_by(None))
            self._record, self._before = record, size
            self._write()

    def recover(self, ready: Mapping[int, int], lent: Iterable[int]) -> None:
        """Count files that are there already, all present: sizes by inode of what is one's own, and what is lent."""
        self._record.size = self._record.touched = self._before = sum(ready.values())
        self._record.inodes, self._record.lent = list(ready), list(lent)
        self._tell()

    def handed_on(self, size: int, inode: int) -> None:
        """Say that `size` bytes, all present, in the file `inode`, are another's from now on.

        It is written a little later, once for all that are handed on at the same time, who do not wait for it: until
        then these bytes may be in two records, but as touched in both. Call it in an event loop.
        """
        self._record.size -= size
        self._record.touched -= size
        self._before -= size
        self._record.inodes.remove(inode)
        self._record.lent.append(inode)
        self._tell_later()

    def lends(self, inode: int) -> None:
        """Say that a file of another promise is lent, all of it present; it is written as what is handed on."""
        self._record.lent.append(inode)
        self._tell_later()

    def ended(self, inode: int) -> None:
        """Say that a file is lent no more: who maps it still is a stranger. It is written as what is handed on."""
        self._record.lent.remove(inode)
        self._tell_later()

    def touched(self, size: int) -> None:
        """Say that `size` bytes of what was promised last are present."""
        done = self._before + size
        if done >= self._record.touched + _STEP_BYTES or done == self._record.size:
            self._record.touched = done
            self._tell()

    async def anew(self) -> None:
        """Say that nothing of what was promised last is present, before it is given back. Raises HostUnfit.

        Nobody reckons meanwhile: with the promise as it was before and the free memory as it is after, all of it would
        be promised to others.
        """
        async with _lock(self._file.parents[1]):
            self._record.touched = self._before
            self._write()

    def backed_by(self, inode: int) -> None:
        """Say in which file the memory that was promised last will be."""
        self._record.inodes.append(inode)
        self._tell()

    def settle(self, inodes: Iterable[int]) -> None:
        """Say that the guest's processes run, and have taken what they take whatever its size; and what they map."""
        self._record.overhead = 0
        self._record.inodes = list(inodes)
        self._tell()

    def withdraw(self, size: int) -> None:
        """Take back a promise whose memory was released again."""
        self._record.size -= size
        self._record.touched = min(self._record.touched, self._before)
        self._tell()

    def _tell_later(self) -> None:
        if self._later is None:
            import asyncio  # as in _lock

            self._later = asyncio.get_running_loop().call_later(_LATER_S, self._tell)

    def _tell(self) -> None:
        """Write what others can do without: that less is promised and untouched than the file says."""
        with suppress(HostUnfit):  # on a full disk it counts twice until the next time
            self._write()

    def _write(self) -> None:
        """Put a whole file in the place of the old one, so that nobody reads half of it. Raises HostUnfit."""
        if self._later:
            self._later.cancel()
            self._later = None
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(vars(self._record)))
            new.replace(self._file)
        except OSError as error:
            raise HostUnfit(
                f"what the guest is promised cannot be written: {self._file}: {error.strerror}",
                "make room in the runtime folder: no guest gets memory that others cannot know of",
            ) from error


async def admit(folder: Path, size: int, backing: Backing, group: str | None = None) -> Promise:
    """Promise memory to the guest of a folder. Raises AdmissionRefused when it does not fit, HostUnfit."""
    promise = Promise(folder, backing)
    await promise.extend(size, group)
    return promise


async def take_over(folder: Path, size: int, inode: int) -> Promise:
    """Count secret RAM of `size` bytes that is there already, and the guest's. Raises as `admit`."""
    promise = Promise(folder, "secret")
    await promise.take_over(size, inode)
    return promise


def promised() -> int:
    """Return how many bytes guests were promised and have not touched, page tables included.

    Guests of this runtime folder tell it; of all others it counts what is mapped and not present, as far as this
    process may look. Raises HostUnfit, UsageError.
    """
    return outstanding(promises().values(), secret_files())


def secret_files() -> dict[int, SecretFile]:
    """Return the secret files that are mapped; of guests that have touched all of their RAM not what is present."""
    return secret_use.secret_files(known=settled(promises().values()))


def reckon(records: Collection[Record], files: Mapping[int, SecretFile], group: str | None = None) -> HostMemory:
    """Return the host's memory with what was promised of it, and what a memory cgroup has left, as `extend` means it.

    Files were read before the records, and both before the rest: what is touched in between counts twice, and not
    never; a guest that others see mapping its RAM has its record by then. Of a group's room goes
    what was promised to guests of the groups that can have a limit in common with it. Raises HostUnfit.
    """
    total, room = outstanding(records, files), cgroups.room(group)
    if room is not None:
        paid_by = _paid_by(group)
        room -= sum(_untouched(record, files) for record in records if _related(record.group, paid_by))
    return HostMemory.read(total, room)


def _paid_by(group: str | None) -> str:
    return group or cgroups.path_of("self")


def _related(one: str, other: str) -> bool:
    """Tell whether two groups are below the same one, other than the root, which has no limit."""
    return one.split("/")[1:2] == other.split("/")[1:2]


def settled(records: Iterable[Record]) -> set[int]:
    """Return the inodes of the guests that have touched all that they were promised, and of what is lent."""
    return {
        inode
        for record in records
        for inode in (*record.lent, *(record.inodes if record.touched >= record.size else ()))
    }


def promises() -> dict[str, Record]:
    """Return what live guests of this runtime folder were promised, by their names, and the broker's pool.

    Raises HostUnfit, UsageError.
    """
    base = runtime_folder()
    files = {name: base / name / _PROMISE_FILE for name in (*live_guests(), BROKER)}
    # The folder of a dead broker is gone by then, as those of dead guests.
    files |= {f"{BROKER}/{file.stem}": file for file in (base / BROKER).glob(_MORE_PROMISES)}
    return {name: record for name, file in files.items() if (record := _read(file))}


def outstanding(records: Collection[Record], files: Mapping[int, SecretFile]) -> int:
    """Return what was promised and is not touched, page tables included, given all secret files.

    A file belongs to the guest that has told its inode; before it has, to the one whose supervisor maps it, or a child
    of that: QEMU, or the process that prefaults. What else these map keeps no promise: other RAM blocks, and what a
    prefault sets aside, which is given back.
    """
    owned = {inode for record in records for inode in (*record.inodes, *record.lent)}
    for record in records:
        if not record.inodes or record.touched < record.size:
            family = {record.pid, *procfs.children(record.pid)}
            owned |= {inode for inode, file in files.items() if file.pids & family}
    total = sum(with_page_tables(file.mapped - file.present) for inode, file in files.items() if inode not in owned)
    return total + sum(_untouched(record, files) for record in records)


def _untouched(record: Record, files: Mapping[int, SecretFile]) -> int:
    present = sum(files[inode].present for inode in record.inodes if inode in files)
    return with_page_tables(max(0, record.size - max(record.touched, present))) + record.overhead


def _read(file: Path) -> Record | None:
    """Return a record; None where there is none yet, or no folder any more."""
    with suppress(OSError, ValueError, TypeError):
        return Record(**json.loads(file.read_text()))
    return None


@asynccontextmanager
async def _lock(folder: Path) -> AsyncIterator[None]:
    """Hold the lock of the runtime folder. Raises HostUnfit when it is not to be had in time."""
    import asyncio  # here, as `vmmback host` needs the rest alone: it is a fifth of its time

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise HostUnfit(
                    f"another launch has held the lock on {folder} for {_LOCK_TIMEOUT_S:g} s",
                    "end or continue that process",
                )
            await asyncio.sleep(0.05)  # flock(2) would wait, but has no deadline
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # for a child that was forked meanwhile has it, too, until it executes
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
