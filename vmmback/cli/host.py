"""`vmmback host`: can this host run guests, and how much secret RAM can it still give."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmmback.cli.files import check_place
from vmmback.cli.host_plan import plan
from vmmback.cli.output import EXIT_REFUSED, print_result
from vmmback.errors import UsageError

if TYPE_CHECKING:
    from vmmback.doctor import Check
    from vmmback.overview import Overview

EXIT_UNFIT = 3
_WATCH_EVERY_S = 5.0


@click.group(
    invoke_without_command=True,
    epilog="Exit codes: 0 a guest can be launched, 2 wrong argument, 3 a launch would fail (the checks say why), "
    "4 there is no memory for one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; with --watch, one on each line.")
@click.option("--types", is_flag=True, help="With --json: free blocks by migrate type, too; takes some 30 ms more.")
@click.option("--prometheus", is_flag=True, help="Print metrics in Prometheus' text format.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="Put it into FILE, as a whole each time, instead of standard output.",
)  # fmt: skip
@click.option("--watch", is_flag=True, help="Do it again and again until Ctrl-C.")
@click.option("--every", metavar="DURATION", help='How often, with --watch (default "5s").')
@click.pass_context
def host(
    context: click.Context,
    as_json: bool,
    types: bool,
    prometheus: bool,
    output: Path | None,
    watch: bool,
    every: str | None,
) -> None:
    """Tell whether this host can run guests, what is missing, and how much secret RAM it can still give.

    \b
    Examples:
      vmmback host
      vmmback host --json | jq .secret_ram.largest_guest
      vmmback host --watch --every 2s
      vmmback host --prometheus --output /var/lib/prometheus/node-exporter/vmmback.prom
    """
    given = as_json or types or prometheus or output or watch or every
    if context.invoked_subcommand:
        if given:
            raise UsageError("options of `vmmback host` stand before a command of it", "leave them out")
        return
    if as_json and prometheus:
        raise UsageError("--json and --prometheus are two formats", "choose one of them")
    if types and not as_json:
        raise UsageError("--types is for JSON alone", "write --json, too")
    if every and not watch:
        raise UsageError("--every says how often to --watch", "write --watch, too")
    every_s = _duration(every) if every else _WATCH_EVERY_S
    if output:
        check_place("--output", output)
    shape = _json_line if as_json and watch else _json if as_json else _metrics if prometheus else _text
    overview, checks = _look(types=types)
    with suppress(KeyboardInterrupt) if watch else nullcontext():
        while True:
            _put(shape(overview, checks), output, clear=watch and not as_json and not prometheus)
            if not watch:
                break
            time.sleep(every_s)
            overview, checks = _look(types=types)
    from vmmback.doctor import would_fail

    sys.exit(EXIT_UNFIT if would_fail(checks) else EXIT_REFUSED if overview.gives_nothing else 0)


def _look(*, types: bool) -> tuple[Overview, tuple[Check, ...]]:
    """Read the memory while the checks are made, most of which wait for others."""
    from vmmback import doctor

    with doctor.examination() as checks:
        from vmmback import overview

        memory = overview.read(types=types)
        return memory, checks()


def _duration(text: str) -> float:
    from vmmback.config.values import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--every: {error}", "write for example --every 30s") from error


def _json(overview: Overview, checks: tuple[Check, ...]) -> str:
    return json.dumps(_document(overview, checks), indent=2) + "\n"


def _json_line(overview: Overview, checks: tuple[Check, ...]) -> str:
    return json.dumps(_document(overview, checks)) + "\n"


def _document(overview: Overview, checks: tuple[Check, ...]) -> dict[str, Any]:
    from vmmback.doctor import would_fail

    return {
        "launch_possible": not would_fail(checks) and not overview.gives_nothing,
        **overview.document(),
        "checks": [check._asdict() for check in checks],
    }


def _metrics(overview: Overview, checks: tuple[Check, ...]) -> str:
    from vmmback.cli.host_metrics import exposition

    return exposition(overview, checks)


def _text(overview: Overview, checks: tuple[Check, ...]) -> str:
    from vmmback.cli.host_view import shown

    return shown(overview, checks)


def _put(text: str, output: Path | None, *, clear: bool) -> None:
    from vmmback.cli.output import is_terminal

    if output:
        from vmmback.cli.files import write_whole

        write_whole(output, text)
    else:
        print_result(("\x1b[H\x1b[2J" if clear and is_terminal(sys.stdout) else "") + text)


host.add_command(plan)
