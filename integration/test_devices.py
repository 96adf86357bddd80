"""Virtio devices of a guest on secret RAM: they work, as on ordinary RAM, and what they open is named."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from integration import capabilities
from integration.conftest import (
    MIB,
    Backing,
    LiveGuest,
    Start,
    eventually,
    guest_file,
    prepared,
    processes_of,
    qemu_of,
)
from integration.leftovers import RESETS
from integration.task_guest import guest_file as task_guest_file
from integration.task_guest import printed, task_guest
from vmmback import command, shares, vsock
from vmmback.config.share import Share
from vmmback.errors import HostUnfit, QemuFailed
from vmmback.host import qemu
from vmmback.isolation.catalogue import ACCESS_PROBES
from vmmback.isolation.holders import HoldersProbe
from vmmback.linux import procfs
from vmmback.report import GuestVerdict, IsolationReport, Verdict

pytestmark = pytest.mark.usefixtures("needs_qemu")
virtiofsd = pytest.mark.usefixtures("needs_virtiofsd")
linux = pytest.mark.usefixtures("needs_guest_kernel")

# --- Random numbers, shares, a balloon: two Linux guests for all ------------------------------------------------------

TASK = """\
echo "rng: $(cat /sys/class/misc/hw_random/rng_current)"
echo "random: $(head -c 32 /dev/hwrng | hexdump -v -e '1/1 "%02x"')"
mkdir /mnt/read /mnt/write
mount -t virtiofs to.read /mnt/read || fail "cannot mount to.read"
mount -t virtiofs to.write /mnt/write || fail "cannot mount to.write"
sum=$(sha256sum </mnt/read/data) && echo "read: $sum"
for refused in "touch /mnt/read/data" "rm /mnt/read/data" "mkdir /mnt/read/folder" "mknod /mnt/write/null c 1 3"; do
  $refused 2>/dev/null && fail "could $refused"
done
cp /mnt/read/data /mnt/write/copy || fail "cannot write"
echo "mounted below: $(ls /mnt/read/below | wc -l)"
"""


@contextmanager
def with_balloon() -> Iterator[None]:
    """Give guests a balloon, which no guest file can."""
    build = command.build

    def build_more(*arguments: Any) -> command.QemuCommand:
        built = build(*arguments)
        return built._replace(argv=(*built.argv, "-device", "virtio-balloon-pci"))

    with mock.patch.object(command, "build", build_more):
        yield


def shared(folder: Path) -> tuple[str, bytes]:
    """Make two folders to share; return the tables, and what is in to.read's file."""
    data = secrets.token_bytes(3 * MIB + 5)
    for name in ("read/below", "write"):
        (folder / name).mkdir(parents=True)
    (folder / "read/data").write_bytes(data)
    return (
        f'[[share]]\npath = "{folder}/read"\ntag = "to.read"\n'
        f'[[share]]\npath = "{folder}/write"\ntag = "to.write"\nread-only = false\nplaintext = "allowed"\n'
    ), data


def present_bytes(live: LiveGuest) -> int:
    """Return how much of the RAM's file is there: pages that QEMU has mapped, or what an ordinary file holds."""
    (memory,), pid = live.guest.ram, live.pid
    if memory.backing == "ordinary":
        return os.fstat(memory.fileno()).st_blocks * 512
    mappings = procfs.memory_mappings(procfs.maps(pid), memory.inode)
    return sum(entry >> 63 for mapping in mappings for entry in procfs.pagemap(pid, mapping.start, mapping.size)) * 4096


@linux
@virtiofsd
def test_devices_work_on_secret_ram_as_on_ordinary_and_open_nothing_but_what_is_named(tmp_path: Path) -> None:
    random = set()
    kinds: tuple[Backing, ...] = ("secret", "ordinary")
    for backing in kinds:
        folder = tmp_path / backing
        tables, data = shared(folder)
        with with_balloon(), task_guest(folder, TASK, tables, backing) as live:
            live.start()

            assert printed(live, "rng: ") == "virtio_rng.0"
            random.add(printed(live, "random: "))
            assert len(set(bytes.fromhex(printed(live, "random: ")))) > 8  # 30 different ones, or so, of 32

            assert printed(live, "read: ").split()[0] == hashlib.sha256(data).hexdigest()
            assert (folder / "write/copy").read_bytes() == data
            assert sorted(path.name for path in (folder / "read").iterdir()) == ["below", "data"]
            check_daemons(live)
            check_balloon(live)
            check_end_of_a_daemon(live)
    assert len(random) == 2


def check_daemons(live: LiveGuest) -> None:
    """The daemons have the RAM, are named, and give nobody more than QEMU does; a stranger is found beside them."""
    secret = live.guest.ram[0].backing == "secret"
    found = live.run(live.guest.examine())
    assert found.verdict is (GuestVerdict.ISOLATED if secret else GuestVerdict.EXPOSED), found.reasons
    holders = next(probe for probe in found.probes if probe.name == "holders")
    assert holders.verdict is Verdict.BLOCKED, holders.detail
    named = [exposure for exposure in found.exposures if exposure.name == "share"]
    assert [exposure.detail.partition(":")[0] for exposure in named] == ["to.read", "to.write"]
    rights = r"uid 0, capabilities CAP_DAC_READ_SEARCH(, CAP_IPC_LOCK)?, maps the guest's RAM"
    assert re.search(rights, named[0].detail), named[0].detail

    target = live.guest.target
    workers = [int(re.search(r"pid (\d+)", exposure.holders)[1]) for exposure in named]  # type: ignore[index]
    assert set(workers) < target.partners
    for worker in workers:
        assert procfs.memory_mappings(procfs.maps(worker), *target.ram)  # it maps the RAM, so this says something:
        for probe in ACCESS_PROBES:
            seen = probe().observe(target._replace(pid=worker))
            if probe.name in ("proc-mem", "process-vm-readv"):
                assert seen.target is (Verdict.BLOCKED if secret else Verdict.READABLE), (probe.name, seen.detail)

    unknown = HoldersProbe().observe(target._replace(partners=frozenset()))  # were they not known, they would be found
    assert unknown.target is Verdict.READABLE
    assert all(f"process {worker} (virtiofsd) maps it" in unknown.detail for worker in workers), unknown.detail
    with ExitStack() as stack:
        stranger = stack.enter_context(
            subprocess.Popen(["sh", "-c", "sleep 99 & echo $!; wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             pass_fds=[live.guest.ram[0].fileno()])
        )  # fmt: skip
        stack.callback(stranger.kill)
        assert stranger.stdout is not None
        sleeper = int(stranger.stdout.readline())
        stack.callback(os.kill, sleeper, signal.SIGKILL)
        seen = HoldersProbe().observe(target)
        assert seen.target is Verdict.READABLE
        assert f"process {sleeper} " in seen.detail
        assert not any(f"process {worker} " in seen.detail for worker in workers)


def check_balloon(live: LiveGuest) -> None:
    """What the guest gives up comes back to the host from ordinary memory alone: why [balloon] is refused."""
    before = present_bytes(live)

    def inflated() -> bool:
        answer = live.run(live.guest.monitor.execute("query-balloon"))
        assert isinstance(answer, dict)
        return int(answer["actual"]) <= 97 * MIB

    live.run(live.guest.monitor.execute("balloon", {"value": 96 * MIB}))
    eventually(inflated, "the balloon has its size")
    given_back = before - present_bytes(live)
    log = (live.guest.folder / "qemu.log").read_text()
    if live.guest.ram[0].backing == "secret":
        assert given_back <= 0
        assert log.count("Failed to fallocate ram0") > 7000
    else:
        assert given_back > 30 * MIB
        assert log == ""


def check_end_of_a_daemon(live: LiveGuest) -> None:
    """The guest goes on without a daemon that was killed, and somebody is told."""

    told = asyncio.Event()

    async def end_one() -> None:
        watched = shares.watched(live.guest.daemons, live.guest.qemu, note_and_tell)
        async with watched, asyncio.timeout(30):
            os.kill(max(live.guest.daemons[0].pids), signal.SIGKILL)
            await told.wait()

    def note_and_tell(note: str) -> None:
        live.watcher.notes.append(note)
        told.set()

    live.run(end_one())
    (note,) = live.watcher.notes
    assert note.startswith("share to.read: virtiofsd ended; the guest goes on, and waits in vain for what it wants of")
    assert live.guest.qemu.status is None
    found = live.run(live.guest.examine())
    assert found.verdict is (GuestVerdict.ISOLATED if live.guest.ram[0].backing == "secret" else GuestVerdict.EXPOSED)


# --- Shares of guests that have no driver for them --------------------------------------------------------------------


def with_share(file: Path, path: Path) -> Path:
    """Add a share to a guest file."""
    file.write_text(file.read_text() + f'[[share]]\npath = "{path}"\ntag = "t"\n')
    return file


@virtiofsd
def test_the_death_of_the_supervisor_takes_the_daemons_along(tmp_path: Path, runtime_dir: Path, vmmback: Start) -> None:
    supervisor = vmmback("launch", with_share(guest_file(tmp_path), tmp_path))
    supervisor.wait_for("pages checked")
    assert any("virtiofsd" in line for line in processes_of(runtime_dir).values())
    assert qemu_of(runtime_dir)
    supervisor.process.kill()
    supervisor.process.wait()
    eventually(lambda: not processes_of(runtime_dir), "all processes of the guest are gone")
    eventually(lambda: not list(runtime_dir.iterdir()), "its folder is gone")


@linux
@virtiofsd
def test_daemons_that_stand_still_are_ended_before_the_frames_are_looked_at(
    tmp_path: Path, runtime_dir: Path, vmmback: Start
) -> None:
    file = task_guest_file(tmp_path, "mkdir /mnt/t\nmount -t virtiofs t /mnt/t || fail 'cannot mount t'\n")
    supervisor = vmmback("launch", with_share(file, tmp_path), "--json")
    supervisor.wait_for("is isolated while it runs")
    daemons = {pid for pid, line in processes_of(runtime_dir).items() if "virtiofsd " in line}
    assert len(daemons) == 2
    for daemon in daemons:
        os.kill(daemon, signal.SIGSTOP)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # at once, without waiting for the guest
        supervisor.process.send_signal(signum)
    ended = supervisor.ended()
    assert not daemons & processes_of(runtime_dir).keys()  # a zombie is none
    report = IsolationReport.from_json(ended.stdout)
    freed = report.probes[-1]
    assert (freed.name, freed.verdict) == ("freed-frames", Verdict.BLOCKED), freed
    assert int(freed.detail.split()[0]) > 32768 // 8, freed  # zero: they were freed, and are not all in use again


@virtiofsd
def test_a_daemon_that_ends_before_the_guest_runs_is_one_error(tmp_path: Path) -> None:
    async def end_and_settle() -> None:
        with ExitStack() as inherited:
            share = Share(path=tmp_path, tag="t")
            program = await shares.usable_program(share, tmp_path, "secret", 16 * MIB)
            async with shares.serve(share, 0, program, tmp_path, 16 * MIB, inherited) as daemon:
                await daemon.end()
                await daemon.end()  # again, it does nothing
                daemon.settle()

    with pytest.raises(QemuFailed, match="share t: virtiofsd ended before the guest ran; it said: "):
        asyncio.run(end_and_settle())


@virtiofsd
def test_a_daemon_that_ends_with_its_guest_is_not_told_of(tmp_path: Path, vmmback: Start) -> None:
    ended = vmmback("launch", with_share(guest_file(tmp_path, rom=RESETS, ready=None), tmp_path)).ended()
    assert ended.code in (0, 8)
    assert "virtiofsd" not in ended.stderr


def test_a_daemon_that_cannot_map_the_ram_is_refused_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\necho 'I cannot map that' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(qemu, "_VIRTIOFSDS", (str(program),))
    monkeypatch.setenv("PATH", str(tmp_path) + ":/usr/sbin:/usr/bin:/sbin:/bin")
    file = with_share(guest_file(tmp_path), tmp_path)
    said = r"\[\[share\]\] t: no virtiofsd here can .*said: I cannot map that"
    with pytest.raises(HostUnfit, match=said), prepared(file):
        pass


# --- Vsock ------------------------------------------------------------------------------------------------------------

VSOCK = "[vsock]\ncid = 4242\n"


def test_a_guest_with_a_vsock_is_refused_where_the_host_has_none(tmp_path: Path, vmmback: Start) -> None:
    if capabilities.has(capabilities.VHOST_VSOCK):
        pytest.skip("this host has vhost-vsock")
    file = guest_file(tmp_path)
    file.write_text(file.read_text() + VSOCK)
    ended = vmmback("launch", file).ended()
    assert ended.code == 3
    assert ended.has_one_error()
    assert "[vsock] needs /dev/vhost-vsock" in ended.stderr
    assert "modprobe vhost_vsock" in ended.stderr


@linux
def test_a_guest_talks_to_the_host_over_vsock(tmp_path: Path) -> None:
    capabilities.require(capabilities.VHOST_VSOCK)
    with task_guest(tmp_path, "", VSOCK) as live:
        live.start()
        with pytest.raises(HostUnfit, match=r"\[vsock\] cid 4242 is another guest's"), vsock.opened(4242):
            pass
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            with pytest.raises(ConnectionResetError):  # the guest's kernel answers: nobody listens on that port
                client.connect((4242, 1))
        found = live.run(live.guest.examine())
        assert found.verdict is GuestVerdict.ISOLATED, found.reasons
        assert "vsock" in {exposure.name for exposure in found.exposures}
