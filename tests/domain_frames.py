"""Records of where a domain's RAM lies, as the broker writes them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping

from vmmback.libvirt import records
from vmmback.linux import page_file


def write_frames(uuid: str, pid: int, frames: Mapping[int, array[int]]) -> None:
    """Write the pagemap entries of a run, by inode."""
    files = {inode: page_file.sealed(entries) for inode, entries in frames.items()}
    try:
        folder = records.new_frames(uuid)
        records.write_frames(folder, files)
        records.name_frames(folder, uuid, pid)
    finally:
        for file in files.values():
            os.close(file)
