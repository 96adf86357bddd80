"""What test_debian_kernel.py runs inside a machine with Debian's kernel; all on memory of this process."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 (imported late elsewhere: the machine has what is imported here)
import mmap
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from vmmback import ram
from vmmback.errors import VmmbackError
from vmmback.isolation import access
from vmmback.isolation.direct_map import DirectMapProbe
from vmmback.isolation.probe import Target
from vmmback.isolation.specimen import Specimen, specimen
from vmmback.linux import cgroups, kcore, kernel_image, namespaces, procfs
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.memfd_secret import memfd_secret
from vmmback.linux.procfs import PAGE_SIZE
from vmmback.report import Observation

KINDS: tuple[Literal["secret", "ordinary"], ...] = ("secret", "ordinary")
BYTES = 32 << 20
PAID_BYTES = 16 << 20
WITNESSED = 64
PFN_MASK = (1 << 55) - 1


def main() -> dict[str, Any]:
    """Return what the probes said of either kind of memory, and what the image's mapping shows of it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "release": os.uname().release,
        "limit": limit,
        "beyond the limit": _touched(2 * limit),
        **_prefaulted(),
        **{kind: _look(kind) for kind in KINDS},
        "cgroups": _charged(),
    }


def _prefaulted() -> dict[str, Any]:
    """Return how many frames of the image are a RAM's whose prefault does not look, and one's whose does."""
    image = kernel_image.image_range()
    assert image is not None
    counts: dict[str, float] = {}
    for name, retries in (("taken as they come", 0), ("set aside", ram._RETRIES)):
        with mock.patch.object(ram, "_RETRIES", retries), ram.SecretRam(BYTES) as memory:
            started = time.perf_counter()
            asyncio.run(memory.prefault(lambda _: None))
            counts[name] = len(kernel_image.frames_in(image, memory.frames))
            counts[f"{name}, seconds"] = round(time.perf_counter() - started, 1)
    return counts


def _charged() -> dict[str, Any]:
    """Return what the groups of version 2 tell of prefaults, with this process in one and the guest's in another."""
    top = Path("/sys/fs/cgroup")
    namespaces.mount_new("cgroup2", top, 0, "nsdelegate")
    (top / "cgroup.subtree_control").write_text("+memory")
    ours, machine, guest = top / "ours", top / "machine", top / "machine/guest"
    for folder in (ours, machine, guest):
        folder.mkdir()
    told: dict[str, Any] = {"without the controller": _refusal(lambda: cgroups.named("/machine/guest"))}
    (machine / "cgroup.subtree_control").write_text("+memory")
    told["no limit"] = cgroups.room("/machine/guest")
    (machine / "memory.max").write_text(str(3 * PAID_BYTES))
    (guest / "memory.max").write_text(str(4 * PAID_BYTES))
    with cgroups.entrance(ours) as put:
        put(os.getpid())
    told["path of ours"] = cgroups.path_of("self")
    told["path from behind a wall"] = _put_from_another_namespace(guest)
    told["group"] = {**cgroups.named("/machine/guest")._asdict(), "folder": None}
    told["with children"] = _refusal(lambda: _secret_of(machine, ours, guest))
    for name, group in (("its own", None), ("the guest's", guest)):
        told[name] = _secret_of(group, ours, guest)
    (guest / "memory.max").write_text(str(PAID_BYTES // 2))
    told["too large"] = _refusal(lambda: _secret_of(guest, ours, guest))
    return told


def _put_from_another_namespace(group: Path) -> str:
    """Put a process into a group as the thread does that starts QEMU: opened before its namespaces, written behind."""

    def put_it(pid: int) -> None:
        with cgroups.entrance(group) as put:
            namespaces.unshare(namespaces.NEWCGROUP)
            put(pid)

    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        thread = threading.Thread(target=put_it, args=(process.pid,))
        thread.start()
        thread.join()
        path = cgroups.path_of(process.pid)
        process.kill()
    return path


def _secret_of(group: Path | None, *payers: Path) -> list[int]:
    """Return for how much of a RAM that was prefaulted in `group` each payer pays; bytes that cannot be evicted."""
    with mock.patch.object(ram, "_RETRIES", 0), ram.SecretRam(PAID_BYTES) as memory:
        asyncio.run(memory.prefault(lambda _: None, group=group))
        return [int((payer / "memory.stat").read_text().split("\nunevictable ")[1].split()[0]) for payer in payers]


def _refusal(function: Callable[[], object]) -> str | None:
    try:
        function()
    except VmmbackError as error:
        return f"{error.exit_code} {error.message}"
    return None


def _touched(size: int) -> int:
    """Return how many bytes of secret memory of `size` bytes can be had while nobody has raised the limit."""
    descriptor = memfd_secret()
    touched = 0
    with open("/dev/zero", "rb", buffering=0) as zero, suppress(OSError):
        os.ftruncate(descriptor, size)
        with mmap.mmap(descriptor, size) as memory, memoryview(memory) as view:
            for start in range(0, size, PAGE_SIZE):
                with view[start : start + PAGE_SIZE] as page:
                    touched += zero.readinto(page) or 0
    os.close(descriptor)
    return touched


def _look(kind: Literal["secret", "ordinary"]) -> dict[str, Any]:
    with specimen(kind, BYTES) as memory:
        entries = procfs.pagemap("self", memory.address, memory.ram.size)
        image = kernel_image.image_range()
        assert image is not None
        within = kernel_image.frames_in(image, entries)
        with DirectMap.open() as direct_map:
            seen = [page for _, page in kernel_image.mapping(direct_map, image).read_frames(within)]
            canaries = sum(page is not None and memory.holds(page) for page in seen)
            directly = direct_map.check(within).readable
        probe = DirectMapProbe({})
        target = Target(os.getpid(), {memory.ram.inode: memory.ram.size})
        (mapping,) = access.VmaFlagsProbe().target(target)[1]
        return {
            "direct-map": _told(probe.observe(target)),
            "pages": probe.pages._asdict(),
            "vma-flags": _told(access.VmaFlagsProbe().observe(target)),
            "flags": sorted(mapping.flags),
            "in the image": len(within),
            "in the image, read directly": directly,
            "in the image, canary read through its mapping": canaries,
            "in the image, canary in kcore": sum(_in_kcore(memory, entry & PFN_MASK) for entry in within[:WITNESSED]),
        }


def _in_kcore(memory: Specimen, frame: int) -> bool:
    """Tell whether /proc/kcore shows the canary in a frame: a witness that needs no BPF, and finds the image itself."""
    with open("/proc/kcore", "rb", buffering=0) as file:
        start, size = kcore.table(os.pread(file.fileno(), kcore.HEADER_BYTES, 0))
        offsets = kcore.offsets_of(frame * PAGE_SIZE, kcore.segments(os.pread(file.fileno(), size, start)))
        return any(memory.holds(os.pread(file.fileno(), PAGE_SIZE, offset)) for offset in offsets)


def _told(seen: Observation) -> dict[str, str]:
    return {"target": seen.target, "control": seen.control, "detail": seen.detail}
