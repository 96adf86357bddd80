"""A guest's vsock device: sockets between the guest and programs of the host, by the kernel's vhost-vsock."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmmback.command import Device
from vmmback.errors import HostUnfit
from vmmback.linux import vhost_vsock
from vmmback.linux.vhost_vsock import DEVICE
from vmmback.report import Exposure


@contextmanager
def opened(cid: int, path: Path = DEVICE) -> Iterator[Device]:
    """Open the device for a guest with this address; QEMU needs no path and no right of its own.

    Our copy is closed on exit; the address is the guest's as long as anyone has one. Raises HostUnfit.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostUnfit(
            f"[vsock] needs {path}, which cannot be opened: {error.strerror}",
            "load the kernel's module by `modprobe vhost_vsock` (in a container, on its host, and pass the device in); "
            "or remove [vsock]",
        ) from error
    try:
        _claim(descriptor, cid, path)
        yield Device(
            argv=("-device", f"vhost-vsock-pci,id=vsock0,guest-cid={cid},vhostfd={descriptor}"),
            descriptors=(descriptor,),
            exposures=(
                Exposure(
                    name="vsock",
                    holders="the host kernel, root, whom the guest talks to",
                    detail=f"cid {cid}: what the guest sends and receives passes socket buffers in ordinary memory; a "
                    "kernel thread (vhost) fetches it from the guest's RAM and puts it there, by QEMU's page tables",
                ),
            ),
        )
    finally:
        os.close(descriptor)


def _claim(descriptor: int, cid: int, path: Path) -> None:
    """Take the address now, for a clearer error than QEMU's, which takes it again by the same descriptor."""
    try:
        vhost_vsock.set_guest_cid(descriptor, cid)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise HostUnfit(
                f"[vsock] cid {cid} is another guest's on this host", "write another cid, which is free"
            ) from error
        raise HostUnfit(
            f"{path} does not take the address {cid}: {error.strerror}", "is it the device of vhost_vsock?"
        ) from error
