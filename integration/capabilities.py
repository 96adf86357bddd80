"""What these tests need of the machine, found out by trying it: a version or a file's presence says too little.

A machine that lacks something skips the tests that need it, with the reason. Where CI is set to "true", what every
machine that runs vmmback must have is a failure instead: a run that skips its core proves nothing.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import platform
import pwd
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration import browser
from vmmback import shares
from vmmback.config.share import Share
from vmmback.errors import VmmbackError
from vmmback.host.qemu import can_share_aux_ram, find_qemu
from vmmback.linux import kernel_image, seccomp, vhost_vsock
from vmmback.linux.direct_map import DirectMap
from vmmback.linux.memfd_secret import memfd_secret
from vmmback.linux.network import in_new_network
from vmmback.linux.tap import open_tap

ROOT = Path(__file__).parents[1]
KERNEL = ROOT / "build/guest/vmlinuz"
INITRD = ROOT / "build/guest/initrd.img"

CGROUP_V1 = Path("/sys/fs/cgroup/memory")
CGROUP_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Capability:
    """Something to try; `required` tells whether a machine of CI must have it."""

    name: str
    attempt: Callable[[], object]
    required: bool = True


def _secretmem() -> None:
    os.close(memfd_secret())


def _seccomp_notification() -> None:
    failures: list[OSError] = []

    def install() -> None:
        try:
            os.close(seccomp.install_listener())
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=install)  # the filter ends with it
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _direct_map() -> None:
    with DirectMap.open():
        pass


def _qemu() -> None:
    subprocess.run([find_qemu(), "--version"], check=True, capture_output=True, timeout=30)


def _qemu_img() -> None:
    for program in ("qemu-img", "qemu-io"):
        subprocess.run([program, "--version"], check=True, capture_output=True, timeout=30)


def _loop_device() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(1 << 20)
        made = subprocess.run(["losetup", "--find", "--show", file.name], check=True, capture_output=True, text=True)
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True, capture_output=True)


def _kernel_image() -> None:
    if kernel_image.image_range() is None:
        raise OSError(errno.ENOENT, "/proc/iomem names no code, rodata and bss of the kernel's")


def _aux_ram_share() -> None:
    if not can_share_aux_ram(find_qemu(), "q35", 0):
        raise OSError(errno.ENOTSUP, "this QEMU's machines have no aux-ram-share, or RLIMIT_MEMLOCK is too small")


def _guest_kvm() -> None:
    with (KERNEL.parent / "modules/kvm-amd.ko").open("rb") as file:
        file.read(1)


def _guest_kernel() -> None:
    for path in (KERNEL, INITRD):
        with path.open("rb") as file:
            file.read(1)


def _chromium() -> None:
    with tempfile.TemporaryDirectory() as folder, browser.browser(Path(folder, "log")) as page:
        page.evaluate("1")


def _network_namespace() -> None:
    subprocess.run(["unshare", "--net", "true"], check=True, capture_output=True, timeout=30)


def _vhost_vsock() -> None:
    os.close(os.open(vhost_vsock.DEVICE, os.O_RDWR))


def _taps() -> None:
    for descriptor in in_new_network(lambda: open_tap("vmmtest")):
        os.close(descriptor)


def _iproute2() -> None:
    for argv in (["ip", "-json", "link", "show", "lo"], ["nsenter", "--version"]):
        subprocess.run(argv, check=True, capture_output=True, timeout=30)


def _virtiofsd() -> None:
    share = Share(path=Path("/"), tag="t")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(shares.usable_program(share, Path(folder), "secret", 1 << 20))


def _debootstrap() -> None:
    for argv in (["debootstrap", "--version"], ["mke2fs", "-V"], ["apt-get", "--version"]):
        subprocess.run(argv, check=True, capture_output=True, timeout=30)


def _memory_group() -> None:
    new_memory_group().rmdir()


def _systemd_analyze() -> None:
    subprocess.run(["systemd-analyze", "--version"], check=True, capture_output=True, timeout=30)


def _manual() -> None:
    for command in (["man", "--version"], ["groff", "--version"]):
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    subprocess.run(["lowdown", "-t", "man"], input=b"", check=True, capture_output=True, timeout=30)


def _libvirt() -> None:
    for program in ("/usr/sbin/libvirtd", "virsh", "virt-install"):
        subprocess.run([program, "--version"], check=True, capture_output=True, timeout=30)
    subprocess.run([sys.executable, "-c", "import libvirt"], check=True, capture_output=True, timeout=30)
    with tempfile.TemporaryDirectory() as folder:
        overlay = 'mount -t tmpfs tmpfs "$0" && mkdir "$0/upper" "$0/work" && '
        overlay += 'mount -t overlay -o "lowerdir=/etc,upperdir=$0/upper,workdir=$0/work" overlay /etc'
        alone = ["unshare", "--mount", "--propagation", "private", "--"]
        subprocess.run([*alone, "sh", "-c", overlay, folder], check=True, capture_output=True, timeout=30)


def _polkit() -> None:
    subprocess.run(["dbus-daemon", "--version"], check=True, capture_output=True, timeout=30)
    subprocess.run(["/usr/lib/polkit-1/polkitd", "--help"], check=True, capture_output=True, timeout=30)
    for name in ("polkitd", "messagebus"):
        pwd.getpwnam(name)


SECRETMEM = Capability("memfd_secret(2)", _secretmem)
SECCOMP_NOTIFICATION = Capability("seccomp user notification", _seccomp_notification)
DIRECT_MAP = Capability("BPF programs, and frame numbers in pagemap", _direct_map)
QEMU = Capability("QEMU", _qemu)
QEMU_IMG = Capability("qemu-img and qemu-io (Debian's qemu-utils)", _qemu_img)
LOOP_DEVICE = Capability("a loop device", _loop_device, required=False)
AUX_RAM_SHARE = Capability("a QEMU whose other RAM blocks can be secret", _aux_ram_share, required=False)
GUEST_KERNEL = Capability("the demo guest's kernel and initrd (./dev makes them)", _guest_kernel)
GUEST_KVM = Capability(
    "the guest kernel's kvm-amd.ko (./dev gets it; x86-64)", _guest_kvm, required=platform.machine() == "x86_64"
)
KERNEL_IMAGE = Capability(
    "a kernel whose image has a mapping of its own (x86-64)", _kernel_image, required=platform.machine() == "x86_64"
)
CHROMIUM = Capability("a headless Chromium (Debian's chromium-headless-shell)", _chromium)
SYSTEMD_ANALYZE = Capability("systemd-analyze (Debian's systemd)", _systemd_analyze)
MANUAL = Capability("lowdown, man and groff (Debian's lowdown, man-db, groff-base)", _manual)
NETWORK_NAMESPACE = Capability("a network namespace of our own", _network_namespace)
VHOST_VSOCK = Capability("/dev/vhost-vsock", _vhost_vsock, required=False)
TAPS = Capability("/dev/net/tun, and the right to make taps", _taps)
IPROUTE2 = Capability("ip (iproute2) and nsenter (util-linux)", _iproute2)
VIRTIOFSD = Capability("a virtiofsd that can map secret RAM (QEMU 7.2's)", _virtiofsd, required=False)
DEBOOTSTRAP = Capability("debootstrap, apt and mke2fs (Debian's e2fsprogs)", _debootstrap)
LIBVIRT = Capability(
    "libvirtd, virsh, virt-install, libvirt-python, and overlayfs in a mount namespace of our own (./dev test installs "
    "them)",
    _libvirt,
)
POLKIT = Capability("polkitd and dbus-daemon, with their users (./dev test installs them)", _polkit)
MEMORY_GROUP = Capability("a memory cgroup of our own", _memory_group, required=False)


def require(capability: Capability) -> None:
    """Skip the test that asks, or fail it where CI must have this, unless the machine is capable."""
    if problem := _problem(capability):
        message = f"needs {capability.name}: {problem}"
        if capability.required and os.environ.get("CI") == "true":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


def has(capability: Capability) -> bool:
    """Tell whether the machine is capable."""
    return not _problem(capability)


@functools.cache
def _problem(capability: Capability) -> str:
    try:
        capability.attempt()
    except VmmbackError as error:
        return f"{error.message} ({error.hint})"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


def new_memory_group() -> Path:
    """Return the folder of a new memory cgroup, of version 1 where that has the controller. Raises OSError."""
    if (CGROUP_V1 / "memory.limit_in_bytes").exists():
        return Path(tempfile.mkdtemp(prefix="vmmback-test-", dir=CGROUP_V1))
    if "memory" not in (CGROUP_V2 / "cgroup.subtree_control").read_text().split():
        (CGROUP_V2 / "cgroup.subtree_control").write_text("+memory")
    return Path(tempfile.mkdtemp(prefix="vmmback-test-", dir=CGROUP_V2))
