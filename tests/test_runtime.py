"""The folder of a guest: there while it lives, its alone, and gone however it ends. Real processes, real folders."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vmmback.errors import GuestNameTaken, HostUnfit, UsageError
from vmmback.runtime import guest_folder, live_guests, released, runtime_folder

ROOT = Path(__file__).parents[1]

# Holds the folder of guest "demo" from the first line on its standard input until the end of it.
HOLDER = """
import sys
from vmmback.errors import GuestNameTaken
from vmmback.runtime import guest_folder
print("up", flush=True)
sys.stdin.readline()
try:
    with guest_folder("demo"):
        print("held", flush=True)
        sys.stdin.read()
except GuestNameTaken:
    print("taken", flush=True)
"""


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder with a path that a shell would trip over; nothing may be left in it."""
    with TemporaryDirectory(prefix="vmmback-", dir="/tmp") as place:  # pytest's paths may be longer than 80 bytes
        folder = Path(place, "run *,'\" $HOME")
        monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(folder))
        yield folder
        assert not folder.exists() or list(folder.iterdir()) == []


def holder(stack: ExitStack) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    return stack.enter_context(process)  # whose exit closes its pipes and waits


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def eventually(happens: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happens():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain until {what}"
        time.sleep(0.005)


def test_the_folder_is_private_and_empty_and_gone_with_all_that_is_in_it(runtime: Path) -> None:
    with guest_folder("demo") as folder:
        assert folder == runtime / "demo"
        assert [stat.S_IMODE(made.stat().st_mode) for made in (folder, runtime)] == [0o700, 0o700]
        assert list(folder.iterdir()) == []
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        (folder / ".hidden").write_text("x")
    assert not folder.exists()


def test_the_folder_is_gone_after_an_error_too(runtime: Path) -> None:
    with pytest.raises(ZeroDivisionError), guest_folder("demo"):
        1 / 0  # noqa: B018
    assert not (runtime / "demo").exists()


def test_a_name_is_taken_while_it_is_held_and_free_again_at_once(runtime: Path) -> None:
    for _ in range(3):
        with guest_folder("demo") as folder:
            (folder / "log").touch()
            with pytest.raises(GuestNameTaken, match="a guest named demo is running already"), guest_folder("demo"):
                pass
            assert (folder / "log").exists()
            with guest_folder("demo2") as other:  # another name is another guest
                assert other.is_dir()


def test_a_stale_folder_is_emptied_and_taken_over(runtime: Path) -> None:
    stale = runtime / "demo"
    (stale / "ram").mkdir(parents=True, mode=0o700)
    (stale / "serial.log").write_text("of a guest before the power cut")
    with guest_folder("demo") as folder:
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("what", ["hidden", "mode"])
def test_a_stale_folder_is_made_as_new(runtime: Path, what: str) -> None:
    stale = runtime / "demo"
    stale.mkdir(parents=True)
    stale.chmod(0o755 if what == "mode" else 0o700)
    if what == "hidden":
        (stale / ".hidden").touch()
    with guest_folder("demo") as folder:
        assert list(folder.iterdir()) == []
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_link_in_the_place_of_the_folder_costs_nobody_a_file(runtime: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    runtime.mkdir()
    (runtime / "demo").symlink_to(victim)
    try:
        with guest_folder("demo"):
            pass
    except HostUnfit:
        (runtime / "demo").unlink()
    assert (victim / "file").exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_the_folder_is_gone_when_its_holder_is_killed(runtime: Path, signum: signal.Signals) -> None:
    with ExitStack() as stack:
        process = holder(stack)
        assert line(process) == "up"
        go(process)
        assert line(process) == "held"
        (runtime / "demo" / "qemu.log").write_text("x")
        process.send_signal(signum)
        assert process.wait(10) == -signum
        eventually(lambda: not (runtime / "demo").exists(), "the folder is removed")
    with guest_folder("demo"):
        pass


def test_of_twenty_at_once_exactly_one_gets_the_name(runtime: Path) -> None:
    with ExitStack() as stack:
        processes = [holder(stack) for _ in range(20)]
        assert {line(process) for process in processes} == {"up"}
        for process in processes:
            go(process)
        answers = [line(process) for process in processes]
        assert sorted(answers) == ["held", *["taken"] * 19]
        assert (runtime / "demo").is_dir()
    assert not (runtime / "demo").exists()


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        ("run/vmmback", "is not an absolute path"),
        ("~/run", "is not an absolute path"),
        ("/run/a\nb", "characters that QEMU's JSON options cannot carry"),
        ("/run/\x1b[31m", "characters that QEMU's JSON options cannot carry"),
        ("/run/\udcff", "characters that QEMU's JSON options cannot carry"),
        ("/" + "r" * 80, "is longer than 80 bytes"),
        ("/" + "é" * 40, "is longer than 80 bytes"),
    ],
)
def test_a_runtime_folder_that_cannot_work_is_refused_in_plain_ascii(
    monkeypatch: pytest.MonkeyPatch, chosen: str, problem: str
) -> None:
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", chosen)
    with pytest.raises(UsageError, match=problem) as refused:
        runtime_folder()
    assert "VMMBACK_RUNTIME_DIR" in refused.value.message
    assert refused.value.message.isascii()
    assert refused.value.message.isprintable()


@pytest.mark.parametrize("chosen", ["/", "/run/with space,comma='\"", "/run/é", "/" + "r" * 79])
def test_a_runtime_folder_may_have_any_short_absolute_path(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", chosen)
    assert runtime_folder() == Path(chosen)


@pytest.mark.parametrize(
    ("uid", "session", "expected"),
    [(0, None, "/run/vmmback"), (0, "/run/user/0", "/run/vmmback"), (1000, "/run/user/1000", "/run/user/1000/vmmback")],
)
@pytest.mark.parametrize("chosen", [None, ""])
def test_without_a_choice_it_is_where_such_folders_are(
    monkeypatch: pytest.MonkeyPatch, uid: int, session: str | None, expected: str, chosen: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    for name, text in (("XDG_RUNTIME_DIR", session), ("VMMBACK_RUNTIME_DIR", chosen)):
        if text is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, text)
    assert runtime_folder() == Path(expected)


def test_a_user_without_a_session_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("VMMBACK_RUNTIME_DIR", raising=False)
    with pytest.raises(UsageError) as refused:
        runtime_folder()
    assert "VMMBACK_RUNTIME_DIR" in refused.value.hint


@pytest.mark.parametrize("place", ["/proc/vmmback", "a file"])
def test_a_folder_that_cannot_be_made_is_an_error_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, runtime: Path, place: str
) -> None:
    (runtime.parent / "a file").touch()
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(runtime.parent / place))  # /proc takes no folder, not even root's
    with (
        pytest.raises(
            HostUnfit, match=r"cannot be made: (No such file or directory|Not a directory|File exists)"
        ) as refused,
        guest_folder("x"),
    ):
        pass
    assert refused.value.exit_code == 3
    assert "VMMBACK_RUNTIME_DIR" in refused.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
def test_a_folder_of_another_user_is_not_taken_over(runtime: Path) -> None:
    """Who owns it could put a link in the place of a log that we write."""
    theirs = runtime / "demo"
    theirs.mkdir(parents=True)
    os.chown(theirs, 65534, 65534)
    with pytest.raises(HostUnfit, match="it belongs to another user"), guest_folder("demo"):
        pass
    assert theirs.stat().st_uid == 65534
    theirs.rmdir()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_runtime_folder_that_others_may_write_to_is_refused(runtime: Path, mode: int) -> None:
    runtime.mkdir()
    runtime.chmod(mode)
    with pytest.raises(HostUnfit, match="others may write to it"), guest_folder("demo"):
        pass


# --- Stale folders ----------------------------------------------------------------------------------------------------


def keeper_of(pid: int) -> int:
    """Return the pid of a holder's keeper."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def held(stack: ExitStack) -> subprocess.Popen[str]:
    process = holder(stack)
    assert line(process) == "up"
    go(process)
    assert line(process) == "held"
    return process


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{pid}/cmdline").exists() or is_zombie(pid), "it is gone")


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


def test_a_live_guest_whose_keeper_was_killed_keeps_its_folder_and_removes_it_itself(runtime: Path) -> None:
    """The lock is of the supervisor and the keeper: free only when both are gone."""
    with ExitStack() as stack:
        process = held(stack)
        (runtime / "demo" / "serial.log").write_text("x")
        killed(keeper_of(process.pid))
        with pytest.raises(GuestNameTaken), guest_folder("demo"):
            pass
        assert live_guests() == ["demo"]
        assert (runtime / "demo" / "serial.log").exists()
    assert process.returncode == 0
    assert not (runtime / "demo").exists()


def test_what_both_left_is_no_guest_and_is_removed(runtime: Path) -> None:
    with ExitStack() as stack:
        process = held(stack)
        (runtime / "demo" / "serial.log").write_text("x")
        killed(keeper_of(process.pid))
        process.kill()
        process.wait()
        assert (runtime / "demo" / "serial.log").exists()
        assert live_guests() == []
        assert list(runtime.iterdir()) == []


def test_what_both_left_is_wiped_before_it_is_removed(runtime: Path) -> None:
    (runtime / "demo").mkdir(parents=True, mode=0o700)
    runtime.chmod(0o700)
    (runtime / "demo" / "serial.log").write_text("secret")
    with (runtime / "demo" / "serial.log").open() as log:
        assert live_guests() == []
        assert log.read() == "\0" * 6
    assert list(runtime.iterdir()) == []


def test_a_live_guest_is_listed_and_nothing_of_it_removed(runtime: Path) -> None:
    assert live_guests() == []
    with guest_folder("b") as folder, guest_folder("a"):
        (folder / "log").touch()
        (runtime / "c").mkdir(mode=0o700)
        assert live_guests() == ["a", "b"]
        assert (folder / "log").exists()
        assert sorted(path.name for path in runtime.iterdir()) == ["a", "b"]


def test_what_is_no_folder_of_a_guest_is_left_alone(runtime: Path, tmp_path: Path) -> None:
    runtime.mkdir(mode=0o700)
    (tmp_path / "other").mkdir()
    (runtime / "link").symlink_to(tmp_path / "other")
    (runtime / "file").touch()
    assert live_guests() == []
    assert sorted(path.name for path in runtime.iterdir()) == ["file", "link"]
    for path in runtime.iterdir():
        path.unlink()


def test_a_removal_that_was_cut_short_is_finished_by_the_next(runtime: Path) -> None:
    (runtime / ".stale-7").mkdir(parents=True, mode=0o700)
    runtime.chmod(0o700)
    assert live_guests() == []
    assert list(runtime.iterdir()) == []


def test_launches_that_race_with_the_removal_of_a_stale_folder_get_their_name(runtime: Path) -> None:
    """Nobody's folder is taken away, and no name is taken by who cleans, while others list and clean all the time."""
    runtime.mkdir(mode=0o700)
    over = threading.Event()
    seen: list[list[str]] = []

    def list_all() -> None:
        while not over.is_set():
            seen.append(live_guests())

    with ThreadPoolExecutor(2) as pool:
        cleaners = [pool.submit(list_all) for _ in range(2)]
        try:
            for _ in range(25):
                (runtime.parent / "made").mkdir(mode=0o700)
                (runtime.parent / "made" / "old").touch()
                (runtime.parent / "made").rename(runtime / "demo")
                with guest_folder("demo") as folder:
                    (folder / "new").touch()
                    assert "demo" in live_guests()
                    assert [path.name for path in folder.iterdir()] == ["new"]
        finally:
            over.set()
        for cleaner in cleaners:
            cleaner.result(10)
    assert any(seen)


def test_the_release_can_be_waited_for(runtime: Path) -> None:
    with ExitStack() as stack:
        process = held(stack)
        assert not released(runtime / "demo", 0.01)
        process.kill()
        assert released(runtime / "demo", 10)
        eventually(lambda: not (runtime / "demo").exists(), "the keeper is done")
    assert released(runtime / "demo", 0)
