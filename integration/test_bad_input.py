"""What a user can do wrong, and what a host can lack: the right exit code, one clear message, and nothing left."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from integration.capabilities import KERNEL
from integration.conftest import ROOT, Ended, Start, guest_file, processes_of, qemu_of
from integration.leftovers import RESETS, Family, environment, named_sockets, stand_in
from vmmback.host.qemu import find_qemu
from vmmback.linux import kvm, procfs

USAGE, UNFIT, REFUSED, QEMU_FAILED = 2, 3, 4, 6
NOBODY = 65534
DEADLINE_S = 60

# A note of a launch that went on for a while before it failed.
_NOTE = re.compile(r"vmmback: \d+ MiB of RAM are prefaulted\n")


class Scene:
    """A folder with a guest file that is right in everything, and the command run on it."""

    def __init__(self, folder: Path, runtime_dir: Path, family: Family) -> None:
        self.folder = folder
        self.runtime_dir = runtime_dir
        self.file = folder / "guest.toml"
        self.command: list[str] = [sys.executable, "-m", "vmmback"]
        self.options: list[str | bytes] = ["--json"]
        self.environment: dict[str, str | None] = {"TMPDIR": str(folder / "tmp")}
        self._family = family
        self._shown: list[str] = []  # statements that show QEMU more of the host than its jail does
        (folder / "tmp").mkdir()
        (folder / "boots.rom").write_bytes(RESETS)
        self.write('firmware = "boots.rom"')

    def write(self, boot: str, *, head: str = "", memory: str = 'size = "16MiB"', more: str = "") -> None:
        """Write the guest file anew: line 2 is [memory], line 5 what follows [boot]."""
        name = 'name = "bad-input"'
        accel = '[machine]\naccel = "tcg"'
        machine = "" if "[machine]" in more else accel
        self.file.write_text(f"{head or name}\n[memory]\n{memory}\n[boot]\n{boot}\n{machine}\n{more}\n")

    def run(self, **streams: Any) -> Ended:
        """Run it to its end. After that, nothing may be left of it but what was there before."""
        before = files_below(self.folder)
        with subprocess.Popen(
            [*self.command, "launch", str(self.file), *self.options],
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "env": environment(self.environment),
                "cwd": ROOT,
                "start_new_session": True,
                **streams,
            },
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=DEADLINE_S)
            finally:
                process.kill()
        assert self._family.survivors() == {}
        assert processes_of(self.runtime_dir) == {}
        assert named_sockets(self.runtime_dir) == []
        assert files_below(self.folder) == before
        return Ended(process.returncode, (stdout or b"").decode(), (stderr or b"").decode(errors="replace"))

    def refused(self, code: int, *patterns: str, **streams: Any) -> Ended:
        """Run it; it must end with `code` and one error that matches all patterns."""
        ended = self.run(**streams)
        assert_one_error(ended, code, *patterns)
        return ended

    def ran(self) -> Any:
        """Run it; it must work. Return the report."""
        ended = self.run()
        assert ended.code == 0, ended.stderr
        return json.loads(ended.stdout)

    def shell(self, script: str) -> None:
        """Let a shell run `script` before it becomes the command."""
        self.command = ["sh", "-c", f'{script}; exec "$@"', "sh", *self.command]

    def patched(self, *statements: str) -> None:
        """Let the command run after these statements, for what cannot be brought about from outside."""
        program = "\n".join(
            [
                "from pathlib import Path",
                "from vmmback import cli, handoff, jail, launch",
                *self._shown,
                *statements,
                "cli.main()",
            ]
        )
        self.command = [sys.executable, "-c", program]

    def unprivileged(self, *statements: str) -> None:
        """Run as another uid without capabilities, after these statements.

        All is imported as root: the interpreter may lie where others cannot read (in /root, for one).
        """
        self.patched(
            "import importlib, os, pkgutil, resource, vmmback",
            "from vmmback.isolation import residue",
            "import asyncio.subprocess, concurrent.futures.thread, encodings.idna, qemu.qmp",
            *statements,
            "os.setgroups([])",
            f"os.setresgid({NOBODY}, {NOBODY}, {NOBODY})",
            f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})",
        )

    def qemu(self, body: str) -> None:
        """Put a program in QEMU's place."""
        python = Path(sys.executable).resolve()
        folder = stand_in(self.folder / "programs", str(python), body)
        self.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
        self._shown = [f"jail._FOLDERS = (*jail._FOLDERS, Path({sys.base_prefix!r}))"]  # the interpreter is not in /usr
        self.patched()


def files_below(folder: Path) -> set[str]:
    """Return the files below a folder, without folders (that of a run stays for the next one) and without logs."""
    return {str(path) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() if path.suffix != ".log"}


def assert_one_error(ended: Ended, code: int, *patterns: str) -> None:
    assert ended.code == code, (ended.code, ended.stderr)
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    message, hint = parts(ended.stderr)
    assert "\nvmmback:" not in message + hint, ended.stderr
    assert hint.strip()
    assert (message + hint).replace("\n", "").isprintable()
    for pattern in patterns:
        assert re.search(pattern, message), (pattern, message)


def parts(stderr: str) -> tuple[str, str]:
    """Return the message and the hint; but for the notes before them they must be all that was written."""
    found = re.fullmatch(r"vmmback: error: (.+)\nvmmback: hint: (.+)\n", _NOTE.sub("", stderr), re.DOTALL)
    assert found, stderr
    return found[1], found[2]


@pytest.fixture
def scene(tmp_path: Path, runtime_dir: Path) -> Iterator[Scene]:
    with Family() as family:
        yield Scene(tmp_path, runtime_dir, family)


needs_qemu = pytest.mark.usefixtures("needs_qemu")


@needs_qemu
def test_the_scene_is_right_but_for_what_a_test_does_to_it(scene: Scene) -> None:
    """The control of all tests below."""
    scene.options.append("--no-validate")
    report = scene.ran()
    assert report["memory"]["secret"] == report["memory"]["size"] == 16 << 20


# --- The guest file as a file -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """What stands in the guest file's place."""

    make: Callable[[Path], object]
    says: str


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Remove what is there before `make` makes something else."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


FILES = {
    "missing": File(Path.unlink, r"^\S+/guest\.toml: no such file or directory$"),
    "folder": File(instead(Path.mkdir), r"^\S+/guest\.toml: is a folder, not a file$"),
    "fifo": File(instead(os.mkfifo), r"^\S+/guest\.toml: is not a regular file$"),
    "link-to-nothing": File(instead(lambda path: path.symlink_to("gone")), r": no such file or directory$"),
    "link-to-itself": File(instead(lambda path: path.symlink_to(path)), r": too many levels of symbolic links$"),
    "link-to-a-device": File(instead(lambda path: path.symlink_to("/dev/zero")), r": is not a regular file$"),
    "empty": File(lambda path: path.write_bytes(b""), r": is empty$"),
    "only-a-comment": File(lambda path: path.write_bytes(b"# guest\n"), r": is empty$"),
    "huge": File(lambda path: os.truncate(path, 1 << 30), r": is larger than 1 MiB$"),
    "binary": File(lambda path: path.write_bytes(b"\x7fELF\n\0\0"), r"/guest\.toml:2: has a NUL byte$"),
    "not-utf-8": File(lambda path: path.write_bytes(b'\nname = "\xff"\n'), r"/guest\.toml:2: is not UTF-8 text$"),
    "bom": File(lambda path: path.write_bytes(b"\xef\xbb\xbfname = 1"), r": starts with a byte order mark \(BOM\)$"),
    "not-toml": File(lambda path: path.write_text("name = demo\n"), r"/guest\.toml:1:8: not TOML: Invalid value; "),
    "yaml": File(lambda path: path.write_text("name: demo\n"), r"/guest\.toml:1:5: not TOML: Expected '=' after a key"),
    "torn-off": File(lambda path: path.write_text('name = "de'), r"not TOML.*: Unterminated string"),
    "nested": File(lambda path: path.write_text("a = " + "[" * 5000), r": is nested too deeply$"),
    "control-characters": File(lambda path: path.write_text('"\\u001b[31m" = 1\n'), r'unknown key "\\u001b\[31m"'),
}


@pytest.mark.parametrize("kind", FILES)
def test_guest_file(scene: Scene, kind: str) -> None:
    FILES[kind].make(scene.file)
    scene.refused(USAGE, FILES[kind].says)


def test_guest_file_whose_name_is_not_utf_8(scene: Scene) -> None:
    scene.file = scene.folder / os.fsdecode(b"\xff\n.toml")
    scene.refused(USAGE, r"\\udcff\\n\.toml: no such file or directory$")


@pytest.mark.parametrize(
    "arguments", [["launch"], ["launch", "a.toml", "b.toml"], ["launch", "--josn", "a.toml"], ["lunch", "a.toml"], []]
)
def test_command_line(arguments: list[str]) -> None:
    """In click's words, with the usage."""
    result = subprocess.run(
        [sys.executable, "-m", "vmmback", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == USAGE
    assert result.stdout == ""
    assert "Usage: vmmback" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\nError: ") == (1 if arguments else 0)


# --- What it says -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """A guest file that is wrong: what it has instead of what is right, and what must be said."""

    says: str
    boot: str = 'firmware = "boots.rom"'
    rest: Mapping[str, str] = field(default_factory=dict)


WRONG = {
    "unknown-key": Wrong(
        r':4: memory\.prefualt: unknown key "prefualt"; did you mean "prefault"\?$',
        rest={"memory": 'size = "16MiB"\nprefualt = true'},
    ),
    "key-of-another-table": Wrong(
        r':4: memory\.kernel: unknown key "kernel" here; "kernel" belongs under \[boot\]$',
        rest={"memory": 'size = "16MiB"\nkernel = "vmlinuz"'},
    ),
    "unknown-table": Wrong(
        r":8: memroy: unknown table \[memroy\]; did you mean \[memory\]\?$", rest={"more": "[memroy]"}
    ),
    "wrong-type": Wrong(r":3: memory\.size: 256 is an integer; write a size in quotes", rest={"memory": "size = 256"}),
    "text-for-a-boolean": Wrong(
        r':4: memory\.prefault: "yes" is a string; write a boolean without quotes: true or false$',
        rest={"memory": 'size = "16MiB"\nprefault = "yes"'},
    ),
    "size-missing": Wrong(r':2: memory\.size: missing; write size = "256MiB"$', rest={"memory": ""}),
    "size-bad": Wrong(r':3: memory\.size: "a lot" is not a size; ', rest={"memory": 'size = "a lot"'}),
    "size-without-unit": Wrong(r':3: memory\.size: "16" is not a size; ', rest={"memory": 'size = "16"'}),
    "size-zero": Wrong(r':3: memory\.size: "0MiB" is out of range', rest={"memory": 'size = "0MiB"'}),
    "size-negative": Wrong(r':3: memory\.size: "-1MiB" is not a size', rest={"memory": 'size = "-1MiB"'}),
    "size-of-no-whole-page": Wrong(
        r':3: memory\.size: "16385KiB" is not a multiple of 8KiB', rest={"memory": 'size = "16385KiB"'}
    ),
    "name-missing": Wrong(r': name: missing; write name = "demo"$', rest={"head": "# no name"}),
    "name-bad": Wrong(r':1: name: "\.\./etc" is not a guest name; ', rest={"head": 'name = "../etc"'}),
    "name-with-a-comma": Wrong(r':1: name: "a,b" is not a guest name; ', rest={"head": 'name = "a,b"'}),
    "cpu-count": Wrong(r":9: cpu\.count: 0 is too small; write 1 or more$", rest={"more": "[cpu]\ncount = 0"}),
    "accel": Wrong(
        r':8: machine\.accel: is "xen"; write "auto", "tcg" or "kvm"$', rest={"more": '[machine]\naccel = "xen"'}
    ),
    "kernel-missing": Wrong(r":5: boot\.kernel: \S+/gone: no such file or directory; ", boot='kernel = "gone"'),
    "kernel-is-a-folder": Wrong(r":5: boot\.kernel: \S+/tmp: is a folder, not a file; ", boot='kernel = "tmp"'),
    "kernel-is-a-device": Wrong(r":5: boot\.kernel: /dev/zero: is not a regular file; ", boot='kernel = "/dev/zero"'),
    "initrd-missing": Wrong(
        r":6: boot\.initrd: \S+/gone: no such file or directory; ", boot='kernel = "boots.rom"\ninitrd = "gone"'
    ),
    "kernel-and-firmware": Wrong(
        r":6: boot\.firmware: does not go with kernel; ", boot='kernel = "boots.rom"\nfirmware = "boots.rom"'
    ),
    "neither-kernel-nor-firmware": Wrong(r":4: boot: has neither kernel nor firmware; ", boot=""),
    "initrd-without-kernel": Wrong(
        r":6: boot\.initrd: goes with a kernel, not with firmware; ",
        boot='firmware = "boots.rom"\ninitrd = "boots.rom"',
    ),
    "cmdline-of-two-lines": Wrong(
        r":6: boot\.cmdline: .* not printable; ", boot='kernel = "boots.rom"\ncmdline = "a\\nb"'
    ),
    "log-in-a-missing-folder": Wrong(
        r":9: console\.log: \S+/gone/log: its folder does not exist; ", rest={"more": '[console]\nlog = "gone/log"'}
    ),
    "log-is-a-folder": Wrong(r":9: console\.log: \S+/tmp: is a folder; ", rest={"more": '[console]\nlog = "tmp"'}),
    "ready-blank": Wrong(r":9: isolation\.ready: is blank", rest={"more": '[isolation]\nready = " "'}),
    "ready-timeout-zero": Wrong(
        r':9: isolation\.ready-timeout: "0s" is out of range', rest={"more": '[isolation]\nready-timeout = "0s"'}
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_guest_file_says(scene: Scene, kind: str) -> None:
    wrong = WRONG[kind]
    scene.write(wrong.boot, **wrong.rest)
    scene.refused(USAGE, rf"^{re.escape(str(scene.file))}{wrong.says}")


def test_all_errors_of_a_file_are_one_message(scene: Scene) -> None:
    scene.write(
        'kernel = "gone"', head="nmae = 1", memory='size = "3KiB"\nbacking = "magic"', more="[cpu]\ncount = 1000"
    )
    message, _ = parts(scene.refused(USAGE).stderr)
    places = [
        re.fullmatch(rf"{re.escape(str(scene.file))}(?::(\d+))?: (\S+): .+", line) for line in message.split("\n")
    ]
    assert all(places), message
    assert [place[2] for place in places if place] == [
        "nmae", "memory.size", "memory.backing", "boot.kernel", "cpu.count", "name"
    ]  # fmt: skip
    assert [place[1] for place in places if place] == ["1", "3", "4", "6", "10", None]


# --- What the host lacks ----------------------------------------------------------------------------------------------


def test_more_memory_than_there_is(scene: Scene) -> None:
    scene.write('firmware = "boots.rom"', memory='size = "16TiB"')
    scene.refused(REFUSED, r"^16777216 MiB of secret RAM do not fit: \d+ MiB do\. Of [\d,]+ MiB that are free ")


def test_qemu_is_missing(scene: Scene) -> None:
    scene.environment["PATH"] = str(scene.folder)
    ended = scene.refused(UNFIT, rf"^{find_qemu().name} was not found on PATH$")
    assert "apt-get install qemu-system-" in ended.stderr


@needs_qemu
def test_setpriv_is_missing(scene: Scene) -> None:
    scene.patched("handoff._ENVIRONMENT = {'PATH': '/no/such/folder'}")
    ended = scene.refused(UNFIT, "setpriv")
    assert "util-linux" in ended.stderr


@needs_qemu
def test_kvm_where_it_cannot_map_secret_ram(scene: Scene) -> None:
    answer = kvm.can_map_secret_ram()
    if answer.usable:
        pytest.skip(f"needs a host where KVM cannot map secret RAM: {answer.reason}")
    scene.write('firmware = "boots.rom"', more='[machine]\naccel = "kvm"')
    ended = scene.refused(UNFIT, f"^{re.escape(answer.reason)}$")
    assert 'set [machine] accel to "tcg"' in ended.stderr


@pytest.fixture
def open_scene(runtime_dir: Path) -> Iterator[Scene]:
    """A scene in a folder that other uids may read and write; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="vmmback-") as folder, Family() as family:
        scene = Scene(Path(folder), Path(folder) / "run", family)
        scene.environment["VMMBACK_RUNTIME_DIR"] = str(scene.runtime_dir)
        for path in (scene.folder, *scene.folder.iterdir()):
            path.chmod(0o777 if path.is_dir() else 0o644)
        yield scene
        assert not scene.runtime_dir.exists() or list(scene.runtime_dir.iterdir()) == []


@needs_qemu
def test_another_uid_that_may_lock_too_little_memory(open_scene: Scene) -> None:
    open_scene.unprivileged("resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))")
    ended = open_scene.refused(UNFIT, r"^RLIMIT_MEMLOCK is 1024 KiB, too small to map 16384 KiB of secret RAM$")
    assert "ulimit -l 16384" in ended.stderr


@needs_qemu
def test_another_uid_that_may_not_write_to_the_runtime_folder(open_scene: Scene) -> None:
    open_scene.runtime_dir.mkdir(mode=0o755)
    open_scene.unprivileged()
    open_scene.refused(UNFIT, r"^the runtime folder \S+/run belongs to another user")


@needs_qemu
def test_another_uid_without_a_runtime_folder(open_scene: Scene) -> None:
    del open_scene.environment["VMMBACK_RUNTIME_DIR"]
    open_scene.environment |= {"VMMBACK_RUNTIME_DIR": None, "XDG_RUNTIME_DIR": None}
    open_scene.unprivileged()
    open_scene.refused(USAGE, r"^there is no place for runtime state: XDG_RUNTIME_DIR is not set$")


def test_another_uid_that_may_not_read_the_guest_file(open_scene: Scene) -> None:
    open_scene.file.chmod(0o600)
    open_scene.unprivileged()
    open_scene.refused(USAGE, r"/guest\.toml: permission denied$")


def test_another_uid_that_may_not_read_the_initrd(open_scene: Scene) -> None:
    (open_scene.folder / "initrd").write_bytes(b"secret")
    (open_scene.folder / "initrd").chmod(0o600)
    open_scene.write('kernel = "boots.rom"\ninitrd = "initrd"')
    open_scene.unprivileged()
    open_scene.refused(USAGE, r":6: boot\.initrd: \S+/initrd: permission denied; ")


@needs_qemu
def test_another_uid_that_may_start_no_process(open_scene: Scene) -> None:
    """RLIMIT_NPROC does not bind root."""
    open_scene.unprivileged("resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))")
    ended = open_scene.run()
    assert ended.code == UNFIT, ended.stderr
    assert_one_error(ended, UNFIT)


def limit_descriptors(scene: Scene, limit: int, *statements: str) -> None:
    """Let it open so few descriptors, 0, 1 and 2 among them."""
    scene.patched("import os, resource", f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))", *statements)


@needs_qemu
@pytest.mark.parametrize("limit", [5, 20, 63])
def test_a_limit_of_few_descriptors(scene: Scene, limit: int) -> None:
    limit_descriptors(scene, limit)
    ended = scene.refused(UNFIT, rf"^RLIMIT_NOFILE is {limit}, and a launch needs 64 descriptors$")
    assert "ulimit -n 64" in ended.stderr


@needs_qemu
def test_a_limit_of_enough_descriptors(scene: Scene) -> None:
    scene.options.append("--no-validate")
    limit_descriptors(scene, 64)
    assert scene.ran()["memory"]["secret"] == 16 << 20


@needs_qemu
@pytest.mark.parametrize("free", [1, 4, 7, 10, 13])
def test_descriptors_that_run_out(scene: Scene, free: int) -> None:
    """Wherever that is, it is an error of ours; a launch that gets by with so few is fine too."""
    scene.options.append("--no-validate")
    limit_descriptors(scene, 64, f"held = [os.open('/dev/null', 0) for _ in range({64 - 3 - free})]")
    ended = scene.run()
    assert ended.code in {0, UNFIT, REFUSED, QEMU_FAILED}, ended.stderr
    if ended.code:
        assert_one_error(ended, ended.code)


@needs_qemu
@pytest.mark.parametrize("mib", [300, 700])
def test_little_address_space(scene: Scene, mib: int) -> None:
    """QEMU has less than it needs, or Python has: an error either way, with QEMU's own words where it is QEMU's."""
    scene.shell(f"ulimit -v {mib << 10}")
    scene.write('firmware = "boots.rom"', memory='size = "512MiB"')
    ended = scene.run()
    assert ended.code in {UNFIT, REFUSED, QEMU_FAILED}, ended.stderr
    assert_one_error(ended, ended.code)


# --- The runtime folder -----------------------------------------------------------------------------------------------


@needs_qemu
@pytest.mark.parametrize("name", ["a,b =c:", "'$(id)' \\ \"x\" {b}", "-rf", "*?[a] %s", "é日本😀"])
def test_runtime_folder_with_a_name_that_shells_and_qemu_read_otherwise(scene: Scene, name: str) -> None:
    """Each of them works."""
    folder = Path(tempfile.mkdtemp(prefix="v", dir="/tmp"))
    try:
        scene.environment["VMMBACK_RUNTIME_DIR"] = str(folder / name)
        scene.runtime_dir = folder
        scene.options.append("--no-validate")
        assert scene.ran()["memory"]["secret"] == 16 << 20
        assert [path.name for path in folder.iterdir()] == [name]
        assert list((folder / name).iterdir()) == []
        (folder / name).rmdir()
    finally:
        folder.rmdir()


@needs_qemu
@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        ("run", "is not an absolute path"),
        ("./run", "is not an absolute path"),
        ("~/run", "is not an absolute path"),
        ("/tmp/two\nlines", "has characters that QEMU's JSON options cannot carry"),
        ("/tmp/\x1b[31m", "has characters that QEMU's JSON options cannot carry"),
        (os.fsdecode(b"/tmp/\xff"), "has characters that QEMU's JSON options cannot carry"),
        ("/tmp/" + "x" * 100, "is longer than 80 bytes"),
        ("/tmp/" + "é" * 40, "is longer than 80 bytes"),
    ],
)
def test_runtime_folder_that_is_refused(scene: Scene, chosen: str, problem: str) -> None:
    scene.environment["VMMBACK_RUNTIME_DIR"] = chosen
    scene.refused(USAGE, rf"^VMMBACK_RUNTIME_DIR {re.escape(ascii(chosen))} {problem}$")


@needs_qemu
@pytest.mark.parametrize("place", ["a-file", "below-a-file", "/proc/vmmback", "/dev/null", "a-link-to-nothing"])
def test_runtime_folder_that_cannot_be_made(scene: Scene, place: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # the folder's path may have 80 bytes, wherever tests run
        folder = Path(short)
        (folder / "a-file").write_text("mine")
        (folder / "a-link-to-nothing").symlink_to("/proc/vmmback")
        chosen = "a-file/run" if place == "below-a-file" else place
        scene.environment["VMMBACK_RUNTIME_DIR"] = str(folder / chosen)
        scene.refused(UNFIT, r"^the folder \S+/bad-input cannot be made: .")
        assert (folder / "a-file").read_text() == "mine"
        assert {path.name for path in folder.iterdir()} == {"a-file", "a-link-to-nothing"}


@needs_qemu
def test_guest_folder_that_is_a_link(scene: Scene) -> None:
    """A link that somebody else has put there must not lead us to delete elsewhere."""
    elsewhere = scene.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    scene.runtime_dir.mkdir()
    (scene.runtime_dir / "bad-input").symlink_to(elsewhere)
    scene.refused(UNFIT, r"cannot be made: it is a symbolic link$")
    assert (elsewhere / "file").read_text() == "mine"
    (scene.runtime_dir / "bad-input").unlink()


@needs_qemu
def test_two_guests_of_one_name(scene: Scene, vmmback: Start, runtime_dir: Path) -> None:
    """The second is refused, and the first notices nothing."""
    file = guest_file(scene.folder)
    running = vmmback("launch", file, "--json")
    running.wait_for("is isolated while it runs")
    first = qemu_of(runtime_dir)
    second = subprocess.run(
        [sys.executable, "-m", "vmmback", "launch", file, "--json"],
        capture_output=True,
        cwd=ROOT,
        check=False,
        timeout=DEADLINE_S,
    )
    ended = Ended(second.returncode, second.stdout.decode(), second.stderr.decode())
    assert_one_error(ended, USAGE, rf"^a guest named {file.stem} is running already$")
    assert qemu_of(runtime_dir) == first
    assert sorted(path.name for path in (runtime_dir / file.stem).iterdir()) == [
        "control",
        "promise.json",
        "qemu.log",
        "qmp.sock",
        "serial.log",
        "supervisor.log",
    ]
    for signum in (signal.SIGTERM, signal.SIGINT):  # the power button, which the tiny guest ignores, and quit
        running.signal(signum)
    assert running.ended().code == 0


# --- QEMU -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StandIn:
    """A program named like QEMU: what it does, and what must be said of it."""

    body: str
    says: str
    patch: str = "pass"


TOOK_NOTHING = r"^QEMU did not take the descriptor of its RAM: "

# A stand-in whose memory is elsewhere: it answers the monitor like a QEMU that has mapped what it was given.
ELSEWHERE = """
memory = mmap.mmap(-1, size)
where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
def hmp(line):
    if line == "info mtree -f":
        return ('FlatView #0\\r\\n AS "memory", root: system\\r\\n Root memory region: system\\r\\n'
                f"  {0:016x}-{size - 1:016x} (prio 0, ram): ram0\\r\\n")
    if line == "info ramblock":
        return f"  ram0    4 KiB  0x{0:016x} 0x{size:016x} 0x{size:016x}\\r\\n"
    address = int(line.split()[1], 16)
    return f"Host virtual address for {address:#x} (ram0) is {where + address:#x}\\r\\n"
take()
serve(hmp)
"""

STAND_INS = {
    "dies-at-once": StandIn(
        "say('no luck today'); sys.exit(3)", TOOK_NOTHING + r"it exited with status 3; it said: no luck today$"
    ),
    "dies-without-a-word": StandIn("sys.exit(0)", TOOK_NOTHING + r"it exited with status 0; it said: nothing$"),
    "dies-of-a-signal": StandIn(
        "os.kill(os.getpid(), 11)", TOOK_NOTHING + r"it was ended by SIGSEGV; it said: nothing$"
    ),
    "writes-to-the-terminal": StandIn(
        r"say('\x1b[2J' + 'x' * 100_000 + ' last'); sys.exit(1)", r"it said: x{1900,2000} last$"
    ),
    "never-opens-its-mem-path": StandIn(
        "time.sleep(0.3); say('leaving'); sys.exit(0)", TOOK_NOTHING + r"it exited with status 0; it said: leaving$"
    ),
    "never-opens-its-mem-path-and-stays": StandIn(
        "say('here'); stay()",
        r"^QEMU did not take the descriptor of its RAM within 4\.0 s: it still runs; it said: here$",
        patch="launch._HANDOFF_TIMEOUT_S = 4",
    ),
    "opens-another-file-of-its-folder": StandIn(
        "path += '1'; say(take()); sys.exit(1)",
        TOOK_NOTHING + r"it exited with status 1; it said: Permission denied$",
    ),
    "takes-it-and-dies": StandIn(
        "take(); say('goodbye'); sys.exit(4)", r"^QEMU did not stay alive: it exited with status 4; it said: goodbye$"
    ),
    "takes-it-and-is-silent": StandIn(
        "take(); stay()", r"^QEMU did not greet over QMP within 0\.5 s", patch="launch._GREETING_TIMEOUT_S = 0.5"
    ),
    "hangs-up": StandIn("take(); monitor.close(); stay()", r"^QEMU did not greet over QMP: "),
    "speaks-http": StandIn(
        "take(); monitor.sendall(b'HTTP/1.1 400 Bad Request\\r\\n\\r\\n'); stay()", r"^QEMU did not greet over QMP: "
    ),
    "greets-and-dies": StandIn(
        "take(); greet(); say('goodbye'); sys.exit(5)",
        r"^QEMU did not stay alive: it exited with status 5; it said: goodbye$",
    ),
    "greets-and-is-silent": StandIn(
        "take(); greet(); stay()",
        r"^QEMU did not greet over QMP within 0\.5 s",
        patch="launch._GREETING_TIMEOUT_S = 0.5",
    ),
    "answers-and-then-is-silent": StandIn(
        "take(); serve(lambda line: stay())",
        r"^QEMU did not answer human-monitor-command within 1\.5 s",
        patch="from vmmback import monitor; monitor._COMMAND_TIMEOUT_S = 1.5",
    ),
    "answers-nonsense": StandIn(
        "take(); serve(lambda line: 'unknown command')", r'^QEMU shows no flat view of address space "memory"$'
    ),
    "answers-what-is-no-text": StandIn("take(); serve(lambda line: {})", r"^QEMU shows no flat view"),
    "maps-nothing": StandIn(
        "take(); serve(lambda line: 'FlatView #0\\r\\n AS \"memory\", root: system\\r\\n')",
        r'^QEMU shows no flat view of address space "memory"$',
    ),
    "maps-ordinary-memory": StandIn(
        ELSEWHERE,
        r"^QEMU's RAM is not where it must be: the guest could write to memory that is not ours: ram0$",
    ),
}


@needs_qemu
@pytest.mark.parametrize("kind", STAND_INS)
def test_a_qemu_that(scene: Scene, kind: str) -> None:
    wanted = STAND_INS[kind]
    scene.qemu(wanted.body)
    if wanted.patch != "pass":
        scene.patched(wanted.patch)
    ended = scene.refused(QEMU_FAILED, wanted.says)
    assert "CONT WAS SENT" not in ended.stderr


@needs_qemu
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"#!/no/such/interpreter\n", r"it exited with status 127; it said: .*No such file or directory"),
        (b"\x7fELF is all there is\n", r"it exited with status 127; it said: .*not found$"),
    ],
)
def test_a_qemu_that_cannot_be_executed(scene: Scene, content: bytes, says: str) -> None:
    scene.qemu("")
    (scene.folder / "programs" / find_qemu().name).write_bytes(content)
    scene.refused(QEMU_FAILED, TOOK_NOTHING + says)


@needs_qemu
def test_cpu_model_that_qemu_does_not_know(scene: Scene) -> None:
    scene.write('firmware = "boots.rom"', more='[cpu]\nmodel = "z80"')
    scene.refused(QEMU_FAILED, r"it exited with status 1; it said: .*unable to find CPU model 'z80'$")


@needs_qemu
@pytest.mark.parametrize("size", [1, 4096, 65537])
def test_kernel_that_is_none(scene: Scene, size: int) -> None:
    (scene.folder / "kernel").write_bytes(b"\xa5" * size)
    scene.write('kernel = "kernel"')
    scene.refused(QEMU_FAILED, r"it exited with status 1; it said: qemu: invalid kernel header$")


@needs_qemu
@pytest.mark.usefixtures("needs_guest_kernel")
def test_initrd_that_does_not_fit(scene: Scene) -> None:
    (scene.folder / "initrd").touch()
    os.truncate(scene.folder / "initrd", 64 << 20)
    scene.write(f'kernel = "{KERNEL}"\ninitrd = "initrd"')
    scene.refused(QEMU_FAILED, r"it exited with status 1; it said: .*initrd is too large")


@needs_qemu
@pytest.mark.parametrize("size", [0, 1000, 65537])
def test_firmware_of_a_wrong_size(scene: Scene, size: int) -> None:
    (scene.folder / "firmware").touch()
    os.truncate(scene.folder / "firmware", size)
    scene.write('firmware = "firmware"')
    scene.refused(QEMU_FAILED, r"it exited with status 1; it said: .*(?:could not load PC BIOS|firmware)")


@needs_qemu
@pytest.mark.parametrize("name", ["a,b =c.rom", "é\n'x'.rom", "-bios"])
def test_firmware_whose_name_qemu_could_read_otherwise(scene: Scene, name: str) -> None:
    """Each of them works."""
    (scene.folder / name).write_bytes(RESETS)
    scene.write(f"firmware = {json.dumps(name, ensure_ascii=False)}")
    scene.options.append("--no-validate")
    assert scene.ran()["memory"]["secret"] == 16 << 20


@needs_qemu
@pytest.mark.parametrize("place", ["/proc/vmmback.log", "/sys/kernel/vmmback.log"])
def test_console_log_in_a_place_that_takes_no_files(scene: Scene, place: str) -> None:
    scene.write('firmware = "boots.rom"', more=f'[console]\nlog = "{place}"')
    scene.refused(USAGE, rf"^the console log {place} cannot be written: .")


# --- Standard streams, and the terminal -------------------------------------------------------------------------------


@needs_qemu
@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
@pytest.mark.parametrize("json_", [True, False], ids=["json", "table"])
def test_streams_that_are_closed(scene: Scene, closed: str, json_: bool) -> None:
    """No descriptor of ours may come to stand in a stream's place. A report that is not written is no success."""
    scene.options = [*(["--json"] if json_ else []), "--no-validate"]
    scene.shell("exec " + " ".join({"0": "<&-", "1": ">&-", "2": "2>&-"}[number] for number in closed.split()))
    ended = scene.run()
    if json_ and "1" in closed:
        assert ended.code == USAGE
        if "2" not in closed:
            assert_one_error(ended, USAGE, r"^the report could not be written to standard output: ")
        return
    assert ended.code == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    if json_:
        assert json.loads(ended.stdout)["memory"]["secret"] == 16 << 20
    if "2" in closed:
        assert ended.stderr == ""


@needs_qemu
@pytest.mark.parametrize("json_", [True, False], ids=["json", "table"])
@pytest.mark.parametrize("place", ["/dev/full", "pipe", "read-only"])
def test_standard_output_that_takes_nothing(scene: Scene, place: str, json_: bool) -> None:
    scene.options = [*(["--json"] if json_ else []), "--no-validate"]
    if place == "pipe":
        reader, stdout = os.pipe()
        os.close(reader)
    else:
        stdout = os.open("/dev/full" if place == "/dev/full" else "/dev/null", os.O_WRONLY if "full" in place else 0)
    with open(stdout, "wb") as file:
        if json_:
            scene.refused(USAGE, r"^the report could not be written to standard output: ", stdout=file)
        else:
            ended = scene.run(stdout=file)
            assert ended.code == 0, ended.stderr
            assert "Traceback" not in ended.stderr


@needs_qemu
@pytest.mark.parametrize("place", ["/dev/full", "closed"])
def test_standard_error_that_takes_nothing(scene: Scene, place: str) -> None:
    """The exit code says it still: here that the file is wrong, and that all is well."""
    if place == "closed":
        scene.shell("exec 2>&-")
    with open("/dev/full" if place == "/dev/full" else "/dev/null", "wb") as stderr:
        ended = scene.run(stderr=stderr)
        assert ended.code == 8  # it ends before it is ready
        assert json.loads(ended.stdout)["verdict"] == "inconclusive"
        scene.file.write_text("")
        assert scene.run(stderr=stderr).code == USAGE


@needs_qemu
@pytest.mark.usefixtures("needs_direct_map")
def test_a_ready_text_that_never_comes(scene: Scene) -> None:
    file = guest_file(scene.folder, ready="NEVER", isolation='ready-timeout = "300ms"\nafter-validation = "powerdown"')
    scene.file = file
    scene.patched("launch._POWERDOWN_TIMEOUT_S = 0.1")
    report = scene.ran()
    assert (report["verdict"], report["validated_after"]) == ("isolated", "0.3 s without 'NEVER' on the console")


@needs_qemu
@pytest.mark.parametrize("ignored", [True, False], ids=["ignored", "not"])
def test_a_hangup_that_was_ignored_before_stays_ignored(scene: Scene, start: Start, ignored: bool) -> None:
    """As nohup(1) wants it; without it the hangup is a request to stop."""
    disposition = "--ignore-signal=HUP" if ignored else "--default-signal=HUP"
    running = start("env", disposition, *scene.command, "launch", guest_file(scene.folder), "--json")
    running.wait_for("is isolated while it runs")
    status = procfs.status(running.process.pid)
    bit = 1 << (signal.SIGHUP - 1)
    assert bool(int(status["SigIgn"], 16) & bit) == ignored
    assert bool(int(status["SigCgt"], 16) & bit) != ignored
    for signum in (signal.SIGTERM, signal.SIGINT):  # the power button, which the tiny guest ignores, and quit
        running.signal(signum)
    assert running.ended().code == 0


@needs_qemu
@pytest.mark.parametrize("moment", ["prefault", "guest"])
def test_a_terminal_that_is_gone(scene: Scene, start: Start, runtime_dir: Path, moment: str) -> None:
    """SIGHUP comes, and from then on the terminal answers EIO."""
    file = guest_file(scene.folder, size="1GiB" if moment == "prefault" else "16MiB")
    scene.patched("launch._POWERDOWN_TIMEOUT_S = 0.1")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "env", "--default-signal=HUP", *scene.command, "launch", file, "--no-validate"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        env=environment(scene.environment | {"TERM": "xterm"}),
    )
    os.close(slave)
    seen = b""
    try:
        wanted = b"prefault" if moment == "prefault" else b"READY"
        while wanted not in seen:
            seen += os.read(master, 4096)
    finally:
        os.close(master)
    try:
        code = process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert code == (128 + signal.SIGHUP if moment == "prefault" else 0), seen
    assert processes_of(runtime_dir) == {}
    assert list(runtime_dir.iterdir()) == []
