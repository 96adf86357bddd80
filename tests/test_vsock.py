"""The vsock device: what is said where it cannot be had. Nothing here needs the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmback import vsock
from vmmback.errors import HostUnfit


def test_a_host_without_the_device_is_told_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit) as caught, vsock.opened(3, tmp_path / "vhost-vsock"):
        pass
    assert (
        caught.value.message
        == f"[vsock] needs {tmp_path}/vhost-vsock, which cannot be opened: No such file or directory"
    )
    assert "modprobe vhost_vsock" in caught.value.hint


def test_what_is_no_vsock_is_not_taken_for_one_and_is_closed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with (
        pytest.raises(HostUnfit, match="does not take the address 3: Inappropriate ioctl"),
        vsock.opened(3, tmp_path / "file"),
    ):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
