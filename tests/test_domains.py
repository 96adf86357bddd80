"""Domains that are announced and claimed: who gets which RAM, once, and what becomes of it when something goes wrong.

Pool, ledger and workers are made up; integration/test_libvirt.py has the real ones.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
from array import array
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmmback.broker import handoffs
from vmmback.broker.ledger import Caller
from vmmback.broker.lending import Broker
from vmmback.broker.service import Refused
from vmmback.errors import AdmissionRefused, ConfigError, UsageError
from vmmback.libvirt import domain_edit, domains, installed_files, qemu_user, records
from vmmback.libvirt.domains import Domains, DomainsInterface
from vmmback.libvirt.places import Places, wrapper_of
from vmmback.libvirt.qemu_user import QemuUser
from vmmback.linux import page_file

XML = """<domain type='qemu'>
  <name>{name}</name>
  <uuid>c0dedd50-80a2-4d4a-ab37-39d77e436206</uuid>
  <memory unit='MiB'>64</memory>
  <cpu><numa><cell id='0' memory='32' unit='MiB'/><cell id='1' memory='32' unit='MiB'/></numa></cpu>
  <os><type machine='pc-q35-7.2'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
  </devices>
</domain>
"""
UUID = "c0dedd50-80a2-4d4a-ab37-39d77e436206"
SIZES = [32 << 20, 32 << 20]


def arguments(name: str = "one", sizes: Sequence[int] = SIZES) -> list[str]:
    """What libvirt gives QEMU, as far as it is told the broker."""
    argv = ["-name", f"guest={name},debug-threads=on"]
    for size in sizes:
        argv += ["-object", json.dumps({"qom-type": "memory-backend-memfd", "id": "ram", "size": size})]
    return argv


CALLER = Caller(os.getpid(), 1000, 100, 1 << 60)


QEMU = Path("/usr/bin/qemu-system-x86_64")


def asking(name: str = "one") -> str:
    return domain_edit.enabled(XML.format(name=name), wrapper_of(QEMU), "kill")


class Ready:
    def __init__(self, size: int, inode: int) -> None:
        self.size, self.inode, self.frames = size, inode, page_file.sealed(array("Q", [1]))


class Reserved:
    def __init__(self, made_up: MadeUp, size: int) -> None:
        self.made_up, self.size, self.ready = made_up, size, True

    async def admitted(self) -> None:
        await asyncio.sleep(0)
        if self.size in self.made_up.refused:
            raise AdmissionRefused("no room")

    async def given(self) -> Ready:
        if self.made_up.prefaults_that_fail and len(self.made_up.given) == 1:
            raise AdmissionRefused("the prefault was killed")
        if self.made_up.makes:
            self.made_up.makes.set()
            await self.made_up.is_made.wait()
        self.ready = False
        ready = Ready(self.size, len(self.made_up.given))
        self.made_up.given.append(ready)
        return ready

    async def give_up(self) -> None:
        if self.ready:
            self.ready = False
            self.made_up.given_up.append(self.size)


class Lent:
    def __init__(self, made_up: MadeUp, inode: int) -> None:
        self.made_up, self.inode = made_up, inode

    def fileno(self) -> int:
        return 100 + self.inode

    def close(self) -> None:
        self.made_up.closed.append(self.inode)


class MadeUp:
    """A broker, with what was done of it; it is its own pool, ledger and workers."""

    def __init__(self, places: Places) -> None:
        self.places, self.records = places, places.root.parent / "records"
        self.pool = self.ledger = self.handoffs = self
        self.reserved, self.given = list[Reserved](), list[Ready]()
        self.given_up, self.back, self.closed, self.ended = list[int](), list[int](), list[int](), list[int]()
        self.refused, self.prefaults_that_fail = set[int](), False
        self.makes: asyncio.Event | None = None
        """Set when a file is waited for that is not done before `is_made`."""
        self.is_made = asyncio.Event()
        self.leases = list[SimpleNamespace]()
        """Of others."""
        self.pidfd = os.pidfd_open(os.getpid())
        self.channels = list[int]()
        self.told = list[tuple[Any, ...]]()
        """Of workers: pid, pidfd, offers, and what may be plugged in."""
        self.given_back = asyncio.Event()
        """All of one domain's."""

    def __iter__(self) -> Iterator[SimpleNamespace]:
        return iter(self.leases)

    def next_number(self) -> int:
        return 7

    def start(self, uid: int) -> int:
        assert uid == 0
        reading, writing = os.pipe()
        os.close(reading)
        self.channels.append(writing)
        return writing

    def reserve(self, size: int, _: int) -> Reserved:
        self.reserved.append(Reserved(self, size))
        return self.reserved[-1]

    def not_lent(self, ready: Ready) -> None:
        os.close(ready.frames)
        self.back.append(ready.inode)
        if len(self.back) == len(SIZES):
            self.given_back.set()

    def hand_over(self, ready: Ready, caller: Caller, _: int, purpose: str) -> tuple[Any, Lent, int]:
        assert (caller, purpose) == (CALLER, "domain one")
        lease = type("Lease", (), {"number": ready.inode})
        return lease, Lent(self, ready.inode), ready.frames

    def end(self, number: int) -> None:
        self.ended.append(number)

    @property
    def recorded(self) -> list[str]:
        """What is there of domains' runs."""
        return [path.name for path in self.records.iterdir()]

    @property
    def still_open(self) -> int:
        """How many of the descriptors that it gave: channels, and frames."""
        given = {*self.channels, *(ready.frames for ready in self.given)}
        return sum(os.path.exists(f"/proc/self/fd/{descriptor}") for descriptor in given)  # noqa: PTH110


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MadeUp]:
    monkeypatch.setattr(domains, "_PIDFILES", tmp_path)
    (tmp_path / "one.pid").write_text(str(os.getpid()))
    made_up = MadeUp(Places(tmp_path / "host/root"))
    install(made_up.places, QEMU)
    monkeypatch.setattr(records, "RECORDS", made_up.records)
    monkeypatch.setattr(handoffs, "tell", lambda _, *told: made_up.told.append(told))
    monkeypatch.setattr(qemu_user, "of_host", lambda places: QemuUser(64055 if places is made_up.places else 0, 0))
    yield made_up
    os.close(made_up.pidfd)


def install(places: Places, qemu: Path) -> None:
    wrapper = places.below(wrapper_of(qemu))
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    wrapper.write_text(installed_files.wrapper(qemu))


def run(broker: MadeUp, work: Any) -> Any:
    """Do something with domains in an event loop, and close them."""

    async def all_of_it() -> Any:
        made = Domains(cast("Broker", broker), broker.places)
        try:
            return await work(made)
        finally:
            await made.close()

    coroutine: Coroutine[Any, Any, Any] = all_of_it()
    return asyncio.run(coroutine)


async def all_is_ready() -> None:
    """Wait for what is done beside."""
    await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})


def test_what_was_announced_is_claimed_once(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        await made.announce(asking())
        channel = await made.claim(arguments(), CALLER, broker.pidfd)
        memfd = "memory-backend-memfd"
        offers = [("memfd_create", memfd, 100), ("memfd_create", memfd, 101)]
        ((pid, pidfd, offered, more),) = broker.told
        assert (pid, pidfd, offered) == (CALLER.pid, broker.pidfd, offers)
        assert more["purpose"] == "domain one"
        assert set(records.frames(UUID, CALLER.pid)) == {0, 1}
        os.close(channel)
        with pytest.raises(AdmissionRefused, match="was announced"):
            await made.claim(arguments(), CALLER, broker.pidfd)

    run(broker, work)
    assert (broker.given_up, broker.back, broker.closed, broker.ended) == ([], [], [1, 0], [])
    assert (broker.still_open, broker.recorded) == (0, [f"{UUID}.{CALLER.pid}.frames"])


def test_a_claim_waits_for_nothing_that_could_be_done_before(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        await made.announce(asking())
        await all_is_ready()
        claim = made.claim(arguments(), CALLER, broker.pidfd)
        with pytest.raises(StopIteration) as returned:  # at its first step
            claim.send(None)
        os.close(returned.value.value)

    run(broker, work)


def test_a_claim_waits_for_what_is_being_made(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        broker.makes = asyncio.Event()
        await made.announce(asking())
        claim = asyncio.create_task(made.claim(arguments(), CALLER, broker.pidfd))
        await broker.makes.wait()
        assert not claim.done()
        broker.is_made.set()
        os.close(await asyncio.wait_for(claim, 30))

    run(broker, work)
    assert (broker.given_up, broker.back, broker.closed) == ([], [], [1, 0])


@pytest.mark.parametrize(
    ("name", "sizes", "caller", "error"),
    [
        ("two", SIZES, CALLER, AdmissionRefused),
        ("one", SIZES, CALLER._replace(pid=1), AdmissionRefused),
        ("one", SIZES, CALLER._replace(started=1), AdmissionRefused),
        ("one", SIZES, CALLER._replace(uid=64055), AdmissionRefused),
        ("one", SIZES[:1], CALLER, ConfigError),
        ("one", [*SIZES, 1 << 20], CALLER, ConfigError),
    ],
    ids=["another name", "another process", "one of before", "the user of all", "less", "more"],
)
def test_who_claims_something_else_gets_nothing_and_the_domain_still_its_own(
    broker: MadeUp, name: str, sizes: list[int], caller: Caller, error: type[Exception]
) -> None:
    async def work(made: Domains) -> None:
        await made.announce(asking())
        with pytest.raises(error):
            await made.claim(arguments(name, sizes), caller, broker.pidfd)
        assert broker.told == []
        os.close(await made.claim(arguments(), CALLER, broker.pidfd))

    run(broker, work)


def test_a_domain_whose_wrapper_would_start_another_qemu_is_refused(broker: MadeUp) -> None:
    other = Path("/opt/other") / QEMU.name

    async def work(made: Domains) -> None:
        with pytest.raises(UsageError, match=f"is the wrapper of {QEMU}, and the domain's QEMU is {other}") as raised:
            await made.announce(asking().replace(f'emulator="{QEMU}"', f'emulator="{other}"'))
        assert f"vmmback libvirt install --emulator {other}" in raised.value.hint
        assert broker.reserved == []
        install(broker.places, other)
        await made.announce(asking().replace(f'emulator="{QEMU}"', f'emulator="{other}"'))
        with pytest.raises(UsageError, match="is the wrapper of /opt"):
            await made.announce(asking())
        broker.places.below(wrapper_of(QEMU)).unlink()
        with pytest.raises(UsageError, match="is not there"):
            await made.announce(asking())

    run(broker, work)


def test_no_two_domains_have_one_user(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        broker.leases = [SimpleNamespace(uid=CALLER.uid, purpose="domain two")]
        await made.announce(asking())
        with pytest.raises(AdmissionRefused, match=f"as user {CALLER.uid}, as domain two does"):
            await made.claim(arguments(), CALLER, broker.pidfd)
        broker.leases = [
            SimpleNamespace(uid=CALLER.uid, purpose="domain one"),  # of a run that is about to end
            SimpleNamespace(uid=CALLER.uid + 1, purpose="domain two"),
        ]
        os.close(await made.claim(arguments(), CALLER, broker.pidfd))

    run(broker, work)


def test_what_is_made_for_who_has_ended_goes_back(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        broker.makes = asyncio.Event()
        await made.announce(asking())
        claimer = await asyncio.create_subprocess_exec("sleep", "60")
        pidfd = os.pidfd_open(claimer.pid)
        claim = asyncio.create_task(made.claim(arguments(), CALLER, pidfd))
        await broker.makes.wait()
        claimer.kill()
        with pytest.raises(AdmissionRefused, match="has ended"):
            await asyncio.wait_for(claim, 30)
        await claimer.wait()
        os.close(pidfd)

    run(broker, work)
    assert (broker.given, broker.given_up) == ([], SIZES)
    assert (broker.still_open, broker.recorded) == (0, [])


def test_what_is_made_for_a_claim_that_is_cancelled_goes_back(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        broker.makes = asyncio.Event()
        await made.announce(asking())
        claim = asyncio.create_task(made.claim(arguments(), CALLER, broker.pidfd))
        await broker.makes.wait()
        claim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claim

    run(broker, work)
    assert (broker.given, broker.given_up) == ([], SIZES)
    assert (broker.still_open, broker.recorded) == (0, [])


def test_a_claim_that_still_waits_when_its_domain_is_announced_anew_gets_its_own(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        broker.makes = asyncio.Event()
        await made.announce(asking())
        claim = asyncio.create_task(made.claim(arguments(), CALLER, broker.pidfd))
        await broker.makes.wait()
        await made.announce(asking())
        broker.is_made.set()
        os.close(await asyncio.wait_for(claim, 30))
        os.close(await made.claim(arguments(), CALLER, broker.pidfd))

    run(broker, work)
    assert (len(broker.given), len(broker.back), len(broker.closed), len(broker.told)) == (4, 0, 4, 2)
    assert (broker.still_open, broker.recorded) == (0, [f"{UUID}.{CALLER.pid}.frames"])


def test_a_claim_whose_domain_was_announced_anew_when_all_was_written_says_so(
    broker: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_frames = records.name_frames

    def late(*about: Any) -> None:
        records.begin(UUID)
        name_frames(*about)

    async def work(made: Domains) -> None:
        await made.announce(asking())
        monkeypatch.setattr(records, "name_frames", late)
        with pytest.raises(AdmissionRefused, match="domain 'one' was announced anew meanwhile"):
            await made.claim(arguments(), CALLER, broker.pidfd)

    run(broker, work)
    assert (broker.told, broker.ended, broker.still_open, broker.recorded) == ([], [1, 0], 0, [])


def test_what_is_announced_while_the_broker_ends_goes_back(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        announcing = asyncio.create_task(made.announce(asking()))
        await asyncio.sleep(0)
        await made.close()
        with pytest.raises(AdmissionRefused, match="the broker ends"):
            await announcing

    run(broker, work)
    assert (broker.given, broker.given_up, broker.still_open) == ([], SIZES[::-1], 0)


def test_what_cannot_be_given_back_keeps_nothing_else(broker: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(_: Reserved) -> None:
        raise OSError(28, "No space left on device")

    async def work(made: Domains) -> None:
        await made.announce(asking())
        await all_is_ready()
        monkeypatch.setattr(Reserved, "give_up", fails)
        with pytest.raises(OSError, match="No space left"):
            await made.withdraw("one")

    run(broker, work)
    assert (sorted(broker.back), broker.still_open, broker.recorded) == ([0, 1], 0, [])


def test_what_an_earlier_broker_wrote_for_nobody_is_removed(broker: MadeUp) -> None:
    async def work() -> None:
        async with domains.served(cast("Broker", broker), broker.places):
            assert broker.recorded == [f"{UUID}.7.frames"]

    for name in (f"{UUID}.7.frames", f"{UUID}.0123456789abcdef.frames.new"):
        (broker.records / name).mkdir(parents=True)
    asyncio.run(work())


def test_a_domain_that_does_not_ask_is_none_of_ours(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        await made.announce(XML.format(name="one"))
        with pytest.raises(AdmissionRefused):
            await made.claim(arguments(), CALLER, broker.pidfd)

    run(broker, work)
    assert broker.reserved == []


def test_what_does_not_fit_goes_back_whole(broker: MadeUp) -> None:
    broker.refused = {32 << 20}

    async def work(made: Domains) -> None:
        with pytest.raises(AdmissionRefused):
            await made.announce(asking())
        with pytest.raises(AdmissionRefused):
            await made.claim(arguments(), CALLER, broker.pidfd)

    run(broker, work)
    assert broker.given_up == SIZES[:1]
    assert broker.still_open == 0


def test_of_two_announcements_at_once_the_last_one_counts_and_nothing_is_lost(broker: MadeUp) -> None:
    async def work(made: Domains) -> None:
        await asyncio.gather(*(made.announce(asking()) for _ in range(3)))
        os.close(await made.claim(arguments(), CALLER, broker.pidfd))

    run(broker, work)
    assert len(broker.reserved) == 6
    assert len(broker.given_up) + len(broker.back) == 4
    assert (broker.still_open, broker.recorded) == (0, [f"{UUID}.{CALLER.pid}.frames"])


@pytest.mark.parametrize(
    ("module", "step", "lent"),
    [(records, "write_frames", []), (records, "name_frames", [0, 1]), (handoffs, "tell", [0, 1])],
)
def test_a_claim_that_fails_half_way_gives_all_of_it_back(
    broker: MadeUp, monkeypatch: pytest.MonkeyPatch, module: object, step: str, lent: list[int]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    async def work(made: Domains) -> None:
        await made.announce(asking())
        with pytest.raises(OSError, match="no space"):
            await made.claim(arguments(), CALLER, broker.pidfd)

    with monkeypatch.context() as full:
        full.setattr(module, step, fail)
        run(broker, work)
    assert (sorted(broker.closed), sorted(broker.ended)) == (lent, lent)
    assert sorted(broker.back + lent) == [0, 1]
    assert (broker.still_open, broker.recorded) == (0, [])


def test_of_a_claim_whose_second_file_cannot_be_made_the_first_goes_back(broker: MadeUp) -> None:
    broker.prefaults_that_fail = True

    async def work(made: Domains) -> None:
        await made.announce(asking())
        with pytest.raises(AdmissionRefused, match="killed"):
            await made.claim(arguments(), CALLER, broker.pidfd)

    run(broker, work)
    assert (broker.back, broker.closed, broker.given_up) == ([0], [], SIZES[1:])
    assert (broker.still_open, broker.recorded) == (0, [])


def test_what_fails_of_a_domain_that_nobody_claims_is_told_nobody(broker: MadeUp) -> None:
    broker.prefaults_that_fail = True
    said = list[dict[str, Any]]()

    async def work(made: Domains) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        await made.announce(asking())
        await all_is_ready()
        await made.withdraw("one")
        gc.collect()

    run(broker, work)
    assert said == []
    assert (broker.back, broker.given_up, broker.still_open, broker.recorded) == ([0], SIZES[1:], 0, [])


@pytest.mark.parametrize("is_ready", [True, False], ids=["ready", "not begun"])
@pytest.mark.parametrize("end", ["withdrawn", "announced anew", "closed"])
def test_what_was_got_ready_for_nothing_goes_back(broker: MadeUp, end: str, *, is_ready: bool) -> None:
    async def work(made: Domains) -> None:
        await made.announce(asking())
        if is_ready:
            await all_is_ready()
            assert len(broker.given) == 2
        if end == "withdrawn":
            await made.withdraw("one")
            await made.withdraw("one")
        elif end == "announced anew":
            await made.announce(asking())
            os.close(await made.claim(arguments(), CALLER, broker.pidfd))
        else:
            await made.close()

    run(broker, work)
    assert (broker.back, broker.given_up) == (([0, 1], []) if is_ready else ([], SIZES))
    claimed = [f"{UUID}.{CALLER.pid}.frames"] if end == "announced anew" else []
    assert (broker.still_open, broker.recorded) == (0, claimed)


def test_what_is_just_written_goes_back_when_it_is_written(broker: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, sizes, write_frames = threading.Event(), list[int](), records.write_frames

    async def work(made: Domains) -> None:
        loop, writes = asyncio.get_running_loop(), asyncio.Event()

        def write(folder: Path, frames: dict[int, int]) -> None:
            loop.call_soon_threadsafe(writes.set)
            assert goes_on.wait(30)
            sizes.extend(os.fstat(file).st_size for file in frames.values())
            write_frames(folder, frames)

        monkeypatch.setattr(records, "write_frames", write)
        await made.announce(asking())
        await writes.wait()
        withdrawn = asyncio.create_task(made.withdraw("one"))
        await asyncio.sleep(0)
        goes_on.set()
        await withdrawn

    run(broker, work)
    assert (broker.back, sizes) == ([0, 1], [8, 8])
    assert (broker.still_open, broker.recorded) == (0, [])


def test_what_nobody_claims_goes_back(broker: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "_CLAIM_TIMEOUT_S", 0.2)

    async def work(made: Domains) -> None:
        expiring = asyncio.create_task(made.expire())
        await made.announce(asking())
        await asyncio.wait_for(broker.given_back.wait(), 30)
        with pytest.raises(AdmissionRefused):
            await made.claim(arguments(), CALLER, broker.pidfd)
        expiring.cancel()

    run(broker, work)


def test_a_name_is_escaped_as_libvirt_does(broker: MadeUp, tmp_path: Path) -> None:
    (tmp_path / "a&apos;b &amp; &quot;c&quot; &lt;d&gt;.pid").write_text("77")
    assert domains.pid_of('a\'b & "c" <d>') == 77
    assert domains.pid_of("a&apos;b &amp; &quot;c&quot; &lt;d&gt;") == -1
    assert domains.pid_of("none") == -1


class Worker(MadeUp):
    """A broker whose workers live until a test ends them."""

    def __init__(self, places: Places) -> None:
        super().__init__(places)
        self.workers = list[socket.socket]()
        self.started = asyncio.Event()

    def start(self, uid: int) -> int:
        ours, worker = socket.socketpair()
        self.workers.append(worker)
        self.channels.append(ours.detach())
        self.started.set()
        return self.channels[-1]

    async def has_started(self, number: int) -> None:
        while len(self.channels) < number:
            self.started.clear()
            await asyncio.wait_for(self.started.wait(), 10)


@pytest.fixture
def workers(broker: MadeUp, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(domains, "_UP_S", 0.0)
    made_up = Worker(broker.places)
    yield made_up
    for worker in made_up.workers:
        worker.close()
    assert made_up.still_open == 0


def test_a_worker_waits_for_the_next_domain(workers: Worker) -> None:
    async def work(made: Domains) -> None:
        await made.announce(asking())
        await workers.has_started(2)
        await made.announce(asking())
        channel = await made.claim(arguments(), CALLER, workers.pidfd)
        assert channel == workers.channels[1]
        os.close(channel)
        await workers.has_started(3)

    run(workers, work)
    assert len(workers.channels) == 3


def test_a_worker_that_has_ended_while_it_waited_is_no_domains(workers: Worker) -> None:
    async def work(made: Domains) -> None:
        await made.announce(asking())
        await workers.has_started(2)
        workers.workers[1].close()
        await made.announce(asking())
        channel = await made.claim(arguments(), CALLER, workers.pidfd)
        os.write(channel, b"to whom it may concern")
        assert workers.workers[2].recv(64) == b"to whom it may concern"
        os.close(channel)

    run(workers, work)


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        ("set [memory] size to at most 256MiB, or free memory on the host",
         "give the domain less <memory> (virsh edit), or free memory on the host"),
        ("choose a smaller [memory] size, or free memory or descriptors on the host",
         "give the domain less <memory> (virsh edit), or free memory or descriptors on the host"),
        ("free memory on the host", "free memory on the host"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["announce", "claim"])
def test_hints_speak_of_a_domain_not_of_a_guest_file(
    broker: MadeUp, monkeypatch: pytest.MonkeyPatch, method: str, hint: str, told: str
) -> None:
    async def refuse(*_: object) -> None:
        raise AdmissionRefused("it does not fit", hint)

    async def work(made: Domains) -> None:
        monkeypatch.setattr(made, method, refuse)
        interface = DomainsInterface(made, CALLER._replace(uid=0), 0)
        with pytest.raises(Refused) as refused:
            await (interface.Announce("") if method == "announce" else interface.Claim([]))
        assert refused.value.hint == told

    run(broker, work)
