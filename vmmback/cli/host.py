"""The commands `vmmback host …`."""

from __future__ import annotations

import click

from vmmback.cli.host_plan import plan


@click.group()
def host() -> None:
    """Tell what hosts can give to guests."""


host.add_command(plan)
