"""One call of the broker, for the programs that hold up a domain's start: the hook and the emulator.

Standard library only, and little of it, since they are started anew each time: Python alone takes 7 ms, and as much
again each of the modules `socket`, `typing` and `json` (which needs `re`). What these are made of takes a tenth.
`vmmback libvirt install` puts copies where QEMU's user finds them, which may not look into this package.
"""

from __future__ import annotations

import _socket
import sys
from _json import encode_basestring_ascii, make_scanner

TYPE_CHECKING = False  # typing itself would cost more to import than the rest together
if TYPE_CHECKING:
    from typing import Any

BROKER = "/run/vmmback-broker/socket"
REFUSED = "org.vmmback.Broker.Refused"

_MOST_BYTES, _MOST_DESCRIPTORS = 1 << 16, 64
_INT_BYTES = 4  # a descriptor, as the kernel passes it (cmsg(3))
_MSG_CMSG_CLOEXEC = 0x40000000  # include/linux/socket.h
_START = "start it: systemctl start vmmback-broker.socket, or: vmmback broker FILE"


class _Context:
    """What json.decoder.JSONDecoder is to its scanner."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float

    def __init__(self) -> None:
        self.memo: dict[str, str] = {}


class Failed(Exception):
    """It was refused, or nobody answered: what to say, and the exit code (docs/LIBVIRT.md)."""

    def __init__(self, message: str, hint: str, exit_code: int = 3) -> None:
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code

    def tell(self, program: str) -> int:
        """Print it as all of vmmback's errors are; return the exit code."""
        sys.stderr.write(f"{program}: error: {self.message}\n" + (f"  {self.hint}\n" if self.hint else ""))
        return self.exit_code


def connected(timeout_s: float) -> _socket.socket:
    """Connect to the broker, which must answer each time within `timeout_s`. Raises Failed."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(BROKER)
    except OSError as error:
        raise Failed(f"no broker can be reached at {BROKER}: {error.strerror or error}", _START) from None
    return connection


def socket_of(descriptor: int, timeout_s: float) -> _socket.socket:
    """Return the socket of a descriptor, at which each answer must come within `timeout_s`."""
    connection = _socket.socket(fileno=descriptor)
    connection.settimeout(timeout_s)
    return connection


def call(
    connection: _socket.socket, method: str, parameters: dict[str, object], descriptors: tuple[int, ...] = ()
) -> tuple[dict[str, Any], list[int]]:
    """Make one Varlink call; return the parameters of the answer, and its descriptors, close-on-exec. Raises Failed."""
    text = encoded({"method": method, "parameters": parameters}).encode() + b"\0"
    passed = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _words(descriptors))] if descriptors else []
    received, gotten = b"", b""
    try:
        sent = connection.sendmsg([text], passed)
        while sent < len(text):
            sent += connection.send(text[sent:])
        while not received.endswith(b"\0"):
            data, ancillary, _, _ = connection.recvmsg(
                _MOST_BYTES, _socket.CMSG_SPACE(_MOST_DESCRIPTORS * _INT_BYTES), _MSG_CMSG_CLOEXEC
            )
            for level, kind, content in ancillary:
                if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                    gotten += content[: len(content) - len(content) % _INT_BYTES]
            if not data:
                raise Failed("the broker hung up", "look at its messages")
            received += data
    except TimeoutError:
        raise Failed(f"the broker did not answer {method} in time", "look whether it is stopped") from None
    except OSError as error:
        raise Failed(f"the broker ended meanwhile: {error.strerror}", _START) from None
    answer = decoded(received[:-1].decode())
    told = answer.get("parameters", {})
    if answer.get("error") == REFUSED:
        raise Failed(told["message"], told["hint"], told["exit_code"])
    if "error" in answer:
        raise Failed(f"the broker knows no {method}: {answer['error']}", "is it of the same version as the hook?")
    words = [gotten[start : start + _INT_BYTES] for start in range(0, len(gotten), _INT_BYTES)]
    return told, [int.from_bytes(word, sys.byteorder) for word in words]


def _words(numbers: tuple[int, ...]) -> bytes:
    return b"".join([number.to_bytes(_INT_BYTES, sys.byteorder) for number in numbers])


def encoded(value: object) -> str:
    """Return what json.dumps does, of dicts, lists, strings, numbers and truths."""
    if isinstance(value, str):
        return str(encode_basestring_ascii(value))
    if isinstance(value, dict):
        return "{" + ", ".join([f"{encoded(key)}: {encoded(each)}" for key, each in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([encoded(each) for each in value]) + "]"
    return str(value).lower()


def decoded(text: str) -> Any:
    """Return what json.loads does, of text without space around it. Raises ValueError."""
    try:
        value, end = make_scanner(_Context())(text, 0)  # type: ignore[arg-type]
    except StopIteration:
        end = -1
    if end != len(text):
        raise ValueError("no JSON")
    return value
