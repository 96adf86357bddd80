"""Folders of the host in a guest: virtiofs, by a daemon (virtiofsd) that maps the guest's RAM as QEMU does.

QEMU hands the daemon the descriptor of the RAM once the guest uses the share (vhost-user). So the daemon is a third
process that has the guest's RAM, and a report names it. It gets as few rights as it works with: docs/DEVICES.md.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Literal, TypeAlias

from vmmback import ram, vhost_user
from vmmback.command import Device
from vmmback.config.share import Share
from vmmback.errors import HostUnfit, QemuFailed, UsageError
from vmmback.handoff import Qemu, pidfd_of
from vmmback.host.qemu import AUX_RAM_BYTES, QEMU_ENVIRONMENT, virtiofsds
from vmmback.linux import capabilities, memlock, procfs
from vmmback.report import Exposure
from vmmback.runtime import last_words, listening_socket, socket_address

Backing: TypeAlias = Literal["secret", "ordinary"]

_TRIAL_TIMEOUT_S = 10.0
_END_TIMEOUT_S = 10.0
_ENDS_WITH_QEMU_S = 1.0

# In a mount namespace of its own: the folder without what is mounted below it, and without devices. mount(8) makes the
# flags hold also where the daemon itself knows no way to be read-only.
_ENTER = 'ulimit -c 0 && mount -n --bind -o "$3,nosuid,nodev" -- "$1" "$2" && shift 3 && exec "$@"'

_CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h

# What a daemon drops besides what it drops by itself. Where nothing can be written, it needs no other user's identity
# and no right to change a file; it opens what its user, root, may not read (CAP_DAC_READ_SEARCH).
_CAPABILITIES = {
    True: "+dac_read_search:-dac_override:-chown:-fowner:-fsetid:-mknod:-setfcap:-setuid:-setgid",
    False: "-mknod:-setfcap",
}


class Daemon:
    """A daemon that serves a folder to a guest. Made by `serve`."""

    def __init__(self, share: Share, log: Path, device: Device) -> None:
        self.share = share
        self.log = log
        self.device = device
        self.pids: frozenset[int] = frozenset()
        self.exposure: Exposure | None = None
        self.ended = asyncio.Event()
        self._children: dict[int, int] = {}

    @property
    def epitaph(self) -> str:
        """What its end means to a guest that goes on."""
        return (
            f"share {self.share.tag}: virtiofsd ended; the guest goes on, and waits in vain for what it wants of the "
            f"share; it said: {last_words(self.log) or 'nothing'}"
        )

    def settle(self) -> None:
        """Find out which processes it is, and with what rights, now that QEMU has spoken with it.

        It has put itself into namespaces by then, where its child works and the first process waits for that one.
        Raises QemuFailed when it has ended.
        """
        pid = self._process.pid
        self._hold_children()
        self.pids = frozenset({pid, *self._children})
        try:
            processes = [procfs.status(each) for each in (*self._children, pid)]
        except OSError:  # one is gone, and reaped
            processes = []
        # A dead process is there, as a zombie, until its parent asks for its status; init may take its time.
        if self.ended.is_set() or not processes or any(process["State"][0] in "ZX" for process in processes):
            words = last_words(self.log) or "nothing"
            raise QemuFailed(
                f"share {self.share.tag}: virtiofsd ended before the guest ran; it said: {words}",
                "launch the guest again",
            )
        worker = processes[0]
        names = ", ".join(capabilities.names(int(worker["CapEff"], 16))) or "none"
        used = "reads" if self.share.read_only else "reads and writes"
        self.exposure = Exposure(
            name="share",
            holders=f"virtiofsd (pid {worker['Pid']}), the host kernel, root",
            detail=f"{self.share.tag}: virtiofsd, uid {worker['Uid'].split()[0]}, capabilities {names}, "
            f"maps the guest's RAM while the guest uses the share: whoever takes that process over reads it; what "
            f"the guest {used} there is in the host's page cache in the clear",
        )

    def _start(self, program: str, folder: Path, number: int, listening: int, ram_size: int) -> None:
        mount_point = folder / f"share{number}"
        mount_point.mkdir(exist_ok=True)
        changes = _CAPABILITIES[self.share.read_only]
        if memlock.falls_short(ram_size + AUX_RAM_BYTES):
            changes += ":+ipc_lock"  # of the limit of its own, which nobody here may raise
        _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
        argv = [
            "setpriv", "--pdeathsig", "KILL", "--no-new-privs", "--",
            "unshare", "--mount", "--",
            "/bin/sh", "-c", _ENTER, "vmmback-share",
            str(self.share.path), str(mount_point), "ro" if self.share.read_only else "rw",
            program,
            f"--fd={listening}",
            f"--rlimit-nofile={descriptors}",
            "-o", f"source={mount_point},sandbox=namespace,modcaps={changes}",
        ]  # fmt: skip
        # By the event loop's thread, with which PR_SET_PDEATHSIG ends the daemon (prctl(2)). Its child it ends itself.
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listening],
                env=QEMU_ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
        self._pidfd = pidfd_of(self._process)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._process.wait()
        self.ended.set()

    async def end(self) -> None:
        """Kill it, and wait until none of its processes has the guest's RAM any more; again, it does nothing.

        Raises QemuFailed when the kernel does not end them in time.
        """
        if not self.ended.is_set():
            self._hold_children()
        for pidfd in (*self._children.values(), self._pidfd):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await self.ended.wait()
                for pidfd in self._children.values():
                    await _gone(pidfd)
        except TimeoutError:
            pids = ", ".join(str(pid) for pid in (self._process.pid, *self._children))
            raise QemuFailed(f"virtiofsd (pid {pids}) did not end {_END_TIMEOUT_S:g} s after SIGKILL") from None

    def _hold_children(self) -> None:
        """Open a pidfd of each child, so that it can be ended, and its end awaited, whichever process ends first."""
        pid = self._process.pid
        for child in set(procfs.children(pid)) - self._children.keys():
            with suppress(OSError):
                pidfd = os.pidfd_open(child)
                if procfs.children(pid).count(child):  # still, so that the pid is no other process's
                    self._children[child] = pidfd
                else:
                    os.close(pidfd)

    def _close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        for pidfd in (*self._children.values(), self._pidfd):
            os.close(pidfd)


@asynccontextmanager
async def serve(
    share: Share,
    number: int,
    program: str,
    folder: Path,
    ram_size: int,
    inherited: ExitStack,
) -> AsyncIterator[Daemon]:
    """Serve a share to the QEMU that gets the device; the daemon is gone on exit, and with QEMU or this process.

    `inherited` holds our end of the connection until QEMU has its own. Raises OSError.
    """
    connection = inherited.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    device = Device(
        argv=(
            "-chardev", f"socket,id=share{number},fd={connection.fileno()}",
            "-device", f"vhost-user-fs-pci,chardev=share{number},tag={share.tag}",
        ),
        descriptors=(connection.fileno(),),
    )  # fmt: skip
    daemon = Daemon(share, folder / f"share{number}.log", device)
    address = folder / f"share{number}.sock"
    with listening_socket(address) as listening:  # nobody else can connect: one place in the queue, then it is gone
        listening.listen(1)
        with socket_address(address) as reachable:
            connection.connect(reachable)
        daemon._start(program, folder, number, listening.fileno(), ram_size)
    try:
        yield daemon
    finally:
        try:
            await daemon.end()
        finally:
            daemon._close()


async def usable_program(share: Share, folder: Path, backing: Backing, ram_size: int) -> str:
    """Return the virtiofsd that can map RAM of that kind, tried with a descriptor of that size.

    Raises HostUnfit with what each one said when there is none.
    """
    if set(",\\") & set(str(folder)):
        raise UsageError(
            f"{folder} has a comma or a backslash, which virtiofsd's options cannot carry",
            "set VMMBACK_RUNTIME_DIR to another folder, or remove [[share]]",
        )
    programs = virtiofsds()
    if not programs:
        raise HostUnfit(
            "[[share]] needs virtiofsd, which was not found",
            "install it: apt-get install qemu-system-common (Debian 12), or remove [[share]]",
        )
    if not procfs.has_capability(_CAP_SYS_ADMIN):
        raise HostUnfit(
            f"[[share]] {share.tag}: virtiofsd cannot be put into namespaces of its own without CAP_SYS_ADMIN",
            "run as root with all capabilities, or remove [[share]]",
        )
    problems = []
    for program in programs:
        if not (problem := await _try(program, share, folder, backing, ram_size)):
            return program
        problems.append(f"{program} {problem}")
    raise HostUnfit(
        f"[[share]] {share.tag}: no virtiofsd here can serve it to a guest on secret RAM: {'; '.join(problems)}",
        "the virtiofsd of QEMU 7.2 can (Debian 12: qemu-system-common), the one written in Rust cannot; or remove "
        "[[share]]",
    )


async def _try(program: str, share: Share, folder: Path, backing: Backing, ram_size: int) -> str:
    """Let a daemon of this program map memory of that size, of which no page is ever touched; say what failed."""
    log = folder / "share0.log"
    with ram.allocate(backing, ram_size) as memory, ExitStack() as inherited:
        async with serve(share, 0, program, folder, ram_size, inherited) as daemon:
            try:
                with socket.socket(fileno=os.dup(daemon.device.descriptors[0])) as connection:
                    connection.setblocking(False)
                    async with asyncio.timeout(_TRIAL_TIMEOUT_S):
                        taken = await vhost_user.give_memory(connection, memory.fileno(), ram_size)
            except TimeoutError:
                return f"did not answer within {_TRIAL_TIMEOUT_S:g} s"
            except (ConnectionError, EOFError):
                taken = False
            if taken:
                log.unlink()
                return ""
            with suppress(TimeoutError):  # its last words come with its end
                async with asyncio.timeout(1):
                    await daemon.ended.wait()
            return f"said: {last_words(log) or 'nothing'}"


async def _gone(pidfd: int) -> None:
    """Wait for the end of a process, of all its threads (pidfd_open(2)): its memory is released by then."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)


@asynccontextmanager
async def watched(daemons: Sequence[Daemon], qemu: Qemu, note: Callable[[str], None]) -> AsyncIterator[None]:
    """Tell of each daemon that ends while the block runs, unless QEMU ended, with which it ends."""

    async def tell_of_end(daemon: Daemon) -> None:
        await daemon.ended.wait()
        try:
            await qemu.ended(_ENDS_WITH_QEMU_S)
        except TimeoutError:
            note(daemon.epitaph)

    tasks = [asyncio.create_task(tell_of_end(daemon)) for daemon in daemons]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
