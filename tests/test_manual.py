"""The manual page has every command and option, in their own words, in the Markdown that a tool turns into a page."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from vmmback import cli
from vmmback.cli.manual import page

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/vmmback.1.md").read_text()


def leaves(group: click.Group, above: str = "") -> list[tuple[str, click.Command]]:
    found, ctx = [], click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        inner = isinstance(command, click.Group)
        found += leaves(command, f"{name} ") if isinstance(command, click.Group) else [(f"{above}{name}", command)]
        assert not (inner and above), "the page knows groups of one level"
    return found


def test_every_command_and_option_is_in_it() -> None:
    made = page(TEXT, cli.commands)
    for name, command in leaves(cli.commands):
        assert f"\n## vmmback {name} " in made
        section = made.split(f"\n## vmmback {name} ")[1].split("\n#")[0]
        for param in command.params:
            for option in param.opts + param.secondary_opts if isinstance(param, click.Option) else ():
                assert option in section, (name, option)
            if isinstance(param, click.Argument):
                assert param.make_metavar(click.Context(command)) in section.splitlines()[0].replace("\\", "")
        assert f"\n    vmmback {name}" in section  # its examples, in lines of their own
    assert "\b" not in made
    assert "**--version**" in made


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 7, 8])
def test_every_exit_code_is_in_it(code: int) -> None:
    assert f"\n**{code}**\n" in TEXT


def test_what_markdown_would_take_for_its_own_is_taken_as_it_is() -> None:
    @click.command(help="a *b* _c_ <d> [e] `f_*g`\n\n\b\nExample:\n  h *i*\n    j")
    @click.option("--k", metavar="<l>", help="m_n_o")
    def command() -> None:
        pass

    group = click.Group(commands={"p": command})
    made = page("before\n\n{commands}\n\nafter\n", group)
    assert r"a \*b\* \_c\_ \<d\> \[e\] `f_*g`" in made
    assert "\nExample:\n\n    h *i*\n    j\n" in made
    assert "**--k \\<l\\>**\n\n:   m\\_n\\_o" in made
    assert made.startswith("before\n\n**-")
    assert made.endswith("\n\nafter\n")
