"""Known holes: what the owner of the memory gives away itself. The kernel copies for it through its own mapping."""

from __future__ import annotations

import os
import socket
import warnings

from vmmback.isolation.pinning import pipe
from vmmback.isolation.specimen import CallProbe, Specimen
from vmmback.linux.memory import PAGE_SIZE

_OWNER = "the process itself (QEMU), and who makes it do so"


class OwnerWriteProbe(CallProbe):
    """write(2) of the memory: how QEMU writes a guest's blocks to a disk that is not open with O_DIRECT."""

    name = "owner-write"
    vector = "write(2) of the memory to a pipe, by the process that maps it"
    source = "lib/iov_iter.c, copy_page_from_iter: a copy through the process's own mapping; write(2)"
    holders = _OWNER

    def reach(self, place: Specimen) -> str:
        with pipe() as (read_end, write_end), memoryview(place.memory) as view:
            os.write(write_end, view[:PAGE_SIZE])
            return "the owner wrote the canary out" if place.holds(os.read(read_end, PAGE_SIZE)) else ""


class OwnerSendProbe(CallProbe):
    """send(2) of the memory: how QEMU sends a guest's packets."""

    name = "owner-send"
    vector = "send(2) of the memory on a socket, by the process that maps it"
    source = "net/core/datagram.c, skb_copy_datagram_from_iter: a copy through the process's own mapping; send(2)"
    holders = _OWNER

    def reach(self, place: Specimen) -> str:
        ends = socket.socketpair()
        with ends[0] as sender, ends[1] as receiver, memoryview(place.memory) as view:
            sent = sender.send(view[:PAGE_SIZE])
            return "the owner sent the canary out" if place.holds(receiver.recv(sent)) else ""


class ForkProbe(CallProbe):
    """fork(2): the child has the mapping too, and whatever code it goes on to run without execve(2)."""

    name = "fork"
    vector = "fork(2): the child reads the memory through the mapping that it inherits"
    source = "kernel/fork.c, dup_mmap: shared mappings are inherited, save after MADV_DONTFORK; fork(2)"
    holders = "children of the process (QEMU's -sandbox spawn=deny allows none)"

    def reach(self, place: Specimen) -> str:
        with pipe() as (read_end, write_end):
            with warnings.catch_warnings():
                # Python 3.12 and later warn of threads whose locks the child inherits; this one takes none.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                try:
                    os.write(write_end, place.memory[:PAGE_SIZE])
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            return "the child read the canary" if place.holds(os.read(read_end, PAGE_SIZE)) else ""
