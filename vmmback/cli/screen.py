"""What a launch shows while it goes on."""

from __future__ import annotations

import codecs
import sys
from typing import TYPE_CHECKING

from vmmback.cli.output import is_terminal, print_result, show, write
from vmmback.cli.progress import ByteProgress
from vmmback.cli.tables import at_the_end, rendered, while_it_runs

if TYPE_CHECKING:
    from vmmback.lifecycle import State
    from vmmback.report import Drift, IsolationReport


class Screen:
    """What a launch shows: the guest's console and the report on standard output, progress and notes on standard error.

    With `as_json` standard output carries the report's JSON alone.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._console_out = sys.stderr if as_json else sys.stdout
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_line_start = True
        self._prefault = ByteProgress("prefault")
        self._validated_rows = 0
        self._left_out = 0

    def prefaulted(self, done: int, size: int) -> None:
        self._prefault.show(done, size)
        if done == size and not is_terminal(sys.stderr):
            self.note(f"{size >> 20} MiB of RAM are prefaulted")

    def console(self, data: bytes | memoryview) -> None:
        # A guest must not command the operator's terminal: what is not text is left out. The log has it all.
        text = "".join(c for c in self._decoder.decode(data) if c.isprintable() or c in "\n\t")
        if text:
            self._at_line_start = text.endswith("\n")
            self._left_out += show(self._console_out, text)

    def note(self, message: str) -> None:
        self._fresh_line()
        show(sys.stderr, f"vmmback: {message}\n")

    def validated(self, report: IsolationReport) -> None:
        if self.as_json:
            self.note(f"guest {report.guest} is {report.verdict.value} while it runs")
            return
        self._fresh_line()
        if not show(sys.stdout, rendered(*while_it_runs(report))):
            self._validated_rows = len(report.probes)

    def drifted(self, drift: Drift) -> None:
        self.note(f"drift at {drift.at}: {drift.probe}: {drift.detail}")

    def entered(self, state: State) -> None:
        pass  # what is printed says it

    def finished(self, report: IsolationReport) -> None:
        """Show the last word. Raises UsageError if JSON was asked for and cannot be written."""
        if self._left_out:
            self.note(f"{self._left_out} characters of the console are not shown: the output took them too slowly")
        self._fresh_line()
        if self.as_json:
            print_result(report.as_json())
        else:
            write(sys.stdout, rendered(*at_the_end(report, self._validated_rows)))

    def close(self) -> None:
        self._prefault.close()

    def _fresh_line(self) -> None:
        if not self._at_line_start:
            show(self._console_out, "\n")
            self._at_line_start = True
