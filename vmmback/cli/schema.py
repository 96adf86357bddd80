"""`vmmback schema`: what may stand in a guest file."""

from __future__ import annotations

import click


@click.command()
def schema() -> None:
    """Print the JSON Schema of guest.toml, for editors and checkers.

    \b
    Example:
      vmmback schema > guest.schema.json
    """
    import json

    from vmmback.config.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
