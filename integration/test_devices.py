"""Virtio devices of a guest on secret RAM: they work, and what they open is named."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from integration import capabilities
from integration.conftest import Backing, Start
from integration.task_guest import guest_file as task_guest_file
from integration.task_guest import printed, task_guest
from vmmback import vsock
from vmmback.errors import HostUnfit
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


# --- Vsock ------------------------------------------------------------------------------------------------------------

VSOCK = "[vsock]\ncid = 4242\n"


def test_a_guest_with_a_vsock_is_refused_where_the_host_has_none(tmp_path: Path, vmmback: Start) -> None:
    if capabilities.has(capabilities.VHOST_VSOCK):
        pytest.skip("this host has vhost-vsock")
    ended = vmmback("launch", task_guest_file(tmp_path, "", VSOCK)).ended()
    assert ended.code == 3
    assert ended.has_one_error()
    assert "[vsock] needs /dev/vhost-vsock" in ended.stderr
    assert "modprobe vhost_vsock" in ended.stderr


def test_a_guest_talks_to_the_host_over_vsock(tmp_path: Path) -> None:
    capabilities.require(capabilities.VHOST_VSOCK)
    with task_guest(tmp_path, "", VSOCK) as live:
        live.start()
        with pytest.raises(HostUnfit, match=r"\[vsock\] cid 4242 is another guest's"), vsock.opened(4242):
            pass
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            with pytest.raises(ConnectionResetError):  # the guest's kernel answers: nobody listens on that port
                client.connect((4242, 1))
        found = live.run(live.guest.examine())
        assert found.verdict is GuestVerdict.ISOLATED, found.reasons
        assert "vsock" in {exposure.name for exposure in found.exposures}
