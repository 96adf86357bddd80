"""A file whose server never answers some requests: who needs the answer waits, and not even SIGKILL ends him.

The server is a child of the caller's, for a file system of FUSE in a mount namespace of the caller's own. Source:
include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Collection
from pathlib import Path

from vmmback.linux import namespaces

READ, FLUSH = 15, 25
_GETATTR, _OPEN, _INIT = 3, 14, 26
_LONGEST_S = 60
_FILE_BYTES = 1 << 20
_MOST_BYTES = 1 << 12  # of what is read or written at a time
_ANSWERS = {
    _INIT: struct.pack("IIIIHHII", 7, 31, _MOST_BYTES, 0, 12, 9, _MOST_BYTES, 1).ljust(64, b"\0"),
    _GETATTR: struct.pack("QII6Q10I", 1000, 0, 0, 1, _FILE_BYTES, 8, *[0] * 6, 0o100666, 1, 0, 0, 0, _MOST_BYTES, 0),
    _OPEN: struct.pack("QII", 1, 0, 0),
}


def mount(place: Path, silent: Collection[int]) -> int:
    """Put such a file at `place`, a file, for this process and its children; return the pid of its server."""
    namespaces.unshare(namespaces.NEWNS)
    namespaces.stop_propagation()
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=100000,user_id=0,group_id=0,allow_other"
    namespaces.mount_new("fuse", place, namespaces.NOSUID | namespaces.NODEV, options)
    server = os.fork()
    if not server:
        _serve(device, silent)
    os.close(device)
    return server


def _serve(device: int, silent: Collection[int]) -> None:
    signal.alarm(_LONGEST_S)  # should the test fail, nobody waits for ever
    while True:
        request = os.read(device, 1 << 16)
        _, opcode, unique = struct.unpack_from("IIQ", request)
        if opcode in silent or opcode == 2:  # FORGET has no answer
            continue
        answer = _ANSWERS.get(opcode)
        problem = 0 if answer is not None else -errno.ENOSYS
        os.write(device, struct.pack("IiQ", 16 + len(answer or b""), problem, unique) + (answer or b""))
