"""Taps: network interfaces whose other end is a descriptor. Source: Documentation/networking/tuntap.rst."""

from __future__ import annotations

import fcntl
import os
import struct

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_IFF_MULTI_QUEUE, _IFF_TUN_EXCL = 0x0100, 0x8000


def open_tap(name: str, queues: int = 1) -> list[int]:
    """Make a tap and return a descriptor for each of its queues; it goes with the last of them that is closed.

    Raises OSError: EBUSY if there is an interface of this name, EPERM without CAP_NET_ADMIN, ENOENT without the tun
    module.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    descriptors: list[int] = []
    try:
        for number in range(queues):
            descriptors.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
            # struct ifreq: a name of 16 bytes, then a union of 24, here the flags. Only the first makes the interface.
            request = struct.pack("=16sH22x", name.encode(), flags | (0 if number else _IFF_TUN_EXCL))
            fcntl.ioctl(descriptors[-1], _TUNSETIFF, request)
    except OSError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return descriptors
