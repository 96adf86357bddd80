"""What is kept of a domain of libvirt while it runs, and of its last run: where its RAM lies, and what audits found.

Of root alone, below places.RECORDS. Frames are written by the broker, as the process that touched them is the one that
could tell where all of them are; who audits reads them.
"""

from __future__ import annotations

import os
import shutil
import threading
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vmmback.libvirt.places import RECORDS
from vmmback.report import IsolationReport

_OWN = 0o700


def begin(uuid: str) -> None:
    """Forget what audits of the domain found, and what is of no run. Raises OSError."""
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    RECORDS.parent.chmod(0o755)  # whatever the umask: polkit's rule looks for files there, as another user
    RECORDS.mkdir(mode=_OWN, exist_ok=True)
    _report(uuid).unlink(missing_ok=True)
    for left in list(RECORDS.glob(f"{uuid}.*.new")):  # whose writer was killed
        if left.is_dir():
            # All of it at once: of what is still being written for an earlier start no part is ever named.
            drop_frames(left.rename(new_frames(uuid)))
        else:
            left.unlink(missing_ok=True)


def new_frames(uuid: str) -> Path:
    """Return where `write_frames` can write what is of no run yet; nothing is there."""
    return RECORDS / f"{uuid}.{os.urandom(8).hex()}.frames.new"


def write_frames(folder: Path, frames: Mapping[int, int]) -> None:
    """Write where the RAM of a run will lie: by inode the pagemap entries of all pages (page_file.py). Raises OSError.

    It is of no run until it gets the pid of one: `name_frames`.
    """
    folder.mkdir(mode=_OWN)
    for inode, entries in frames.items():
        with _put(folder / str(inode)) as descriptor:
            left = size = os.fstat(entries).st_size
            while left:  # a start may wait for it, so the kernel copies
                left -= os.sendfile(descriptor, entries, size - left, left)


def name_frames(folder: Path, uuid: str, pid: int) -> None:
    """Say that what was written is of the run whose QEMU has this pid; the folder is gone. Raises OSError."""
    forget_frames(uuid, pid)
    folder.rename(_frames(uuid, pid))


def drop_frames(folder: Path) -> None:
    """Remove what is of no run, and will be of none."""
    shutil.rmtree(folder, ignore_errors=True)


def drop_unnamed() -> None:
    """Remove what is of no run of any domain: whoever wrote it was killed."""
    for folder in RECORDS.glob("*.frames.new"):
        drop_frames(folder)


def frames(uuid: str, pid: int) -> dict[int, array[int]]:
    """Return where the RAM of a run lies; nothing where that is not known."""
    found = {}
    with suppress(FileNotFoundError):
        for file in _frames(uuid, pid).iterdir():
            if file.name.isdecimal():
                found[int(file.name)] = array("Q", file.read_bytes())
    return found


def runs(uuid: str) -> list[int]:
    """Return the pids of the QEMUs of which it is written where the RAM lies, or lay."""
    return [int(folder.suffixes[-2][1:]) for folder in RECORDS.glob(f"{uuid}.*.frames")]


def forget_frames(uuid: str, pid: int) -> None:
    """Remove where the RAM of a run lay."""
    shutil.rmtree(_frames(uuid, pid), ignore_errors=True)


def write(uuid: str, report: IsolationReport) -> None:
    """Keep a report as the domain's last. Raises OSError."""
    content = memoryview(report.as_json().encode())
    with _put(_report(uuid)) as descriptor:
        while content:
            content = content[os.write(descriptor, content) :]


def read(uuid: str) -> IsolationReport | None:
    """Return the domain's last report, None where there is none yet. Raises OSError."""
    try:
        return IsolationReport.from_json(_report(uuid).read_text())
    except FileNotFoundError:
        return None


@contextmanager
def _put(file: Path) -> Iterator[int]:
    """Yield the descriptor of a new file, which takes the place of the old one once the block ends.

    Of several who do so at once, one is the last.
    """
    new = file.with_suffix(f".{threading.get_native_id()}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
    new.replace(file)


def _report(uuid: str) -> Path:
    return RECORDS / f"{uuid}.json"


def _frames(uuid: str, pid: int) -> Path:
    return RECORDS / f"{uuid}.{pid}.frames"
