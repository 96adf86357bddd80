"""The manual page's part on commands, made of what `--help` says, so that neither can go stale: `./dev man`.

python -m vmmback.cli.manual docs/vmmback.1.md | lowdown -s -t man --out-no-smarty
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

# Where a page has the commands.
PLACE = "{commands}"


def page(text: str, group: click.Group) -> str:
    """Return a page in Markdown, with the commands of `group` in their place."""
    assert text.count(PLACE) == 1
    return text.replace(PLACE, "\n\n".join(_sections(group)))


def _sections(group: click.Group) -> Iterator[str]:
    top = click.Context(group, info_name="vmmback", **group.context_settings)
    yield _options(group, top, own_help=True)
    for name, command in _leaves(group, top):
        ctx = click.Context(command, info_name=name, parent=top)
        yield f"## {_escaped(' '.join(['vmmback', name, *command.collect_usage_pieces(ctx)]))}"
        yield _prose(command.help or "")
        if options := _options(command, ctx, own_help=False):
            yield options
        if command.epilog:
            yield _escaped(command.epilog)


def _leaves(group: click.Group, ctx: click.Context) -> Iterator[tuple[str, click.Command]]:
    """Yield the commands that do something, each with its name; one of a group of its own carries the group's."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            if command.invoke_without_command:
                yield name, command
            yield from ((f"{name} {inner}", leaf) for inner, leaf in _leaves(command, ctx))
        else:
            yield name, command


def _options(command: click.Command, ctx: click.Context, *, own_help: bool) -> str:
    """Return a list of a command's options; that of help is said once, for all commands."""
    records = [
        param.get_help_record(ctx)
        for param in command.get_params(ctx)
        if isinstance(param, click.Option) and (own_help or "--help" not in param.opts)
    ]
    return "\n\n".join(f"**{_escaped(record[0])}**\n\n:   {_escaped(record[1])}" for record in records if record)


def _prose(text: str) -> str:
    """Return a help text's paragraphs; those that click is told not to wrap are examples, in their own lines."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            title, _, lines = paragraph.removeprefix("\b\n").partition("\n")
            parts += [_escaped(title), "\n".join(f"    {line.strip()}" for line in lines.splitlines())]
        else:
            parts.append(_escaped(" ".join(paragraph.split())))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """Return a text in which Markdown finds nothing but code in backquotes."""
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<>\[\]])", r"\\\1", part)
        for part in re.split(r"(`[^`]*`)", text)
    )


def main(source: Path) -> None:
    """Print the page whose text is in this file."""
    from vmmback.cli import commands

    click.echo(page(source.read_text(), commands), nl=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
