"""[[disk]]: the images that a guest has as virtio-blk disks, and which of them cannot work on secret RAM.

docs/REFUSALS.md lists what is refused, with the reasons; integration/test_disks.py measures them.
"""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from vmmback.config.values import given_path, matching
from vmmback.toml_errors import Problem, ascii_path, open_regular, why
from vmmback.toml_tables import Checked, Parsed, Table

MAX_DISKS = 16  # each takes one of the 30 slots of q35's PCI bus that are free, and others want some, too
MAX_KEY_BYTES = 4096  # far above any key; it is passed through a pipe, which holds 64 KiB (pipe(7))
HEADER_BYTES = 104  # of qcow2 version 3 (docs/interop/qcow2.txt), the longer one

_SERIAL_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.-]{0,19}"  # VIRTIO_BLK_ID_BYTES is 20 (virtio specification, 5.2.6)
_QCOW2_MAGIC, _LUKS_MAGIC = b"QFI\xfb", b"LUKS\xba\xbe"
_QCOW2_DATA_FILE = 1 << 2  # a bit of the incompatible features

_BOUNCED = "which the kernel refuses on secret RAM (EFAULT): without encryption QEMU reads right into the guest's RAM"


def _image(value: object, folder: Path | None) -> Path:
    """Return the path of a disk image, or of a block device, that is there."""
    path = given_path(value, folder)
    if folder is None:
        return path
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        advice = "`vmmback disk create` makes an image; a path is absolute or from the guest file's folder"
        raise ValueError(f"{ascii_path(path)}: {why(error)}; {advice}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        what = "is a folder" if stat.S_ISDIR(mode) else "is neither a regular file nor a block device"
        raise ValueError(f"{ascii_path(path)}: {what}; write the path of a disk image or of a block device")
    return path


def _key_file(value: object, folder: Path | None) -> Path:
    """Return the path of a key: looked at, but not read, as its contents must not get into our memory."""
    path = given_path(value, folder)
    if folder is None:
        return path
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
    except (OSError, ValueError) as error:
        advice = "write the path of a file with the key, or make one: `vmmback disk create --new-key`"
        raise ValueError(f"{ascii_path(path)}: {why(error)}; {advice}") from error
    if problem := key_problem(status):
        raise ValueError(f"{ascii_path(path)}: {problem}")
    return path


def key_problem(status: os.stat_result) -> str:
    """Return what is wrong with a key file and what to do, "" if nothing is."""
    if status.st_mode & 0o077:
        return f"others may use it (mode {stat.S_IMODE(status.st_mode):04o}), and it opens the disk; chmod 600 it"
    if not status.st_size:
        return "is empty; put the key into it"
    if status.st_size > MAX_KEY_BYTES:
        return f"is larger than {MAX_KEY_BYTES} bytes; is it a key file?"
    return ""


Image = Annotated[Path, Parsed(_image, type="string", minLength=1)]
KeyFile = Annotated[Path, Parsed(_key_file, type="string", minLength=1)]
Serial = Annotated[
    str,
    Checked(
        matching(_SERIAL_PATTERN, 'a serial number; write 1 to 20 of a-z, A-Z, 0-9, "_", "." and "-", no sign first'),
        pattern=f"^{_SERIAL_PATTERN}$",
    ),
]


class Disk(Table, frozen=True):
    """A virtio-blk disk. With a key-file it is encrypted by QEMU; without, the host holds what the guest writes."""

    path: Annotated[
        Image,
        Meta(
            description="The image or block device: absolute, or relative to the guest file's folder.",
            examples=["root.luks"],
        ),
    ]
    format: Annotated[
        Literal["raw", "qcow2", "luks"],
        Meta(
            description="What the image is: luks is encrypted, raw is not, qcow2 is LUKS inside if it has a key-file.",
            examples=["luks"],
        ),
    ]
    key_file: Annotated[
        KeyFile | None,
        Meta(
            description="The file with the key of an encrypted image: 1 to 4096 bytes of text, used as they are, "
            "that nobody but its owner may use (mode 0600).",
            examples=["root.key"],
        ),
    ] = None
    cache: Annotated[
        Literal["none", "directsync", "writeback", "writethrough"] | None,
        Meta(
            description="Whether the host's page cache is used (writeback, writethrough), and whether each write is "
            "flushed (directsync, writethrough). Without it, none for an encrypted disk and writeback for another.",
            examples=["none"],
        ),
    ] = None
    plaintext: Annotated[
        Literal["refused", "allowed"],
        Meta(
            description="allowed lets a disk be unencrypted: what the guest writes is then in the host's page cache, "
            "and on the host's disk."
        ),
    ] = "refused"
    read_only: Annotated[bool, Meta(description="Whether the guest may not write to it.")] = False
    serial: Annotated[
        Serial | None,
        Meta(description="The disk's serial number in the guest, at most 20 characters.", examples=["root"]),
    ] = None
    boot_order: Annotated[
        int | None,
        Meta(
            ge=1,
            le=1000,
            description="The disk's place among those that a firmware tries to boot, from 1 on.",
            examples=[1],
        ),
    ] = None
    discard: Annotated[
        bool,
        Meta(
            description="Whether blocks that the guest discards are freed on the host, which then knows which ones "
            "are free. QEMU's LUKS passes none on: only raw and qcow2 images can."
        ),
    ] = False

    @property
    def encrypted(self) -> bool:
        """Tell whether QEMU encrypts what the guest writes."""
        return self.key_file is not None

    @property
    def direct(self) -> bool:
        """Tell whether the image is opened with O_DIRECT, past the page cache."""
        return (self.cache or ("none" if self.encrypted else "writeback")) in ("none", "directsync")

    @property
    def flushes(self) -> bool:
        """Tell whether each write is flushed before it is done."""
        return self.cache in ("directsync", "writethrough")

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        """Tell which keys do not go together, or would leave the guest's data on the host."""
        kind, cache, encrypted = written.get("format"), written.get("cache"), "key-file" in written
        if kind == "luks" and not encrypted:
            yield ("key-file",), 'is missing, and LUKS needs a key; write key-file = "root.key"'
        elif kind == "raw" and encrypted:
            yield ("key-file",), 'does not go with format = "raw", which is not encrypted; write format = "luks"'
        elif encrypted and "plaintext" in written:
            yield ("plaintext",), "does not go with key-file: the disk is encrypted; remove one of the two"
        if kind in ("raw", "qcow2") and not encrypted:
            if cache in ("none", "directsync"):
                yield (
                    ("cache",),
                    f"{cache} opens the image with O_DIRECT, {_BOUNCED}; "
                    'write cache = "writeback", or encrypt the disk',
                )
            if written.get("plaintext", "refused") == "refused":
                yield (
                    ("plaintext",),
                    "the disk is not encrypted, so that the host's page cache and disk would hold what the guest "
                    'writes; encrypt it (format = "luks", key-file), or write plaintext = "allowed"',
                )
        if written.get("discard") is True and kind == "luks":
            yield ("discard",), 'does not go with format = "luks": QEMU\'s LUKS passes no discards on; remove it'
        elif written.get("discard") is True and written.get("read-only") is True:
            yield ("discard",), "does not go with read-only; remove one of the two"

    def problems(self, folder: Path | None) -> Iterator[Problem]:
        """Tell in what the image's header contradicts the keys."""
        if folder is None:
            return
        try:
            problem = header_problem(read_header(self.path), self.format, encrypted=self.encrypted)
        except OSError as error:
            problem = f"{why(error)}; write the path of an image that you may read"
        if problem:
            yield ("path",), f"{ascii_path(self.path)}: {problem}"


def read_header(image: Path | int) -> bytes:
    """Return the first bytes of an image, given by its path or an open descriptor. Raises OSError."""
    # By way of /proc a descriptor is opened anew: one with O_DIRECT reads whole sectors only.
    with open(f"/proc/self/fd/{image}" if isinstance(image, int) else image, "rb", buffering=0) as file:
        return file.read(HEADER_BYTES) or b""


def header_problem(header: bytes, kind: str, *, encrypted: bool) -> str:
    """Return in what an image's header contradicts its format, and what to do; "" if it does not."""
    is_luks, is_qcow2 = header.startswith(_LUKS_MAGIC), header.startswith(_QCOW2_MAGIC)
    if kind == "raw":
        if is_luks:
            return 'is LUKS, not raw; write format = "luks" and its key-file'
        return 'is qcow2, not raw; write format = "qcow2"' if is_qcow2 else ""
    if kind == "luks":
        return _luks_problem(header) if is_luks else "is not LUKS; `vmmback disk create` makes such an image"
    return _qcow2_problem(header, encrypted=encrypted) if is_qcow2 else "is not qcow2; write what it is as format"


def _luks_problem(header: bytes) -> str:
    version = int.from_bytes(header[6:8], "big")
    if version != 1:  # crypto/block-luks.c, qcrypto_block_luks_check_header
        return f"is LUKS{version}, and QEMU knows LUKS1 only; docs/DISKS.md says how to convert it"
    return ""


def _qcow2_problem(header: bytes, *, encrypted: bool) -> str:
    """Judge the fields of docs/interop/qcow2.txt."""
    version, backing_file = int.from_bytes(header[4:8], "big"), int.from_bytes(header[8:16], "big")
    method = int.from_bytes(header[32:36], "big")
    features = int.from_bytes(header[72:80], "big") if version >= 3 else 0
    if backing_file:
        return "has a backing file, which QEMU cannot reach; make one image of both: qemu-img convert"
    if features & _QCOW2_DATA_FILE:
        return "has an external data file, which QEMU cannot reach; make one image of both: qemu-img convert"
    if method == 1:
        return "is encrypted by qcow2's old AES, which is broken; convert it to LUKS (docs/DISKS.md)"
    if encrypted and not method:
        return "is not encrypted, but has a key-file; remove that, or encrypt the image (docs/DISKS.md)"
    if method and not encrypted:
        return "is encrypted; write its key-file"
    return ""


def identity(path: Path) -> tuple[int, ...]:
    """Return what two paths of one file, or of one block device, have in common. Raises OSError."""
    status = path.stat()
    return (status.st_rdev,) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def disk_conflicts(
    disks: Sequence[Disk], others: Mapping[str, Path | None], *, kernel: bool, look: bool
) -> Iterator[Problem]:
    """Compare a guest's disks with each other and with its other files, by key; `look` says whether at files, too."""
    if len(disks) > MAX_DISKS:
        yield ("disk",), f"there are {len(disks)} disks; {MAX_DISKS} is the most that a guest can have"
    places: dict[int, int] = {}
    for number, disk in enumerate(disks):
        if disk.boot_order is None:
            continue
        where = ("disk", number, "boot-order")
        if kernel:
            yield where, "does not go with [boot] kernel, which QEMU loads by itself; remove one of the two"
        elif (first := places.setdefault(disk.boot_order, number)) != number:
            yield where, f"{disk.boot_order} is that of disk[{first}] already; write another number"
    if look:
        yield from _shared_files(disks, others)


def _shared_files(disks: Sequence[Disk], others: Mapping[str, Path | None]) -> Iterator[Problem]:
    taken = {identity(path): key for key, path in others.items() if path and path.exists()}
    images: dict[tuple[int, ...], int] = {}
    for number, disk in enumerate(disks):
        where, this = ("disk", number, "path"), identity(disk.path)
        first = images.setdefault(this, number)
        if this in taken:
            yield where, f"{ascii_path(disk.path)}: is {taken[this]} as well; write another path"
        elif first != number and not (disk.read_only and disks[first].read_only):
            yield (
                where,
                f"{ascii_path(disk.path)}: is the image of disk[{first}] as well, and one of them may write to it; "
                "write another path, or make both read-only",
            )
