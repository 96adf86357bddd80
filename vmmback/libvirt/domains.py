"""Domains of libvirt that ask for secret RAM, as the broker knows them: announced by the hook, claimed by the wrapper.

The hook announces a domain before libvirt starts it, which is when its XML is judged and its RAM is got ready. What
libvirt starts then in QEMU's place (configs/libvirt/emulator.c) claims that RAM, once: nobody else can, for libvirt,
which is root, writes the pid of what it starts to a file that only root can write. docs/LIBVIRT.md has the interface.
"""

# The annotations of the methods are the interface: asyncvarlink reads them, so they must not all be strings.
import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TypedDict
from xml.sax.saxutils import escape

from asyncvarlink import FileDescriptor, VarlinkInterface, varlinkmethod

from vmmback.broker import handoffs
from vmmback.broker.client import socket_path
from vmmback.broker.closing import Lent
from vmmback.broker.handoffs import Offer
from vmmback.broker.ledger import Caller
from vmmback.broker.lending import Broker
from vmmback.broker.pool import Pool, Ready, Reserved
from vmmback.broker.server import Interfaces
from vmmback.broker.service import Refused, held, refusing, shown
from vmmback.errors import AdmissionRefused, ConfigError, HostUnfit, VmmbackError
from vmmback.libvirt import domain_refusals, domain_xml, qemu_user, records
from vmmback.libvirt.domain_xml import Domain
from vmmback.libvirt.installed_files import see_wrapper
from vmmback.libvirt.places import Places, wrapper_of
from vmmback.libvirt.ram_arguments import Block, blocks_of, name_of
from vmmback.linux import kvm, seccomp
from vmmback.threads import in_thread

# Where libvirt's QEMU driver writes pids (virPidFileBuildPath; src/qemu/qemu_conf.c, stateDir).
_PIDFILES = Path("/run/libvirt/qemu")
_QUOTES = {"'": "&apos;", '"': "&quot;"}
# Between the hook's `prepare` and the start of the emulator are milliseconds, and on a busy host seconds.
_CLAIM_TIMEOUT_S = 120.0
# A domain that starts has the processors first.
_UP_S = 2.0


class Claimed(TypedDict):
    """What `Claim` returns."""

    channel: FileDescriptor
    filter: str


class DomainsInterface(VarlinkInterface, name="org.vmmback.Domains"):
    """What libvirt's hook and emulators may ask."""

    errors = (Refused,)

    def __init__(self, domains: "Domains", caller: Caller, pidfd: int) -> None:
        self._domains, self._caller, self._pidfd = domains, caller, pidfd

    @varlinkmethod
    async def Announce(self, xml: str) -> None:  # noqa: N802 (Varlink's spelling)
        """Judge a domain that is about to start, and get its RAM ready, which goes back unless it is claimed. Root's.

        A domain that does not ask for secret RAM is none of ours.
        """
        with refusing("the domain cannot have secret RAM"), _of_a_domain():
            self._by_root()
            await self._domains.announce(xml)

    @varlinkmethod
    async def Claim(self, arguments: list[str]) -> Claimed:  # noqa: N802
        """Have the calls of a QEMU with these arguments answered with the RAM of its domain, which was announced.

        `filter` is the program (hex) for seccomp(2), whose listener goes to `channel` (org.vmmback.Handoff). For the
        process that libvirt has started for this domain alone, and once.
        """
        with refusing("the domain cannot have its RAM"), _of_a_domain(), held(self._pidfd) as pidfd:
            channel = await self._domains.claim(arguments, self._caller, pidfd)
            return {
                "channel": FileDescriptor(channel, should_close=True),
                "filter": seccomp.program(memfds=True, mappings=True).hex(),
            }

    @varlinkmethod
    async def Withdraw(self, name: str) -> None:  # noqa: N802
        """Give the RAM of a domain back that was announced and will not be claimed any more. Root's."""
        with refusing("the domain cannot be withdrawn"):
            self._by_root()
            await self._domains.withdraw(name)

    def _by_root(self) -> None:
        if self._caller.uid != 0:
            raise AdmissionRefused(
                f"uid {self._caller.uid} may not speak for libvirt", "the hook does, which is root's"
            )


class _Announced:
    """A domain that may start. What its claim would wait for is done before, while libvirt gets on."""

    def __init__(self, domain: Domain, pool: Pool, ram: list[Reserved], channel: int) -> None:
        """Take over what its QEMU will get, and the channel of the worker that will answer its calls. Raises OSError.

        Call it in an event loop.
        """
        self.domain, self.channel = domain, channel
        self.until_s = time.monotonic() + _CLAIM_TIMEOUT_S
        self.since_ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
        """When it was announced, as starts of processes are told: in ticks since boot (proc_pid_stat(5))."""
        records.begin(domain.uuid)
        self.frames = records.new_frames(domain.uuid)
        """Where it is written where its RAM lies, until it is said of which run."""
        self.ready = list[Ready]()
        """What is there of its RAM, and not lent."""
        self._pool, self._ram = pool, ram
        self._preparing = asyncio.create_task(self._prepare())

    async def _prepare(self) -> None:
        for reserved in self._ram:
            self.ready.append(await reserved.given())
        await in_thread(partial(records.write_frames, self.frames, {each.inode: each.frames for each in self.ready}))

    async def prepared(self, pidfd: int) -> None:
        """Wait until all is ready, as long as who has claimed it lives. Raises VmmbackError, OSError."""
        if not self._preparing.done():
            await _done_or_ended(self._preparing, pidfd)
        if not self._preparing.done():
            raise AdmissionRefused("the process that has claimed it has ended", "start the domain again")
        self._preparing.result()

    async def close(self) -> None:
        """Give all of it back that was not lent."""
        self._preparing.cancel()
        await asyncio.gather(self._preparing, return_exceptions=True)  # errors are for its claim
        async with AsyncExitStack() as last_first:
            last_first.callback(os.close, self.channel)
            last_first.callback(records.drop_frames, self.frames)
            for reserved in reversed(self._ram):
                last_first.push_async_callback(reserved.give_up)
            for ready in reversed(self.ready):
                last_first.callback(self._pool.not_lent, ready)


class Domains:
    """All that were announced and not claimed yet."""

    def __init__(self, broker: Broker, places: Places) -> None:
        """Know none; `places` have the wrappers that libvirt starts."""
        self._broker, self._places = broker, places
        self._announced: dict[str, _Announced] = {}
        self._closed = False
        self._spare = -1
        """The channel of a worker that waits for the next domain: to start one takes longer than a claim."""

    async def announce(self, xml: str) -> None:
        """See DomainsInterface.Announce. Raises ConfigError, UsageError, AdmissionRefused, HostUnfit, OSError."""
        if not domain_xml.mentions(xml):
            return
        root = domain_xml.parse(xml)
        domain = domain_xml.domain_of(root)
        if domain is None:
            return
        kvm_works = domain.type == "kvm" and (await in_thread(kvm.can_map_secret_ram)).usable
        problems = domain_refusals.refusals(root, wrapper_of(domain.policy.emulator), kvm_works)
        if problems:
            raise domain_refusals.refused(root, problems)
        see_wrapper(self._places, domain.policy.emulator)
        await self.withdraw(domain.name)  # of an earlier start that came to nothing
        async with AsyncExitStack() as failed:
            channel, ram = self._worker(), list[Reserved]()
            failed.callback(os.close, channel)
            for block in domain.ram:
                ram.append(self._broker.pool.reserve(block.size, self._broker.ledger.next_number()))
                failed.push_async_callback(ram[-1].give_up)
                await ram[-1].admitted()
            while domain.name in self._announced:  # of a hook that was ended meanwhile
                await self.withdraw(domain.name)
            if self._closed:
                raise AdmissionRefused("the broker ends", "start the domain again once the next one runs")
            self._announced[domain.name] = _Announced(domain, self._broker.pool, ram, channel)
            failed.pop_all()

    def _worker(self) -> int:
        """Return the channel of a worker, and have a new one started once this domain is up. Raises OSError."""
        channel, self._spare = self._spare, -1
        asyncio.get_running_loop().call_later(_UP_S, self._start_spare)
        if channel >= 0 and not handoffs.has_ended(channel):
            return channel
        if channel >= 0:
            os.close(channel)
        return self._broker.handoffs.start(0)

    def _start_spare(self) -> None:
        if self._spare < 0 and not self._closed:
            with suppress(OSError):  # the next domain will have one started
                self._spare = self._broker.handoffs.start(0)

    async def claim(self, arguments: Sequence[str], caller: Caller, pidfd: int) -> int:
        """See DomainsInterface.Claim; the channel is the caller's to close. Raises VmmbackError, OSError."""
        name, blocks = name_of(arguments), blocks_of(arguments)
        announced = self._announced_to(name, blocks, caller)
        del self._announced[name]
        async with AsyncExitStack() as failed:
            failed.push_async_callback(announced.close)
            await announced.prepared(pidfd)
            self._lend(announced, blocks, caller, pidfd)
            failed.pop_all()
            return announced.channel

    def _announced_to(self, name: str, blocks: Sequence[Block], caller: Caller) -> _Announced:
        """Return what was announced of a domain for whoever claims it. Raises AdmissionRefused, ConfigError."""
        announced = self._announced.get(name)
        if announced is None:
            raise AdmissionRefused(
                f"no domain {name!a} was announced to the broker, or it has its RAM already",
                "start it by libvirt again; if that fails too: vmmback libvirt enable it, and vmmback libvirt install",
            )
        if pid_of(name) != caller.pid or caller.started < announced.since_ticks:
            raise AdmissionRefused(
                f"process {caller.pid} is not the one that libvirt has started for domain {name!a}",
                "only libvirt starts a domain's emulator",
            )
        wanted, sizes = [block.size for block in announced.domain.ram], [block.size for block in blocks]
        if sizes != wanted:
            raise ConfigError(
                f"domain {name!a} was announced with RAM blocks of {wanted} bytes, and its QEMU wants {sizes}",
                "report this, with the domain's XML",
            )
        # Who runs as one user can take each other's descriptors, capabilities or not (own_user.py).
        others = {lease.purpose for lease in self._broker.ledger if lease.uid == caller.uid} - {purpose(name)}
        if others or caller.uid == self._user_of_all:
            shares = f"{min(others)} does" if others else "all domains do by default"
            raise AdmissionRefused(
                f"domain {name!a} would run as user {caller.uid}, as {shares}, and they could take each other's RAM",
                "remove its <seclabel model='dac'>, then vmmback libvirt enable",
            )
        return announced

    def _lend(self, announced: _Announced, blocks: Sequence[Block], caller: Caller, pidfd: int) -> None:
        """Lend the files of a domain to its QEMU, and tell the worker which of its calls to answer with them."""
        name, uuid, memory = announced.domain.name, announced.domain.uuid, list[Lent]()
        with ExitStack() as failed, ExitStack() as lending:
            while announced.ready:
                lease, lent, frames = self._broker.hand_over(announced.ready.pop(0), caller, pidfd, purpose(name))
                lending.callback(lent.close)
                failed.callback(self._broker.end, lease.number)
                memory.append(lent)
                os.close(frames)
            failed.callback(records.forget_frames, uuid, caller.pid)
            try:
                records.name_frames(announced.frames, uuid, caller.pid)
            except FileNotFoundError as error:  # records.begin has removed them
                raise AdmissionRefused(
                    f"domain {name!a} was announced anew meanwhile", "start the domain again"
                ) from error
            offers = [Offer(block.call, block.name, lent.fileno()) for block, lent in zip(blocks, memory, strict=True)]
            more = {"broker": str(socket_path()), "purpose": purpose(name), "room": announced.domain.room}
            handoffs.tell(announced.channel, caller.pid, pidfd, offers, more)
            failed.pop_all()

    @cached_property
    def _user_of_all(self) -> int:
        """The uid that libvirt gives QEMUs which are not to have another one, -1 where that is not known."""
        try:
            return qemu_user.of_host(self._places).uid
        except HostUnfit:
            return -1

    async def withdraw(self, name: str) -> None:
        """Give the RAM of a domain back that was announced."""
        if announced := self._announced.pop(name, None):
            await announced.close()

    async def close(self) -> None:
        """Give back all."""
        self._closed = True
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        while self._announced:
            await self.withdraw(next(iter(self._announced)))

    async def expire(self) -> None:
        """Give back for ever what nobody has claimed in time."""
        while True:
            await asyncio.sleep(_CLAIM_TIMEOUT_S / 4)
            for name, announced in list(self._announced.items()):
                if time.monotonic() > announced.until_s:
                    with suppress(VmmbackError, OSError):
                        await self.withdraw(name)


async def _done_or_ended(task: asyncio.Task[None], pidfd: int) -> None:
    """Wait until a task is done, or a process has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    end = asyncio.create_task(ended.wait())
    try:
        await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(pidfd)
        end.cancel()


@contextmanager
def _of_a_domain() -> Iterator[None]:
    """Have hints speak of a domain's XML where they speak of a guest file, which a domain has not."""
    try:
        yield
    except VmmbackError as error:
        # How much fits is said of one RAM block, of which a domain may have several: no size of <memory>.
        size = r"(?:set|choose a smaller) \[memory\] size(?: to at most \w+)?"
        error.hint = re.sub(size, "give the domain less <memory> (virsh edit)", error.hint)
        raise


def purpose(name: str) -> str:
    """Return the purpose of the leases of a domain, as the broker keeps it."""
    return shown(f"domain {name}")


@asynccontextmanager
async def served(broker: Broker, places: Places) -> AsyncIterator[Interfaces]:
    """Serve libvirt's domains beside the broker while the block runs."""
    records.drop_unnamed()
    domains = Domains(broker, places)
    expiring = asyncio.create_task(domains.expire())
    try:
        yield lambda caller, pidfd: DomainsInterface(domains, caller, pidfd)
    finally:
        expiring.cancel()
        with suppress(asyncio.CancelledError):
            await expiring
        await domains.close()


def pid_of(name: str) -> int:
    """Return the pid of what libvirt has started for a domain, -1 where it has not.

    libvirt names the file by the domain's name as it is written in XML (src/qemu/qemu_process.c, virPidFileBuildPath of
    a name that virDomainDefFormat has escaped).
    """
    try:
        return int((_PIDFILES / f"{escape(name, _QUOTES)}.pid").read_text())
    except (OSError, ValueError):
        return -1
