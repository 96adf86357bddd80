"""/dev/vhost-vsock: the kernel's end of a guest's vsock device. Source: include/uapi/linux/vhost.h."""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path

DEVICE = Path("/dev/vhost-vsock")

_SET_GUEST_CID = 0x4008AF60  # _IOW(VHOST_VIRTIO, 0x60, __u64)


def set_guest_cid(descriptor: int, cid: int) -> None:
    """Give the guest of this descriptor an address. Raises OSError: EADDRINUSE while another guest has it."""
    fcntl.ioctl(descriptor, _SET_GUEST_CID, struct.pack("=Q", cid))
