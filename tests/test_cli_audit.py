"""`vmmback audit` and `vmmback selftest`: arguments, files and exit codes. Guest and self-test are made up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import vmmback.selftest
from tests.sample_reports import exposed_report, guest_report, selftest_report, vector
from vmmback import cli, control_client, errors
from vmmback.cli.audit import audit
from vmmback.cli.files import ReportFiles
from vmmback.cli.output import finish
from vmmback.errors import AdmissionRefused, HostUnfit, NoSuchGuest, QemuFailed, UsageError, VmmbackError
from vmmback.report import GuestVerdict, IsolationReport, SelftestReport, Verdict
from vmmback.selftest import Progress

INCONCLUSIVE = guest_report(verdict=GuestVerdict.INCONCLUSIVE, reasons=("tracer: did not run",))
FAILED = selftest_report(vector("file-read", Verdict.READABLE))
UNSURE = selftest_report(vector("file-read", Verdict.INCONCLUSIVE))
PASSED = selftest_report()


class Made:
    """A guest that is made up."""

    def __init__(self) -> None:
        self.answer: IsolationReport | BaseException = guest_report(hunt=None)
        self.asked: list[Path] = []
        self.grown: list[int] = []

    async def audit(self) -> IsolationReport:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    async def grow(self, size: int, progress: Callable[[int, int], None]) -> IsolationReport:
        self.grown.append(size)
        progress(size, size)
        return await self.audit()

    async def frames(self) -> array[int]:
        return array("Q", [0])

    async def canary_halves(self) -> None:
        return None


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Made:
    monkeypatch.setenv("VMMBACK_RUNTIME_DIR", str(tmp_path / "run"))
    guest = Made()

    @asynccontextmanager
    async def connect(folder: Path) -> AsyncIterator[Made]:
        guest.asked.append(folder)
        yield guest

    monkeypatch.setattr(control_client, "connect", connect)
    return guest


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `vmmback` with arguments; return exit code, standard output and standard error."""

    def vmmback(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vmmback", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return code or 0, output.out, output.err

    return vmmback


# --- audit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (guest_report(hunt=None), 0),
        (exposed_report(), 5),
        (INCONCLUSIVE, 8),
        (QemuFailed("the guest ended meanwhile"), 6),
        (NoSuchGuest("no guest named demo is running"), 7),
        (HostUnfit("the host cannot do it"), 3),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["tables", "json"])
def test_the_exit_code_tells_the_verdict_or_the_error(
    made: Made, run: Run, tmp_path: Path, answer: IsolationReport | VmmbackError, code: int, options: list[str]
) -> None:
    made.answer = answer
    exit_code, out, err = run("audit", "demo", *options)
    assert exit_code == code
    assert made.asked == [tmp_path / "run/demo"]
    if isinstance(answer, VmmbackError):
        assert (out, err) == ("", f"vmmback: error: {answer.message}\n")
    elif options:
        assert (IsolationReport.from_json(out), err) == (answer, "")
    else:
        assert "direct-map" in out
        assert err == ""


def test_an_audit_writes_the_files_also_of_an_exposed_guest(made: Made, run: Run, tmp_path: Path) -> None:
    made.answer = exposed_report()
    code, _, err = run("audit", "demo", "--html", tmp_path / "page", "--junit", tmp_path / "xml")
    assert (code, err) == (5, "")
    assert "exposed" in (tmp_path / "page").read_text()
    assert "<testsuite" in (tmp_path / "xml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["A"], "is not a guest name"),
        (["a/../b"], "is not a guest name"),
        ([""], "is not a guest name"),
        (["demo", "--hunt", "-", "--hunt-from-guest"], "do not go together"),
        (["demo", "--hunt", "-1"], "never the canary itself"),
        (["demo", "--hunt", "1234567"], "never the canary itself"),
        (["demo", "--hunt", ""], "never the canary itself"),
        (["demo", "--hunt", "999"], "no such descriptor is open"),
        (["demo", "--hunt-from-guest"], "has printed no halves"),
    ],
)
def test_a_wrong_argument(made: Made, run: Run, arguments: list[str], words: str) -> None:
    code, out, err = run("audit", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("vmmback: error: ") == 1


def test_a_descriptor_that_cannot_be_read_is_a_wrong_argument(made: Made, run: Run, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for descriptor, problem in ((writer, "Bad file descriptor"), (folder, "Is a directory")):
            code, out, err = run("audit", "demo", "--hunt", str(descriptor))
            assert (code, out) == (2, "")
            assert f"vmmback: error: --hunt {descriptor}: it cannot be read: {problem}\n" in err
    finally:
        for descriptor in (reader, writer, folder):
            os.close(descriptor)
    assert made.asked == []


@pytest.mark.parametrize("source", ["-", "0"])
def test_a_standard_input_that_is_closed_is_a_wrong_argument(source: str) -> None:
    """Another file of Python's may have its number."""
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "vmmback", "audit", "demo", "--hunt", source]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"vmmback: error: --hunt {source}: no such descriptor is open\n")


def test_a_canary_on_the_command_line_is_not_repeated(made: Made, run: Run) -> None:
    canary = "correct horse battery staple"
    _, _, err = run("audit", "demo", "--hunt", canary)
    assert not any(word in err for word in canary.split())
    assert "change the canary" in err


def test_the_help_of_audit_tells_every_exit_code() -> None:
    codes = {kind.exit_code for kind in (UsageError, HostUnfit, QemuFailed, NoSuchGuest)} | {0, 5, 8}
    assert all(f" {code} " in (audit.epilog or "") for code in codes)
    assert "128 + signal" in (audit.epilog or "")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda signum: signum.name)
@pytest.mark.parametrize("where", ["in-a-callback", "in-the-task"])
def test_a_signal_ends_an_audit_wherever_it_comes(
    made: Made, run: Run, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, where: str
) -> None:
    """An event loop keeps exceptions of callbacks to itself, and a task has a handler for errors of its own."""
    closed = []

    async def audit() -> IsolationReport:
        try:
            if where == "in-a-callback":
                asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signum)
                await asyncio.sleep(20)
            try:
                os.kill(os.getpid(), signum)
                await asyncio.sleep(20)
            except VmmbackError:
                pytest.fail("the signal came as an error of the guest")
        finally:
            closed.append(True)
        raise AssertionError

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(made, "audit", audit)
    code, out, err = run("audit", "demo")
    assert (code, out) == (128 + signum, "")
    assert err == f"vmmback: error: stopped by {signum.name} before the audit was done\n"
    assert closed == [True]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers


# --- selftest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("report", "code"), [(PASSED, 0), (FAILED, 5), (UNSURE, 8)])
def test_the_exit_code_of_a_selftest(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: SelftestReport, code: int
) -> None:
    async def selftest(progress: Progress) -> SelftestReport:
        progress("file-read", 0, 1)
        return report

    monkeypatch.setattr(vmmback.selftest, "selftest", selftest)
    exit_code, out, err = run("selftest", "--json", "--html", tmp_path / "page", "--junit", tmp_path / "xml")
    assert (exit_code, err) == (code, "")
    assert SelftestReport.from_json(out) == report
    assert report.verdict in (tmp_path / "page").read_text()
    assert (tmp_path / "xml").exists()
    assert run("selftest")[0] == code


# --- files ------------------------------------------------------------------------------------------------------------


def refused(html: Path | None, junit: Path | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        ReportFiles(html, junit)
    return caught.value.message


def test_places_where_no_file_can_be_made(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert refused(tmp_path) == f"--html {tmp_path}: is a folder"
    assert refused(tmp_path / "no/page") == f"--html {tmp_path}/no/page: its folder does not exist"
    assert refused(tmp_path / "fifo") == f"--html {tmp_path}/fifo: is no regular file"
    assert refused(Path("/dev/null")) == "--html /dev/null: is no regular file"
    assert refused(None, Path("/proc/xml")).startswith("--junit /proc/xml: cannot be written: ")
    assert "File name too long" in refused(tmp_path / ("x" * 256))
    assert "its folder does not exist" in refused(tmp_path / "file/page")
    assert "both name" in refused(tmp_path / "page", tmp_path / "page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file", "loop"]
    assert Path("/dev/null").is_char_device()


def write(files: ReportFiles) -> None:
    for output in files.outputs(guest_report()):
        output()


def test_a_file_is_replaced_in_one_go_once_the_report_is_whole(tmp_path: Path) -> None:
    page, xml = tmp_path / "page", tmp_path / "xml"
    page.write_text("before")
    files = ReportFiles(page, xml)
    assert page.read_text() == "before"
    assert not xml.exists()
    before = page.stat().st_ino
    write(files)
    assert page.stat().st_ino != before
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "xml"]
    assert stat.S_ISREG(xml.stat().st_mode)


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/page")
    write(ReportFiles(tmp_path / "link", None))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder/page").is_file()
    assert list((tmp_path / "folder").iterdir()) == [tmp_path / "folder/page"]


def test_a_folder_that_goes_away_meanwhile_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    files = ReportFiles(folder / "page", None)
    folder.rmdir()
    with pytest.raises(errors.UsageError, match="could not be written: No such file or directory"):
        write(files)


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    write(ReportFiles(tmp_path / ("x" * 255), None))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


# --- grow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (guest_report(hunt=None), 0),
        (exposed_report(), 5),
        (INCONCLUSIVE, 8),
        (UsageError("guest demo cannot grow by 3GiB", "grow by at most 1GiB"), 2),
        (AdmissionRefused("it does not fit"), 4),
        (NoSuchGuest("no guest named demo is running"), 7),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["tables", "json"])
def test_grow_tells_what_is_there_now_and_the_verdict(
    made: Made, run: Run, tmp_path: Path, answer: IsolationReport | VmmbackError, code: int, options: list[str]
) -> None:
    made.answer = answer
    exit_code, out, err = run("grow", "demo", "384MiB", *options)
    assert (exit_code, made.asked, made.grown) == (code, [tmp_path / "run/demo"], [384 << 20])
    if isinstance(answer, VmmbackError):
        assert out == ""
        assert err.startswith(f"vmmback: error: {answer.message}\n")
        assert answer.hint in err
        return
    assert f"guest demo has {answer.memory.size >> 20} MiB of RAM now" in err
    if options:
        assert IsolationReport.from_json(out) == answer
    else:
        assert answer.verdict.value in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("demo", "1GB"), '"1GB" is not a size'), (("Demo", "1GiB"), "name"), (("demo", "0MiB"), "is out of range")],
)
def test_grow_asks_nobody_about_what_is_no_size_or_name(
    made: Made, run: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run("grow", *arguments)
    assert (code, out, made.asked) == (2, "", [])
    assert message in err


# --- outputs that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"), [(guest_report(hunt=None), 2), (exposed_report(), 5), (INCONCLUSIVE, 8)], ids=["0", "5", "8"]
)
@pytest.mark.parametrize("failing", ["stdout", "page", "xml", "stdout page xml"])
def test_every_output_is_tried_and_none_hides_a_verdict(
    made: Made,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    answer: IsolationReport,
    code: int,
) -> None:
    async def audit() -> IsolationReport:
        for name in set(failing.split()) - {"stdout"}:
            (tmp_path / name).rmdir()
        return answer

    monkeypatch.setattr(made, "audit", audit)
    for name in ("page", "xml"):
        (tmp_path / name).mkdir()
    if "stdout" in failing:
        monkeypatch.setattr("sys.stdout", None)  # what Python makes of >&-
    ended, out, err = run("audit", "demo", "--json", "--html", tmp_path / "page/0", "--junit", tmp_path / "xml/0")
    assert ended == code
    assert bool(out) == ("stdout" not in failing)
    assert [name for name in ("page", "xml") if not (tmp_path / name / "0").exists()] == [
        name for name in ("page", "xml") if name in failing
    ]
    assert err.count("vmmback: error: ") == len(failing.split())
    assert err.count("could not be written") == len(failing.split())


def test_an_output_that_fails_otherwise_hides_no_verdict_either(capsys: pytest.CaptureFixture[str]) -> None:
    done = []

    def without_memory() -> None:
        raise MemoryError

    for code, expected in ((5, 5), (0, 3)):
        with pytest.raises(SystemExit) as ended:
            finish(code, without_memory, lambda: done.append(True))
        assert ended.value.code == expected
        assert "refused what the command needs: out of memory" in capsys.readouterr().err
    assert done == [True, True]


def test_json_of_a_report_is_one_document(made: Made, run: Run) -> None:
    assert json.loads(run("audit", "demo", "--json")[1])["guest"] == "demo"
