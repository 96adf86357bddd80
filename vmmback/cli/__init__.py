"""The command line: the only package that prints or exits. What a command needs is imported when it runs."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from vmmback import __version__
from vmmback.cli.audit import audit, selftest
from vmmback.cli.completion import completion
from vmmback.cli.console import console
from vmmback.cli.disk import disk
from vmmback.cli.files import ReportFiles, report_files
from vmmback.cli.grow import grow
from vmmback.cli.guests import ps, status, stop
from vmmback.cli.host import host
from vmmback.cli.logs import logs, qmp
from vmmback.cli.output import as_user_error, exit_code_of, finish, print_error
from vmmback.cli.screen import Screen
from vmmback.errors import Interrupted, VmmbackError


def main() -> None:
    """Run the command line, and turn an error into one message and its exit code."""
    try:
        commands.main(prog_name="vmmback")
    except (VmmbackError, OSError, MemoryError, RuntimeError) as caught:
        error = as_user_error(caught)
        if error is None:
            raise
        print_error(error)
        sys.exit(error.exit_code)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C has its exit code also where a command makes nothing of it (click's is 1)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT, "before it was done") from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
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
@report_files
@click.option("--validate/--no-validate", default=True, help="Run the probes (the default), or only the guest.")
@click.option(
    "--detach", is_flag=True, help="Leave it in the background once it was validated (or, unvalidated, runs)."
)
def launch(file: Path, as_json: bool, validate: bool, detach: bool, files: ReportFiles) -> None:
    """Run the guest of FILE on secret RAM until it ends, and report what was measured.

    Ctrl-C presses the guest's power button; again, it tells QEMU to quit; once more, it kills it. With --detach the
    report and the exit code are those of the running guest, which `vmmback stop` ends.

    \b
    Example:
      vmmback launch configs/demo.toml --json | jq .verdict
    """
    from vmmback import config
    from vmmback.cli.detach import detached
    from vmmback.cli.lead import lead
    from vmmback.host.limits import check_descriptors

    guest = config.load(file)
    check_descriptors()
    validate = validate and guest.isolation.validate_at == "boot"
    screen = Screen(as_json=as_json)
    if detach:
        detached(guest, screen, validate=validate, file=file, files=files)
    try:
        report = lead(guest, screen, validate=validate, file=file)
    finally:
        screen.close()
    exit_code = exit_code_of(report.verdict) if validate or report.verdict == "exposed" else 0
    finish(exit_code, partial(screen.finished, report), *files.outputs(report))


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


for command in (audit, selftest, ps, status, stop, console, logs, qmp, grow, disk, host, completion):
    commands.add_command(command)
