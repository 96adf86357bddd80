"""Shell completion: the script for a shell, and what completes the name of a guest."""

from __future__ import annotations

import socket
from contextlib import suppress

import click
from click.shell_completion import CompletionItem, get_completion_class

_CONNECT_TIMEOUT_S = 0.2


class GuestName(click.types.StringParamType):
    """The name of a live guest; that it is one is for the command to find out."""

    name = "name"

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Name the guests that this user can reach; none, and no error, where nothing can be known."""
        from vmmback.errors import VmmbackError

        with suppress(VmmbackError, OSError):
            return [CompletionItem(name) for name in live_guests() if name.startswith(incomplete)]
        return []


def live_guests() -> list[str]:
    """Return the names of the guests whose supervisor answers. Raises UsageError, OSError."""
    from vmmback.runtime import runtime_folder, socket_address

    found = []
    for control in sorted(runtime_folder().glob("*/control")):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection, socket_address(control) as address:
            connection.settimeout(_CONNECT_TIMEOUT_S)
            connection.connect(address)  # what a power cut left refuses it
            found.append(control.parent.name)
    return found


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options, the names of live guests, and files.

    \b
    Examples:
      vmmback completion bash > /etc/bash_completion.d/vmmback
      vmmback completion zsh > /usr/local/share/zsh/site-functions/_vmmback
      vmmback completion fish > ~/.config/fish/completions/vmmback.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "vmmback", "_VMMBACK_COMPLETE").source())
