"""The command line: what it prints where, and how it exits. The launch itself is replaced."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import vmmback.launch
from vmmback import cli, errors
from vmmback.cli.launch import launch
from vmmback.cli.output import EXIT_EXPOSED, EXIT_INCONCLUSIVE
from vmmback.cli.screen import Screen
from vmmback.config import GuestConfig
from vmmback.errors import VmmbackError
from vmmback.guest import Watcher
from vmmback.lifecycle import Stop
from vmmback.report import Exposure, GuestVerdict, Host, IsolationReport, Memory, ProbeResult, RamBlock, Verdict

ROOT = Path(__file__).parents[1]
SIZE = 256 << 20
GUEST = 'name = "demo"\n[memory]\nsize = "256MiB"\n[boot]\nkernel = "vmlinuz"\n'


def vmmback_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmmback", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# ---- without a guest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("--help", "vmmback launch configs/demo.toml"),
        ("-h", "vmmback launch configs/demo.toml"),
        ("launch --help", "vmmback launch configs/demo.toml --json | jq .verdict"),
        ("schema --help", "vmmback schema > guest.schema.json"),
    ],
)
def test_help_shows_an_example_on_a_line_of_its_own(command: str, example: str) -> None:
    done = vmmback_process(*command.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert f"  Example:\n    {example}\n" in done.stdout


@pytest.mark.parametrize("name", cli.commands.list_commands(click.Context(cli.commands)))
def test_every_command_has_an_example_and_exits_with_0_when_asked_for_help(name: str) -> None:
    done = vmmback_process(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"vmmback {name}" in re.split("Examples?:", done.stdout)[-1]


def test_the_help_of_launch_tells_every_exit_code() -> None:
    not_of_launch = (VmmbackError, errors.Interrupted, errors.NoSuchGuest)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VmmbackError)]
    codes = {kind.exit_code for kind in kinds if kind not in not_of_launch}
    epilog = launch.epilog or ""
    for code in sorted({*codes, EXIT_EXPOSED, EXIT_INCONCLUSIVE}):
        assert f" {code} " in epilog, code
    assert "128 + signal" in epilog


def test_the_examples_of_the_help_name_files_that_are_there() -> None:
    assert (ROOT / "configs/demo.toml").is_file()


def test_version_prints_the_name_and_a_number() -> None:
    done = vmmback_process("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vmmback 0.")


def test_schema_is_valid_json_of_the_guest_file() -> None:
    done = vmmback_process("schema")
    assert (done.returncode, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"name", "memory"} <= set(schema["required"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "Usage: vmmback"),
        (["lunch"], "No such command 'lunch'"),
        (["launch"], "Missing argument 'FILE'"),
        (["launch", "--jsn", "x"], "--jsn"),
        (["schema", "x"], "unexpected extra argument"),
    ],
    ids=str,
)
def test_a_wrong_command_line_exits_with_2_and_prints_nothing_on_standard_output(
    arguments: list[str], complaint: str
) -> None:
    done = vmmback_process(*arguments)
    assert done.returncode == 2 or not arguments  # click >= 8.2 exits with 2 without a command, earlier with 0
    assert complaint in done.stdout + done.stderr
    if arguments:
        assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_missing_guest_file_is_one_message_and_a_hint() -> None:
    done = vmmback_process("launch", "/nowhere/guest.toml")
    assert (done.returncode, done.stdout) == (2, "")
    message, hint = done.stderr.splitlines()
    assert message == "vmmback: error: /nowhere/guest.toml: no such file or directory"
    assert hint.startswith("vmmback: hint: ")


# ---- with a guest ----------------------------------------------------------------------------------------------------


def report(verdict: str, *reasons: str, detail: str = "0 of 65536 present pages readable") -> IsolationReport:
    probe = {"isolated": Verdict.BLOCKED, "exposed": Verdict.READABLE}.get(verdict, Verdict.INCONCLUSIVE)
    return IsolationReport(
        guest="demo",
        verdict=GuestVerdict(verdict),
        validated_after="'GUEST READY' on the console",
        reasons=reasons,
        memory=Memory(size=SIZE, secret=SIZE, present_pages=65536, checked_pages=65536, readable_pages=0),
        ram_blocks=(RamBlock(name="ram0", size=SIZE, backing="secretmem", guest_writable=True),),
        probes=(
            ProbeResult(name="direct-map", verdict=probe, control=Verdict.READABLE, detail=detail, seconds=0.05),
            ProbeResult(name="freed-frames", verdict=probe, control=Verdict.READABLE, detail="all zero", seconds=0.05),
        ),
        exposures=(Exposure(name="pidfd-getfd", holders="root", detail="1 descriptor copied"),),
        host=Host(kernel="6.1", qemu="7.2", accel="tcg"),
        timings={"prefault": 1.0},
    )


def while_it_runs(whole: IsolationReport) -> IsolationReport:
    return replace(whole, probes=whole.probes[:1])


Play = Callable[[Watcher], IsolationReport]


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    """A launch ignores, to its exit, what would stop it: here the tests go on."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    signals_as_before: None,
) -> Callable[..., tuple[int, str, str]]:
    """Run `vmmback launch` of a guest whose life is what `play` does; return exit code, standard output and error."""
    (tmp_path / "vmlinuz").touch()
    guest = tmp_path / "guest.toml"
    monkeypatch.setenv("COLUMNS", "200")

    def run(play: Play, *options: str, isolation: str = "", validates: bool = True) -> tuple[int, str, str]:
        guest.write_text(f"{GUEST}[isolation]\n{isolation}")

        async def launch(
            config: GuestConfig, watcher: Watcher, stop: Stop, *, validate: bool, file: Path | None = None
        ) -> IsolationReport:
            assert config.name == "demo"
            assert stop.times == 0
            assert validate is validates
            return play(watcher)

        monkeypatch.setattr(vmmback.launch, "launch", launch)
        monkeypatch.setattr(sys, "argv", ["vmmback", "launch", str(guest), *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize(
    ("verdict", "options", "isolation", "validates", "expected"),
    [
        ("isolated", [], "", True, 0),
        ("exposed", [], "", True, 5),
        ("inconclusive", [], "", True, 8),
        ("inconclusive", ["--no-validate"], "", False, 0),
        ("exposed", ["--no-validate"], "", False, 5),
        ("inconclusive", [], 'validate = "never"', False, 0),
        ("inconclusive", ["--validate"], 'validate = "never"', False, 0),
    ],
)
def test_the_exit_code_tells_the_verdict_where_one_was_wanted(
    run: Run, verdict: str, options: list[str], isolation: str, validates: bool, expected: int, json_option: list[str]
) -> None:
    code, _, _ = run(lambda _: report(verdict), *options, *json_option, isolation=isolation, validates=validates)
    assert code == expected


def play_all(watcher: Watcher) -> IsolationReport:
    whole = report("isolated", "because of [heap]")
    watcher.prefaulted(SIZE // 2, SIZE)
    watcher.prefaulted(SIZE, SIZE)
    watcher.console(b"Linux version\r\nGUEST REA")
    watcher.note("a note")
    watcher.console(b"DY\r\n")
    watcher.validated(while_it_runs(whole))
    watcher.console(b"no newline at the end")
    return whole


def test_with_json_standard_output_has_the_report_and_nothing_else(run: Run) -> None:
    code, out, err = run(play_all, "--json")
    assert code == 0
    assert IsolationReport.from_json(out) == report("isolated", "because of [heap]")
    assert err.splitlines() == [
        "vmmback: 256 MiB of RAM are prefaulted",
        "Linux version",
        "GUEST REA",
        "vmmback: a note",
        "DY",
        "vmmback: guest demo is isolated while it runs",
        "no newline at the end",
    ]


def test_without_json_standard_output_has_the_console_and_the_tables(run: Run) -> None:
    code, out, err = run(play_all)
    assert code == 0
    assert err.splitlines() == ["vmmback: 256 MiB of RAM are prefaulted", "vmmback: a note"]
    assert out.startswith("Linux version\nGUEST REA\nDY\n")
    for row in (
        ("ram0", "256 MiB", "secretmem", "yes"),
        ("pidfd-getfd", "root"),
        ("direct-map", "blocked", "readable"),
    ):
        assert any(all(cell in line for cell in row) for line in out.splitlines()), row
    *_, last_console = [n for n, line in enumerate(out.splitlines()) if line == "no newline at the end"]
    end = out.splitlines()[last_console:]
    assert any("freed-frames" in line for line in end)  # what came after the guest's end
    assert not any("direct-map" in line for line in end)  # and nothing twice
    assert any(line.endswith("65536 of 65536 pages checked, 0 readable: isolated") for line in end)


@pytest.mark.parametrize("text", ["[heap] was read", "a [/] b", "[bold]x[/bold]", "[/secretmem]"])
def test_what_was_measured_is_shown_as_it_is(run: Run, text: str) -> None:
    def play(watcher: Watcher) -> IsolationReport:
        whole = report("inconclusive", text, detail=text)
        watcher.validated(while_it_runs(whole))
        return whole

    code, out, _ = run(play)
    assert code == 8
    assert out.count(text) == 3  # in the table of probes, and as a reason of both verdicts


@pytest.mark.parametrize(
    "kind", [errors.UsageError, errors.GuestNameTaken, errors.HostUnfit, errors.AdmissionRefused, errors.HandoffFailed]
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_an_error_is_one_message_and_its_hint_on_standard_error_with_its_exit_code(
    run: Run, kind: type[VmmbackError], options: list[str]
) -> None:
    def fail(watcher: Watcher) -> IsolationReport:
        watcher.prefaulted(SIZE // 2, SIZE)
        raise kind("what was wrong", "what to do")

    code, out, err = run(fail, *options)
    assert (code, out) == (kind.exit_code, "")
    assert err == "vmmback: error: what was wrong\nvmmback: hint: what to do\n"


def test_an_error_without_a_hint_is_one_line(run: Run) -> None:
    def fail(_: Watcher) -> IsolationReport:
        raise errors.QemuFailed("what was wrong")

    assert run(fail) == (6, "", "vmmback: error: what was wrong\n")


def test_a_launch_that_was_interrupted_exits_with_128_plus_the_signal(run: Run) -> None:
    def stop(_: Watcher) -> IsolationReport:
        raise errors.Interrupted(15)

    assert run(stop)[0] == 143


# ---- what a guest may show on the terminal ---------------------------------------------------------------------------


def shown(*chunks: bytes, encoding: str = "utf-8") -> str:
    """Return what the terminal gets when a guest prints this."""
    raw = BytesIO()
    with pytest.MonkeyPatch.context() as patch, TextIOWrapper(raw, encoding=encoding, write_through=True) as stream:
        patch.setattr(sys, "stdout", stream)
        screen = Screen(as_json=False)
        for chunk in chunks:
            screen.console(chunk)
        return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([b"plain\ttext\n"], "plain\ttext\n"),
        ([b"line\r\nline\r"], "line\nline"),
        ([b"\x1b[31mred\x1b[0m"], "[31mred[0m"),
        ([b"\x1b]0;title\x07\x1b", b"[2J"], "]0;title[2J"),
        (["\x9b31m\x85\x90".encode()], "31m"),  # the same commands in one sign each: ECMA-48, C1
        ([b"\0\b\x7f\x0e"], ""),
        (["\u202eright to left\u200b\ufeff".encode()], "right to left"),
        (["é".encode()[:1], "é".encode()[1:]], "é"),
        ([b"\xff\xc3("], "\ufffd\ufffd("),
    ],
)
def test_of_the_console_only_text_comes_to_the_terminal(chunks: list[bytes], expected: str) -> None:
    assert shown(*chunks) == expected


@given(st.lists(st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode(errors="replace"))))
def test_no_guest_commands_the_terminal(chunks: list[bytes]) -> None:
    control = {sign for sign in shown(*chunks) if unicodedata.category(sign) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert control <= {"\n", "\t"}


def test_a_terminal_without_the_guests_letters_gets_others_in_their_place() -> None:
    assert shown("é\n".encode(), encoding="ascii") == "?\n"


class Gone(StringIO):
    """A terminal that was closed."""

    def write(self, _: str) -> int:
        raise BrokenPipeError


def test_a_terminal_that_is_gone_is_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(watcher: Watcher) -> IsolationReport:
        monkeypatch.setattr(sys, "stderr", Gone())
        return play_all(watcher)

    code, out, _ = run(play, "--json")
    assert code == 0
    assert IsolationReport.from_json(out).verdict is GuestVerdict.ISOLATED


LAUNCH = """
import os, sys
import tests.test_cli, vmmback.cli, vmmback.launch
verdict = sys.argv.pop()
async def launch(config, watcher, stop, *, validate, file):
    reasons = [str(number) * 1000 for number in range(100)] if "LONG" in os.environ else []
    return tests.test_cli.report(verdict, *reasons)
vmmback.launch.launch = launch
vmmback.cli.main()
"""


def launched(folder: Path, output: int, verdict: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a launch that comes to this verdict in a process of its own, whose standard output is `output`."""
    (folder / "vmlinuz").touch()
    (folder / "guest.toml").write_text(GUEST)
    command = [sys.executable, "-c", LAUNCH, "launch", str(folder / "guest.toml"), *options, verdict]
    return subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60)


def test_no_signal_after_the_guests_end_ends_its_report(tmp_path: Path) -> None:
    """It is longer than a pipe holds, so that it is being written while they come."""
    (tmp_path / "vmlinuz").touch()
    (tmp_path / "guest.toml").write_text(GUEST)
    command = [sys.executable, "-c", LAUNCH, "launch", str(tmp_path / "guest.toml"), "--json", "isolated"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "LONG": "1"}) as launch:
        assert launch.stdout is not None
        out = os.read(launch.stdout.fileno(), 1)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) * 2:
            launch.send_signal(signum)
        out += launch.stdout.read()
    assert launch.returncode == 0
    assert len(IsolationReport.from_json(out).reasons) == 100


def test_a_table_that_nobody_reads_changes_no_exit_code(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = launched(tmp_path, writer, "exposed")
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (5, "")


def test_a_json_report_that_cannot_be_written_is_an_error_and_no_success(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = launched(tmp_path, full.fileno(), "isolated", "--json")
    assert done.returncode not in (0, 5, 8)
    assert done.stderr.splitlines()[0].startswith("vmmback: error: ")
    assert "Traceback" not in done.stderr


def test_a_reader_that_stands_still_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        screen = Screen(as_json=False)
        for _ in range(100):
            screen.console(b"x" * 4096)
        assert 0 < screen._left_out < 100 * 4096
        assert len(os.read(pipe.fileno(), 1 << 20)) == 100 * 4096 - screen._left_out
        left_out = screen._left_out
        screen.console(b"y")
        assert screen._left_out == left_out
