"""Disks of real guests: what they hold, what is left of it on the host, and what happens when something is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration import capabilities, residue
from integration.conftest import MIB, ROOT, Backing, LiveGuest, Start, eventually, prepared
from vmmback import config, disk_images, disks, runtime
from vmmback.config import disk as disk_config
from vmmback.errors import UsageError
from vmmback.host.qemu import find_qemu
from vmmback.linux import memory

INIT = ROOT / "integration/guest/disk-init"
DISK_BYTES = 16 * MIB


@pytest.fixture(autouse=True)
def needs(needs_qemu: None, needs_guest_kernel: None) -> None:
    capabilities.require(capabilities.QEMU_IMG)


@dataclass(frozen=True)
class Images:
    """Encrypted images and their key, made once: to derive a key takes seconds."""

    luks: Path
    qcow2: Path
    key: Path
    initrd: Path
    printed: str
    """What `vmmback disk create` printed of the first."""


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    # On a disk, not in a tmpfs: O_DIRECT is what is tested.
    with tempfile.TemporaryDirectory(prefix="vmmback-images-", dir=ROOT / "build") as name:
        luks, qcow2, key = Path(name, "a.luks"), Path(name, "a.qcow2"), Path(name, "a.key")
        create = f"-m vmmback disk create {luks} --size {DISK_BYTES >> 20}MiB --key-file {key} --new-key"
        with subprocess.Popen([sys.executable, *create.split()], cwd=ROOT, stdout=subprocess.PIPE) as command:
            disk_images.create(qcow2, DISK_BYTES, "qcow2", Path(f"{qcow2}.key"), new_key=True)
            initrd = residue.pack_initrd(Path(name), INIT)
            printed, _ = command.communicate(timeout=60)
        assert command.returncode == 0
        made = Images(luks, qcow2, key, initrd, printed.decode())
        yield made


@pytest.fixture
def folder(images: Images) -> Iterator[Path]:
    """A folder on the same disk, with fresh copies of the images."""
    with tempfile.TemporaryDirectory(prefix="vmmback-", dir=ROOT / "build") as name:
        files = (images.luks, images.qcow2, images.key, Path(f"{images.qcow2}.key"))
        subprocess.run(["cp", "--preserve=mode", "--sparse=always", *files, name], check=True)
        yield Path(name)


def raw_image(path: Path, contents: bytes = b"") -> Path:
    path.write_bytes(contents)
    os.truncate(path, DISK_BYTES)
    return path


def blocks(path: Path) -> int:
    """How many sectors of its disk a file takes."""
    return path.stat().st_blocks


def cached(path: Path, offset: int) -> int:
    """How many pages of a MiB of a file, from an offset on, are in the host's page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        return sum(memory.mincore(memory.address_of(mapped) + offset, MIB))


def pattern() -> str:
    """64 bytes that nobody else has."""
    return secrets.token_hex(32)


LUKS = '[[disk]]\npath = "a.luks"\nformat = "luks"\nkey-file = "a.key"\n'
PLAIN_QCOW2 = '[[disk]]\npath = "plain.qcow2"\nformat = "qcow2"\nplaintext = "allowed"\n'
RAW = '[[disk]]\npath = "a.raw"\nformat = "raw"\nplaintext = "allowed"\n'


def guest_file(
    folder: Path, images: Images, words: str, tables: str, boot: str | None = None, backing: Backing = "secret"
) -> Path:
    """Write the guest file of a disk guest; `words` are what its init is to do."""
    name = f"disk-{secrets.token_hex(4)}"
    kernel = (
        f'[boot]\nkernel = "{capabilities.KERNEL}"\ninitrd = "{images.initrd}"\n'
        f'cmdline = "console=ttyS0 quiet panic=-1 no_timer_check {words}"\n'
    )
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\n[memory]\nsize = "96MiB"\nbacking = "{backing}"\n[machine]\naccel = "tcg"\n'
        f'[cpu]\nmodel = "max,-erms,-fsrm"\n{kernel if boot is None else boot}'
        f'[isolation]\nready = "GUEST READY"\n{tables}'
    )
    return path


def said(live: LiveGuest, text: str) -> bool:
    """Tell whether the guest printed a text; run its event loop a little, on which the console is read."""
    live.run(_turn())
    printed = live.watcher.printed.decode(errors="replace")
    assert "GUEST FAILED" not in printed or text.startswith("GUEST FAILED"), printed
    return text in printed


async def _turn() -> None:
    await asyncio.sleep(0.01)


def boot(live: LiveGuest, text: str = "GUEST READY") -> str:
    """Let a guest run until it has printed a text; return all that it printed."""
    live.run(live.guest.monitor.cont())
    eventually(lambda: said(live, text), f"the guest says {text}", 60)
    return live.watcher.printed.decode(errors="replace")


# --- What disks hold, and what they leave -----------------------------------------------------------------------------


def test_every_kind_of_disk_is_written_and_read(folder: Path, images: Images, needs_direct_map: None) -> None:
    text = pattern()
    block = text.encode() * (MIB // 64)
    raw_image(folder / "a.raw")
    raw_image(folder / "ro.raw", block)
    raw_image(folder / "discard.raw")
    disk_images.create(folder / "plain.qcow2", DISK_BYTES, "qcow2")
    tables = (
        f'{RAW}serial = "first"\ncache = "writethrough"\n'
        f"{PLAIN_QCOW2}"
        f'{LUKS}serial = "12345678901234567890"\n'
        '[[disk]]\npath = "a.qcow2"\nformat = "qcow2"\nkey-file = "a.qcow2.key"\ncache = "directsync"\n'
        '[[disk]]\npath = "ro.raw"\nformat = "raw"\nplaintext = "allowed"\nread-only = true\n'
        '[[disk]]\npath = "discard.raw"\nformat = "raw"\nplaintext = "allowed"\ndiscard = true\n'
    )
    words = f"pattern={text} look write=vda,vdb,vdc,vdd,vdf read=vda,vdb,vdc,vdd,vde,vdf refused=vde forget=vdf idle"
    before = {name: blocks(folder / name) for name in ("a.luks", "a.qcow2")}
    with prepared(guest_file(folder, images, words, tables)) as live:
        printed = boot(live)
        sectors = DISK_BYTES // 512
        for line in (
            f"disk vda serial=first sectors={sectors} ro=0 discard=0 cache=write-through.",
            f"disk vdb serial= sectors={sectors} ro=0 discard=0 cache=write-back.",
            f"disk vdc serial=12345678901234567890 sectors={sectors} ro=0 discard=0 cache=write-back.",
            f"disk vdd serial= sectors={sectors} ro=0 discard=0 cache=write-through.",
            f"disk vde serial= sectors={sectors} ro=1 discard=0 cache=write-back.",
            "wrote vdd.",
            "read vde.",
            "refused vde.",
            "forgot vdf.",
        ):
            assert line in printed
        assert "disk vdf serial= sectors=32768 ro=0 discard=0 " not in printed

        # On the host: what is plain is there to be read; what is encrypted is not, and not in the page cache either.
        assert cached(folder / "a.raw", 0) == MIB // memory.PAGE_SIZE
        assert cached(folder / "a.luks", images.luks.stat().st_size - DISK_BYTES) == 0
        assert (folder / "a.raw").read_bytes()[:MIB] == block
        assert text.encode() in (folder / "plain.qcow2").read_bytes()
        for encrypted in ("a.luks", "a.qcow2"):
            assert blocks(folder / encrypted) >= before[encrypted] + MIB // 512
            assert text.encode() not in (folder / encrypted).read_bytes()
        assert blocks(folder / "discard.raw") == 0 < blocks(folder / "a.raw")

        # The keys are in no place that others read, where the disks' names are the control.
        words_of_qemu = Path(f"/proc/{live.pid}/cmdline").read_bytes()
        assert b"a.luks" not in words_of_qemu
        assert b'"key-secret": "disk2-key"' in words_of_qemu
        files = [path for path in live.guest.folder.rglob("*") if path.is_file()]
        assert any(b"wrote vda" in path.read_bytes() for path in files)
        for key in (images.key, folder / "a.qcow2.key"):
            secret = key.read_bytes()
            places = [words_of_qemu, Path(f"/proc/{live.pid}/environ").read_bytes(), *(f.read_bytes() for f in files)]
            assert not any(secret in place for place in places)

        report = live.run(live.guest.examine())
        assert report.verdict == "isolated", report.reasons
        exposures = [(exposure.name, exposure.detail) for exposure in report.exposures]
        disks_named = [name for name, _ in exposures if name.endswith("-disk")]
        assert disks_named == ["plaintext-disk"] * 2 + ["encrypted-disk"] * 2 + ["plaintext-disk"] * 2
        assert any("a.luks is encrypted by QEMU" in detail for _, detail in exposures)


def test_why_some_disks_are_refused(
    folder: Path, images: Images, backing: Backing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the refusals: O_DIRECT fails on secret RAM alone, and QEMU's LUKS says yes to a discard and keeps all."""
    monkeypatch.setattr(disk_config.Disk, "conflicts", lambda written, good: ())
    raw_image(folder / "a.raw")
    tables = f'{RAW}cache = "none"\n{LUKS}discard = true\n'
    words = f"pattern={pattern()} write=vdb forget=vdb again=vda"
    before = blocks(folder / "a.luks")
    with prepared(guest_file(folder, images, words, tables, backing=backing)) as live:
        failed = backing == "secret"
        printed = boot(live, "GUEST FAILED: cannot write to vda" if failed else "GUEST WROTE AGAIN")
        assert "forgot vdb." in printed
        assert blocks(folder / "a.luks") >= before + MIB // 512
        if not failed:
            assert "GUEST FAILED" not in printed


def test_an_image_in_use_is_refused_to_others_and_free_afterwards(folder: Path, images: Images) -> None:
    raw_image(folder / "a.raw")
    first = guest_file(folder, images, "", LUKS + RAW + "read-only = true\n")
    with prepared(first):
        for tables in (LUKS, f"{RAW}"):
            with pytest.raises(UsageError, match=r"disk\[0\]\.path: .* is in use"):
                prepared(guest_file(folder, images, "", tables)).__enter__()
        # One that only reads goes with another that only reads.
        with prepared(guest_file(folder, images, "", RAW + "read-only = true\n")):
            pass
        refused = subprocess.run(["qemu-img", "resize", "-f", "raw", folder / "a.luks", "1G"], capture_output=True)
        assert b"lock" in refused.stderr
    with prepared(first):  # no lock is left
        pass


def test_an_image_that_qemu_img_uses_is_refused(folder: Path, images: Images) -> None:
    raw_image(folder / "a.raw")
    io = ["qemu-io", "-f", "raw", str(folder / "a.raw")]
    with subprocess.Popen(io, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"length\n")
        other.stdin.flush()
        other.stdout.readline()  # it has opened it
        with pytest.raises(UsageError, match="is in use"):
            prepared(guest_file(folder, images, "", RAW)).__enter__()
        other.stdin.close()


def test_a_key_that_does_not_open_the_disk_is_named(folder: Path, images: Images) -> None:
    disk_images.create(folder / "plain.qcow2", DISK_BYTES, "qcow2")
    (folder / "a.key").write_text("wrong")
    for key, problem in ((b"wrong", "does not open"), (b"\xff\xfe", "is not text")):
        (folder / "a.key").write_bytes(key)
        with pytest.raises(UsageError, match=rf"disk\[1\]\.key-file: .*/a\.key {problem}"):
            prepared(guest_file(folder, images, "", PLAIN_QCOW2 + LUKS)).__enter__()


def test_the_pipe_of_a_key_can_be_opened_by_its_owner_alone(folder: Path) -> None:
    def as_user(uid: int, reader: int) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "cat", f"/proc/self/fd/{reader}"],
            pass_fds=[reader],
            capture_output=True,
        )

    reader = disks.key_pipe(folder / "a.key", (4711, 4711))
    try:
        assert b"Permission denied" in as_user(4712, reader).stderr
        assert as_user(4711, reader).stdout == (folder / "a.key").read_bytes()
    finally:
        os.close(reader)


def test_disks_need_no_path_and_no_right_of_qemus(folder: Path, images: Images) -> None:
    """Here QEMU is a user who may read none of it, without capabilities, and with the least of a /proc."""
    raw_image(folder / "a.raw").chmod(0o600)
    tables = f'{RAW}{LUKS}[[disk]]\npath = "a.qcow2"\nformat = "qcow2"\nkey-file = "a.qcow2.key"\n'
    guest = config.load(guest_file(folder, images, "", tables))
    with contextlib.ExitStack() as inherited:
        devices = disks.open_disks(guest, inherited, (4711, 4711))
        options = "-M q35 -m 16 -S -nodefaults -display none -vga none -qmp stdio"
        qemu = [str(find_qemu()), *options.split()]
        qemu += [word for device in devices for word in device.argv]
        rights = "--reuid=4711 --regid=4711 --clear-groups --bounding-set=-all --no-new-privs --pdeathsig=KILL"
        enter = 'mount -t proc -o subset=pid proc /proc && exec setpriv "$@"'
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", enter, "sh", *rights.split(), *qemu]
        ended = subprocess.run(
            argv,
            input='{"execute": "qmp_capabilities"} {"execute": "query-block"} {"execute": "quit"}',
            pass_fds=[descriptor for device in devices for descriptor in device.descriptors],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 0, ended.stderr
    assert [name for name in ("disk0", "disk1", "disk2") if f'"node-name": "{name}-image"' in ended.stdout] == [
        "disk0", "disk1", "disk2",
    ]  # fmt: skip


# --- Booting ----------------------------------------------------------------------------------------------------------


def boot_sector(text: str) -> bytes:
    """Return a boot sector that prints a text on the serial port and halts."""
    code = bytes.fromhex("31c08ed8be187cfcac84c07406baf803eeebf5f4ebfd")  # up to the text, at 0x7c18
    return (code.ljust(0x18, b"\x90") + text.encode() + b"\0").ljust(510, b"\0") + b"\x55\xaa"


def test_a_guest_without_boot_table_boots_its_encrypted_disk_in_the_order_given(folder: Path, images: Images) -> None:
    (folder / "boot.raw").write_bytes(boot_sector("GUEST READY from the encrypted disk"))
    raw_image(folder / "a.raw", boot_sector("GUEST READY from the other disk"))
    secret = f"secret,id=key,file={folder}/a.key"
    target = f"driver=luks,key-secret=key,file.filename={folder}/a.luks"
    convert = ["qemu-img", "convert", "-n", "--object", secret, "-f", "raw", f"{folder}/boot.raw"]
    subprocess.run([*convert, "--target-image-opts", target], check=True)
    for first, second, booted in ((2, 1, "encrypted"), (1, 2, "other")):
        tables = f"{RAW}boot-order = {first}\n{LUKS}boot-order = {second}\n"
        with prepared(guest_file(folder, images, "", tables, boot="")) as live:
            assert f"from the {booted} disk" in boot(live, " disk")


# --- What goes wrong while a guest runs -------------------------------------------------------------------------------


def test_a_guest_goes_on_whose_images_are_removed(folder: Path, images: Images) -> None:
    raw = raw_image(folder / "a.raw")
    with prepared(guest_file(folder, images, f"pattern={pattern()} again=vda,vdb", RAW + LUKS)) as live:
        wrote = b"GUEST WROTE AGAIN"
        boot(live, wrote.decode())
        raw.unlink()
        (folder / "a.luks").unlink()
        seen = live.watcher.printed.count(wrote)
        eventually(lambda: said(live, "") and live.watcher.printed.count(wrote) > seen + 2, "it writes again")


def query(guest: Path, command: str) -> object:
    """Send one command to a guest's qmp.sock; return what it answers."""
    with socket.socket(socket.AF_UNIX) as client, runtime.socket_address(guest / "qmp.sock") as address:
        client.settimeout(30)
        client.connect(address)
        lines = client.makefile("rw")
        for line in ("qmp_capabilities", command):
            lines.write(json.dumps({"execute": line}) + "\n")
            lines.flush()
            while "return" not in (answer := json.loads(lines.readline())):
                assert "error" not in answer
        return answer["return"]


def test_a_host_disk_that_is_full_stops_the_guest_until_there_is_space(
    folder: Path, images: Images, runtime_dir: Path, start: Start
) -> None:
    place = folder / "full"
    place.mkdir()
    tables = RAW.replace("a.raw", "full/a.raw")
    file = guest_file(folder, images, f"pattern={pattern()} fill=vda", tables)
    raw_image(place / "a.raw")  # so that the file can be checked; the one that is used is in the tmpfs
    script = (
        f"mount -t tmpfs -o size=20m tmpfs {place} && truncate -s {DISK_BYTES} {place}/a.raw && "
        f"dd if=/dev/zero of={place}/ballast bs=1M count=12 && "
        f"exec {sys.executable} -m vmmback launch {file} --no-validate"
    )
    supervisor = start("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
    supervisor.wait_for("the guest stands still")
    guest = runtime_dir / file.stem
    assert query(guest, "query-status") == {"status": "io-error", "singlestep": False, "running": False}
    inside = Path(f"/proc/{supervisor.process.pid}/root{place}")
    query(guest, "cont")  # too early: it is told again
    supervisor.wait_until(lambda: supervisor.stderr.count("stands still") == 2, "it is told again")
    (inside / "ballast").unlink()
    query(guest, "cont")
    supervisor.wait_for("filled vda.")
    assert supervisor.ended().code == 0
    assert supervisor.stderr.count("stands still") == 2
    assert (
        f"{place}/a.raw is full, and the guest stands still: free space there, then send `cont` to" in supervisor.stderr
    )


# --- vmmback disk create ----------------------------------------------------------------------------------------------


def test_what_disk_create_makes_and_prints_is_a_guests_disk(folder: Path, images: Images, vmmback: Start) -> None:
    file = guest_file(folder, images, "", images.printed)
    assert str(images.luks) in file.read_text()
    with prepared(file):
        pass
    again = vmmback("disk", "create", images.luks, "--size", "8MiB", "--key-file", images.key).ended()
    assert again.code == 2
    assert again.has_one_error()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_disk_create_that_is_stopped_leaves_nothing(folder: Path, vmmback: Start, signum: signal.Signals) -> None:
    before = sorted(folder.iterdir())
    made = vmmback("disk", "create", folder / "new.luks", "--size", "8MiB", "--key-file", folder / "n.key", "--new-key")
    tool = f"/proc/{made.process.pid}/task/{made.process.pid}/children"
    made.wait_until(lambda: _is_qemu_img(Path(tool)), "qemu-img runs")
    (child,) = Path(tool).read_text().split()
    made.signal(signum)
    ended = made.ended()
    assert ended.code == (-signum if signum == signal.SIGKILL else 128 + signum)
    if signum != signal.SIGKILL:
        assert ended.has_one_error()
        assert "before the disk was made" in ended.stderr
    eventually(lambda: not Path(f"/proc/{child}").exists(), "qemu-img is gone")
    assert sorted(folder.iterdir()) == before


def _is_qemu_img(children: Path) -> bool:
    return any(Path(f"/proc/{pid}/comm").read_text() == "qemu-img\n" for pid in children.read_text().split())


# --- What QEMU itself sees of a disk ----------------------------------------------------------------------------------


def qemu_io(live: LiveGuest, number: int, *commands: str) -> None:
    """Let QEMU read or write a guest's disk as it does for the guest."""
    for command in commands:
        device = f"/machine/peripheral/disk{number}/virtio-backend"
        assert live.run(live.guest.monitor.hmp(f'qemu-io -d {device} "{command}"')) == ""


def results(live: LiveGuest) -> list[str]:
    """End QEMU, which says only then what its reads and writes brought; return whether each was "done" or "other"."""
    residue.end(live, "quit")
    lines = (live.guest.folder / "qemu.log").read_text().splitlines()
    said = [line for line in lines if re.match(r"(read|wrote) \d+/|Pattern verification failed", line)]
    return ["other" if line.startswith("Pattern") else "done" for line in said]


def test_an_image_that_is_cut_off_reads_as_zeroes_or_noise_and_keeps_what_comes_later(
    folder: Path, images: Images
) -> None:
    raw, luks = raw_image(folder / "a.raw"), folder / "a.luks"
    with prepared(guest_file(folder, images, "", RAW + LUKS)) as live:
        for number, (image, kept) in enumerate(((raw, 4096), (luks, luks.stat().st_size - DISK_BYTES + 4096))):
            qemu_io(live, number, "write -P 7 0 8192", "read -P 7 0 8192")
            os.truncate(image, kept)
            qemu_io(live, number, "read -P 7 0 4096", "read -P 0 4096 4096")
            qemu_io(live, number, "write -P 9 8388608 4096", "read -P 9 8388608 4096")
        assert live.watcher.notes == []
        assert results(live) == ["done"] * 6 + ["done"] * 3 + ["other"] + ["done"] * 3  # of a failed one both are said


def test_a_block_device_is_a_disk_and_is_not_shared(folder: Path, images: Images) -> None:
    capabilities.require(capabilities.LOOP_DEVICE)
    raw = raw_image(folder / "a.raw")
    device = (
        subprocess.run(["losetup", "--find", "--show", raw], check=True, capture_output=True).stdout.decode().strip()
    )
    table = RAW.replace("a.raw", device)
    try:
        with prepared(guest_file(folder, images, "", table)) as live:
            with pytest.raises(UsageError, match="busy"):
                prepared(guest_file(folder, images, "", table)).__enter__()
            qemu_io(live, 0, "write -P 7 0 4096", "read -P 7 0 4096", "read -P 8 0 4096")
            assert results(live) == ["done", "done", "other", "done"]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert raw.read_bytes()[:4096] == b"\x07" * 4096
