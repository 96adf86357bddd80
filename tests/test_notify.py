"""sd_notify: one datagram for whoever started us, and never a failure of ours."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vmmback.notify import forget, notify, store, stored


@pytest.mark.parametrize("abstract", [False, True])
def test_lines_arrive_as_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"\0vmmback-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        notify("READY=1", "STATUS=a\nREADY=0")
        assert manager.recv(100) == b"READY=1\nSTATUS=a READY=0"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/notify", "@" + "x" * 200, "/etc/passwd"])
def test_a_manager_that_is_not_there_is_no_failure(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


def test_a_manager_that_stands_still_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for _ in range(1000):  # more than its queue holds
            notify("STATUS=x")


def test_what_is_stored_arrives_with_its_descriptors_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not store("x", 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert store("ready-1", 0, 1)
        text, descriptors, _, _ = socket.recv_fds(manager, 100, 8)
        assert (text, len(descriptors)) == (b"FDSTORE=1\nFDNAME=ready-1\nFDPOLL=0", 2)
        for descriptor in descriptors:
            os.close(descriptor)
        assert forget("ready-1")
        assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=ready-1"


def test_what_was_passed_is_for_the_process_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDNAMES", "broker")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert stored() == []
