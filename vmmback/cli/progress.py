"""A progress bar of bytes on standard error."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vmmback.cli.output import is_terminal
from vmmback.cli.tables import rich_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ByteProgress:
    """A bar with bytes done, of how many, and the speed; nothing where standard error is no terminal."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done; the bar stays as it is once all are."""
        if not is_terminal(sys.stderr):
            return
        with suppress(OSError):  # the terminal is gone meanwhile
            self._show(done, total)

    def _show(self, done: int, total: int) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn(self._label), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
            self._progress = Progress(*columns, console=rich_console(sys.stderr, is_terminal=True))
            self._task = self._progress.add_task(self._label, total=total)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=done)
        if done == total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
