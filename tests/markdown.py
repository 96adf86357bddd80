"""Tables of the documentation, which tests hold together with the code."""

from __future__ import annotations

import re


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables in a text: the cells of each row below a table's head, as many as the head has."""
    return [_rows(lines.splitlines()) for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def _rows(lines: list[str]) -> list[list[str]]:
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    assert [row for row in rows if len(row) != len(head)] == []
    return rows
