"""Asks supervisors over Varlink without an event loop, all at once: for commands whose start must cost nothing.

A call is one JSON object and a NUL each way (varlink.org); control.py is the other side, and the way to the calls that
carry descriptors.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from vmmback.errors import NoSuchGuest, QemuFailed, VmmbackError
from vmmback.runtime import CONTROL_SOCKET, live_guests, runtime_folder, socket_address

Answer = dict[str, object]

_FAILED = "org.vmmback.Guest.Failed"
_PACKET_BYTES = 1 << 16
# Longer than any report; a supervisor that says more is none.
_MOST_BYTES = 64 << 20


def folder_of(name: str) -> Path:
    """Return the folder of a live guest. Raises NoSuchGuest, which names those that live."""
    base, live = runtime_folder(), live_guests()
    if name not in live:
        raise NoSuchGuest(f"no guest named {name} is running", f"running in {base}: {', '.join(live) or 'none'}")
    return base / name


def ask(folder: Path, method: str, parameters: Mapping[str, object], timeout_s: float) -> Answer:
    """Call one method of a guest's supervisor and return its answer. Raises QemuFailed."""
    answer = ask_all([folder], method, parameters, timeout_s)[0]
    if isinstance(answer, VmmbackError):
        raise answer
    return answer


def ask_all(
    folders: Sequence[Path], method: str, parameters: Mapping[str, object], timeout_s: float
) -> list[Answer | VmmbackError]:
    """Call a method of several supervisors at once; return the answer of each, or what was wrong with it.

    One that hangs holds up no other, and all together take no longer than `timeout_s`.
    """
    request = json.dumps({"method": f"org.vmmback.Guest.{method}", "parameters": parameters}).encode() + b"\0"
    answers: list[Answer | VmmbackError] = [
        QemuFailed(
            f"the supervisor of {folder.name} did not answer within {timeout_s:g} s", "look whether it is stopped"
        )
        for folder in folders
    ]
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for index, folder in enumerate(folders):
            try:
                connection = stack.enter_context(_connected(folder))
                connection.send(request)  # it is short, and the socket is new
            except OSError as error:
                answers[index] = _unreached(folder.name, error)
            else:
                selector.register(connection, selectors.EVENT_READ, (index, bytearray()))
        deadline = time.monotonic() + timeout_s
        while selector.get_map() and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                index, received = key.data
                if (answer := _more(key.fileobj, folders[index].name, received)) is not None:  # type: ignore[arg-type]
                    answers[index] = answer
                    selector.unregister(key.fileobj)
    return answers


def _connected(folder: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)  # a full queue of connections fails with EAGAIN at once (unix(7))
        with socket_address(folder / CONTROL_SOCKET) as address:
            connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _unreached(name: str, error: OSError) -> QemuFailed:
    if error.errno in {errno.ENOENT, errno.ECONNREFUSED}:
        return QemuFailed(f"the supervisor of {name} has only begun, or is about to end", "try it again")
    return QemuFailed(f"the supervisor of {name} cannot be reached: {error.strerror}", "look whether it is stopped")


def _more(connection: socket.socket, name: str, received: bytearray) -> Answer | VmmbackError | None:
    """Take what has come; return the answer once it is whole."""
    try:
        data = connection.recv(_PACKET_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        data = b""
    received += data
    if received.endswith(b"\0") and received.count(b"\0") == 1:
        return _understood(bytes(received[:-1]))
    if not data:
        return QemuFailed(f"the guest {name} ended meanwhile")
    return unknown_answer() if len(received) > _MOST_BYTES or b"\0" in received else None


def _understood(text: bytes) -> Answer | VmmbackError:
    try:
        message = json.loads(text)
        if message.get("error") == _FAILED:
            return QemuFailed(message["parameters"]["message"], message["parameters"]["hint"])
        if "error" in message:
            return QemuFailed(
                f"the guest's supervisor refused: {message['error']}", "it may be another version of vmmback"
            )
        parameters = message["parameters"]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return unknown_answer()
    return parameters if isinstance(parameters, dict) else unknown_answer()


def unknown_answer() -> QemuFailed:
    """Return the error for an answer that this version does not know."""
    return QemuFailed("the guest's supervisor answered in a way not known here", "it may be another version of vmmback")
