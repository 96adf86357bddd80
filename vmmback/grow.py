"""Growing a guest while it runs: a DIMM with a descriptor of its own, handed over and proved as the first one was.

Before the guest can use it, the kernel must say that QEMU has mapped our memory; after it was plugged, the whole QMP
proof is taken again. What fails before that leaves the guest as it was. What fails after it ends the guest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from vmmback import command, process, ram
from vmmback.config.values import DIMM_GRAIN_BYTES, shown_size
from vmmback.errors import AdmissionRefused, CommandRefused, HandoffFailed, QemuFailed, UsageError
from vmmback.guest import Guest, confirm
from vmmback.isolation import qmp_proof
from vmmback.linux import procfs
from vmmback.report import IsolationReport

Progress = Callable[[int, int], None]
"""Told how many bytes of the new RAM are present, and how many there will be."""

# It takes the descriptor before it answers; so much for a host that stands still.
_HANDOFF_TIMEOUT_S = 30.0


async def grow(guest: Guest, size: int, progress: Progress) -> IsolationReport:
    """Add `size` bytes of RAM of the guest's kind, examine the guest, and return what was measured of it.

    One at a time; who comes second waits. Raises VmmbackError: UsageError for a size that cannot be, AdmissionRefused,
    HostUnfit, QemuFailed. Until QEMU is asked, cancelling it undoes all of it; from then on it is finished first.
    """

    def prefaulted(done: int) -> None:
        guest.promise.touched(done)
        progress(done, size)

    async with guest.growing:
        _check(guest, size)
        group = process.memory_group(guest.config)
        async with _promised(guest, size):
            started = time.perf_counter()
            memory = ram.allocate(guest.config.memory.backing, size)
            guest.promise.backed_by(memory.inode)
            try:
                if guest.config.memory.prefault:
                    await memory.prefault(prefaulted, group=group, anew=guest.promise.anew)
                await _finished(_plug(guest, memory))
            finally:
                if memory not in guest.ram:
                    memory.close()
        guest.timings["grow"] = time.perf_counter() - started
        guest.watcher.note(f"the guest has grown by {shown_size(size)} to {shown_size(guest.target.size)}")
        return await guest.examine()


def _check(guest: Guest, size: int) -> None:
    """Raise UsageError unless the guest can grow by so much."""
    name, memory = guest.config.name, guest.config.memory
    room = memory.largest - guest.target.size
    if not memory.slots:
        raise UsageError(
            f"guest {name} cannot grow: [memory] max of its file does not say how far",
            f'write for example max = "{shown_size(memory.size + 8 * DIMM_GRAIN_BYTES)}", and launch it again',
        )
    if not room or len(guest.ram) > memory.slots:
        raise UsageError(f"guest {name} cannot grow any more: {shown_size(guest.target.size)} is all that it may have")
    if size <= 0 or size % DIMM_GRAIN_BYTES:
        raise UsageError(
            f"guest {name} cannot grow by {size} bytes", f"write a multiple of 128MiB, at most {shown_size(room)}"
        )
    if size > room:
        raise UsageError(
            f"guest {name} cannot grow by {shown_size(size)}: it has {shown_size(guest.target.size)}, and "
            f"[memory] max is {shown_size(memory.largest)}",
            f"grow by at most {shown_size(room)}",
        )


@asynccontextmanager
async def _promised(guest: Guest, size: int) -> AsyncIterator[None]:
    """Promise more memory to a guest, and take it back if the block fails. Raises AdmissionRefused."""
    try:
        await guest.promise.extend(size, guest.config.process.cgroup)
    except AdmissionRefused as error:
        fits = error.largest // DIMM_GRAIN_BYTES * DIMM_GRAIN_BYTES
        smaller = f"grow by at most {shown_size(fits)}, or " if fits else ""
        raise AdmissionRefused(error.message, f"{smaller}free memory on the host") from error
    had = guest.target.size
    try:
        yield
    finally:
        if guest.target.size == had:
            guest.promise.withdraw(size)
        guest.promise.settle(memory.inode for memory in guest.ram)


async def _plug(guest: Guest, memory: ram.Ram) -> None:
    """Hand the RAM over and plug it. Raises QemuFailed, with the guest as it was before, or ended."""
    number = len(guest.ram)
    name, mem_path = f"ram{number}", guest.folder / "ram" / f"ram{number}"
    async with guest.examining, AsyncExitStack() as undo:  # no examination sees half of it
        undo.push_async_callback(_remove, guest, name)
        with guest.qemu.offering(mem_path, memory.fileno()):
            await guest.monitor.execute("object-add", command.memory_backend(name, memory.size, mem_path))
            await guest.qemu.handed_over(_HANDOFF_TIMEOUT_S)
        _confirm_mapped(guest, memory)
        try:
            await guest.monitor.execute("device_add", {"driver": "pc-dimm", "id": f"dimm{number}", "memdev": name})
        except CommandRefused:
            raise
        except BaseException as error:  # whether it is plugged is not known
            await _fail_closed(guest, error)
            raise
        undo.pop_all()
        guest.ram.append(memory)
        try:
            guest.proof = await qmp_proof.observe(guest.target, guest.monitor.hmp)
            if guest.evidence:
                guest.evidence = guest.evidence._replace(proof=guest.proof)
            confirm(guest.ram, guest.proof)
        except BaseException as error:
            await _fail_closed(guest, error)
            raise


def _confirm_mapped(guest: Guest, memory: ram.Ram) -> None:
    """Raise QemuFailed unless QEMU has mapped all of the descriptor, and as secret memory if it is."""
    find = procfs.secret_mappings if memory.backing == "secret" else procfs.memory_mappings
    try:
        mappings = find(procfs.maps(guest.qemu.pid), memory.inode)
    except OSError as error:
        raise QemuFailed("QEMU ended while the guest grew") from error
    mapped = 0
    for mapping in mappings:  # in the order of their addresses
        mapped += mapping.size if mapping.offset == mapped else 0
    if mapped != memory.size:
        raise HandoffFailed(f"QEMU has mapped {mapped} of {memory.size} bytes of the new RAM", "report this")


async def _remove(guest: Guest, name: str) -> None:
    """Take the backend back, as far as there is one; QEMU may have ended, or may never have made it."""
    with suppress(QemuFailed):
        await guest.monitor.execute("object-del", {"id": name})


async def _fail_closed(guest: Guest, error: BaseException) -> None:
    """End a guest that has, or may have, RAM which was not proved to be ours, whatever on-exposed says."""
    guest.watcher.note(f"the guest is ended, as its new RAM was not confirmed: {error}")
    if isinstance(error, HandoffFailed):  # else QEMU itself failed, and its launch will say so
        guest.unexamined = f"its new RAM was not confirmed: {error}"
        guest.exposed.set()
    await guest.qemu.kill()


async def _finished(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, which goes on to its end also when this is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # told by the guest's end, or by nothing having changed
        raise
