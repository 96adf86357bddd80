"""`vmmback grow`: more RAM for a guest that runs."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from vmmback.cli.audit import run
from vmmback.cli.completion import GuestName
from vmmback.cli.output import exit_code_of, finish, print_result, show
from vmmback.cli.progress import ByteProgress
from vmmback.cli.signals import stopped

if TYPE_CHECKING:
    from vmmback.report import IsolationReport


@click.command(
    epilog="Exit codes: 0 isolated, 2 wrong argument or too much, 3 host cannot do it, 4 not enough memory, "
    "5 exposed, 6 QEMU failed, 7 no such guest, 8 inconclusive, 128 + signal when stopped."
)
@click.argument("name", type=GuestName())
@click.argument("size")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document; all else goes to stderr.")
def grow(name: str, size: str, as_json: bool) -> None:
    """Add RAM of SIZE to the live guest NAME, up to [memory] max of its file, and report what was measured of it.

    SIZE is a multiple of 128MiB. The new RAM is of the guest's kind, and proved before the guest can use it. Ctrl-C
    while it is prefaulted takes it back; what QEMU was asked for already is finished by the guest's supervisor.

    \b
    Examples:
      vmmback grow demo 128MiB
      vmmback grow demo 1GiB --json | jq .memory
    """
    from vmmback import control_client
    from vmmback.cli.tables import rendered, while_it_runs
    from vmmback.config.values import check_name, check_size
    from vmmback.runtime import runtime_folder

    folder, size_bytes = runtime_folder() / check_name(name), check_size(size)

    async def grown(progress: ByteProgress) -> IsolationReport:
        async with control_client.connect(folder) as supervisor:
            return await supervisor.grow(size_bytes, progress.show)

    with stopped("before the guest had grown"), ByteProgress("prefault") as progress:
        report = run(grown(progress))
    show(sys.stderr, f"vmmback: guest {name} has {report.memory.size >> 20} MiB of RAM now\n")
    text = report.as_json() if as_json else rendered(*while_it_runs(report))
    finish(exit_code_of(report.verdict), partial(print_result, text))
