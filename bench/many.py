"""Many guests of 16 MiB in the background: how long `vmmback ps` takes, and what one more supervisor costs."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmmback import tiny_guest
from vmmback.ask import ask_all
from vmmback.linux import procfs
from vmmback.runtime import live_guests, runtime_folder

GUESTS, MORE_GUESTS = 50, 100


@dataclass(frozen=True)
class Supervisor:
    """What one supervisor takes of the host, its guest validated and running; the median of all."""

    own_bytes: float
    """Resident, and of no other process (Private of proc_pid_smaps(5))."""
    proportional_bytes: float
    """Its own, and its share of what it shares with others (Pss)."""
    resident_bytes: float
    threads: float
    descriptors: float

    def __str__(self) -> str:
        return (
            f"{self.proportional_bytes / (1 << 20):.1f} MiB with its share of others', "
            f"{self.resident_bytes / (1 << 20):.1f} MiB resident, {self.threads:g} threads, "
            f"{self.descriptors:g} descriptors"
        )


@contextmanager
def many_guests(program: str, folder: Path, count: int = GUESTS) -> Iterator[list[int]]:
    """Start them all at once; yield their supervisors' pids once all are isolated, and stop them at the end."""
    (folder / "many.rom").write_bytes(tiny_guest.rom())
    files = [folder / f"many-{number}.toml" for number in range(count)]
    for file in files:
        file.write_text(
            f'name = "{file.stem}"\n[memory]\nsize = "16MiB"\n[machine]\naccel = "tcg"\n'
            '[boot]\nfirmware = "many.rom"\n[isolation]\nready = "READY"\n'
        )
    try:
        starts = [subprocess.Popen([program, "launch", file, "--detach"], stdout=subprocess.DEVNULL) for file in files]
        assert [start.wait() for start in starts] == [0] * count
        listed = subprocess.run([program, "ps", "--json"], check=True, capture_output=True).stdout
        guests = json.loads(listed)
        assert [guest["verdict"] for guest in guests] == ["isolated"] * count
        yield [guest["pid"] for guest in guests]
    finally:
        ask_all([runtime_folder() / name for name in live_guests()], "Stop", {"kill": True}, 60)


def cost(pids: Sequence[int]) -> Supervisor:
    """Return what one of these supervisors takes."""
    status = [procfs.status(pid) for pid in pids]
    return Supervisor(
        own_bytes=statistics.median(_bytes_of(pid, "Private_Clean", "Private_Dirty") for pid in pids),
        proportional_bytes=statistics.median(_bytes_of(pid, "Pss") for pid in pids),
        resident_bytes=statistics.median(int(each["VmRSS"].removesuffix(" kB")) * 1024 for each in status),
        threads=statistics.median(int(each["Threads"]) for each in status),
        descriptors=statistics.median(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
    )


def _bytes_of(pid: int, *names: str) -> int:
    rows = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(row[1]) * 1024 for row in rows if row[0].removesuffix(":") in names)
