"""Where QEMU runs: as a uid of its own, in namespaces of its own, with the few files that it needs and no rights.

docs/PROCESS.md says what is taken away, why, and what is left.
"""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from vmmback.errors import HostUnfit
from vmmback.linux import arch, namespaces, procfs
from vmmback.linux.namespaces import NODEV, NOEXEC, NOSUID

# include/uapi/linux/capability.h. The supervisor reads QEMU's arguments and memory, and ends it: PTRACE and KILL.
_NEEDED = {
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}

_FOLDERS: tuple[Path, ...] = (Path("/usr"),)
# Where /usr is not merged these are folders of their own, else links into it (hier(7)).
_BESIDE_USR = ("bin", "sbin", "lib", "lib32", "lib64")
# What the dynamic loader reads (ld.so(8)); libraries may be links through /etc/alternatives.
_SETTINGS = (Path("/etc/ld.so.cache"), Path("/etc/alternatives"))
# Where a QEMU has its firmware, modules and libraries, beside the folder of its program.
_BESIDE_PROGRAM = ("lib", "lib64", "libexec", "share")
_DEVICES = ("null", "zero", "urandom")
_KVM = Path("/dev/kvm")
_MUSL_LOADER = "/lib/ld-musl-{}.so.1"

_DESCRIPTORS = 1024
_ROOT_OPTIONS = "size=4m,nr_inodes=256,mode=755"
_DEV_OPTIONS = "size=4k,nr_inodes=16,mode=755"


class Jail(NamedTuple):
    """What one QEMU gets: ids, files (their place in the jail -> their path here), and bytes of locked memory.

    `host_network` leaves it this network namespace, `kvm` adds /dev/kvm. `root` is a folder of the guest's that is
    hidden for QEMU by its new root; nothing is made in it.
    """

    uid: int
    gid: int
    root: Path
    program: Path
    locked: int
    files: Mapping[Path, Path] = MappingProxyType({})
    host_network: bool = False
    kvm: bool = False

    def enter(self) -> None:
        """Put the calling thread, and what it starts, behind the jail's walls; the thread must not import then.

        All of it ends with the last of them: nothing is mounted where others could see it. Raises HostUnfit.
        """
        own = namespaces.NEWNS | namespaces.NEWIPC | namespaces.NEWUTS | namespaces.NEWCGROUP
        try:
            namespaces.unshare(own if self.host_network else own | namespaces.NEWNET)
            namespaces.stop_propagation()
            namespaces.mount_new("tmpfs", self.root, NOSUID | NODEV, _ROOT_OPTIONS)
            self._add_programs()
            for place, file in self.files.items():
                self._show(file, place, NOEXEC)
            self._add_devices()
            proc = self._folder(Path("/proc"))
            # hidepid=ptraceable: only what QEMU may trace, which is itself alone (Documentation/filesystems/proc.rst).
            namespaces.mount_new("proc", proc, NOSUID | NODEV | NOEXEC, "subset=pid,hidepid=ptraceable")
            namespaces.make_read_only(proc, 0)
            self._hide_loader()
            namespaces.enter_root(self.root)
            namespaces.make_read_only(Path("/"), NOEXEC, below=False)
        except OSError as error:
            raise HostUnfit(
                f"QEMU's namespaces and mounts could not be made: {error}",
                "run as root with CAP_SYS_ADMIN; a container must allow mount(2), unshare(2) and mknod(2)",
            ) from error

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that takes the rights away, lowers the limits, and then executes `argv`.

        In this order: setpriv has its old capabilities until it executes something, and they would let it read what
        `_hide_loader` hides. It sets the parent-death signal after the change of uid, which would clear it (prctl(2));
        the programs behind it gain no rights, so that it stays. This process has raised its own limit on locked memory
        as far as it may (linux/memlock.py). Where that is not enough CAP_IPC_LOCK alone is kept, in all sets, so that
        QEMU has it (capabilities(7), ambient).
        """
        _, hard = resource.prlimit(0, resource.RLIMIT_NOFILE)
        descriptors = min(hard, _DESCRIPTORS) if hard != resource.RLIM_INFINITY else _DESCRIPTORS
        limits = ["--core=0:0", "--msgqueue=0:0", f"--nofile={descriptors}:{descriptors}"]
        kept = ",+ipc_lock"
        if may_lock_by_limit(self.locked):
            limits.append(f"--memlock={self.locked}:{self.locked}")
            kept = ""
        return [
            "setpriv",
            "--reuid", str(self.uid), "--regid", str(self.gid), "--clear-groups",
            f"--inh-caps=-all{kept}", f"--ambient-caps=-all{kept}", f"--bounding-set=-all{kept}",
            "--no-new-privs", "--pdeathsig", "KILL", "--",
            "prlimit", *limits, "--",
            *argv,
        ]  # fmt: skip

    def give(self, descriptors: Iterable[int]) -> None:
        """Make QEMU's uid the owner of the pipes among what it inherits, so that it can open /proc/self/fd/N of them.

        That asks the pipe's own permissions, 0600 for whoever made it (fs/pipe.c); read(2) and write(2) ask nothing.
        """
        for descriptor in descriptors:
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.fchown(descriptor, self.uid, self.gid)

    def _add_programs(self) -> None:
        for folder in _FOLDERS:
            self._show(folder, folder)
        for name in _BESIDE_USR:
            path = Path("/", name)
            if path.is_symlink():
                (self.root / name).symlink_to(path.readlink())
            elif path.is_dir():
                self._show(path, path)
        for path in _SETTINGS:
            if path.exists():
                self._show(path, path, NOEXEC)
        self._add_qemu()

    def _add_qemu(self) -> None:
        """Show a QEMU that is installed elsewhere, by the name that it is called by and by its own."""
        seen = (*_FOLDERS, *(Path("/", name) for name in _BESIDE_USR))
        for path in dict.fromkeys((self.program.absolute(), self.program.resolve())):
            if any(path.is_relative_to(folder) for folder in seen):
                continue
            self._show(path, path)
            beside = [path.parent.parent / name for name in _BESIDE_PROGRAM] if path.parent.name == "bin" else []
            for folder in beside:
                if folder.is_dir() and not self._place(folder).exists():
                    self._show(folder, folder)

    def _add_devices(self) -> None:
        """Make devices of our own, of which the host's permissions do not count."""
        dev = self._folder(Path("/dev"))
        namespaces.mount_new("tmpfs", dev, NOSUID | NOEXEC, _DEV_OPTIONS)
        for name in _DEVICES:
            self._device(Path("/dev", name), 0o666)
        if self.kvm:
            self._device(_KVM, 0o600)
            os.chown(self._place(_KVM), self.uid, self.gid)
        namespaces.make_read_only(dev, 0)

    def _device(self, path: Path, mode: int) -> None:
        place = self._place(path)
        os.mknod(place, stat.S_IFCHR | mode, path.stat().st_rdev)
        place.chmod(mode)  # whatever the umask

    def _hide_loader(self) -> None:
        """Put a copy of the ELF interpreter in its place that QEMU's uid may execute but not read.

        The kernel makes a process that executes what it may not read not dumpable (fs/exec.c, would_dump; the
        interpreter: fs/binfmt_elf.c). So nobody but a holder of CAP_SYS_PTRACE gets at it: not even its own uid.
        """
        for name in (arch.current().loader, _MUSL_LOADER.format(arch.current().name)):
            loader = Path(name).resolve()
            if not loader.exists():
                continue
            copy = self.root / loader.name
            copy.write_bytes(loader.read_bytes())
            copy.chmod(0o111)
            namespaces.bind_read_only(copy, self._place(loader), NOSUID | NODEV)
            copy.unlink()

    def _show(self, source: Path, place: Path, flags: int = 0) -> None:
        if source.is_dir():
            target = self._folder(place)
        else:
            target = self._folder(place.parent) / place.name
            target.touch()
        namespaces.bind_read_only(source, target, NOSUID | NODEV | flags)

    def _folder(self, path: Path) -> Path:
        folder = self._place(path)
        missing = [above for above in (folder, *folder.parents) if not above.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            made.chmod(0o755)  # whatever the umask
        return folder

    def _place(self, path: Path) -> Path:
        return self.root / path.relative_to("/")


def missing_rights() -> list[str]:
    """Return what this process lacks to put a QEMU in a jail; empty if nothing."""
    if os.geteuid() != 0:
        return ["root"]
    return [name for name, number in _NEEDED.items() if not procfs.has_capability(number)]


def may_lock_by_limit(size: int) -> bool:
    """Tell whether this process's hard RLIMIT_MEMLOCK, which what it starts inherits, covers `size` bytes."""
    _, hard = resource.prlimit(0, resource.RLIMIT_MEMLOCK)
    return hard == resource.RLIM_INFINITY or hard >= size


def check_readable(files: Mapping[str, Path], uid: int, gid: int) -> None:
    """Raise HostUnfit, with its key in the guest file, for the first of these files that such a QEMU could not read.

    Only their own permissions count: the folders that they lie in are not in the jail.
    """
    for key, file in files.items():
        if not _may_read(file.stat(), uid, gid):
            raise HostUnfit(
                f"{key}: {file} cannot be read by QEMU, which runs as uid {uid}, gid {gid}",
                f"let others read it: chmod o+r {file}",
            )


def _may_read(status: os.stat_result, uid: int, gid: int) -> bool:
    """Tell whether a file's mode lets them read it: the first class that fits decides (path_resolution(7))."""
    if status.st_uid == uid:
        return bool(status.st_mode & stat.S_IRUSR)
    if status.st_gid == gid:
        return bool(status.st_mode & stat.S_IRGRP)
    return bool(status.st_mode & stat.S_IROTH)
