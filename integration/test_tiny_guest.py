"""The tiny guest under plain QEMU with ordinary memory: what it promises to the tests that use it."""

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmmback.tiny_guest import READY, Halves, canary, filled_ranges, new_halves, rom

MIB = 1 << 20
DEADLINE_S = 20.0


class PlainQemu:
    """A QEMU without vmmback: its serial port on a pipe, QMP on a socket."""

    def __init__(self, process: "subprocess.Popen[bytes]", monitor: socket.socket) -> None:
        self._process = process
        self._monitor = monitor
        self._answers = monitor.makefile("rb")
        json.loads(self._answers.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._answers.readline())
            if "event" not in answer:
                return answer["return"]

    def read_until(self, end: bytes, timeout_s: float = DEADLINE_S) -> bytes:
        """What comes from the serial port, up to and with `end`."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        output = b""
        while end not in output:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise TimeoutError(f"no {end!r} from the serial port in {timeout_s} s, only {output[-2000:]!r}")
            data = os.read(self._process.stdout.fileno(), 65536)
            assert data, f"QEMU ended after {output[-2000:]!r}"
            output += data
        return output

    def wait(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def dump(self, path: Path, start: int, end: int) -> bytes:
        self.execute("pmemsave", val=start, size=end - start, filename=str(path))
        data = path.read_bytes()
        path.unlink()
        return data

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._answers.close()


@contextmanager
def plain_qemu(ram_bytes: int, *options: str) -> Iterator[PlainQemu]:
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_S)
    argv = [
        "qemu-system-x86_64",
        *("-machine", "q35"),
        *("-accel", "tcg"),
        *("-m", f"{ram_bytes // MIB}M"),
        *("-display", "none"),
        *("-vga", "none"),
        *("-serial", "stdio"),
        *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
        *("-mon", "chardev=qmp,mode=control"),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        *options,
    ]
    with ours, theirs:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()], bufsize=0
        )
        with process:
            try:
                theirs.close()
                qemu = PlainQemu(process, ours)
                try:
                    yield qemu
                finally:
                    qemu.close()
            finally:
                process.kill()
                process.wait(DEADLINE_S)


@contextmanager
def tiny_guest(image: bytes, folder: Path, ram_bytes: int) -> Iterator[PlainQemu]:
    (folder / "tiny.rom").write_bytes(image)
    with plain_qemu(ram_bytes, "-bios", str(folder / "tiny.rom")) as qemu:
        yield qemu


def assert_filled(qemu: PlainQemu, folder: Path, halves: Halves, ranges: list[tuple[int, int]]) -> None:
    secret = canary(halves)
    for start, end in ranges:
        expected = secret * ((end - start) // len(secret))
        assert qemu.dump(folder / "memory", start, end) == expected, f"not filled: {start:#x} to {end:#x}"


@pytest.mark.parametrize("ram_mib", [16, 64, 300])
def test_ready_means_that_all_ram_consists_of_the_canary(tmp_path: Path, ram_mib: int) -> None:
    halves = new_halves()
    with tiny_guest(rom(halves), tmp_path, ram_mib * MIB) as qemu:
        assert qemu.read_until(READY) == READY
        assert_filled(qemu, tmp_path, halves, filled_ranges(ram_mib * MIB))


def test_fill_bytes_is_where_filling_ends(tmp_path: Path) -> None:
    halves = new_halves()
    with tiny_guest(rom(halves, fill_bytes=20 * MIB), tmp_path, 64 * MIB) as qemu:
        assert qemu.read_until(READY) == READY
        assert_filled(qemu, tmp_path, halves, filled_ranges(20 * MIB))
        assert not any(qemu.dump(tmp_path / "memory", 20 * MIB, 64 * MIB))


def test_without_fill_no_ram_is_touched(tmp_path: Path) -> None:
    with tiny_guest(rom(fill=False), tmp_path, 64 * MIB) as qemu:
        assert qemu.read_until(READY) == READY
        assert not any(qemu.dump(tmp_path / "memory", 0, 0xA0000))
        assert not any(qemu.dump(tmp_path / "memory", MIB, 64 * MIB))


def test_after_ready_it_is_silent_and_costs_no_cpu(tmp_path: Path) -> None:
    with tiny_guest(rom(fill=False), tmp_path, 64 * MIB) as qemu:
        assert qemu.read_until(READY) == READY
        before = qemu.cpu_seconds()
        with pytest.raises(TimeoutError, match="only b''"):
            qemu.read_until(b"more", timeout_s=0.5)
        assert qemu.cpu_seconds() - before < 0.2
        assert qemu.execute("query-status")["status"] == "running"
