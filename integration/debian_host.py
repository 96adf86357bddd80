"""A virtual machine that is itself a host of guests: Debian's kernel, a file system on a disk, and QEMU on it.

The machine is emulated (TCG). Its first process is Python, as in debian_kernel.py, but its files lie on a disk, as a
host's do: what is read of them is page cache that can be moved, and what an initramfs holds would stay where it is. It
has one processor: secret pages are taken out of the direct map one by one, and each time all processors must be told,
which takes an emulated machine of two ten times as long.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import vmmback
from integration.capabilities import KERNEL, ROOT
from integration.debian_kernel import bytecode_of, cpio, environment, first_process, loaded_by, result
from vmmback.host.qemu import find_qemu

# What vmmback starts: QEMU and what puts it into its jail, and the keeper of a guest's folder.
_PROGRAMS = ("setpriv", "prlimit", "sh", "ls", "chmod", "rm", "find", "dd", "stat")
# What QEMU opens by name: TCG is a module of Debian's, beside its libraries.
_QEMU_MODULES = "qemu/accel-tcg-x86_64.so"
_FIRMWARE = ("/usr/share/qemu/kvmvapic.bin", "/usr/share/qemu/linuxboot_dma.bin", "/usr/share/seabios/bios-256k.bin")
_FOLDERS = ("proc", "sys", "dev", "run", "tmp", "etc", "root")
_DISK_BYTES = 2 << 30  # sparse
_MODULES = "virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk"

# What vmmback imports where it needs it, beside its own modules.
_IMPORTED_LATE = ("rich.console", "rich.table", "rich.text")

_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /dev /root
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in {modules}; do /bin/busybox insmod /$module.ko; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox umount /dev
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec /bin/busybox switch_root /root {python} -S {first}
"""


def run_on_host(program: Path, folder: Path, *, memory: str, cmdline: str, timeout_s: float) -> Any:
    """Run main() of the file `program` on such a host; return what it returned, by way of JSON.

    `folder` is for the disk, and for what the machine prints (serial.log). Fails where it does not end in time.
    """
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    first = first_process(program, folder)
    disk, initramfs, log = folder / "disk.ext4", folder / "initramfs", folder / "serial.log"
    _make_disk({first, *_python_files(program), *_program_files()}, folder / "tree", disk)
    busybox = shutil.which("busybox")
    assert busybox
    modules = {f"/{name}.ko": KERNEL.parent / "modules" / f"{name}.ko" for name in _MODULES.split()}
    contents = {"/bin/busybox": Path(busybox), **{place: file for place, file in modules.items() if file.exists()}}
    init = _INIT.format(modules=_MODULES, python=python, first=first)
    initramfs.write_bytes(
        cpio({"/init": init.encode(), **{place: file.read_bytes() for place, file in contents.items()}}, ["/bin"])
    )
    with log.open("wb") as output:
        ended = subprocess.run(
            [
                find_qemu(), "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", memory, "-display", "none",
                "-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel", KERNEL, "-initrd", initramfs,
                "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe",
                "-append", f"{cmdline} log_buf_len=4M console=ttyS0 quiet panic=-1 no_timer_check {environment()}",
            ],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, check=False, timeout=timeout_s,
        )  # fmt: skip
    return result(log.read_text(errors="replace"), ended.stderr.decode(errors="replace"))


def _python_files(program: Path) -> set[Path]:
    """Return the files of the interpreter, of `program` and of all of vmmback, with their bytecode."""
    names = [module.name for module in pkgutil.walk_packages(vmmback.__path__, "vmmback.")]
    names = [name for name in names if not name.endswith("__main__")]
    files = loaded_by(program, [*names, *_IMPORTED_LATE])
    files |= set((ROOT / "vmmback").rglob("*.py"))
    return files | bytecode_of(files)


def _program_files() -> set[Path]:
    """Return the programs that vmmback starts, with their libraries and firmware, by the names that they ask for."""
    programs = [find_qemu(), *(Path(found) for name in _PROGRAMS if (found := shutil.which(name)))]
    assert len(programs) == len(_PROGRAMS) + 1
    plugins = list(Path("/usr/lib").glob(f"*/{_QEMU_MODULES}"))
    linked = subprocess.run(["ldd", *programs, *plugins], capture_output=True, text=True, check=True, timeout=60).stdout
    libraries = {Path(path) for path in re.findall(r"(/\S+) \(0x", linked)}
    return {*programs, *plugins, *libraries, *(file for name in _FIRMWARE if (file := Path(name)).exists())}


def _make_disk(files: Iterable[Path], tree: Path, disk: Path) -> None:
    """Put files at their own paths into a file system; what leads to a file by a link is the file there."""
    for name in _FOLDERS:
        (tree / name).mkdir(parents=True)
    for folder in ("bin", "sbin", "lib", "lib64"):
        if Path("/", folder).is_symlink():
            (tree / folder).symlink_to(Path("/", folder).readlink())
    for file in files:
        for path in {file, file.resolve()}:
            place = tree / os.path.realpath(path.parent).lstrip("/") / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                shutil.copy2(file, place)
    _run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(disk), f"{_DISK_BYTES >> 10}k"]
    )
    shutil.rmtree(tree)


def _run(argv: Sequence[str]) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=120)
