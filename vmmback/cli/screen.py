"""What a launch shows while it goes on."""

from __future__ import annotations

import codecs
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from vmmback.cli.output import is_terminal, show, write
from vmmback.cli.tables import at_the_end, rendered, rich_console, while_it_runs
from vmmback.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from vmmback.report import Drift, IsolationReport


class Screen:
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
        if is_terminal(sys.stderr):
            with suppress(OSError):  # the terminal is gone meanwhile
                self._show_progress(done, size)
        elif done == size:
            self.note(f"{size >> 20} MiB of RAM are prefaulted")

    def _show_progress(self, done: int, size: int) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("prefault"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
            self._progress = Progress(*columns, console=rich_console(sys.stderr, is_terminal=True))
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
            self._left_out += show(self._console_out, text)

    def note(self, message: str) -> None:
        self._fresh_line()
        show(sys.stderr, f"vmmback: {message}\n")

    def validated(self, report: IsolationReport) -> None:
        if report.verdict == "exposed":
            self.exposed = report
        if self._as_json:
            self.note(f"guest {report.guest} is {report.verdict.value} while it runs")
            return
        self._fresh_line()
        if not show(sys.stdout, rendered(*while_it_runs(report))):
            self._validated_rows = len(report.probes)

    def drifted(self, drift: Drift, report: IsolationReport) -> None:
        self.exposed = report
        self.note(f"drift at {drift.at}: {drift.probe}: {drift.detail}")

    def finished(self, report: IsolationReport) -> None:
        if self._left_out:
            self.note(f"{self._left_out} characters of the console are not shown: the output took them too slowly")
        self._fresh_line()
        if self._as_json:
            problem = write(sys.stdout, report.model_dump_json(indent=2) + "\n")
            if problem:
                raise UsageError(
                    f"the report could not be written to standard output: {problem}", "give it a place to go to"
                )
        else:
            write(sys.stdout, rendered(*at_the_end(report, self._validated_rows)))

    def close(self) -> None:
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None

    def _fresh_line(self) -> None:
        if not self._at_line_start:
            show(self._console_out, "\n")
            self._at_line_start = True
