"""The command line: the only module that prints or exits. What a command needs is imported when it runs."""

from __future__ import annotations

import codecs
import os
import select
import signal
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from vmmback.errors import HostUnfit, QemuFailed, UsageError, VmmbackError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from vmmback.report import IsolationReport

EXIT_EXPOSED, EXIT_INCONCLUSIVE = 5, 8

_CHUNK = 1024  # characters: at most 4 bytes each

_COLOURS = {
    "blocked": "green",
    "isolated": "bold green",
    "readable": "red",
    "exposed": "bold red",
    "inconclusive": "yellow",
}


def main() -> None:
    """Run the command line, and turn an error into one message and its exit code."""
    try:
        commands.main(prog_name="vmmback")
    except (VmmbackError, OSError, MemoryError, RuntimeError) as caught:
        error = _as_user_error(caught)
        if error is None:
            raise
        hint = f"vmmback: hint: {error.hint}\n" if error.hint else ""
        _write(sys.stderr, f"vmmback: error: {error.message}\n{hint}")
        sys.exit(error.exit_code)


def _as_user_error(error: Exception) -> VmmbackError | None:
    """Return what to tell the user; None for an error that is a mistake of ours."""
    if isinstance(error, VmmbackError):
        return error
    if isinstance(error, RuntimeError) and "can't start new thread" not in str(error):
        return None
    return HostUnfit(
        f"the kernel refused what a launch needs: {error or 'out of memory'}",
        "look at the limits of this process (`ulimit -a`), its cgroup, and what confines it",
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vmmback", message="%(prog)s %(version)s")
def commands() -> None:
    """Guest RAM that the host kernel itself cannot see, for unmodified QEMU, with a proof that it cannot.

    \b
    Example:
      vmmback launch configs/demo.toml
    """


@commands.command(
    epilog="Exit codes: 0 isolated, 2 wrong file or argument, 3 host cannot do it, 4 not enough memory, "
    "5 exposed, 6 QEMU failed, 8 inconclusive, 128 + signal when stopped before the guest ran."
)
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document; all else goes to stderr.")
@click.option("--validate/--no-validate", default=True, help="Run the probes (the default), or only the guest.")
def launch(file: Path, as_json: bool, validate: bool) -> None:
    """Run the guest of FILE on secret RAM until it ends, and report what was measured.

    Ctrl-C presses the guest's power button; again, it tells QEMU to quit; once more, it kills it.

    \b
    Example:
      vmmback launch configs/demo.toml --json | jq .verdict
    """
    import asyncio

    from vmmback import config
    from vmmback.host import check_descriptors
    from vmmback.launch import Stop
    from vmmback.launch import launch as run

    guest = config.load(file)
    check_descriptors()
    validate = validate and guest.isolation.validate_at == "boot"
    screen = _Screen(as_json=as_json)

    async def supervise() -> IsolationReport:
        stop = Stop()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # which nohup(1) asks for
                loop.add_signal_handler(signum, stop.request, signum)
        return await run(guest, screen, stop, validate=validate)

    try:
        report = asyncio.run(supervise())
    except QemuFailed as error:
        if screen.exposed is None:
            raise
        report = screen.exposed  # that QEMU failed afterwards must not hide it
        screen.note(error.message)
    finally:
        screen.close()
    try:
        screen.finished(report)
    except UsageError as error:
        if report.verdict != "exposed":  # which says more than that the report could not be written
            raise
        screen.note(error.message)
    if report.verdict == "exposed":
        sys.exit(EXIT_EXPOSED)
    if report.verdict == "inconclusive" and validate:
        sys.exit(EXIT_INCONCLUSIVE)


@commands.command()
def schema() -> None:
    """Print the JSON Schema of guest.toml, for editors and checkers.

    \b
    Example:
      vmmback schema > guest.schema.json
    """
    import json

    from vmmback import config

    click.echo(json.dumps(config.json_schema(), indent=2))


class _Screen:
    """What a launch shows: the guest's console and the report on standard output, progress and notes on standard error.

    With `as_json` standard output carries the report's JSON alone.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console_out = sys.stderr if as_json else sys.stdout
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_line_start = True
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._validated_rows = 0
        self._left_out = 0
        self.exposed: IsolationReport | None = None
        """The report of a guest that was found exposed while it ran."""

    def prefaulted(self, done: int, size: int) -> None:
        if _is_terminal(sys.stderr):
            with suppress(OSError):  # the terminal is gone meanwhile
                self._show_progress(done, size)
        elif done == size:
            self.note(f"{size >> 20} MiB of RAM are prefaulted")

    def _show_progress(self, done: int, size: int) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("prefault"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
            self._progress = Progress(*columns, console=_rich(sys.stderr, is_terminal=True))
            self._task = self._progress.add_task("prefault", total=size)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=done)
        if done == size:
            self.close()

    def console(self, data: bytes) -> None:
        # A guest must not command the operator's terminal: what is not text is left out. The log has it all.
        text = "".join(c for c in self._decoder.decode(data) if c.isprintable() or c in "\n\t")
        if text:
            self._at_line_start = text.endswith("\n")
            self._left_out += _show(self._console_out, text)

    def note(self, message: str) -> None:
        self._fresh_line()
        _show(sys.stderr, f"vmmback: {message}\n")

    def validated(self, report: IsolationReport) -> None:
        if report.verdict == "exposed":
            self.exposed = report
        if self._as_json:
            self.note(f"guest {report.guest} is {report.verdict.value} while it runs")
            return
        self._fresh_line()
        if not _show(sys.stdout, _rendered(*_tables(report))):
            self._validated_rows = len(report.probes)

    def finished(self, report: IsolationReport) -> None:
        if self._left_out:
            self.note(f"{self._left_out} characters of the console are not shown: the output took them too slowly")
        self._fresh_line()
        if self._as_json:
            problem = _write(sys.stdout, report.model_dump_json(indent=2) + "\n")
            if problem:
                raise UsageError(
                    f"the report could not be written to standard output: {problem}", "give it a place to go to"
                )
        else:
            _write(sys.stdout, _rendered(*_end(report, self._validated_rows)))

    def close(self) -> None:
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None

    def _fresh_line(self) -> None:
        if not self._at_line_start:
            _show(self._console_out, "\n")
            self._at_line_start = True


def _show(stream: TextIO | None, text: str) -> int:
    """Write as much as can be had without waiting; return how many characters were left out.

    A reader that stands still (Ctrl-S, a full pipe) must not keep a launch from its deadlines and its signals. What is
    ready to be written to takes PIPE_BUF bytes, 4 KiB, at once (pipe(7)).
    """
    for start in range(0, len(text), _CHUNK):
        if not _is_ready(stream):
            return len(text) - start
        _write(stream, text[start : start + _CHUNK])
    return 0


def _is_ready(stream: TextIO | None) -> bool:
    try:
        return stream is None or bool(select.select([], [stream.fileno()], [], 0)[1])
    except (OSError, ValueError):  # it has no descriptor, or a bad one: writing will tell
        return True


def _write(stream: TextIO | None, text: str) -> str:
    """Write and flush; return what went wrong, "" if nothing did. `stream` is None where it was closed at the start.

    A terminal, a pipe or a disk that is gone or full does not end a guest. From then on nothing is written to it.
    """
    if stream is None:
        return "it is closed"
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except OSError as error:
        with suppress(OSError):  # what is buffered would be tried again when Python ends, and fail again
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return error.strerror or str(error)
    return ""


def _rendered(*parts: RenderableType) -> str:
    """Return what standard output is to show; rich's own way of writing raises where a stream is gone."""
    from rich.text import Text

    text = StringIO()
    console = _rich(text, is_terminal=_is_terminal(sys.stdout))
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, (str, Text)))  # a table fits the width, a line need not
    return text.getvalue()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _rich(stream: TextIO, *, is_terminal: bool) -> Console:
    """Return rich's console without its markup: what was measured is shown as it is."""
    from rich.console import Console

    return Console(file=stream, force_terminal=is_terminal, highlight=False, markup=False, emoji=False)


def _tables(report: IsolationReport) -> list[RenderableType]:
    """Return what was found while the guest runs."""
    from rich.table import Table
    from rich.text import Text

    blocks = Table("RAM block", "size", "backing", "guest can write", title_justify="left")
    for block in report.ram_blocks:
        blocks.add_row(block.name, _size(block.size), block.backing, "yes" if block.guest_writable else "no")
    exposures = Table("exposure", "who holds the key", "what was measured")
    for exposure in report.exposures:
        exposures.add_row(exposure.name, exposure.holders, exposure.detail)
    return [blocks, exposures, _probe_table(report, 0), *_verdict(report), Text()]


def _end(report: IsolationReport, shown: int) -> list[RenderableType]:
    """Return what the guest's end added to the `shown` rows, and the last word."""
    return [*([_probe_table(report, shown)] if report.probes[shown:] else []), *_verdict(report)]


def _probe_table(report: IsolationReport, start: int) -> RenderableType:
    from rich.table import Table

    table = Table("probe", "guest RAM", "control", "what was seen", "ms")
    table.columns[4].justify = "right"
    for probe in report.probes[start:]:
        table.add_row(
            probe.name,
            _coloured(probe.verdict.value),
            probe.control.value,
            probe.detail,
            f"{probe.seconds * 1000:.1f}",
        )
    return table


def _verdict(report: IsolationReport) -> list[RenderableType]:
    from rich.text import Text

    memory = report.memory
    summary = (
        f"guest {report.guest}: {_size(memory.secret)} of {_size(memory.size)} secret, "
        f"{memory.checked_pages} of {memory.size // 4096} pages checked, {memory.readable_pages} readable: "
    )
    lines: list[RenderableType] = [Text.assemble(summary, _coloured(report.verdict.value))]
    lines += [f"  {reason}" for reason in report.reasons]
    if report.validated_after:
        lines.append(f"  validated after {report.validated_after}")
    return lines


def _coloured(verdict: str) -> Text:
    from rich.text import Text

    return Text(verdict, style=_COLOURS[verdict])


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size % (1 << 20) == 0 and size else f"{size >> 10} KiB"
