"""`vmmback broker` and `vmmback pool`: warm secret RAM for other processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from vmmback.cli.output import print_result
from vmmback.errors import HostUnfit


@click.command(epilog="Exit codes: 0 ended by SIGTERM or Ctrl-C, 2 wrong file, 3 host cannot do it.")
@click.argument("file", type=click.Path(readable=False, path_type=Path))
def broker(file: Path) -> None:
    """Keep secret RAM ready as FILE says, and lend it to `vmmback launch` and to other programs, until Ctrl-C.

    What was lent once is never lent again. docs/BROKER.md has the file and the interface.

    \b
    Example:
      vmmback broker configs/broker/broker.toml
    """
    import asyncio

    from vmmback.broker import config
    from vmmback.broker.run import run
    from vmmback.cli.output import show
    from vmmback.libvirt import domains
    from vmmback.libvirt.places import Places

    def note(message: str) -> None:
        import sys

        show(sys.stderr, f"vmmback: {message}\n")

    asyncio.run(run(config.load(file), note, lambda broker: domains.served(broker, Places())))


@click.command(epilog="Exit codes: 0 fine, 3 no broker runs, or it does not answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def pool(*, as_json: bool) -> None:
    """Show what the broker has ready, and what it has lent to this user; root sees all leases.

    \b
    Example:
      vmmback pool --json | jq .pool
    """
    import asyncio

    found = asyncio.run(_ask())
    print_result(json.dumps(found, indent=2) + "\n" if as_json else _text(found))


async def _ask() -> dict[str, Any]:
    from dataclasses import asdict

    from vmmback.broker.client import connected, socket_path

    async with connected() as lender:
        if lender is None:
            raise HostUnfit(f"no broker can be reached at {socket_path()}", "start one: vmmback broker FILE")
        statistics = await lender.statistics()
        leases = [asdict(lease) for lease in await lender.leases()]
    statistics["pool"] = [asdict(ready) for ready in statistics["pool"]]
    return statistics | {"leases": leases}


def _text(found: dict[str, Any]) -> str:
    from vmmback.cli.tables import plain_table, rendered

    ready = plain_table("ready", "of", "size")
    for entry in found["pool"]:
        ready.add_row(str(entry["ready"]), str(entry["wanted"]), f"{entry['size'] >> 20} MiB")
    leases = plain_table("lease", "size", "pid", "uid", "since", "purpose")
    for lease in found["leases"]:
        leases.add_row(
            str(lease["lease"]), f"{lease['size'] >> 20} MiB", str(lease["pid"]), str(lease["uid"]), lease["since"],
            lease["purpose"],
        )  # fmt: skip
    return rendered(ready, leases)
