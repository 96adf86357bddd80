"""A Debian root file system for guests, made by debootstrap once and kept in build/debian: `./dev debian` uses it too.

The release is this host's own, and so is the mirror: what apt is configured with. The file system is put into a file by
`mke2fs -d`, so that nothing is mounted and no loop device is needed.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmmback import disk_images
from vmmback.disks import key_pipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/debian"
MODULES = ROOT / "build/guest/modules"
INIT = ROOT / "integration/guest/debian-init"

# Room for Debian (150 MiB), its journal, and the 256 MiB of the test's workload.
DISK_BYTES = 512 << 20

# What a system needs that boots with systemd, has a network, and powers off when its button is pressed: that does
# systemd-logind, which D-Bus starts. All else is in debootstrap's smallest variant.
_PACKAGES = ("systemd-sysv", "udev", "dbus")
_EXCLUDED = ("doc", "info", "locale", "man")
_DPKG = "force-unsafe-io\n" + "".join(f"path-exclude=/usr/share/{name}/*\n" for name in _EXCLUDED)
# What is of no use to a guest that lives for a day, or waits for what it does not have (a screen, the internet).
_DISABLED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "getty@tty1.service", "systemd-networkd-wait-online.service", "systemd-pstore.service",
)  # fmt: skip
# The network as the kernel's command line says, by ip= (systemd-network-generator.service(8)).
_ENABLED = ("systemd-network-generator.service", "systemd-networkd.service")

# debootstrap takes a minute where the mirror is slow.
_BUILD_S = 600.0


class ImageFailed(Exception):
    """The image could not be made; the message says why."""


@dataclass(frozen=True)
class Mirror:
    """Where Debian's packages come from."""

    uri: str
    suite: str


def mirror(release: str) -> Mirror:
    """Return the mirror that apt is configured with for a release of Debian.

    apt itself reads its sources, in whichever of their two formats. Raises ImageFailed.
    """
    fields = "$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(ORIGIN)|$(REPO_URI)"  # a field that is not known stays as it is
    argv = ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]
    listed = _run(argv).splitlines()
    for suite, codename, component, origin, uri in (line.split("|") for line in listed):
        ours = release in (suite, codename) and component == "main" and origin in ("Debian", "$(ORIGIN)")
        if ours and uri.startswith(("http://", "https://", "file:")):
            return Mirror(uri, release)
    raise ImageFailed(f"apt has no source of Debian's own for the release {release!r} (main) that debootstrap can use")


def root_image() -> Path:
    """Return the file with the root file system (ext4, DISK_BYTES); make it if this recipe's is not there yet.

    Whoever comes while another makes it waits. What an interrupted build left is removed. Raises ImageFailed.
    """
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    image = FOLDER / f"root-{release}-{platform.machine()}-{recipe}.ext4"
    with _locked(FOLDER):
        if not image.exists():
            for old in (*FOLDER.glob("root-*.ext4"), *FOLDER.glob("new-*")):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            with tempfile.TemporaryDirectory(prefix="new-", dir=FOLDER) as folder:
                made = Path(folder, "root.ext4")
                tree = Path(folder, "tree")
                _bootstrap(tree, mirror(release))
                _settle(tree)
                _file_system(tree, made)
                made.replace(image)
    return image


def _bootstrap(tree: Path, source: Mirror) -> None:
    """Install Debian into a folder.

    debootstrap mounts /proc and /sys there: in a mount namespace of its own, which ends with it and with us, so that
    nothing of these can be left when the folder is removed.
    """
    (tree / "etc/dpkg/dpkg.cfg.d").mkdir(parents=True)
    (tree / "etc/dpkg/dpkg.cfg.d/small").write_text(_DPKG)
    tree.chmod(0o755)
    alone = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--"]
    include = f"--include={','.join(_PACKAGES)}"
    _run([*alone, "debootstrap", "--variant=minbase", include, source.suite, str(tree), source.uri])


def _settle(tree: Path) -> None:
    """Make of what debootstrap leaves a system that starts quickly, and that is another machine with each disk."""
    _run(["chroot", str(tree), "systemctl", "disable", *_DISABLED])
    _run(["chroot", str(tree), "systemctl", "enable", *_ENABLED])
    # enabling networkd brings back what waits for the internet
    _run(["chroot", str(tree), "systemctl", "mask", "systemd-networkd-wait-online.service"])
    _run(["chroot", str(tree), "passwd", "--delete", "root"])  # who has the console is root, as at any machine
    (tree / "etc/hostname").write_text("debian\n")
    (tree / "etc/machine-id").write_text("")  # made anew at the first boot (machine-id(5))
    for path in ("var/cache/apt", "var/lib/apt/lists", "var/log", *(f"usr/share/{name}" for name in _EXCLUDED)):
        for entry in (tree / path).iterdir():  # also what debootstrap unpacked before dpkg was there to leave it out
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _file_system(tree: Path, image: Path) -> None:
    """Put a folder into a file system of its own. Nothing is left for the guest's kernel to initialise when idle."""
    options = ["-q", "-t", "ext4", "-m", "0", "-L", "root", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    _run(["mke2fs", *options, "-d", str(tree), str(image), f"{DISK_BYTES >> 10}k"])


def pack_initrd(initrd: Path, init: Path = INIT, units: Path | None = None) -> None:
    """Make an initrd of busybox, the modules that `./dev` unpacked, an init, and a folder of units for that to install.

    The init that is there without any brings up the disk and hands over to systemd.
    """
    with tempfile.TemporaryDirectory(prefix="initrd-", dir=initrd.parent) as folder:
        tree = Path(folder)
        (tree / "bin").mkdir()
        shutil.copy(shutil.which("busybox") or "busybox", tree / "bin/busybox")
        shutil.copytree(MODULES, tree / "lib/modules")
        shutil.copy(init, tree / "init")
        (tree / "init").chmod(0o755)
        if units:
            shutil.copytree(units, tree / "units")
        names = "\n".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
        argv = ["busybox", "cpio", "-o", "-H", "newc", "-R", "0:0"]
        packed = subprocess.run(argv, cwd=tree, input=names.encode(), capture_output=True, check=True).stdout
        made = tree / "initrd"
        made.write_bytes(gzip.compress(packed, 1, mtime=0))
        made.replace(initrd)


def encrypt(image: Path, disk: Path, key_file: Path) -> None:
    """Make a LUKS disk with the contents of an image, and its key, as docs/DEBIAN-GUEST.md does. Raises ImageFailed."""
    disk_images.create(disk, image.stat().st_size, "luks", key_file, new_key=True)
    key = key_pipe(key_file)
    try:
        secret = ["--object", f"secret,id=key,format=raw,file=/dev/fd/{key}"]
        target = f"driver=luks,key-secret=key,file.driver=file,file.filename={disk}"
        _run(["qemu-img", "convert", "-n", "-f", "raw", *secret, "--target-image-opts", str(image), target], (key,))
    finally:
        os.close(key)


def _run(argv: Sequence[str], descriptors: Sequence[int] = ()) -> str:
    """Run a program to its end; return what it printed."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    environment |= {name: value for name, value in os.environ.items() if name.endswith("_proxy")}
    try:
        ended = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_BUILD_S,
            env=environment, pass_fds=descriptors,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageFailed(f"{argv[0]}: {error}") from error
    if ended.returncode:
        raise ImageFailed(f"{' '.join(argv)} ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-3000:]}")
    return ended.stdout


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Make what configs/debian.toml names: an initrd, and a disk and its key unless they are there."""
    image = root_image()
    with _locked(FOLDER):
        pack_initrd(FOLDER / "initrd.img")
        if not (FOLDER / "root.luks").exists():
            with tempfile.TemporaryDirectory(prefix="new-", dir=FOLDER) as folder:
                disk, key = Path(folder, "root.luks"), Path(folder, "root.key")
                encrypt(image, disk, key)
                key.replace(FOLDER / key.name)
                disk.replace(FOLDER / disk.name)


if __name__ == "__main__":
    try:
        main()
    except ImageFailed as error:
        sys.exit(f"debian: error: {error}")
