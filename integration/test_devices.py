"""Virtio devices of a guest on secret RAM: they work, and what they open is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.conftest import Backing
from integration.task_guest import printed, task_guest
from vmmback.report import GuestVerdict

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_guest_kernel")

RNG = """\
echo "rng: $(cat /sys/class/misc/hw_random/rng_current)"
echo "random: $(head -c 32 /dev/hwrng | hexdump -v -e '1/1 "%02x"')"
"""


def test_every_guest_has_random_numbers_of_the_hosts_and_no_two_have_the_same(tmp_path: Path) -> None:
    seen = set()
    kinds: tuple[Backing, ...] = ("secret", "ordinary")
    for backing in kinds:
        with task_guest(tmp_path, RNG, backing=backing) as live:
            live.start()
            assert printed(live, "rng: ") == "virtio_rng.0"
            numbers = bytes.fromhex(printed(live, "random: "))
            assert len(numbers) == 32
            assert len(set(numbers)) > 8  # 30 different ones, or so, in 32 random bytes
            seen.add(numbers)
            if backing == "secret":  # the device has no memory of its own that the guest could write to
                found = live.run(live.guest.examine())
                assert found.verdict is GuestVerdict.ISOLATED, found.reasons
    assert len(seen) == 2
