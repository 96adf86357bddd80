"""Reading a TOML file, and saying what is wrong with it in TOML's own words.

An error reads `FILE:LINE: KEY: what was wrong; what to do`. All text that comes from the user is printed as ASCII,
quoted and cut, so that no file can write control characters to a terminal.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vmmback.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_SHOWN_CHARS = 80
MAX_PATH_CHARS = 4096  # PATH_MAX of Linux
MAX_STATEMENT_LINES = 200  # parsing a statement again for each of its lines takes quadratic time
MAX_DEPTH = 3

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Grammar:
    """What a file may say: the fields of each table ("" is the top of the file).

    `arrays` names those of the tables that may be there several times, as [[table]].
    """

    tables: Mapping[str, Mapping[str, FieldInfo]]
    refused: Mapping[KeyPath, str] = field(default_factory=dict)
    """What users may look for and cannot have, and why."""
    arrays: Collection[str] = ()


def quote(text: str, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """Return `text` in double quotes, as printable ASCII, and cut when it is long."""
    cut = text if len(text) <= max_chars else text[: max_chars - 3] + "..."
    return json.dumps(cut)


def ascii_path(path: Path) -> str:
    """Return a path as printable ASCII, without quotes."""
    return quote(str(path), MAX_PATH_CHARS)[1:-1]


def key_text(path: KeyPath) -> str:
    """Return a key path as TOML writes it, `memory.size`, with quotes where a part needs them.

    A number stands for one of several tables, from 0 on: `disk[1].path`.
    """
    shown = [part if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", part) else quote(part) for part in path]
    return re.sub(r"\.([0-9]+)(?=\.|$)", r"[\1]", ".".join(shown))


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


def explain(path: Path, text: str, error: ValidationError, grammar: Grammar) -> str:
    """Return every error of a file, one a line, in the file's order; those without a line come last."""
    lines = key_lines(text)
    rows: list[tuple[int | None, str]] = []
    for detail in error.errors(include_url=False):
        keys = tuple(str(part) for part in detail["loc"])
        line = lines.get(keys) or lines.get(keys[:-1])  # a key that is not there is missed in its table
        place = f"{ascii_path(path)}:{line}" if line else ascii_path(path)
        rows.append((line, f"{place}: {key_text(keys)}: {_say(keys, detail, grammar)}"))
    rows.sort(key=lambda row: (row[0] is None, row[0] or 0))
    return "\n".join(row for _, row in rows)


def wrong_type(value: object, wanted: str) -> str:
    """Return what a value of the wrong type is, and what to write instead."""
    shown = f"{_shown(value)} is" if isinstance(value, str | int | float) else "is"
    return f"{shown} {_type_name(value)}; write {wanted}"


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


def _shown(value: object) -> str:
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 1 << 64:  # str() refuses integers of thousands of digits
        return "a huge number"
    return str(value) if isinstance(value, int | float) else _type_name(value)


def _written(value: object) -> str:
    """Return an example of a value as it is written in TOML; that of a table is its first keys."""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_written(inner)}" for key, inner in value.items())
    return _shown(value)


def _table(keys: KeyPath) -> str:
    """Return the name of the table that a key is in."""
    return ".".join(part for part in keys[:-1] if not part.isdecimal())


def _field(keys: KeyPath, grammar: Grammar) -> FieldInfo:
    return grammar.tables[_table(keys)][keys[-1]]


def _example(keys: KeyPath, grammar: Grammar) -> str:
    field = _field(keys, grammar)
    example = field.examples[0] if field.examples else field.get_default(call_default_factory=False)
    return _written(example)


def _missing(keys: KeyPath, _: ErrorDetails, grammar: Grammar) -> str:
    example = _example(keys, grammar)
    if keys[-1] in grammar.tables:
        return f"the table is missing; write {_header(keys[-1], grammar)} and under it {example}"
    return f"missing; write {keys[-1]} = {example}"


def _unknown(keys: KeyPath, detail: ErrorDetails, grammar: Grammar) -> str:
    if keys in grammar.refused:
        return grammar.refused[keys]
    key, table = keys[-1], _table(keys)
    known = grammar.tables[table]
    is_table = isinstance(detail["input"], dict | list)
    what = f"unknown table [{key_text(keys)}]" if is_table and not table else f"unknown key {quote(key)}"
    near = difflib.get_close_matches(key.lower(), known, n=1)
    elsewhere = [name for name, fields in grammar.tables.items() if key in fields and name != table]
    if elsewhere:
        where = (
            f"under {_header(elsewhere[0], grammar)}"
            if elsewhere[0]
            else "at the top of the file, before the first table"
        )
        return f"{what} here; {quote(key)} belongs {where}"
    if near:
        return f"{what}; did you mean {_named(near[0], table, grammar)}?"
    return f"{what}; known here are {', '.join(_named(name, table, grammar) for name in known)}"


def _named(key: str, table: str, grammar: Grammar) -> str:
    return _header(key, grammar) if not table and key in grammar.tables else quote(key)


def _header(table: str, grammar: Grammar) -> str:
    return f"[[{table}]]" if table in grammar.arrays else f"[{table}]"


def _want_table(keys: KeyPath, detail: ErrorDetails, grammar: Grammar) -> str:
    name = keys[-1] if not keys[-1].isdecimal() else keys[-2]
    return wrong_type(detail["input"], f"a table: {_header(name, grammar)} and its keys under it")


def _want_tables(keys: KeyPath, detail: ErrorDetails, grammar: Grammar) -> str:
    header = _header(keys[-1], grammar)
    return wrong_type(detail["input"], f"{header} with two brackets, for there may be several, and its keys under it")


def _want(wanted: str) -> Callable[[KeyPath, ErrorDetails, Grammar], str]:
    def say(keys: KeyPath, detail: ErrorDetails, grammar: Grammar) -> str:
        return wrong_type(detail["input"], wanted.format(key=key_text(keys), example=_example(keys, grammar)))

    return say


def _choice(_: KeyPath, detail: ErrorDetails, __: Grammar) -> str:
    expected = str(detail["ctx"]["expected"]).replace("'", '"')
    return f"is {_shown(detail['input'])}; write {expected}"


_SAYINGS: Mapping[str, Callable[[KeyPath, ErrorDetails, Grammar], str]] = {
    "missing": _missing,
    "extra_forbidden": _unknown,
    "model_type": _want_table,
    "tuple_type": _want_tables,
    "string_type": _want("a string in quotes, like {example}"),
    "int_type": _want("an integer without quotes, like {example}"),
    "bool_type": _want("a boolean without quotes: true or false"),
    "literal_error": _choice,
    "greater_than_equal": lambda _, detail, __: (
        f"{_shown(detail['input'])} is too small; write {detail['ctx']['ge']} or more"
    ),
    "less_than_equal": lambda _, detail, __: (
        f"{_shown(detail['input'])} is too large; write {detail['ctx']['le']} or less"
    ),
    "value_error": lambda _, detail, __: str(detail["ctx"]["error"]),
}


def _say(keys: KeyPath, detail: ErrorDetails, grammar: Grammar) -> str:
    say = _SAYINGS.get(detail["type"])
    return say(keys, detail, grammar) if say else f"{_shown(detail['input'])} cannot stand here"
