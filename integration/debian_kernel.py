"""Runs a program of Python's inside a virtual machine with the demo guest's kernel: this machine's may be another.

The machine is emulated (TCG). Its initramfs is made for the run: the interpreter with all that a trial run of the same
imports has loaded, at the same paths, and its bytecode: to compile it takes such a machine many seconds. Python is the
machine's first process; a panic at its end stops QEMU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from integration.capabilities import KERNEL, ROOT
from vmmback.host.qemu import find_qemu

MODULES = KERNEL.parent / "modules"

_MARK = "vmmback-result "
_WORDS = "console=ttyS0 quiet panic=-1 no_timer_check"
_BOOT_S = 180.0

# What of a process's mappings and modules is a file; run in an interpreter of its own, which has nothing else loaded.
_TRIAL = """
import ctypes, importlib, json, os, sys, traceback
sys.argv = ["trial"]
exec(open({program!r}).read(), {{"__name__": "trial"}})
for module in {modules!r}:
    importlib.import_module(module)
files = {{m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)}}
files |= {{line.split()[5] for line in open("/proc/self/maps") if len(line.split()) == 6}}
print("\\n".join(files))
"""

# The first process has no file systems; what it needs of them is mounted by mount(2).
_FIRST = """
import ctypes, json, os, traceback
libc = ctypes.CDLL(None)
for kind in ("proc", "sysfs", "devtmpfs"):
    folder = {{"proc": "/proc", "sysfs": "/sys", "devtmpfs": "/dev"}}[kind]
    os.makedirs(folder, exist_ok=True)
    libc.mount(kind.encode(), folder.encode(), kind.encode(), 0, None)
try:
    scope = {{"__name__": "inside"}}
    exec(open({program!r}).read(), scope)
    result = scope["main"]()
except BaseException:
    result = {{"error": traceback.format_exc()}}
print("\\n" + {mark!r} + json.dumps(result), flush=True)
"""


def run_inside(
    program: Path,
    folder: Path,
    memory_mib: int = 1024,
    cmdline: str = "secretmem.enable=1",
    cpu: str = "max",
    modules: Iterable[str] = (),
) -> Any:
    """Run main() of the file `program` inside the machine; return what it returned, by way of JSON.

    `folder` is for the initramfs. The imports of `program` must all be at its top; it finds the kernel's `modules` in
    /modules. Fails where the machine does not come to an end in time.
    """
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    first = first_process(program, folder)
    initramfs = folder / "initramfs"
    kernel_modules = {f"/modules/{name}.ko": MODULES / f"{name}.ko" for name in modules}
    files = loaded_by(program)
    initramfs.write_bytes(_archive(files | bytecode_of(files) | {first}, kernel_modules))
    ended = subprocess.run(
        [
            find_qemu(), "-accel", "tcg", "-cpu", cpu, "-m", str(memory_mib), "-display", "none", "-no-reboot",
            "-nodefaults", "-serial", "stdio", "-kernel", KERNEL, "-initrd", initramfs,
            "-append", f"{cmdline} {_WORDS} {environment()} rdinit={python} -- -S {first}",
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_BOOT_S,
    )  # fmt: skip
    return result(ended.stdout, ended.stderr)


def environment() -> str:
    """Return what the interpreter's environment must have, as words of the kernel's command line, which makes it so."""
    return " ".join(f"{name}={value}" for name, value in _environment().items())


def first_process(program: Path, folder: Path) -> Path:
    """Write the file that the interpreter is to run as the machine's first process; `result` finds what it says."""
    first = folder / "first.py"
    first.write_text(_FIRST.format(program=str(program), mark=_MARK))
    return first


def loaded_by(program: Path, imported_late: Iterable[str] = ()) -> set[Path]:
    """Return the files that an interpreter with this program's imports has: itself, modules, libraries, their loader.

    `imported_late` are the modules that it imports elsewhere than at its top.
    """
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    trial = subprocess.run(
        [python, "-S", "-c", _TRIAL.format(program=str(program), modules=tuple(imported_late))],
        env=_environment(), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    loaded = {Path(line) for line in trial.stdout.split("\n") if line.startswith("/")}
    files = {path for path in loaded if path.is_file()} | {python, program, _loader(python)}
    # Libraries are asked for by the names of links, and /proc/PID/maps shows where these lead.
    return files | {link for file in files for link in file.parent.glob(file.name.partition(".so")[0] + ".so.*")}


def bytecode_of(files: Iterable[Path]) -> set[Path]:
    """Return the bytecode that there is of the Python files among `files`: that of all after `loaded_by`."""
    cached = {Path(importlib.util.cache_from_source(str(file))) for file in files if file.suffix == ".py"}
    return {file for file in cached if file.exists()}


def result(output: str, errors: str) -> Any:
    """Return what main() returned, out of what the machine printed. Fails where that is not there, or is an error."""
    _, mark, rest = output.partition(_MARK)
    assert mark, f"{output[-3000:]}\n{errors[-1000:]}"
    returned = json.loads(rest.splitlines()[0])
    assert not (isinstance(returned, dict) and "error" in returned), returned["error"]
    return returned


def _environment() -> dict[str, str]:
    import msgspec

    return {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": f"{ROOT}:{Path(msgspec.__file__).parents[1]}"}


def _loader(program: Path) -> Path:
    """Return the dynamic loader that a program names: /proc/PID/maps shows where its link leads."""
    with program.open("rb") as file:
        found = re.search(rb"/lib\w*/ld-[\w.-]+", file.read(1 << 16))
    assert found, f"{program} names no dynamic loader"
    return Path(os.fsdecode(found[0]))


def _archive(files: Iterable[Path], others: Mapping[str, Path]) -> bytes:
    """Return files and the folders above them as a cpio archive (Documentation/driver-api/early-userspace).

    A file that is reached by a link is put at both places; `others` are put at another one than here.
    """
    every = {str(path): path for file in files for path in (file, file.resolve())} | dict(others)
    folders = {parent for path in every for parent in Path(path).parents}
    return cpio(
        {path: file.read_bytes() for path, file in sorted(every.items())},
        [str(folder) for folder in sorted(folders) if str(folder) != "/"],
        {path: int(file.stat().st_mtime) for path, file in every.items()},
    )


def cpio(files: Mapping[str, bytes], folders: Iterable[str] = (), times: Mapping[str, int] | None = None) -> bytes:
    """Return folders, and programs with their contents, as a cpio archive.

    `times` are when files were changed, in seconds since 1970: bytecode names that of its source.
    """
    parts = [_entry(folder, 0o040755, b"") for folder in folders]
    parts += [_entry(path, 0o100755, data, (times or {}).get(path, 0)) for path, data in files.items()]
    return b"".join([*parts, _entry("TRAILER!!!", 0, b"")])


def _entry(path: str, mode: int, data: bytes, time: int = 0) -> bytes:
    name = path.lstrip("/").encode() + b"\0"
    fields = (0, mode, 0, 0, 1, time, len(data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
