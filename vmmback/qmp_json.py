"""QMP's input: JSON values one after the other, with nothing needed between them, out of packets of any size.

A message ends where its outermost brace closes, as in QEMU (qobject/json-streamer.c). What QEMU's parser refuses is
refused here too, since the supervisor's connection must never carry it: QEMU answers it without an id, and then nobody
can tell whose it was. Stricter than QEMU's: strings in single quotes, which JSON has not, are refused.

After an error QEMU starts anew at the next token; here a stray text is one error, up to the next brace or line, and a
message that can have no end (a byte that JSON cannot hold, or too long, or too deep) is one error and lasts up to the
end of its line. The byte 0xff ends everything, as QMP's specification has it (docs/interop/qmp-spec.rst).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

# QEMU takes its input byte by byte (monitor/monitor.c, monitor_can_read), in 4 us each; the supervisor waits meanwhile.
MAX_MESSAGE_BYTES = 16 * 1024
MAX_DEPTH = 64  # QEMU's own limit is 1024 (qobject/json-streamer.c); QMP needs about 10

_FLUSH = 0xFF
_OPEN, _CLOSE, _QUOTE, _BACKSLASH = b"{[", b"}]", ord('"'), ord("\\")
_BLANK = re.compile(rb"[ \t\r\n]*")
# What ends a text that is no message: the start of one, the end of the line, or a flush.
_AFTER_STRAY = re.compile(rb"[{\[\n\xff]")
_AFTER_BROKEN = re.compile(rb"[\n\xff]")
# Bytes that mean something in a message, and those that cannot be in one: control characters, and bytes not in UTF-8.
_IN_MESSAGE = re.compile(rb'["{}\[\]\x00-\x08\x0b\x0c\x0e-\x1f\xc0\xc1\xf5-\xff]')
_IN_STRING = re.compile(rb'["\\\x00-\x1f\xc0\xc1\xf5-\xff]')
# Surrogates without their other half, and what Unicode says is no character: QEMU refuses both (util/unicode.c).
_LAST_OF_PLANES = "".join(chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF))
_NO_CHARACTER = re.compile(f"[\ud800-\udfff\ufdd0-\ufdef{_LAST_OF_PLANES}]")


class Malformed(ValueError):
    """Input that is no message; str() says why."""


def parse(data: bytes) -> object:
    """Return the one JSON value in `data`. Raises Malformed.

    Duplicate keys, NaN, numbers that are infinite as a double and text that is no Unicode are refused; an integer
    beyond 64 bits becomes a double: so the value is the same to all who read it, and json.dumps of it is fit for QEMU.
    """
    try:
        text = data.decode()
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_double,
            parse_constant=_constant,
        )
    except UnicodeDecodeError:
        raise Malformed("JSON parse error, it is not UTF-8") from None
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"JSON parse error, {str(error)[:200]}") from None
    except RecursionError:
        raise Malformed(_TOO_DEEP) from None
    # Escapes can spell what the bytes cannot.
    spelled = "\\u" in text or not text.isascii()
    if spelled and _NO_CHARACTER.search(json.dumps(value, ensure_ascii=False)):
        raise Malformed("JSON parse error, it has text that is not valid Unicode")
    return value


_TOO_DEEP = f"JSON nesting depth limit exceeded: {MAX_DEPTH}"
_TOO_LONG = f"JSON message size limit exceeded: {MAX_MESSAGE_BYTES} bytes"


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Malformed("JSON parse error, duplicate key")
    return made


def _integer(digits: str) -> int | float:
    if len(digits) <= 20 and -(1 << 63) <= (number := int(digits)) < 1 << 64:
        return number
    return _double(digits)  # as QEMU does (qobject/json-parser.c)


def _double(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Malformed("JSON parse error, a number is too large")
    return number


def _constant(name: str) -> float:
    raise Malformed(f"JSON parse error, invalid keyword '{name}'")


@dataclass
class _Scan:
    """How far the message at the start of the buffer was looked at."""

    at: int = 0
    depth: int = 0
    in_string: bool = False


class Stream:
    """One client's input. It never holds more than a message and a packet."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scan = _Scan()
        self._skip_to: re.Pattern[bytes] | None = None

    def feed(self, data: bytes) -> Iterator[object | Malformed]:
        """Take a packet; yield each value that it completes, and a Malformed for each piece that is none."""
        self._buffer += data
        while True:
            if self._skip_to and not self._skipped(self._skip_to):
                return
            if not self._scan.depth:
                blank = _BLANK.match(self._buffer)
                assert blank
                self._drop(blank.end())
                if not self._buffer:
                    return
                if self._buffer[0] not in _OPEN:
                    yield self._stray()
                    continue
            try:
                end = self._end()
                if end is None:
                    return
                message = bytes(self._buffer[:end])
                self._drop(end)
                yield parse(message)
            except Malformed as error:
                yield error

    def _skipped(self, to: re.Pattern[bytes]) -> bool:
        """Drop what is to be skipped; False while its end has not come."""
        found = to.search(self._buffer)
        if not found:
            self._buffer.clear()
            return False
        self._drop(found.end() if self._buffer[found.start()] in (_FLUSH, 0x0A) else found.start())
        self._skip_to = None
        return True

    def _stray(self) -> Malformed:
        if self._buffer[0] == _FLUSH:
            self._drop(1)
            return Malformed("JSON parse error, stray '\\xff'")
        self._skip_to = _AFTER_STRAY
        shown = re.split(rb"[\s{\[]", bytes(self._buffer[:40]))[0].decode("ascii", "replace")
        return Malformed(f"JSON parse error, stray {shown!a}: QMP input must be a JSON object")

    def _end(self) -> int | None:
        """Return where the message at the start ends, None if that has not come. Raises Malformed."""
        scan, buffer = self._scan, self._buffer
        while found := (_IN_STRING if scan.in_string else _IN_MESSAGE).search(buffer, scan.at):
            scan.at = found.end()
            if scan.at > MAX_MESSAGE_BYTES or not self._complete(found[0][0]):
                break
            if not scan.depth:
                return scan.at
        else:
            scan.at = len(buffer)
        if len(buffer) > MAX_MESSAGE_BYTES:
            raise self._broken(MAX_MESSAGE_BYTES, _TOO_LONG)
        return None

    def _complete(self, byte: int) -> bool:
        """Take note of a byte that means something; False if what it means depends on the next packet."""
        scan = self._scan
        if byte == _QUOTE:
            scan.in_string = not scan.in_string
        elif byte == _BACKSLASH:
            if scan.at == len(self._buffer):
                scan.at -= 1
                return False
            # It escapes the next byte, whatever that is; but one that no message can hold is looked at for itself.
            scan.at += not _IN_STRING.match(self._buffer, scan.at) or self._buffer[scan.at] in (_QUOTE, _BACKSLASH)
        elif byte in _OPEN:
            scan.depth += 1
            if scan.depth > MAX_DEPTH:
                raise self._broken(scan.at, _TOO_DEEP)
        elif byte in _CLOSE:
            scan.depth -= 1
        else:
            raise self._broken(scan.at - 1, f"JSON parse error, a message cannot hold the byte {byte:#04x}")
        return True

    def _broken(self, skip_from: int, why: str) -> Malformed:
        """Give the message up; its rest is skipped up to the end of the line."""
        self._drop(skip_from)
        self._skip_to = _AFTER_BROKEN
        return Malformed(why)

    def _drop(self, size: int) -> None:
        del self._buffer[:size]
        self._scan = _Scan()
