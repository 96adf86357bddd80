"""`vmmback logs` and `vmmback qmp`: what a guest has printed, and its QMP socket for one command."""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

import click

from vmmback.cli.completion import GuestName
from vmmback.cli.output import print_result, write
from vmmback.cli.signals import stopped
from vmmback.errors import CommandRefused, QemuFailed, UsageError

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 1 << 16
_OBJECT = 'write for example \'{"path": "/machine"}\''
_QMP_TIMEOUT_S = 40.0  # the supervisor gives QEMU 30 s for a command


@click.command(epilog="Exit codes: 0, 2 wrong argument, 7 no such guest, 128 + signal when stopped.")
@click.argument("name", type=GuestName())
@click.option("-f", "--follow", is_flag=True, help="Go on until the guest's end.")
@click.option("--qemu", "which", flag_value="qemu", help="What QEMU said, instead of the serial console.")
@click.option("--supervisor", "which", flag_value="supervisor", help="What the supervisor noted.")
def logs(name: str, follow: bool, which: str | None) -> None:
    """Print what the guest NAME has printed on its serial console so far.

    What is not text, and could command a terminal, is left out; the file in the guest's folder has it all.

    \b
    Examples:
      vmmback logs demo
      vmmback logs demo -f
      vmmback logs demo --supervisor
    """
    from vmmback import runtime
    from vmmback.ask import folder_of

    files = {"qemu": runtime.QEMU_LOG, "supervisor": runtime.SUPERVISOR_LOG, None: runtime.SERIAL_LOG}
    path = folder_of(name) / files[which]
    with stopped("while the log was shown"):
        try:
            with path.open("rb", buffering=0) as log:
                _print(log, path, follow=follow)
        except FileNotFoundError as error:
            raise UsageError(f"the guest {name} has no {path.name} yet", "it starts, or ends: try it again") from error


def _print(log: BinaryIO, path: Path, *, follow: bool) -> None:
    """Print a log; it ends when its last name is gone, which is after the guest's end, or when nobody reads.

    Raises UsageError when it cannot be written for another reason.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    if not follow:
        while data := log.read(_CHUNK):
            if not _write(decoder.decode(data)):
                return
        return
    from vmmback.linux.inotify import watch

    with suppress(FileNotFoundError), watch(path) as changes:  # first, so that nothing is missed after what is read
        while True:
            while data := log.read(_CHUNK):
                if not _write(decoder.decode(data)):
                    return
            if os.fstat(log.fileno()).st_nlink == 0:
                return
            changes.changed()


def _write(text: str) -> bool:
    """Write what is text of it (a log is wiped with zeroes before it is removed); False once nobody reads."""
    problem = write(sys.stdout, "".join(c for c in text if c.isprintable() or c in "\n\t"))
    if problem and problem != os.strerror(errno.EPIPE):
        raise UsageError(f"the log could not be written to standard output: {problem}", "give it a place to go to")
    return not problem


@click.command(
    epilog="Exit codes: 0, 2 wrong argument, 6 QEMU or the guest's policy refused it, or is gone, 7 no such guest."
)
@click.argument("name", type=GuestName())
@click.argument("command")
@click.argument("arguments", required=False)
def qmp(name: str, command: str, arguments: str | None) -> None:
    """Send one QMP COMMAND, with ARGUMENTS as JSON, to the guest NAME, and print what it returns.

    It goes through the guest's qmp.sock and its policy; `[qmp] allow` of the guest file widens that.

    \b
    Examples:
      vmmback qmp demo query-status
      vmmback qmp demo qom-list '{"path": "/machine"}'
    """
    import socket

    from vmmback.ask import folder_of
    from vmmback.runtime import QMP_SOCKET, socket_address

    request: dict[str, object] = {"execute": command, "id": "asked"}
    if arguments is not None:
        request["arguments"] = _object(arguments)
    folder = folder_of(name)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_QMP_TIMEOUT_S)
            with socket_address(folder / QMP_SOCKET) as address:
                connection.connect(address)
            connection.sendall(b'{"execute":"qmp_capabilities"}' + json.dumps(request).encode())
            with connection.makefile("rb") as lines:
                answer = next((said for line in lines if _answers(said := json.loads(line))), None)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise QemuFailed(f"the guest {name} takes no QMP commands now", "it starts, or ends: try it again") from error
    except TimeoutError as error:
        raise QemuFailed(f"QEMU did not answer {command} within {_QMP_TIMEOUT_S:g} s") from error
    except ConnectionError:
        answer = None
    if answer is None:
        raise QemuFailed(f"the guest {name} ended meanwhile")
    if "error" in answer:
        raise CommandRefused(f"{command}: {answer['error']['desc']}", "docs/QMP.md says what is passed, and to whom")
    print_result(json.dumps(answer["return"], indent=2) + "\n")


def _answers(said: Mapping[str, object]) -> bool:
    """Tell whether it is the answer: what could not be read as a command is answered without its "id"."""
    return said.get("id") == "asked" or "error" in said


def _object(text: str) -> dict[str, object]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the arguments are not JSON: {error}", _OBJECT) from error
    if not isinstance(arguments, dict):
        raise UsageError("the arguments are not a JSON object", _OBJECT)
    return arguments
