"""What is asked of a host before something is installed for libvirt, and what is said afterwards."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vmmback.errors import HostUnfit
from vmmback.libvirt import host_checks, installed_files, qemu_user
from vmmback.libvirt.places import LIBEXEC, Places
from vmmback.libvirt.qemu_user import QemuUser


@pytest.fixture
def places(tmp_path: Path) -> Places:
    (tmp_path / "usr/bin").mkdir(parents=True)
    return Places(tmp_path)


def program(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def found(places: Places, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A host that has libvirt and two QEMUs."""
    monkeypatch.setattr(host_checks, "_see_libvirt", lambda: None)
    monkeypatch.setattr(qemu_user, "of_host", lambda _: QemuUser(1, 1))
    for name in ("qemu-system-x86_64", "qemu-system-arm"):
        program(places.root / "usr/bin" / name)
    (places.root / "usr/bin/qemu-system-none").touch()  # cannot be executed
    return places


def test_all_qemus_are_wrapped_and_those_that_were_named_stay(found: Places, tmp_path: Path) -> None:
    usual = [Path("/usr/bin/qemu-system-arm"), Path("/usr/bin/qemu-system-x86_64")]
    assert host_checks.host(found, []).qemus == usual
    own = program(tmp_path / "own/qemu-kvm")
    assert host_checks.host(found, [own]).qemus == [*usual, own]
    # Of two of one name it is the one that was named, also when it was named at an earlier time.
    other = program(found.root / "opt/qemu-system-arm")
    program(found.root / str(LIBEXEC)[1:] / "qemu-system-arm", installed_files.wrapper(Path("/opt/qemu-system-arm")))
    assert host_checks.host(found, []).qemus == [Path("/opt/qemu-system-arm"), usual[1]]
    other.unlink()
    assert host_checks.host(found, []).qemus == usual


@pytest.mark.parametrize("version", ["libvirtd (libvirt) 7.1.0", "libvirtd (libvirt) 6.10.0", "nonsense"])
def test_a_libvirt_that_describes_no_memory_in_json_is_refused(
    places: Places, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    daemon = program(places.root / "libvirtd", f"#!/bin/sh\necho '{version}'\n")
    monkeypatch.setattr(host_checks, "_DAEMONS", (str(daemon),))
    with pytest.raises(HostUnfit, match="describes no memory to QEMU in JSON") as refused:
        host_checks.host(places, [])
    assert refused.value.hint == "libvirt 7.2 and later do"
    program(daemon, "#!/bin/sh\necho 'libvirtd (libvirt) 7.2.0'\n")
    with pytest.raises(HostUnfit, match="no QEMU is in /usr/bin"):  # what is looked at next
        host_checks.host(places, [])


def test_a_hook_that_was_there_needs_no_restart(places: Places) -> None:
    assert any("restart libvirtd" in step for step in host_checks.next_steps(places))
    (places.hooks / "qemu.d").mkdir(parents=True)
    (places.hooks / "qemu.d/README").touch()
    assert any("restart libvirtd" in step for step in host_checks.next_steps(places))
    program(places.hooks / "qemu.d/10-others")
    assert not any("restart libvirtd" in step for step in host_checks.next_steps(places))


def test_who_else_could_change_what_root_will_execute_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = program(tmp_path / "opt/bin/python")
    monkeypatch.setattr(host_checks, "__file__", str(ours))
    if os.geteuid() != 0:
        assert "is not for root alone to change" in host_checks.doubts([str(ours)])[0]
        return
    assert host_checks.doubts([str(ours)]) == []  # /tmp is sticky
    (tmp_path / "opt").chmod(0o775)
    assert host_checks.doubts([str(ours)]) == [
        f"{tmp_path}/opt is not for root alone to change, and libvirt's hook executes {ours} as root"
    ]
    (tmp_path / "opt").chmod(0o755)
    os.chown(ours, 1000, 1000)
    assert host_checks.doubts(["/usr/bin/env"])[0].startswith(f"{ours} is not")  # where our modules are


SOCKET_UNIT, SERVICE_UNIT = (f"/etc/systemd/system/vmmback-broker.{kind}" for kind in ("socket", "service"))


@pytest.mark.parametrize(
    ("ours", "stopped"),
    [((), []), ((SERVICE_UNIT,), ["vmmback-broker.service"]),
     ((SERVICE_UNIT, SOCKET_UNIT), ["vmmback-broker.socket", "vmmback-broker.service"])],
)  # fmt: skip
def test_units_that_are_not_ours_are_not_stopped(
    places: Places, monkeypatch: pytest.MonkeyPatch, ours: tuple[str, ...], stopped: list[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: calls.append(argv))
    places.below("/run/systemd/system").mkdir(parents=True)
    for unit in (SOCKET_UNIT, SERVICE_UNIT):
        program(places.below(unit))
    host_checks.stop_units(places, ours)
    assert calls == ([["systemctl", "disable", "--now", *stopped]] if stopped else [])


def test_what_is_to_be_done_after_a_removal_follows_from_what_was_removed(places: Places) -> None:
    assert host_checks.steps_after(places, [places.hook]) == []
    steps = host_checks.steps_after(places, [places.below(SERVICE_UNIT), places.apparmor / "local/usr.sbin.libvirtd"])
    assert [step.split(":")[0] for step in steps] == ["systemctl daemon-reload", "systemctl reload apparmor"]
