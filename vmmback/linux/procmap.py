"""The shared file mappings of a process, asked for one by one instead of read as text, which takes ten times as long.

Source: PROCMAP_QUERY of include/uapi/linux/fs.h and do_procmap_query() of fs/proc/task_mmu.c (Linux 6.11).
"""

from __future__ import annotations

import errno
import fcntl
import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

# size, flags, address; start, end, flags, page size, offset, inode; device, name size, build id size; their addresses.
_QUERY = struct.Struct("=9Q4I2Q")
_PROCMAP_QUERY = 3 << 30 | _QUERY.size << 16 | ord("f") << 8 | 17
_SHARED, _COVERING_OR_NEXT, _FILE_BACKED = 0x08, 0x10, 0x20
_PATH_MAX = 4096  # include/uapi/linux/limits.h; a longer path is an error of d_path()


class SharedFile(NamedTuple):
    """A VMA, [start, end) in bytes, that maps a file as shared: the file's inode and path as in proc_pid_maps(5)."""

    start: int
    end: int
    inode: int
    path: bytes


def shared_files(maps: int) -> Iterator[SharedFile]:
    """Yield those of the process whose /proc/PID/maps the descriptor is; none for a process without memory.

    Raises OSError: ENOTTY where the kernel cannot do it.
    """
    name = array("B", bytes(_PATH_MAX))
    name_at, _ = name.buffer_info()
    end = 0
    while True:
        flags = _SHARED | _FILE_BACKED | _COVERING_OR_NEXT
        query = bytearray(_QUERY.pack(_QUERY.size, flags, end, 0, 0, 0, 0, 0, 0, 0, 0, _PATH_MAX, 0, name_at, 0))
        try:
            fcntl.ioctl(maps, _PROCMAP_QUERY, query)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):  # no more of them; it has ended, or is the kernel's own
                return
            raise
        _, _, _, start, end, _, _, _, inode, _, _, name_size, _, _, _ = _QUERY.unpack(query)
        yield SharedFile(start, end, inode, name[: max(name_size - 1, 0)].tobytes())
