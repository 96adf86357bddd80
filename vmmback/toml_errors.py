"""Reading a TOML file, and saying what is wrong with it in TOML's own words.

An error reads `FILE:LINE: KEY: what was wrong; what to do`. All text that comes from the user is printed as ASCII,
quoted and cut, so that no file can write control characters to a terminal.
"""

from __future__ import annotations

import json
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any, BinaryIO

from vmmback.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_SHOWN_CHARS = 80
MAX_PATH_CHARS = 4096  # PATH_MAX of Linux
MAX_STATEMENT_LINES = 200  # parsing a statement again for each of its lines takes quadratic time
MAX_DEPTH = 3

KeyPath = tuple[str, ...]
Problem = tuple[tuple[str | int, ...], str]
"""What is wrong with a file: the keys down to the place, a number for one of several tables, and what of it."""


def quote(text: str, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """Return `text` in double quotes, as printable ASCII, and cut when it is long."""
    cut = text if len(text) <= max_chars else text[: max_chars - 3] + "..."
    return json.dumps(cut)


def ascii_path(path: Path) -> str:
    """Return a path as printable ASCII, without quotes."""
    return quote(str(path), MAX_PATH_CHARS)[1:-1]


def key_text(path: Sequence[str | int]) -> str:
    """Return a key path as TOML writes it, `memory.size`, with quotes where a part needs them.

    A number stands for one of several tables, from 0 on: `disk[1].path`.
    """
    parts = [part if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", part) else quote(part) for part in map(str, path)]
    return re.sub(r"\.([0-9]+)(?=\.|$)", r"[\1]", ".".join(parts))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises OSError, also for anything that is not a regular file, and ValueError for a path that no file can have.
    """
    # Looked at before it is opened: opening a FIFO waits for its writer, and opening a device can have effects.
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError("is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file")
    return path.open("rb")


def why(error: OSError | ValueError) -> str:
    """Return, in plain words, why a file could not be used."""
    if isinstance(error, ValueError):
        return "is not a path that a file can have"
    return error.strerror.lower() if error.strerror else str(error)


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of a TOML file and what it says. Raises ConfigError."""
    text = _read_text(path)
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            ascii_path(path) + _not_toml(str(error)), hint="https://toml.io shows how TOML is written"
        ) from error
    except RecursionError as error:
        raise _file_error(path, "is nested too deeply", "a guest file needs tables and single values only") from error
    except ValueError as error:  # Python refuses to read an integer of thousands of digits
        raise _file_error(path, "has a number of too many digits", "write a shorter number") from error


def _file_error(path: Path, problem: str, hint: str) -> ConfigError:
    return ConfigError(f"{ascii_path(path)}: {problem}", hint)


def _read_text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _file_error(path, why(error), "give the path of a guest file that you may read") from error
    if len(data) > MAX_FILE_BYTES:
        raise _file_error(path, "is larger than 1 MiB", "is this a guest file? give the path of a TOML file")
    if data.startswith(b"\xef\xbb\xbf"):
        raise _file_error(path, "starts with a byte order mark (BOM)", "save it as UTF-8 without one")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise ConfigError(f"{ascii_path(path)}:{line}: has a NUL byte", "is this a guest file? save it as UTF-8 text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{ascii_path(path)}:{line}: is not UTF-8 text", "save the file as UTF-8") from error


_ADVICE = {
    "Invalid value": 'text needs quotes, like name = "demo"; true and false are lower case',
    "Invalid statement": "write a key, a [table] or a # comment",
    "Cannot overwrite a value": "a key is written twice; keep one of them",
    "Cannot declare": "a table is written twice; put its keys under one header",
    "Expected '=' after a key": 'write a key and its value, like name = "demo"',
    "Unterminated string": "close it with the quotes that opened it",
    "Illegal character '\\n'": "close the string on the line where it starts",
}


def _not_toml(message: str) -> str:
    """Turn tomllib's message, with its place at the end, into `:LINE:COLUMN: not TOML: message; advice`."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    problem, line, column = found.groups() if found else (message, None, None)
    place = f":{line}:{column}: not TOML: " if line else ": not TOML, at the end of the file: "
    advice = next((f"; {text}" for start, text in _ADVICE.items() if problem.startswith(start)), "")
    # tomllib quotes control characters itself, but not letters beyond ASCII.
    return place + problem[:MAX_SHOWN_CHARS].encode("ascii", "backslashreplace").decode() + advice


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line on which each key and table of a TOML text first appears; `text` must be TOML.

    tomllib keeps no positions. But each statement is TOML by itself, so it is parsed again alone; one that does not
    parse goes on in the next line. A key that is not found this way is left out.
    """
    lines: dict[KeyPath, int] = {}
    arrays: Counter[KeyPath] = Counter()
    table: KeyPath = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), start=1):
        if not statement:
            start = number
        elif number - start > MAX_STATEMENT_LINES:
            break
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except (ValueError, RecursionError):
            continue
        is_header = statement.lstrip().startswith("[")
        paths = list(_paths(parsed, () if is_header else table))
        if is_header:
            table = paths[-1]
        if statement.lstrip().startswith("[["):
            table = (*table, str(arrays[table]))
            arrays[table[:-1]] += 1
            paths.append(table)
        for path in paths:
            lines.setdefault(path, start)
        statement = ""
    return lines


def _paths(value: object, above: KeyPath) -> Iterator[KeyPath]:
    if isinstance(value, list) and value:  # [[table]]
        value = value[0]
    if isinstance(value, dict) and len(above) < MAX_DEPTH:
        for key, inner in value.items():
            yield (*above, key)
            yield from _paths(inner, (*above, key))


def explain(path: Path, text: str, problems: Sequence[Problem]) -> str:
    """Return every problem of a file, one a line, in the file's order; those without a line come last."""
    lines = key_lines(text)
    rows: list[tuple[int | None, str]] = []
    for where, said in problems:
        keys = tuple(map(str, where))
        line = lines.get(keys) or lines.get(keys[:-1])  # a key that is not there is missed in its table
        place = f"{ascii_path(path)}:{line}" if line else ascii_path(path)
        rows.append((line, f"{place}: {key_text(where)}: {said}"))
    rows.sort(key=lambda row: (row[0] is None, row[0] or 0))
    return "\n".join(row for _, row in rows)


def a_string(value: object, wanted: str) -> str:
    """Return a value that must be a string. Raises ValueError, which says that `wanted` is to be written."""
    if not isinstance(value, str):
        raise ValueError(wrong_type(value, wanted))  # noqa: TRY004 (of what a file says every problem is a ValueError)
    return value


def wrong_type(value: object, wanted: str) -> str:
    """Return what a value of the wrong type is, and what to write instead."""
    what = f"{shown(value)} is" if isinstance(value, str | int | float) else "is"
    return f"{what} {_type_name(value)}; write {wanted}"


def _type_name(value: object) -> str:
    names: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (str, "a string"),
        (bool, "a boolean"),  # before int, of which it is a subclass
        (int, "an integer"),
        (float, "a float"),
        (list, "an array"),
        (dict, "a table"),
        ((date, time), "a date or time"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "something else")


def shown(value: object) -> str:
    """Return a value as an error shows it."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 1 << 64:  # str() refuses integers of thousands of digits
        return "a huge number"
    return str(value) if isinstance(value, int | float) else _type_name(value)


def written_as(value: object) -> str:
    """Return a value as it is written in TOML; a table as the keys under its header."""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {written_as(inner)}" for key, inner in value.items())
    return shown(value)
