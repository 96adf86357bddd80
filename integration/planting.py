"""What tests of the hunt plant: needles that no ordinary memory holds but where they are planted.

Anything else is a true hit. So a needle is the XOR of two halves, made byte by byte.
"""

from __future__ import annotations

import mmap
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vmmback.isolation.needle import Needle
from vmmback.linux import procfs
from vmmback.linux.memfd_secret import address_of

PFN_MASK = (1 << 55) - 1
MIB = 1 << 20

# What another process does: it makes the needle in memory of its own, tells so, and waits. argv: the halves, MiB.
CHILD = """
import mmap, sys
halves = bytes.fromhex(sys.argv[1]), bytes.fromhex(sys.argv[2])
memory = mmap.mmap(-1, int(sys.argv[3]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for start in range(0, len(memory), mmap.PAGESIZE):
    for index, (a, b) in enumerate(zip(*halves)):
        memory[start + index] = a ^ b
    if start == 16 * mmap.PAGESIZE:
        break
size = min(len(memory), 16 * mmap.PAGESIZE)
for start in range(size, len(memory), size):
    memory[start : start + size] = memory[:size]
print(flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Halves:
    """What a needle is the XOR of."""

    a: bytes
    b: bytes

    @classmethod
    def new(cls, size: int = 64) -> Halves:
        return cls(secrets.token_bytes(size), secrets.token_bytes(size))

    def __iter__(self) -> Iterator[int]:
        return (a ^ b for a, b in zip(self.a, self.b, strict=True))

    def needle(self) -> Needle:
        return Needle.xor(self.a, self.b)

    def put(self, memory: mmap.mmap, at: int = 0) -> None:
        for index, value in enumerate(self, at):
            memory[index] = value

    def write(self, descriptor: int) -> None:
        """Write it byte by byte: a buffer that has it as a whole would be found."""
        for value in self:
            os.write(descriptor, bytes([value]))


def frames_of(memory: mmap.mmap) -> list[int]:
    return [entry & PFN_MASK for entry in procfs.pagemap("self", address_of(memory), len(memory))]


@contextmanager
def private_memory(size: int) -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(size)
        yield memory


@contextmanager
def other_process(halves: Halves, size: int) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", CHILD, halves.a.hex(), halves.b.hex(), str(size)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()
