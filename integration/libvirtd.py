"""A real libvirtd that is a test's own: it can be killed, and what is installed for it is installed nowhere else.

It runs in a mount namespace with folders of its own (libvirtd-namespace): /etc, /run, /usr/local, /var/lib, /var/cache
and /var/log can be written to inside, and are the host's again outside. libvirt gives hooks and emulators an
environment of its own making, so what tests run inside goes by default paths: /run/vmmback is private too.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from integration import capabilities
from integration.conftest import Supervisor, eventually
from integration.leftovers import command_line, descendants, description

if TYPE_CHECKING:
    import libvirt

_HERE = Path(__file__).parent
_ANSWER_S = 60.0
_ALL_ENDED_S = 30.0

# Where people keep what libvirt boots.
BOOT = Path("/var/lib/libvirt/boot")

_LIBVIRTD_CONF = """\
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "1:file:/var/log/libvirt/libvirtd.log"
log_filters = "1:util.hook 1:util.command 1:qemu.qemu_process 2:qemu 3:*"
"""

# No cgroups: their names are the machine's, and tests run beside each other. security_driver: AppArmor's profiles are
# the machine's as well. stdio_handler: there is no virtlogd.
_QEMU_CONF = """\
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
"""


class Libvirtd:
    """A libvirtd with its namespace. A context manager, at whose end nothing of both is left.

    `inside` is the root folder as it is in the namespace, and `folder` has the sockets.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._mounts = ""
        self._programs: list[Supervisor] = []

    def __enter__(self) -> Self:
        self._mounts = Path("/proc/self/mountinfo").read_text()
        self.folder = Path(tempfile.mkdtemp(prefix="vmmback-libvirtd-", dir="/tmp"))  # a socket's path must be short
        argv = ["unshare", "--mount", "--propagation", "private", "--", str(_HERE / "libvirtd-namespace")]
        argv += [str(self.folder), str(self._logs), sys.executable, "-IS", str(_HERE / "libvirtd_keeper.py")]
        self._keeper = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/"
        )
        try:
            self._start_keeping()
        except BaseException:
            self._end_keeper()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the domains, and all else, as an administrator would; whatever then is left fails the test."""
        try:
            left = self._ended_in_order()
        finally:
            self._end_keeper()
        assert left == {}, f"left when all domains had ended: {left}"
        assert not self.folder.exists()
        assert Path("/proc/self/mountinfo").read_text() == self._mounts

    # --- libvirtd -----------------------------------------------------------------------------------------------------

    @property
    def uri(self) -> str:
        """What libvirt's clients connect to, inside and outside."""
        return f"qemu+unix:///system?socket={self.folder}/sockets/libvirt-sock"

    @property
    def keeper_pid(self) -> int:
        """The parent of all that libvirtd has started; it is in the namespace."""
        return self._keeper.pid

    @property
    def log(self) -> str:
        """What it has logged: what it calls with which arguments, and what it says to QEMU."""
        return (self._logs / "libvirtd.log").read_text(errors="replace")

    @property
    def hooks(self) -> Path:
        """Its hooks folder, seen from outside."""
        return self.inside / "etc/libvirt/hooks"

    def restart(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """End it by a signal, and start it again; domains live on."""
        self.stop(signum)
        self.begin()

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """End it by a signal."""
        os.kill(self.pid, signum)
        eventually(lambda: not Path(f"/proc/{self.pid}").exists(), "libvirtd has ended", _ANSWER_S)

    def begin(self) -> None:
        """Start it, and wait until it answers."""
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        os.write(self._keeper.stdin.fileno(), b"\n")
        self.pid = int(self._keeper.stdout.readline())
        eventually(self._listens, "libvirtd listens", _ANSWER_S)
        self.virsh("uri")

    def _listens(self) -> bool:
        assert Path(f"/proc/{self.pid}").exists(), f"libvirtd ended: {(self._logs / 'stderr.log').read_text()}"
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.connect(f"{self.folder}/sockets/libvirt-sock")
            return True
        return False

    # --- Clients ------------------------------------------------------------------------------------------------------

    def virsh(self, *arguments: str | Path, timeout_s: float = 60.0) -> str:
        """Return what a command of virsh printed. Raises AssertionError with its error."""
        ended = self.virsh_ended(*arguments, timeout_s=timeout_s)
        assert ended.returncode == 0, f"virsh {arguments}: {ended.stderr}"
        return ended.stdout.strip()

    def virsh_ended(self, *arguments: str | Path, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Return how a command of virsh ended."""
        argv = ["virsh", "--quiet", "--connect", self.uri, *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)

    @contextmanager
    def connection(self) -> Iterator[libvirt.virConnect]:
        """A connection of libvirt-python."""
        import libvirt

        libvirt.registerErrorHandler(lambda *_: None, None)  # it would print what it raises as well
        connection = libvirt.open(self.uri)
        try:
            yield connection
        finally:
            connection.close()

    # --- Inside the namespace -----------------------------------------------------------------------------------------

    def command(self, *argv: str | Path) -> list[str]:
        """Return the command that runs `argv` inside, without what the fixtures tell vmmback by the environment."""
        unset = ["env", "--unset=VMMBACK_RUNTIME_DIR", "--unset=VMMBACK_BROKER"]
        enter = ["nsenter", f"--target={self.keeper_pid}", "--mount", "--root", f"--wdns={Path.cwd()}", "--"]
        return [*enter, *unset, *(str(argument) for argument in argv)]

    def run(
        self, *argv: str | Path, check: bool = True, timeout_s: float = 60.0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end."""
        command = self.command(*argv)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, input=stdin)
        assert not check or ended.returncode == 0, f"{argv} ended with {ended.returncode}: {ended.stderr}"
        return ended

    def start(self, *argv: str | Path) -> Supervisor:
        """Start a program inside; one that runs when all domains have ended is killed."""
        program = Supervisor(self.command(*argv), self._logs / f"program-{secrets.token_hex(4)}")
        self._programs.append(program)
        return program

    # --- Domains ------------------------------------------------------------------------------------------------------

    def domain_xml(self, name: str, *options: str, memory_mib: int = 96, vcpus: int = 1) -> str:
        """Return what virt-install makes of a domain with the demo guest's kernel; `options` are virt-install's.

        Its serial console is a file: see `console`.
        """
        argv = ["virt-install", f"--connect={self.uri}", "--print-xml", "--virt-type=qemu", f"--name={name}"]
        argv += [f"--memory={memory_mib}", f"--vcpus={vcpus}", "--machine=q35", "--osinfo=detect=off,require=off"]
        # Without these two features Linux fills its RAM quickly: see configs/demo.toml.
        argv += ["--cpu=mode=maximum,disable=erms,disable=fsrm", "--import", "--disk=none", "--network=none"]
        # Without ports for devices that will never come Linux looks for none: a second less.
        argv += ["--graphics=none", "--controller=usb,model=none", "--controller=pci,model=pcie-root", "--console=none"]
        argv += [f"--serial=file,path={self._console(name)}"]
        kernel, initrd = self._boot_files(name)
        argv += [f"--boot=kernel={kernel},initrd={initrd},kernel_args=console=ttyS0 panic=-1 no_timer_check"]
        ended = subprocess.run([*argv, *options], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, f"virt-install {options}: {ended.stderr}"
        return ended.stdout

    def _boot_files(self, name: str) -> list[Path]:
        """Make a kernel and an initrd of a domain's own: libvirt gives them to its user, who may be nobody else's."""
        files = [BOOT / f"{name}-{file}" for file in ("vmlinuz", "initrd.img")]
        for file, source in zip(files, (capabilities.KERNEL, capabilities.INITRD), strict=True):
            shutil.copy(source, self.inside / str(file)[1:])
        return files

    def define(self, xml: str) -> None:
        """Make a domain known; it does not start."""
        self._give(xml, "define")

    def create(self, xml: str) -> None:
        """Start a domain that is forgotten when it ends."""
        self._give(xml, "create")

    def _give(self, xml: str, command: str) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".xml") as file:
            file.write(xml)
            file.flush()
            self.virsh(command, file.name)

    def console(self, name: str) -> str:
        """Return what a domain has printed on its serial console; a new start begins anew."""
        with suppress(FileNotFoundError):
            return Path(f"{self._logs}/qemu/{name}.serial.log").read_text(errors="replace")
        return ""

    def wait_for(self, name: str, text: str, timeout_s: float = 60.0) -> None:
        """Wait until a domain printed `text`."""

        def printed() -> bool:
            assert self.qemu_pid(name), f"{name} ended before it printed {text!r}: {self.console(name)[-2000:]}"
            return text in self.console(name)

        eventually(printed, f"{name} prints {text!r}", timeout_s)

    def qemu_pid(self, name: str) -> int:
        """Return the pid of a domain's QEMU, as libvirt knows it: 0 if none runs."""
        with suppress(OSError, ValueError):  # it is not there, or not written yet
            pid = int((self.inside / f"run/libvirt/qemu/{name}.pid").read_text())
            return pid if description(pid) else 0
        return 0

    def qemu_log(self, name: str) -> str:
        """Return what libvirt keeps of a domain's QEMU: how it was started, and what it wrote to standard error."""
        return (self._logs / f"qemu/{name}.log").read_text(errors="replace")

    def argv(self, name: str) -> list[str]:
        """Return the command line of a domain's QEMU."""
        return Path(f"/proc/{self.qemu_pid(name)}/cmdline").read_text().split("\0")[:-1]

    @staticmethod
    def _console(name: str) -> str:
        return f"/var/log/libvirt/qemu/{name}.serial.log"

    # --- Begin and end ------------------------------------------------------------------------------------------------

    def _start_keeping(self) -> None:
        """Wait until the namespace is made, fill it, and start libvirtd."""
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline(), "libvirtd's namespace could not be made: see standard error"
        self.inside = Path(f"/proc/{self.keeper_pid}/root")
        etc = self.inside / "etc/libvirt"
        self.hooks.mkdir(parents=True, exist_ok=True)
        (etc / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
        (etc / "qemu.conf").write_text(_QEMU_CONF)
        (self._logs / "qemu").mkdir()
        (self.inside / str(BOOT)[1:]).mkdir()
        self.begin()

    def _ended_in_order(self) -> dict[int, str]:
        """End all domains by libvirt, what tests have started, and libvirtd; return the processes that are left."""
        if not Path(f"/proc/{self.pid}").exists():
            self.begin()
        for name in self.virsh("list", "--name").split():
            # It fails where libvirtd was just reconnecting, and ended the domain itself. One that lives on is found.
            self.virsh_ended("destroy", name)
        with suppress(AssertionError):  # what is left says it better
            eventually(lambda: set(descendants(self.keeper_pid)) <= {self.pid}, "only libvirtd runs", _ALL_ENDED_S)
        self._close_programs()
        self.stop()
        return self._processes()

    def _close_programs(self) -> None:
        while self._programs:
            self._programs.pop().close()

    def _processes(self) -> dict[int, str]:
        """Return the processes of the namespace, and those that libvirtd has started."""
        namespace = Path(f"/proc/{self.keeper_pid}/ns/mnt").readlink()
        found = descendants(self.keeper_pid)
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and (entry / "ns/mnt").readlink() == namespace:
                    found[int(entry.name)] = command_line(int(entry.name))
        found.pop(self.keeper_pid, None)
        return found

    def _end_keeper(self) -> None:
        """End what is left, with force, and forget the folder."""
        self._close_programs()
        left = self._processes() if self._keeper.poll() is None else {}
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.wait(_ANSWER_S)
        self._keeper.stdout.close()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(description(pid) for pid in left), "what was left inside has ended")
        shutil.rmtree(self.folder)
