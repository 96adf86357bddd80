"""`vmmback audit` and `vmmback selftest`: what is found on a live guest, and on this host."""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmmback.cli.completion import GuestName
from vmmback.cli.files import ReportFiles, report_files
from vmmback.cli.output import exit_code_of, finish, is_terminal, print_result, show
from vmmback.cli.progress import ByteProgress
from vmmback.cli.signals import stopped
from vmmback.errors import UsageError

if TYPE_CHECKING:
    from array import array

    from vmmback.isolation.needle import Needle
    from vmmback.report import Hunt, IsolationReport

T = TypeVar("T")


@click.command(
    epilog="Exit codes: 0 isolated, 2 wrong argument, 3 host cannot do it, 5 exposed, 6 QEMU failed, 7 no such guest, "
    "8 inconclusive, 128 + signal when stopped."
)
@click.argument("name", type=GuestName())
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document; all else goes to stderr.")
@report_files
@click.option(
    "--hunt",
    "source",
    metavar="-|FD",
    help="Search all of the host's RAM for a canary of yours, 16 to 4096 bytes, which is read from the terminal or "
    "standard input (-), or from an open descriptor (its number). Never write it on a command line.",
)
@click.option(
    "--hunt-from-guest", "from_guest", is_flag=True, help="Search for the canary of a guest that printed its halves."
)
def audit(name: str, as_json: bool, files: ReportFiles, source: str | None, from_guest: bool) -> None:
    """Try every vector that is safe on a live guest on the guest NAME, and report what was measured.

    Nothing is stopped or written. A guest that turns out to be exposed gets what on-exposed of its file says; what a
    hunt finds is in this report alone.

    \b
    Examples:
      vmmback audit demo
      vmmback audit demo --json | jq .verdict
      vmmback audit demo --html report.html --hunt-from-guest
      vmmback audit demo --hunt 3 3<canary.bin
    """
    from vmmback import control_client
    from vmmback.cli.tables import rendered, while_it_runs
    from vmmback.config.values import check_name
    from vmmback.report import with_hunt
    from vmmback.runtime import runtime_folder

    folder = runtime_folder() / check_name(name)
    if source is not None and from_guest:
        raise UsageError("--hunt and --hunt-from-guest do not go together", "leave one out")
    descriptor = None if source is None else _descriptor(source)

    async def known() -> tuple[array[int], tuple[bytes, bytes] | None]:
        async with control_client.connect(folder) as supervisor:
            return await supervisor.frames(), await supervisor.canary_halves()

    async def audited() -> IsolationReport:
        async with control_client.connect(folder) as supervisor:
            return await supervisor.audit()

    with stopped("before the audit was done"):
        found = None
        if source is not None or from_guest:
            frames, halves = run(known())
            with _needle(descriptor, halves, from_guest=from_guest) as needle:
                found = _hunted(needle, name, frames)  # before any probe: none of theirs is to be found
        report = run(audited())
    if found:
        report = with_hunt(report, found)

    def show_report() -> None:
        print_result(report.as_json() if as_json else rendered(*while_it_runs(report)))

    finish(exit_code_of(report.verdict), show_report, *files.outputs(report))


@click.command(
    epilog="Exit codes: 0 passed, 2 wrong argument, 3 host cannot do it, 5 failed: a probe read secret RAM, "
    "8 inconclusive, 128 + signal when stopped."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document; all else goes to stderr.")
@report_files
def selftest(as_json: bool, files: ReportFiles) -> None:
    """Try every known vector on this host: on throwaway memory, throwaway processes and two tiny guests.

    Each is tried on secret RAM and, as its control, on ordinary memory. Guests that run are left alone.

    \b
    Examples:
      vmmback selftest
      vmmback selftest --json | jq '.vectors[] | select(.verdict != "blocked")'
    """
    from vmmback.cli.tables import rendered, selftest_tables
    from vmmback.selftest import selftest as try_all

    def progress(name: str, done: int, total: int) -> None:
        if is_terminal(sys.stderr):
            show(sys.stderr, f"\r\x1b[Kvmmback: {done} of {total}: {name}")

    with stopped("before the self-test was done"):
        try:
            report = run(try_all(progress))
        finally:
            if is_terminal(sys.stderr):
                show(sys.stderr, "\r\x1b[K")

    def show_report() -> None:
        print_result(report.as_json() if as_json else rendered(*selftest_tables(report)))

    finish(exit_code_of(report.verdict), show_report, *files.outputs(report))


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it to its end in an event loop of its own."""
    import asyncio

    return asyncio.run(coroutine)


def _descriptor(source: str) -> int:
    """Return the descriptor that --hunt names. Raises UsageError, without what was written: it may be the canary."""
    if source != "-" and not (source.isascii() and source.isdecimal() and len(source) <= 6):
        raise UsageError(
            "--hunt wants - or the number of an open descriptor, and never the canary itself",
            "others can read a command line: change the canary if it was one, and write for example --hunt 3 3<file",
        )
    descriptor = 0 if source == "-" else int(source)
    hint = "write for example --hunt 3 3<file"
    # Python leaves None where it found a standard stream closed, whose number another file may have by now.
    if not Path(f"/proc/self/fd/{descriptor}").exists() or (descriptor == 0 and sys.__stdin__ is None):
        raise UsageError(f"--hunt {source}: no such descriptor is open", hint)
    try:
        os.read(descriptor, 0)  # takes nothing, and waits for nothing
    except OSError as error:  # it is open for writing alone, or a folder
        raise UsageError(f"--hunt {source}: it cannot be read: {error.strerror}", hint) from error
    return descriptor


@contextmanager
def _needle(descriptor: int | None, halves: tuple[bytes, bytes] | None, *, from_guest: bool) -> Iterator[Needle]:
    from vmmback.isolation.needle import Needle

    if from_guest:
        if halves is None:
            raise UsageError(
                "the guest has printed no halves of a canary",
                "a guest prints `vmmback-canary halves:HEX:HEX` on its console (configs/guest/init is an example)",
            )
        with Needle.xor(*halves) as needle:
            yield needle
        return
    assert descriptor is not None
    if os.isatty(descriptor):  # whichever number the terminal has: what is typed must not be shown
        show(sys.stderr, "vmmback: the canary (it is not shown): ")
        with Needle.from_terminal() as needle:
            show(sys.stderr, "\n")
            yield needle
    else:
        with Needle.read(descriptor) as needle:
            yield needle


def _hunted(needle: Needle, name: str, frames: array[int]) -> Hunt:
    from vmmback.isolation.hunt import hunt

    with ByteProgress("hunt") as progress:
        return hunt(needle, {name: frames}, lambda done, total, _: progress.show(done, total))
