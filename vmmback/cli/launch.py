"""`vmmback launch`: one guest, from its file to the report at its end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from vmmback.cli.files import ReportFiles, report_files
from vmmback.cli.output import exit_code_of, finish
from vmmback.cli.screen import Screen


@click.command(
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
