"""The demo guest that `./dev` builds, under plain QEMU with ordinary memory, where its RAM can be looked at."""

import hashlib
import re
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from integration.test_tiny_guest import MIB, PlainQemu, plain_qemu

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "configs/demo.toml").read_text())
RAM_BYTES = 256 * MIB
BOOT_DEADLINE_S = 60.0
POWERDOWN_DEADLINE_S = 30.0


@contextmanager
def demo_guest(cmdline: str = CONFIG["boot"]["cmdline"]) -> Iterator[PlainQemu]:
    boot = {key: ROOT / "configs" / CONFIG["boot"][key] for key in ("kernel", "initrd")}
    with plain_qemu(
        RAM_BYTES,
        *("-cpu", CONFIG["cpu"]["model"]),
        *("-kernel", str(boot["kernel"])),
        *("-initrd", str(boot["initrd"])),
        *("-append", cmdline),
    ) as qemu:
        yield qemu


def find(pattern: str, output: bytes) -> str:
    """Return what a line of the guest's says; the kernel may begin one of its own at the end of it."""
    found = re.search(pattern, output.decode())
    assert found, output.decode()
    return found[1]


def test_most_of_ram_consists_of_a_canary_that_only_its_fingerprint_tells(tmp_path: Path) -> None:
    with demo_guest() as qemu:
        output = qemu.read_until(b"GUEST READY\r\n", BOOT_DEADLINE_S)
        memory = qemu.dump(tmp_path / "memory", 0, RAM_BYTES)
    fingerprint = find(r"\nvmmback-canary sha256:([0-9a-f]{64})\b", output)
    halves = find(r"\nvmmback-canary halves:([0-9a-f]{128}:[0-9a-f]{128})\b", output).split(":")
    filled_mib = int(find(r"\nfilled ([0-9]+) of [0-9]+ MiB of free RAM with the canary", output))
    assert filled_mib > RAM_BYTES / MIB * 0.6

    pages = [memory[start : start + 4096] for start in range(0, RAM_BYTES, 4096)]
    canaries = {page[:64] for page in pages if page[:64] * 64 == page and any(page)}
    mine = [canary for canary in canaries if hashlib.sha256(canary).hexdigest() == fingerprint]
    assert len(mine) == 1
    assert re.fullmatch(rb"[0-9a-f]{64}", mine[0])
    assert mine[0] not in output
    assert bytes(a ^ b for a, b in zip(*map(bytes.fromhex, halves), strict=True)) == mine[0]
    assert pages.count(mine[0] * 64) >= filled_mib * MIB / 4096


def test_each_boot_has_its_own_canary_and_the_power_button_ends_it() -> None:
    seen = set()
    for _ in range(2):
        with demo_guest() as qemu:
            output = qemu.read_until(b"GUEST READY\r\n", BOOT_DEADLINE_S)
            seen.add(find(r"\nvmmback-canary sha256:([0-9a-f]{64})\b", output))
            qemu.execute("system_powerdown")
            assert qemu.wait(POWERDOWN_DEADLINE_S) == 0
    assert len(seen) == 2


def test_the_power_button_works_while_ram_is_being_filled() -> None:
    with demo_guest() as qemu:
        output = qemu.read_until(b"vmmback-canary", BOOT_DEADLINE_S)
        qemu.execute("system_powerdown")
        assert qemu.wait(POWERDOWN_DEADLINE_S) == 0
    assert b"GUEST READY" not in output


def test_a_button_pressed_again_and_again_from_the_first_moment_on_ends_it() -> None:
    # QEMU forgets a press for as long as the guest's driver has not enabled the button, so one is not enough.
    with demo_guest() as qemu:
        deadline = time.monotonic() + BOOT_DEADLINE_S
        status = None
        while status is None:
            assert time.monotonic() < deadline, "the guest ignores its power button"
            with suppress(OSError, ValueError):  # the guest has just powered off
                qemu.execute("system_powerdown")
            with suppress(subprocess.TimeoutExpired):
                status = qemu.wait(timeout_s=0.02)
        assert status == 0


def test_a_crash_of_the_guest_ends_qemu_instead_of_hanging() -> None:
    # Linux runs this program instead of /init, and panics as soon as it has ended.
    with demo_guest(f"{CONFIG['boot']['cmdline']} rdinit=/bin/false") as qemu:
        qemu.read_until(b"Kernel panic", BOOT_DEADLINE_S)
        assert qemu.wait(POWERDOWN_DEADLINE_S) == 0


def test_control_toml_is_demo_toml_on_ordinary_memory_but_for_what_it_marks() -> None:
    control = tomllib.loads((ROOT / "configs/control.toml").read_text())
    assert control.pop("name") == "control"
    assert control["memory"].pop("backing") == "ordinary"
    assert control["isolation"].pop("on-exposed") == "warn"
    demo = tomllib.loads((ROOT / "configs/demo.toml").read_text())
    assert demo.pop("name") == "demo"
    assert demo["isolation"].pop("on-exposed") == "kill"
    assert control == demo


def test_a_second_set_up_has_nothing_to_do(tmp_path: Path) -> None:
    # A ./dev reached by a symlink, from another folder, which then asks vmmback for its help only.
    (tmp_path / "link").symlink_to(ROOT / "dev")
    done = subprocess.run(
        [tmp_path / "link", "demo", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: vmmback launch")


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_dev_shows_its_usage_for_a_wrong_command_line(arguments: list[str]) -> None:
    done = subprocess.run([ROOT / "dev", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: ./dev COMMAND" in done.stderr
