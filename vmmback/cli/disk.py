"""The commands `vmmback disk …`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from vmmback.cli.output import print_result, write
from vmmback.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from vmmback.disk_images import Format

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.group()
def disk() -> None:
    """Make disk images for guests."""


@disk.command(epilog="Exit codes: 0 made, 2 wrong argument, 3 host cannot do it, 128 + signal when stopped before.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--size", required=True, help='How large the disk is for the guest, such as "10GiB".')
@click.option(
    "--format",
    "kind",
    type=click.Choice(["luks", "qcow2", "raw"]),
    default="luks",
    show_default=True,
    help="luks is encrypted, qcow2 is LUKS inside with --key-file, raw is not encrypted.",
)
@click.option("--key-file", type=click.Path(path_type=Path), help="The file with the key that opens it.")
@click.option("--new-key", is_flag=True, help="Make the key, too: 256 random bits in --key-file, mode 0600.")
def create(path: Path, size: str, kind: Format, key_file: Path | None, new_key: bool) -> None:
    """Make a disk image at PATH, and print the [[disk]] table for the guest file.

    Nothing is overwritten, and what is stopped before its end leaves nothing.

    \b
    Example:
      vmmback disk create root.luks --size 10GiB --key-file root.key --new-key
    """
    from vmmback import disk_images
    from vmmback.config.values import parse_bytes

    try:
        size_bytes = parse_bytes(size)
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error
    for signum in _STOP_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # which nohup(1) asks for
            signal.signal(signum, _stop)
    disk_images.create(path, size_bytes, kind, key_file, new_key=new_key, note=_note)
    _note(f"made {path}{f' and its key {key_file}' if new_key else ''}, {size}; for the guest file:")
    print_result(_table(path, kind, key_file))


def _note(message: str) -> None:
    write(sys.stderr, f"vmmback: {message}\n")


def _stop(signum: int, _: FrameType | None) -> NoReturn:
    raise Interrupted(signum, "before the disk was made")


def _table(path: Path, kind: Format, key_file: Path | None) -> str:
    """Return the table as TOML, whose strings may be written as those of JSON."""
    lines = {"path": str(path.absolute()), "format": str(kind)}
    if key_file:
        lines |= {"key-file": str(key_file.absolute()), "cache": "none"}
    else:
        lines["plaintext"] = "allowed"
    return "[[disk]]\n" + "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items())
