"""Reports as files: `--html FILE` and `--junit FILE` of the commands that make one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmmback.errors import UsageError

if TYPE_CHECKING:
    from vmmback.report import IsolationReport, SelftestReport


class ReportFiles:
    """Where a report is to be written besides standard output. Raises UsageError for a place that cannot be."""

    def __init__(self, html: Path | None, junit: Path | None) -> None:
        self._html, self._junit = html, junit
        for option, path in (("--html", html), ("--junit", junit)):
            if path:
                check_place(option, path)
        if html and html == junit:
            raise UsageError(f"--html and --junit both name {html}", "name two files")

    def outputs(self, report: IsolationReport | SelftestReport) -> list[Callable[[], None]]:
        """Return what writes each file that was asked for. It raises UsageError."""
        wanted = ((self._html, _page), (self._junit, _xml))
        return [partial(_write, path, made_of, report) for path, made_of in wanted if path]


def report_files(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options, and the ReportFiles made of them as its argument `files`."""

    @click.option("--html", type=click.Path(path_type=Path), help="Write the report as one self-contained page, too.")
    @click.option("--junit", type=click.Path(path_type=Path), help="Write the report as JUnit XML for CI, too.")
    @wraps(command)
    def with_files(*arguments: Any, html: Path | None, junit: Path | None, **options: Any) -> None:
        command(*arguments, files=ReportFiles(html, junit), **options)

    return with_files


def _page(report: IsolationReport | SelftestReport) -> str:
    from vmmback.isolation.catalogue import CATALOGUE
    from vmmback.render.html import guest_page, selftest_page
    from vmmback.report import SelftestReport

    if isinstance(report, SelftestReport):
        return selftest_page(report)
    return guest_page(report, {kind.name: (kind.vector, kind.control_is, kind.source) for kind in CATALOGUE})


def _xml(report: IsolationReport | SelftestReport) -> str:
    from vmmback.render.junit import guest_xml, selftest_xml
    from vmmback.report import SelftestReport

    return selftest_xml(report) if isinstance(report, SelftestReport) else guest_xml(report)


def check_place(option: str, path: Path) -> None:
    """Raise UsageError where no file can be made; what is there stays as it is until the report is whole."""
    try:
        if path.is_dir():
            raise UsageError(f"{option} {path}: is a folder", "write the path of a file in it")
        if path.exists() and not path.is_file():  # a device or a pipe, in whose place a file would come
            raise UsageError(f"{option} {path}: is no regular file", "name a file that may be replaced")
        if not path.parent.is_dir():
            raise UsageError(f"{option} {path}: its folder does not exist", "make the folder, or name another")
        draft = _draft(path)
        draft.touch(exist_ok=False)
        draft.unlink()
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror}", "name another file") from error


def _draft(path: Path) -> Path:
    """Return the path of a new file beside the one that `path` leads to, so that a link stays one.

    Its name is short, however long that of the other is: there is one draft at a time.
    """
    return path.resolve().with_name(f".vmmback.{os.getpid()}")


def _write(
    path: Path, made_of: Callable[[IsolationReport | SelftestReport], str], report: IsolationReport | SelftestReport
) -> None:
    write_whole(path, made_of(report))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises UsageError."""
    draft = _draft(path)
    try:
        draft.write_text(text)
        draft.replace(path.resolve())
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise UsageError(f"{path} could not be written: {error.strerror}", "name another file") from error
