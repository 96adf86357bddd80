"""Tables of a TOML file: what they are read into, and what is said of those that are wrong."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from msgspec import Meta

from vmmback.toml_errors import Problem, explain, read
from vmmback.toml_tables import Checked, Parsed, Table, WrongTables


class Disk(Table, frozen=True):
    path: Annotated[str, Meta(examples=["root.luks"])]
    serial: str = ""


class Cpu(Table, frozen=True):
    least: int = 1
    most: int = 4

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterator[Problem]:
        if "most" in good and good["least"] > good["most"]:
            yield ("most",), f"{good['most']} is less; said in {', '.join(written)}"


class Top(Table, frozen=True):
    refused: ClassVar[Mapping[str, str]] = {"fan": "is refused"}

    name: Annotated[str, Checked(str.lower)] = "demo"
    age: Annotated[float | None, Parsed(lambda text, folder: len(text) if folder is None else len(folder.name))] = None
    cpu: Cpu = Cpu()
    disk: tuple[Disk, ...] = ()

    def problems(self, folder: Path | None) -> Iterator[Problem]:
        if len(self.disk) > 2:
            yield ("disk",), "are too many"


def errors(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "guest.toml"
    file.write_text(text)
    with pytest.raises(WrongTables) as caught:
        Top.of(read(file)[1])
    return explain(file, text, caught.value.problems).replace(f"{file}", "F").splitlines()


def test_several_tables_are_read_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "guest.toml"
    file.write_text('[[disk]]\npath = "a"\n[[disk]]\npath = "b"\nserial = "S"\n')
    assert Top.of(read(file)[1]).disk == (Disk(path="a"), Disk(path="b", serial="S"))


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
        ("[fan]\n", "F:1: fan: is refused"),
    ],
)
def test_what_is_no_such_table(tmp_path: Path, text: str, said: str) -> None:
    (line,) = errors(tmp_path, text)
    assert line.startswith(said)


def test_a_value_is_kept_as_its_annotations_say() -> None:
    assert Top.of({"name": "DEMO", "age": "ab"}) == Top(name="demo", age=2)
    assert Top.of({"age": "ab"}, Path("/four")).age == 4
    assert Top.of({}) == Top()


def test_keys_are_checked_against_each_other_also_when_others_are_wrong_and_tables_when_nothing_else_is() -> None:
    with pytest.raises(WrongTables) as caught:
        Top.of({"name": 1, "cpu": {"least": 5, "mist": 1}, "disk": [{"path": "a"}] * 3})
    assert caught.value.problems == [
        (("name",), '1 is an integer; write a string in quotes, like "demo"'),
        (("cpu", "most"), "4 is less; said in least, mist"),
        (("cpu", "mist"), 'unknown key "mist"; did you mean "most"?'),
    ]
    with pytest.raises(WrongTables, match=r"^disk: are too many$"):
        Top.of({"disk": [{"path": "a"}] * 3})


def test_what_is_compared_is_right_by_itself() -> None:
    with pytest.raises(WrongTables) as caught:
        Top.of({"cpu": {"least": 5, "most": "4"}})
    assert caught.value.problems == [(("cpu", "most"), '"4" is a string; write an integer without quotes, like 4')]
