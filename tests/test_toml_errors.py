"""What is said of tables that may be there several times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from vmmback.config.tables import Table
from vmmback.config.values import Tables
from vmmback.toml_errors import Grammar, explain, key_lines, key_text, read


class Disk(Table):
    path: str = Field(examples=["root.luks"])
    serial: str = ""


class Top(Table):
    name: str = "demo"
    disk: Annotated[tuple[Disk, ...], Tables] = ()


GRAMMAR = Grammar(tables={"": Top.model_fields, "disk": Disk.model_fields}, arrays={"disk"})


def errors(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "guest.toml"
    file.write_text(text)
    with pytest.raises(ValidationError) as caught:
        Top.model_validate(read(file)[1])
    return explain(file, text, caught.value, GRAMMAR).replace(f"{file}", "F").splitlines()


def test_several_tables_are_read_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "guest.toml"
    file.write_text('[[disk]]\npath = "a"\n[[disk]]\npath = "b"\nserial = "S"\n')
    assert Top.model_validate(read(file)[1]).disk == (Disk(path="a"), Disk(path="b", serial="S"))


def test_each_error_names_its_own_table_and_line(tmp_path: Path) -> None:
    text = '[[disk]]\npath = 1\n\n[[disk]]\nserial = "S"\n\n[[disk]]\npath = "c"\nseriel = "S"\n'
    assert errors(tmp_path, text) == [
        'F:2: disk[0].path: 1 is an integer; write a string in quotes, like "root.luks"',
        'F:4: disk[1].path: missing; write path = "root.luks"',
        'F:9: disk[2].seriel: unknown key "seriel"; did you mean "serial"?',
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[disk]\npath = "a"\n',
            "F:1: disk: is a table; write [[disk]] with two brackets, for there may be several, and its keys under it",
        ),
        ("disk = [1]\n", "F:1: disk[0]: 1 is an integer; write a table: [[disk]] and its keys under it"),
        (
            '[[disk]]\npath = "a"\nname = "b"\n',
            'F:3: disk[0].name: unknown key "name" here; "name" belongs at the top of',
        ),
        ('path = "a"\n', 'F:1: path: unknown key "path" here; "path" belongs under [[disk]]'),
        ("[[disc]]\n", "F:1: disc: unknown table [disc]; did you mean [[disk]]?"),
    ],
)
def test_what_is_no_such_table(tmp_path: Path, text: str, said: str) -> None:
    (line,) = errors(tmp_path, text)
    assert line.startswith(said)


def test_lines_of_tables_that_are_there_several_times() -> None:
    lines = key_lines("[[a]]\nx = 1\n[[a]]\nx = 2\n[b]\ny = 3\n[[a]]\n")
    assert lines["a",] == 1
    assert (lines["a", "0"], lines["a", "0", "x"]) == (1, 2)
    assert (lines["a", "1"], lines["a", "1", "x"]) == (3, 4)
    assert (lines["b", "y"], lines["a", "2"]) == (6, 7)


def test_a_number_in_a_key_path_is_shown_as_an_index() -> None:
    assert key_text(("disk", "1", "path")) == "disk[1].path"
    assert key_text(("disk", "10")) == "disk[10]"
