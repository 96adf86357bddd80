"""Probes that let the kernel pin a specimen's pages and use them by itself: for disks, networks and rings.

All of them end in pin_user_pages or get_user_pages, which refuse a secretmem mapping (mm/gup.c, check_vma_flags).
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from vmmback.isolation.probe import Missing, Reading, Target
from vmmback.isolation.specimen import CallProbe, Specimen, SpecimenProbe, require
from vmmback.linux import aio, kvm, memory, xdp
from vmmback.linux.io_uring import Ring, rings_in
from vmmback.linux.memory import PAGE_SIZE
from vmmback.linux.network import LOOPBACK, in_new_network
from vmmback.report import Verdict

_GUP = "mm/gup.c, check_vma_flags: EFAULT for secretmem"
_CAME_THROUGH = "the canary came through"

# socket(7) and msg_zerocopy.rst of the kernel; Python's socket module has no names for them.
_SO_ZEROCOPY, _MSG_ZEROCOPY = 60, 0x4000000
_TIMEOUT_S = 2.0

_ETHERTYPE = 0x88B5  # IEEE 802: for local experiments


class _PinProbe(CallProbe):
    refusals = frozenset({errno.EFAULT})


class _DirectProbe(_PinProbe):
    """Needs a file system that leaves the page cache out when asked to; tmpfs takes the flag, and copies."""

    def require(self) -> None:
        with self._file():
            pass

    @contextmanager
    def _file(self) -> Iterator[int]:
        """Yield a scratch file without a name, open for direct I/O, that holds one page of zeroes. Raises Missing."""
        for folder in _folders():
            try:
                descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
            except OSError:  # cannot hold such files; the next one perhaps can
                continue
            try:
                if _is_direct(descriptor):
                    yield descriptor
                    return
            finally:
                os.close(descriptor)
        raise Missing(f"file system with direct I/O (O_DIRECT, O_TMPFILE) among {', '.join(_folders())}")


def _folders() -> Sequence[str]:
    return tempfile.gettempdir(), "/var/tmp", str(Path.home()), "/"  # noqa: S108 (nothing there gets a name)


def _is_direct(descriptor: int) -> bool:
    """Write a page of ordinary memory, and tell whether the page cache was left out."""
    with mmap.mmap(-1, PAGE_SIZE) as page:
        try:
            os.pwrite(descriptor, page, 0)
        except OSError:
            return False
    with mmap.mmap(descriptor, PAGE_SIZE) as mapped:
        return memory.mincore(memory.address_of(mapped), PAGE_SIZE) == (False,)


def _contents(descriptor: int) -> bytes:
    """Read a file's first page by direct I/O into memory of our own."""
    with mmap.mmap(-1, PAGE_SIZE) as page:
        return page[: os.preadv(descriptor, [page], 0)]


class DirectWriteProbe(_DirectProbe):
    """write(2) to a file that is open with O_DIRECT: the disk reads the pages."""

    name = "direct-io-write"
    vector = "write(2) of the memory to a file opened with O_DIRECT"
    source = f"block/bio.c, bio_iov_iter_get_pages; {_GUP}; open(2)"

    def reach(self, place: Specimen) -> str:
        with self._file() as file:
            with memoryview(place.memory) as view:
                os.pwrite(file, view[:PAGE_SIZE], 0)
            return _CAME_THROUGH if place.holds(_contents(file)) else ""


class DirectReadProbe(_DirectProbe):
    """read(2) from a file that is open with O_DIRECT: the disk writes into the pages."""

    name = "direct-io-read"
    vector = "read(2) into the memory from a file opened with O_DIRECT"
    source = f"block/bio.c, bio_iov_iter_get_pages; {_GUP}; open(2)"

    def reach(self, place: Specimen) -> str:
        with self._file() as file, mmap.mmap(-1, PAGE_SIZE) as page:
            page[:] = other = os.urandom(PAGE_SIZE)
            os.pwrite(file, page, 0)
            with memoryview(place.memory) as view:
                os.preadv(file, [view[:PAGE_SIZE]], 0)
            return "the disk wrote into the memory" if place.memory[:PAGE_SIZE] == other else ""


class AioDirectProbe(_DirectProbe):
    """The same by the kernel's asynchronous I/O, as QEMU's aio=native does it."""

    name = "aio-direct"
    vector = "io_submit(2) of a write from the memory to a file opened with O_DIRECT"
    source = f"fs/aio.c, aio_write; {_GUP}; io_submit(2)"

    def reach(self, place: Specimen) -> str:
        with self._file() as file:
            aio.write(file, place.address, PAGE_SIZE)
            return _CAME_THROUGH if place.holds(_contents(file)) else ""


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Yield the ends of a pipe, to read from and to write to; neither waits."""
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


class VmspliceProbe(_PinProbe):
    """vmsplice(2): the pipe holds the pages themselves."""

    name = "vmsplice"
    vector = "vmsplice(2) of the memory into a pipe"
    source = f"fs/splice.c, iter_to_pipe; {_GUP}; vmsplice(2)"
    gift: ClassVar[bool] = False

    def reach(self, place: Specimen) -> str:
        with pipe() as (read_end, write_end):
            memory.vmsplice(write_end, place.address, PAGE_SIZE, gift=self.gift)
            return _CAME_THROUGH if place.holds(os.read(read_end, PAGE_SIZE)) else ""


class VmspliceGiftProbe(VmspliceProbe):
    """vmsplice(2) with SPLICE_F_GIFT: the pages are given away, so that the kernel may move them to a page cache."""

    name = "vmsplice-gift"
    vector = "vmsplice(2) with SPLICE_F_GIFT"
    gift = True


class IoUringFixedProbe(_PinProbe):
    """io_uring's fixed buffers stay pinned as long as the ring lives."""

    name = "io-uring-fixed-buffer"
    vector = "io_uring: the memory is registered as a fixed buffer and written to a pipe"
    source = f"io_uring/rsrc.c, io_pin_pages; {_GUP}; io_uring_register(2)"

    def require(self) -> None:
        require(Ring.open, "io_uring")

    def reach(self, place: Specimen) -> str:
        with Ring.open() as ring, pipe() as (read_end, write_end):
            ring.register_buffer(place.address, place.ram.size)
            ring.write_fixed(write_end, place.address, PAGE_SIZE)
            return _CAME_THROUGH if place.holds(os.read(read_end, PAGE_SIZE)) else ""


class IoUringRingProbe(_PinProbe):
    """With IORING_SETUP_NO_MMAP the kernel keeps its own rings in a process's memory."""

    name = "io-uring-ring"
    vector = "io_uring with IORING_SETUP_NO_MMAP: the kernel keeps its rings in the memory"
    source = f"io_uring/memmap.c, io_pin_pages; {_GUP}; io_uring_setup(2)"

    def require(self) -> None:
        with mmap.mmap(-1, 2 * PAGE_SIZE) as pages:
            address = memory.address_of(pages)
            require(lambda: rings_in(address, address + PAGE_SIZE), "io_uring with IORING_SETUP_NO_MMAP")

    def reach(self, place: Specimen) -> str:
        with rings_in(place.address, place.address + PAGE_SIZE) as count_at:
            at = count_at - place.address
            return "the kernel wrote its ring into the memory" if place.memory[at : at + 4] == b"\1\0\0\0" else ""


class ZerocopySendProbe(_PinProbe):
    """send(2) with MSG_ZEROCOPY: the network's buffers refer to the pages."""

    name = "msg-zerocopy"
    vector = "send(2) of the memory with MSG_ZEROCOPY on a TCP connection"
    source = f"net/core/datagram.c, zerocopy_fill_skb_from_iter; {_GUP}; msg_zerocopy.rst"

    def require(self) -> None:
        require(_zerocopy_connection, "TCP over loopback with SO_ZEROCOPY")

    def reach(self, place: Specimen) -> str:
        with _zerocopy_connection() as (client, server):
            with memoryview(place.memory) as view:
                sent = client.send(view[:PAGE_SIZE], _MSG_ZEROCOPY)
            return _CAME_THROUGH if place.holds(server.recv(sent, socket.MSG_WAITALL)) else ""


@contextmanager
def _zerocopy_connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield the two ends of a TCP connection over loopback. Raises OSError."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        listener.settimeout(_TIMEOUT_S)
        with socket.create_connection(listener.getsockname(), _TIMEOUT_S) as client:
            server, peer = listener.accept()
            with server:
                if peer != client.getsockname():  # somebody else was quicker
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "a stranger connected")
                client.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
                server.settimeout(_TIMEOUT_S)
                yield client, server


class XdpMemoryProbe(_PinProbe):
    """AF_XDP: the network card's driver takes packets from the memory. One frame goes out, to loopback.

    A queue of an interface serves one such socket, so the loopback is one of its own, in a new network namespace.
    """

    name = "af-xdp-umem"
    vector = "AF_XDP: the memory is registered (XDP_UMEM_REG), and a frame sent from it over loopback"
    source = f"net/xdp/xdp_umem.c, xdp_umem_pin_pages: EFAULT; {_GUP}; af_xdp.rst"
    _FRAME_BYTES: ClassVar[int] = 1024

    def require(self) -> None:
        require(xdp.open_socket, "AF_XDP (CONFIG_XDP_SOCKETS, CAP_NET_RAW)")
        require(
            lambda: in_new_network(_loopback_listener), "network namespace with AF_PACKET (CAP_SYS_ADMIN, CAP_NET_RAW)"
        )

    def reach(self, place: Specimen) -> str:
        return in_new_network(lambda: self._reach(place))

    def _reach(self, place: Specimen) -> str:
        header = bytes(12) + _ETHERTYPE.to_bytes(2, "big")
        place.memory[: len(header)] = header
        with xdp.open_socket() as sender, _loopback_listener() as listener:
            xdp.register_memory(sender, place.address, place.ram.size)
            xdp.send(sender, LOOPBACK, self._FRAME_BYTES)
            frame = listener.recv(self._FRAME_BYTES)
            return _CAME_THROUGH if frame[len(header) :] == place.canary_at(len(header), self._FRAME_BYTES) else ""


def _loopback_listener() -> socket.socket:
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE))
    try:
        listener.bind((LOOPBACK, _ETHERTYPE))
        listener.settimeout(_TIMEOUT_S)
    except BaseException:
        listener.close()
        raise
    return listener


class KvmSlotProbe(SpecimenProbe):
    """KVM maps the memory into a tiny guest (linux/kvm.py tells how that is found out), which runs in a child."""

    name = "kvm-slot"
    vector = "KVM maps the memory into a guest, which runs a few instructions on it"
    source = f"virt/kvm/kvm_main.c, hva_to_pfn: KVM_RUN gives EFAULT; {_GUP}"
    size = kvm.SLOT_BYTES
    _DEADLINE_S: ClassVar[float] = 2.0

    def control(self, target: Target) -> Specimen:
        place = super().control(target)
        run, ending = self._run(place)
        if run is None or not run.passed:
            raise Missing(f"KVM that runs a guest on ordinary memory ({run.describe() if run else ending})")
        return place

    def attempt(self, place: Specimen) -> Reading:
        run, ending = self._run(place)
        if run is None:
            return Reading(Verdict.INCONCLUSIVE, ending)
        if run.passed:
            return Reading(Verdict.READABLE, f"the guest {run.describe()}")
        # Without an error, but with no clock: instructions were emulated by copies through this process's own mapping.
        refused = run.error == errno.EFAULT or run.halted
        verdict = Verdict.BLOCKED if refused else Verdict.INCONCLUSIVE
        return Reading(verdict, run.describe(), errno.errorcode.get(run.error, ""))

    def _run(self, place: Specimen) -> tuple[kvm.SlotRun | None, str]:
        try:
            device = os.open(kvm.DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Missing(f"KVM ({kvm.DEVICE}: {error.strerror})") from error
        try:
            runs, ending = kvm.run_in_child(device, (place.ram.fileno(),), self._DEADLINE_S)
        finally:
            os.close(device)
        return (runs[0] if runs else None), ending
