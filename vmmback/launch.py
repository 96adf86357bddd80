"""One guest's life, in order: admission, RAM, QEMU, handoff, proof, run, probes, supervision, release.

What is not needed to start QEMU is imported while it comes up: who waits for a guest would wait for that as well.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vmmback import admission, command, console, control, devices, disks, handoff, process, ram, report, shares
from vmmback.broker import client as broker
from vmmback.config import GuestConfig
from vmmback.errors import HandoffFailed, Interrupted, QemuFailed, VmmbackError
from vmmback.host.qemu import can_share_aux_ram, choose_accel, find_qemu, kernel_release
from vmmback.lifecycle import State, Stop
from vmmback.linux import memlock
from vmmback.report import IsolationReport
from vmmback.runtime import QEMU_LOG, QMP_SOCKET, SERIAL_LOG, guest_folder
from vmmback.supervisor import Life
from vmmback.threads import in_thread

if TYPE_CHECKING:
    from vmmback.guest import Guest, Watcher

T = TypeVar("T")

# Generous: a deadline is for what never comes, not for what is slow.
_HANDOFF_TIMEOUT_S = 30.0
_GREETING_TIMEOUT_S = 30.0
# For each encrypted disk: before QEMU asks for its RAM it stretches the key, 2 s of a CPU that others want, too.
_UNLOCK_TIMEOUT_S = 30.0
# A guest without `ready` text is validated after its first output, or after so long: its firmware has run by then.
_SILENT_BOOT_S = 10.0
_POWERDOWN_TIMEOUT_S = 15.0
_QUIT_TIMEOUT_S = 5.0
_ASK_AGAIN_S = 3.0


async def launch(
    config: GuestConfig, watcher: Watcher, stop: Stop, *, validate: bool = True, file: Path | None = None
) -> IsolationReport:
    """Run a guest until it ends or `stop` is asked, and return what was measured of it. `file` is told who asks.

    Raises VmmbackError. Whatever happens, no process, file or descriptor of the guest is left.
    """
    with guest_folder(config.name) as folder:
        life = Life(config, file, folder, watcher, stop)
        async with control.serve(folder, life.interface):
            with life:
                return life.ended(await _live(config, folder, life, stop, validate=validate))


async def _live(config: GuestConfig, folder: Path, life: Life, stop: Stop, *, validate: bool) -> IsolationReport:
    async with AsyncExitStack() as stack:
        guest = await _unless(stop, bring_up(config, folder, life, stack))
        try:
            await _run(guest, life, stop, validate=validate)
        except QemuFailed as error:
            if not guest.exposed.is_set():
                raise
            life.note(error.message)  # that QEMU fails must not hide what was found before
            await guest.qemu.kill()
        life.entered(State.STOPPING)
        for daemon in guest.daemons:  # which map its RAM: as long as one does, no frame of it is free
            await daemon.end()
        return guest.report(await in_thread(guest.observe_freed_frames))


async def prepare(config: GuestConfig, watcher: Watcher, stack: AsyncExitStack) -> Guest:
    """Hold the name of a guest, and bring it up (see `bring_up`), for whoever leads it himself."""
    return await bring_up(config, stack.enter_context(guest_folder(config.name)), watcher, stack)


async def bring_up(config: GuestConfig, folder: Path, watcher: Watcher, stack: AsyncExitStack) -> Guest:
    """Bring a guest up to the moment before its first instruction, its RAM confirmed; `stack` holds what it needs."""
    timings: dict[str, float] = {}
    qemu_binary = find_qemu()
    accel = await in_thread(lambda: choose_accel(config.machine.accel))
    group = process.memory_group(config)
    with _timed(timings, "borrow"):
        lent = await broker.borrow(config, watcher.note, stack)
    if lent:
        promise = await admission.take_over(folder, lent.size, lent.inode)
    else:
        promise = await admission.admit(folder, config.memory.size, config.memory.backing, config.process.cgroup)
    plan = stack.enter_context(process.planned(config))
    inherited = stack.enter_context(ExitStack())  # our copies of what QEMU inherits
    opened, daemons = await devices.open_devices(config, plan.ids, folder, stack, inherited)

    memories = stack.enter_context(ram.closed_together())
    if config.memory.backing == "secret":
        memlock.ensure(config.memory.largest)  # QEMU inherits the limit
    guest_ram = lent or ram.allocate(config.memory.backing, config.memory.size)
    memories.append(guest_ram)
    if not lent:
        promise.backed_by(guest_ram.inode)

    def prefaulted(done: int) -> None:
        promise.touched(done)
        watcher.prefaulted(done, config.memory.size)

    # What takes its time without need of the RAM is done while the prefault runs.
    async with (
        _meanwhile(in_thread(lambda: _shares_aux_ram(config, qemu_binary))) as share_aux_ram,
        _meanwhile(in_thread(devices.import_network) if config.nic else asyncio.sleep(0)),
    ):
        if config.memory.prefault and not lent:
            with _timed(timings, "prefault"):
                await guest_ram.prefault(prefaulted, group=group, anew=promise.anew)
        secret_aux = await share_aux_ram

    started = time.perf_counter()
    qmp, qemu_qmp = _socket_pair(stack, inherited)
    serial, qemu_serial = _socket_pair(stack, inherited)
    if config.nic:
        with _timed(timings, "network"):
            opened += await devices.attach_nics(config, stack, inherited, watcher.note)
    logs = [folder / SERIAL_LOG, *([config.console.log] if config.console.log else [])]
    guest_console = await stack.enter_async_context(
        console.attach(serial, logs, watcher, (config.isolation.ready or "").encode())
    )
    # Nothing is ever at this path: QEMU's open of it is answered, and could make no file in a folder that is not there.
    mem_path = folder / "ram" / command.RAM_ID
    qemu_command = command.build(
        plan.config, qemu_binary, accel, mem_path, qemu_qmp.fileno(), qemu_serial.fileno(), opened, secret_aux
    )
    offers, log = {mem_path: guest_ram.fileno()}, folder / QEMU_LOG
    jail = plan.jail(folder, qemu_binary, accel, secret_aux=secret_aux)
    qemu = await stack.enter_async_context(
        handoff.start(
            qemu_command.argv,
            offers,
            qemu_command.descriptors,
            log,
            secret_memfds=secret_aux,
            jail=jail,
            group=group,
        )
    )
    inherited.close()
    from vmmback import monitor
    from vmmback.guest import Guest, confirm, target_of
    from vmmback.isolation import qmp_proof
    from vmmback.qmp_policy import Policy

    try:
        await qemu.handed_over(_HANDOFF_TIMEOUT_S + _UNLOCK_TIMEOUT_S * sum(disk.encrypted for disk in config.disk))
    except HandoffFailed as error:
        raise disks.key_refused(config, error.message) or error from None

    async with _last_words(qemu):
        qemu_monitor = await stack.enter_async_context(monitor.connect(qmp, _GREETING_TIMEOUT_S))
        host = report.Host(kernel=kernel_release(), qemu=await qemu_monitor.version(), accel=accel)
        timings["qmp_ready"] = time.perf_counter() - started
        for daemon in daemons:
            daemon.settle()
        proof = await qmp_proof.observe(target_of(qemu, memories, daemons), qemu_monitor.hmp)
        confirm(memories, proof)
    promise.settle(memory.inode for memory in memories)
    policy = Policy(config.qmp.allow)
    policy.deny("cont", "the guest was not started yet")
    return Guest(
        config, folder, memories, opened, qemu, qemu_monitor, guest_console, host, proof, timings, watcher, policy,
        promise, daemons=daemons,
    )  # fmt: skip


async def _run(guest: Guest, life: Life, stop: Stop, *, validate: bool) -> None:
    """Let a prepared guest run, and examine it, until it has ended. Raises QemuFailed."""
    async with (
        _last_words(guest.qemu),
        life.of(guest),
        _qmp_served(guest),
        shares.watched(guest.daemons, guest.qemu, life.note),
    ):
        await guest.monitor.cont()
        life.entered(State.BOOTING)
        guest.policy.permit("cont")
        if guest.config.isolation.every and not validate:
            life.note("no probe is tried, nor repeated every so often (--no-validate)")
        async with _meanwhile(in_thread(_import_the_rest)) as imported:
            found = await _examined(guest) if validate and await _booted(guest, stop) else None
            await _done(imported)  # of an error those will tell who need what is missing
        if found:
            life.validated(found)
        if guest.qemu.status is None and not stop.times:
            life.entered(State.RUNNING)
        async with _watched(guest):
            await _supervise(guest, life, stop)


def _import_the_rest() -> None:
    """Import what examines a guest, and what makes it grow: later its memory, or these files, may be gone."""
    from vmmback import grow  # noqa: F401
    from vmmback.isolation import audit, residue  # noqa: F401


def _shares_aux_ram(config: GuestConfig, qemu: Path) -> bool:
    """Tell whether QEMU's other RAM blocks are to be secret: if the guest's RAM is, and QEMU and the limits allow."""
    memory = config.memory
    return memory.backing == "secret" and can_share_aux_ram(qemu, config.machine.type, memory.largest)


@asynccontextmanager
async def _qmp_served(guest: Guest) -> AsyncIterator[None]:
    """Let other processes speak QMP to the guest as its file allows, while the block runs.

    Errors of its disks are told to the watcher meanwhile.
    """
    from vmmback import qmp_socket

    path, note = guest.folder / QMP_SOCKET, guest.watcher.note
    disk_errors = disks.DiskErrors(guest.config, path, note)
    async with qmp_socket.serve(path, guest.monitor, guest.policy, note) as clients:
        guest.clients = clients
        with guest.monitor.listen(disk_errors.receive):
            yield


async def _booted(guest: Guest, stop: Stop) -> bool:
    """Wait until the guest is as far as it is to be validated; False if it ended, was stopped or is exposed before."""
    wanted = guest.config.isolation.ready
    timeout_s = guest.config.isolation.ready_timeout_s if wanted else _SILENT_BOOT_S
    with _timed(guest.timings, "boot"):
        first = await _first(
            guest.console.ready.wait(), guest.qemu.ended(), stop.asked(1), guest.exposed.wait(), timeout_s=timeout_s
        )
    if guest.exposed.is_set():  # as another process asked: it must not run on until it is ready
        return False
    awaited = f"{wanted!r} on the console" if wanted else "the first output on the console"
    guest.validated_after = awaited if first == 0 else f"{timeout_s:g} s without {awaited}"
    return first in (0, None)


async def _examined(guest: Guest) -> IsolationReport | None:
    """Examine the guest; None if it ended by itself before that was done. Raises QemuFailed."""
    try:
        return await guest.examine()
    except QemuFailed:  # `examine` has waited for an end that was near
        if guest.qemu.status != 0:
            raise
        return None


@asynccontextmanager
async def _watched(guest: Guest) -> AsyncIterator[None]:
    """Examine the guest again and again while the block runs, where its file says how often."""
    every_s = guest.config.isolation.every
    task = asyncio.create_task(_watch(guest, every_s)) if every_s and guest.evidence else None
    try:
        yield
    finally:
        if task:
            task.cancel()
            await asyncio.wait({task})


async def _watch(guest: Guest, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            await guest.examine()
        except (VmmbackError, OSError, MemoryError, RuntimeError):  # out of memory, threads or descriptors, say
            if guest.qemu.status is None:  # of its end, others tell
                guest.watcher.note(guest.unexamined)


async def _supervise(guest: Guest, watcher: Watcher, stop: Stop) -> None:
    """Wait for the guest's end, or bring it about."""
    isolation = guest.config.isolation
    if not (guest.evidence and isolation.after_validation == "powerdown"):
        await _first(guest.exposed.wait(), guest.qemu.ended(), stop.asked(1))
    if guest.exposed.is_set() and guest.qemu.status is None:
        if isolation.on_exposed == "kill":
            watcher.note("the guest is exposed and is ended (on-exposed is kill)")
            watcher.entered(State.STOPPING)
            await guest.qemu.kill()
            return
        if isolation.on_exposed == "pause":
            watcher.note("the guest is exposed and stands still (on-exposed is pause)")
            for command_name in ("cont", "system_wakeup"):  # first, so that no client's comes after our stop
                guest.policy.deny(command_name, "the guest is exposed and stands still")
            await guest.monitor.stop()
        if isolation.on_exposed == "pause" or isolation.after_validation == "run":
            await _first(guest.qemu.ended(), stop.asked(1))
    await _shut_down(guest, watcher, stop)


async def _shut_down(guest: Guest, watcher: Watcher, stop: Stop) -> None:
    """Press the power button; if that does not end the guest, tell QEMU to quit; at last kill it.

    Each step has its deadline, and another request to stop cuts it short. Raises QemuFailed if QEMU had failed itself.
    """
    watcher.entered(State.STOPPING)
    patience_s = _POWERDOWN_TIMEOUT_S if stop.patience_s is None else stop.patience_s
    steps = (
        ("powerdown", guest.monitor.powerdown, patience_s),
        ("quit", guest.monitor.quit, _QUIT_TIMEOUT_S),
    )
    # A first request brought us here, unless the guest was to power off anyway; the next ones are for the steps.
    for times, (name, ask, timeout_s) in enumerate(steps, start=min(stop.times, 1) + 1):
        if await _first(_ended_by(guest.qemu, ask), stop.asked(times), timeout_s=timeout_s) is None:
            watcher.note(f"the guest did not end within {timeout_s:g} s of {name}")
    if guest.qemu.status is None:
        await guest.qemu.kill()
    elif guest.qemu.status != 0:
        raise guest.qemu.failure("run to the guest's end")


async def _ended_by(qemu: handoff.Qemu, ask: Callable[[], Awaitable[None]]) -> None:
    """Ask until QEMU has ended: it forgets a press of the power button that no driver awaits yet (hw/acpi/core.c)."""
    while qemu.status is None:
        with suppress(QemuFailed):  # it ended meanwhile, or does not answer: its end is the answer
            await ask()
        await _first(qemu.ended(), timeout_s=_ASK_AGAIN_S)


@asynccontextmanager
async def _last_words(qemu: handoff.Qemu) -> AsyncIterator[None]:
    """Let an error that is QEMU's death say so, with its exit status and its own last words."""
    try:
        yield
    except QemuFailed as error:
        if error.hint:  # it says all already
            raise
        with suppress(TimeoutError):
            await qemu.ended(timeout_s=1.0)
        if qemu.status is not None:
            raise qemu.failure("stay alive") from error
        raise type(error)(error.message, qemu.command_line) from error


class _timed:  # noqa: N801 (a context manager, used like a function)
    """Record under `name` the seconds that the block took, also when it fails."""

    def __init__(self, timings: dict[str, float], name: str) -> None:
        self._timings, self._name = timings, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._timings[self._name] = time.perf_counter() - self._started


@asynccontextmanager
async def _meanwhile(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Do `work` while the block runs, which takes its result; cancel it when the block fails before."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _socket_pair(stack: AsyncExitStack, inherited: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, qemus = socket.socketpair()
    return stack.enter_context(ours), inherited.enter_context(qemus)


async def _unless(stop: Stop, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it and raise Interrupted when `stop` is asked first."""
    task = asyncio.create_task(work)
    try:
        if await _first(_done(task), stop.asked(1)) == 0:
            return task.result()
        raise Interrupted(stop.signum)
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _done(task: asyncio.Task[Any]) -> None:
    await asyncio.wait({task})


async def _first(*awaited: Awaitable[object], timeout_s: float | None = None) -> int | None:
    """Return the index of the first that is done (the lowest of several), None when none was in time."""
    tasks = [asyncio.ensure_future(item) for item in awaited]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for index, task in enumerate(tasks):
            if task.done():
                task.result()  # an error of it is ours to raise
                return index
        return None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
