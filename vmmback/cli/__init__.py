"""The command line: the only package that prints or exits. What a command needs is imported when it runs."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import click

from vmmback import __version__
from vmmback.cli.output import as_user_error, print_error
from vmmback.errors import Interrupted, VmmbackError

_MODULES = {
    "launch": "launch",
    "ps": "guests",
    "status": "guests",
    "stop": "guests",
    "console": "console",
    "logs": "logs",
    "qmp": "logs",
    "audit": "audit",
    "selftest": "audit",
    "grow": "grow",
    "disk": "disk",
    "host": "host",
    "libvirt": "libvirt",
    "broker": "broker",
    "pool": "broker",
    "schema": "schema",
    "completion": "completion",
}
"""The module of each command."""


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


def run() -> NoReturn:
    """Run the command line, and end this process at once: to free each object one by one would take some 20 ms."""
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        code = end.code
    else:
        code = 0
    for stream in (sys.stdout, sys.stderr):
        # It is full, or closed (then it is None, sys.__stdout__): whoever wrote has said so.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


class _Commands(click.Group):
    """A group whose commands are imported when they are asked for: nobody waits for those that he does not use."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Name all commands."""
        return list(_MODULES)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of this name, None if there is none."""
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(import_module(f"vmmback.cli.{_MODULES[cmd_name]}"), cmd_name)
        return command

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
