"""What memory this host has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmmback.errors import AdmissionRefused
from vmmback.linux import procfs


@dataclass(frozen=True)
class HostMemory:
    """Memory of the host in bytes: all of it, and what can be had without swapping (MemAvailable of meminfo)."""

    total: int
    available: int

    @classmethod
    def read(cls, root: Path = procfs.PROC) -> HostMemory:
        """Read /proc/meminfo."""
        counters = procfs.meminfo(root)
        return cls(counters["MemTotal"], counters["MemAvailable"])

    @property
    def reserve(self) -> int:
        """Bytes that no guest gets: secret RAM can be neither swapped nor moved, and the host must live beside it."""
        return max(128 << 20, self.total // 50)

    @property
    def largest_guest(self) -> int:
        """Size in bytes of the largest guest that fits now."""
        return max(0, self.available - self.reserve) >> 20 << 20

    def admit(self, size: int) -> None:
        """Raise AdmissionRefused, with the numbers, unless `size` bytes of RAM fit."""
        if size > self.largest_guest:
            smaller = f"set [memory] size to at most {self.largest_guest >> 20}MiB, or " if self.largest_guest else ""
            raise AdmissionRefused(
                f"{size >> 20} MiB of RAM do not fit: {self.available >> 20} MiB are available, and "
                f"{self.reserve >> 20} MiB of them stay with the host",
                f"{smaller}free memory on the host",
            )
