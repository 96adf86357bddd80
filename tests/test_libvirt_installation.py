"""Installing for libvirt below a folder: what is there then, what others have there, and that nothing stays."""

from __future__ import annotations

import grp
import itertools
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmmback.broker.client import SOCKET
from vmmback.errors import HostUnfit, UsageError
from vmmback.libvirt import installation, installed_files, programs, qemu_user
from vmmback.libvirt.installed_files import Block, Host
from vmmback.libvirt.places import LIBEXEC, RUN, Places
from vmmback.libvirt.qemu_user import QemuUser

QEMUS = ("/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-system-aarch64")
PROGRAM = ("/opt/a b/python", "-m", "vmmback")


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    """Return all that is below a folder: modes, contents, where links lead."""
    found = {}
    for path in root.rglob("*"):
        content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (path.lstat().st_mode, content)
    return found


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """The root of a host with libvirt, systemd, polkit and AppArmor, where others have put something, too."""
    for folder in (
        "usr/bin", "usr/local", "etc/libvirt/hooks/qemu.d", "etc/polkit-1/rules.d", "etc/systemd/system",
        "run/systemd/system", "etc/apparmor.d/abstractions", "etc/apparmor.d/local/abstractions",
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
    for qemu in QEMUS:
        (tmp_path / qemu[1:]).write_text("QEMU")
        os.utime(tmp_path / qemu[1:], ns=(1, 1_600_000_000_123_456_789))
    (tmp_path / "etc/libvirt/hooks/qemu.d/10-others").write_text("#!/bin/sh\n")
    (tmp_path / "etc/apparmor.d/abstractions/libvirt-qemu").write_text("  capability chown,\n")
    (tmp_path / "etc/apparmor.d/usr.sbin.libvirtd").write_text("profile libvirtd {}\n")
    (tmp_path / "etc/apparmor.d/local/abstractions/libvirt-qemu").write_text("  /srv/** r, # without a line's end")
    return Places(tmp_path)


def host(*qemus: str) -> Host:
    return Host([Path(qemu) for qemu in qemus or QEMUS], PROGRAM, QemuUser(os.getuid(), os.getgid()))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capability of a file is root's to give: integration/ has the real one."""
    monkeypatch.setattr(programs, "compiled", lambda name, *_: name.encode())
    monkeypatch.setattr(programs, "verify", lambda *_: None)
    monkeypatch.setattr(installed_files, "CAPABILITY", b"")


def test_what_is_installed_is_removed_again_to_the_last_byte(places: Places) -> None:
    before = tree(places.root)
    changed = installation.install(places, host())
    after = tree(places.root)
    assert {f"/{path.relative_to(places.root)}" for path in changed} == {
        "/etc/libvirt/hooks/qemu.d/50-vmmback",
        "/usr/local/libexec/vmmback/qemu-system-x86_64",
        "/usr/local/libexec/vmmback/qemu-system-aarch64",
        "/usr/local/libexec/vmmback/emulator",
        "/etc/polkit-1/rules.d/00-vmmback.rules",
        "/etc/systemd/system/vmmback-broker.service",
        "/etc/systemd/system/vmmback-broker.socket",
        "/etc/tmpfiles.d/vmmback-libvirt.conf",
        "/etc/apparmor.d/local/abstractions/libvirt-qemu",
        "/etc/apparmor.d/local/usr.sbin.libvirtd",
    }
    others = {name: what for name, what in before.items() if not name.endswith("local/abstractions/libvirt-qemu")}
    assert others.items() <= after.items()
    assert not [name for name in after if name.endswith(".vmmback")]  # drafts
    (places.root / "run/vmmback-libvirt/secret").mkdir(parents=True)  # as the hook makes it
    (places.root / "run/vmmback-libvirt/secret/a-uuid").touch()
    installation.uninstall(places)
    assert tree(places.root) == before
    assert installation.uninstall(places) == []


def test_the_files_are_for_root_to_write_and_for_qemus_user_to_read(places: Places) -> None:
    for path in installation.install(places, host()):
        assert stat.S_IMODE(path.stat().st_mode) in ({0o750} if path == places.emulator else {0o644, 0o755})
        for folder in path.relative_to(places.root).parents:
            assert (places.root / folder).stat().st_mode & 0o022 == 0
    assert os.access(places.hook, os.X_OK)


def test_what_a_program_executes_is_there_before_it_is(places: Places) -> None:
    names = [path.name for path in installation.install(places, host())]
    wrappers = [Path(qemu).name for qemu in QEMUS]
    assert names[:3] == ["emulator", *wrappers]


def test_a_wrapper_has_the_time_and_the_path_of_its_qemu(places: Places) -> None:
    installation.install(places, host())
    for qemu in QEMUS:
        wrapper = places.below(LIBEXEC / Path(qemu).name)
        assert wrapper.stat().st_mtime_ns == places.below(qemu).stat().st_mtime_ns
        assert installed_files.qemu_of(wrapper.read_text()) == Path(qemu)


def test_installing_again_changes_nothing_and_repairs_what_is_not_as_it_was(places: Places) -> None:
    installation.install(places, host())
    once = tree(places.root)
    assert installation.install(places, host()) == []
    assert tree(places.root) == once
    places.hook.chmod(0o600)
    places.emulator.unlink()
    (places.libexec / Path(QEMUS[0]).name).write_text("something else")
    repaired = installation.install(places, host())
    assert {path.name for path in repaired} == {"50-vmmback", "emulator", Path(QEMUS[0]).name}
    assert tree(places.root) == once


def test_a_qemu_that_is_gone_takes_its_wrapper_along(places: Places) -> None:
    before = tree(places.root)
    installation.install(places, host())
    changed = installation.install(places, host(QEMUS[0]))
    assert changed == [places.libexec / "qemu-system-aarch64"]
    assert not changed[0].exists()
    installation.uninstall(places)
    assert tree(places.root) == before


def test_what_others_put_beside_ours_since_stays(places: Places) -> None:
    installation.install(places, host())
    (places.libexec / "others").write_text("theirs")
    profile = places.apparmor / "local/usr.sbin.libvirtd"
    profile.write_text(profile.read_text() + "  /srv/** r,\n")
    installation.uninstall(places)
    assert tree(places.libexec) == {"others": (places.libexec.joinpath("others").stat().st_mode, b"theirs")}
    assert profile.read_text() == "  /srv/** r,\n"


def test_a_file_of_somebody_else_is_neither_replaced_nor_removed(places: Places) -> None:
    places.hook.write_text("#!/bin/sh\n# not vmmback's\n")
    before = tree(places.root)
    with pytest.raises(UsageError, match="50-vmmback is there, and is not ours"):
        installation.install(places, host())
    assert tree(places.root) == before
    places.hook.unlink()
    # The same unit, put there by hand.
    unit = places.units / "vmmback-broker.socket"
    unit.write_bytes((installed_files.CONFIGS / "systemd" / unit.name).read_bytes())
    unit.chmod(0o644)
    assert unit not in installation.install(places, host())
    installation.uninstall(places)
    assert unit.exists()


def test_an_installation_that_fails_at_any_file_leaves_all_as_it_was(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation.install(places, host(QEMUS[0]))
    places.emulator.write_text("of an older version")
    places.hook.unlink()
    before = tree(places.root)
    real, left = Path.replace, 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == -1:  # what is put back afterwards has the space of what is removed
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    # The manifest, three files that are not as they are to be, and, once the other wrapper is gone, the manifest.
    for left in range(5):  # noqa: B007 (replace counts it down)
        with pytest.raises(HostUnfit, match="No space left on device"):
            installation.install(places, host(QEMUS[1]))
        assert tree(places.root) == before
    left = 5
    installation.install(places, host(QEMUS[1]))


def test_a_program_that_is_executed_meanwhile_is_put_back_too(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may write to it (ETXTBSY)."""
    places.emulator.parent.mkdir(parents=True)
    installation.install(places, host())
    shutil.copy("/bin/sleep", places.hook)
    before = tree(places.root)
    monkeypatch.setattr(programs, "compiled", lambda name, *_: Path("/bin/cat").read_bytes() + name.encode())
    running = list[subprocess.Popen[bytes]]()

    def fail(*_: object) -> None:
        running.append(subprocess.Popen([places.hook], stdin=subprocess.PIPE))
        raise HostUnfit("no", "")

    monkeypatch.setattr(programs, "verify", fail)
    try:
        with pytest.raises(HostUnfit):
            installation.install(places, host())
    finally:
        for process in running:
            process.communicate()
    assert tree(places.root) == before


def is_killed(places: Places, qemu: str, step: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Install in a process that ends, as by SIGKILL, before it puts or removes a file for the `step`th time from 0."""
    child = os.fork()
    if not child:
        count = itertools.count()

        def or_end(real: Callable[..., object]) -> Callable[..., object]:
            return lambda *args, **named: os._exit(9) if next(count) == step else real(*args, **named)

        try:
            monkeypatch.setattr(Path, "replace", or_end(Path.replace))
            monkeypatch.setattr(Path, "unlink", or_end(Path.unlink))
            installation.install(places, host(qemu))
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in {0, 9}
    return code == 9


@pytest.mark.parametrize("is_upgrade", [False, True], ids=["new", "upgrade"])
def test_what_is_killed_at_any_step_is_removed_whole(
    places: Places, is_upgrade: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    libvirtd, virtqemud = (places.apparmor / f"usr.sbin.{daemon}" for daemon in ("libvirtd", "virtqemud"))
    libvirtd.rename(virtqemud)
    before = tree(places.root)
    # Before the manifest is there, a new one leaves empty folders at most.
    for step in itertools.count(0 if is_upgrade else 1):
        if is_upgrade:  # it brings another wrapper and another block
            virtqemud.rename(libvirtd)
            installation.install(places, host(QEMUS[0]))
            libvirtd.rename(virtqemud)
        killed = is_killed(places, QEMUS[1], step, monkeypatch)
        if killed:
            assert tree(places.root) != before
        installation.uninstall(places)
        assert tree(places.root) == before, step
        if not killed:
            break
    assert step == (6 if is_upgrade else 11)


@pytest.mark.parametrize("name", ["wrapper", "hook"])
def test_what_is_installed_runs_by_itself(places: Places, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a broker: it says so, and what it needed was there."""
    monkeypatch.undo()
    monkeypatch.setattr(programs, "verify", lambda *_: None)
    monkeypatch.setattr(installed_files, "CAPABILITY", b"")
    for place in ("LIBEXEC", "EMULATOR", "SOCKET", "RUN", "SECRET"):
        monkeypatch.setattr(installed_files, place, places.below(getattr(installed_files, place)))
    installation.install(places, host())
    hook = [str(places.hook), "name", "prepare", "begin", "-"]
    argv = [str(places.libexec / Path(QEMUS[0]).name), "-name", "guest=name"] if name == "wrapper" else hook
    xml = "<domain><uuid>0-1</uuid><secret-ram xmlns='urn:vmmback:domain:1.0'/></domain>"
    places.below(RUN.parent).mkdir(exist_ok=True)
    done = subprocess.run(argv, input=xml, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"vmmback: error: no broker can be reached at {places.below(SOCKET)}: No such file")


def test_where_there_is_no_systemd_polkit_or_apparmor_nothing_is_put_there(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / QEMUS[0][1:]).touch()
    installation.install(Places(tmp_path), host(QEMUS[0]))
    assert sorted(path.name for path in (tmp_path / "etc").rglob("*") if path.is_file()) == ["50-vmmback"]
    installation.uninstall(Places(tmp_path))
    assert list(tree(tmp_path)) == ["usr", "usr/bin", "usr/bin/qemu-system-x86_64"]


@pytest.mark.parametrize("path", ["/usr/bin/qemu system", "/usr/bin/$(qemu)", "/usr/bin/qemu\n", "qemu-system", "/kvm"])
def test_a_qemu_whose_path_a_shell_would_take_apart_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="cannot be wrapped"):
        installed_files.wrapper(Path(path))


def test_a_qemu_whose_path_the_kernel_would_cut_off_is_refused() -> None:
    rest = installed_files.FIRST_LINE_BYTES - len(f"#!{LIBEXEC}/emulator //qemu")
    assert installed_files.can_be_wrapped(Path("/", "x" * rest, "qemu"))
    assert not installed_files.can_be_wrapped(Path("/", "x" * (rest + 1), "qemu"))


def test_two_qemus_of_one_name_are_refused(places: Places) -> None:
    with pytest.raises(UsageError, match="two QEMUs are called qemu-system-x86_64"):
        installation.install(places, host(QEMUS[0], "/opt/bin/qemu-system-x86_64"))


def test_nothing_is_left_to_fill_in() -> None:
    for path in (installed_files.CONFIGS / "libvirt").iterdir():
        assert not re.search("@[A-Z]+@", installed_files.filled(path.name))


def test_a_block_keeps_what_is_around_it() -> None:
    block = Block(Path("file"), "ours\n")
    once = block.in_place_of_old(b"theirs\nwithout an end")
    assert once.endswith(b"# END vmmback\ntheirs\nwithout an end")
    assert Block(Path("file"), "new\n").in_place_of_old(once).count(b"vmmback\n") == 1
    assert Block(Path("file"), "").in_place_of_old(once) == b"theirs\nwithout an end"


def test_the_capability_is_the_one_alone() -> None:
    # struct vfs_cap_data, include/uapi/linux/capability.h: revision 2, effective; CAP_IPC_LOCK is bit 14.
    assert programs.CAPABILITY.hex() == "01000002" + "00400000" + "00" * 12


@pytest.mark.parametrize(
    ("conf", "expected"),
    [('user = "root"\ngroup = "root"\n', (0, 0)), ('#user = "none"\nuser = "+0"\n group = "12"\n', (0, 12))],
)
def test_qemus_user_is_the_one_that_libvirt_is_told(tmp_path: Path, conf: str, expected: tuple[int, int]) -> None:
    (tmp_path / "etc/libvirt").mkdir(parents=True)
    (tmp_path / "etc/libvirt/qemu.conf").write_text(conf)
    assert qemu_user.of_host(Places(tmp_path)) == expected


def test_qemus_group_is_that_of_libvirts_folder_where_it_is_not_said(tmp_path: Path) -> None:
    (tmp_path / "etc/libvirt").mkdir(parents=True)
    (tmp_path / "etc/libvirt/qemu.conf").write_text('user = "daemon"\n')
    folder = tmp_path / "var/lib/libvirt/qemu"
    folder.mkdir(parents=True)
    user = qemu_user.of_host(Places(tmp_path))
    assert user.gid == folder.stat().st_gid
    assert user.group == grp.getgrgid(user.gid).gr_name
    assert user._replace(gid=2_000_000_000).group == "+2000000000"


def test_a_user_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "etc/libvirt").mkdir(parents=True)
    (tmp_path / "etc/libvirt/qemu.conf").write_text('user = "no-such-user-here"\n')
    with pytest.raises(HostUnfit, match="the user as whom libvirt runs QEMU is not known"):
        qemu_user.of_host(Places(tmp_path))
