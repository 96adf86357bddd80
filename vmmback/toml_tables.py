"""The tables of a TOML file as frozen classes: `Table.of` reads what a file says into them, or tells all that is wrong.

A key is a field: its annotation says what its value may be, and its `Meta` what that means and what it may look like.
One without a default, which is a value that cannot change, must be there.

Modules of tables do without `from __future__ import annotations`: Python would have to compile each annotation when a
file is read, which takes longer than all the rest of the reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from msgspec import NODEFAULT, Meta, Struct
from msgspec.structs import fields

from vmmback.toml_errors import Problem, key_text, quote, shown, written_as, wrong_type

Place = tuple[str | int, ...]


class Parsed:
    """Annotates a value that is kept otherwise than TOML writes it.

    `parse` is given what the file says and the file's folder, None if no file is to be looked at; it raises ValueError.
    `schema` is the JSON Schema of what is written.
    """

    def __init__(self, parse: Callable[[Any, Path | None], object], **schema: object) -> None:
        self.parse, self.schema = parse, schema


class Checked:
    """Annotates a value that has more to it than a type: `check` returns it as it is to be, or raises ValueError."""

    def __init__(self, check: Callable[[Any], object], **schema: object) -> None:
        self.check, self.schema = check, schema


class Table(Struct, frozen=True, rename="kebab"):
    """Base of all tables."""

    refused: ClassVar[Mapping[str, str]] = {}
    """Tables that users may look for at the top of the file and cannot have, and why."""
    more_schema: ClassVar[Mapping[str, object]] = {}
    """What JSON Schema can say of the keys together."""

    @classmethod
    def of(cls, tables: Mapping[str, object], folder: Path | None = None) -> Self:
        """Return what tables say, as tomllib reads them; paths start from `folder`. Raises WrongTables.

        Without a folder paths are kept as written, and no file and no account is looked at.
        """
        reader = _Reader(cls, folder)
        made = reader.table(cls, tables, ())
        if made is None:
            raise WrongTables(reader.problems)
        return made

    @classmethod
    def conflicts(cls, written: Mapping[str, object], good: Mapping[str, Any]) -> Iterable[Problem]:  # noqa: ARG003
        """Tell which keys do not go together, also when others are wrong, so that all errors show at once.

        `written` has the file's keys and values; `good` has the fields that are right by themselves, or have defaults.
        """
        return ()

    def problems(self, folder: Path | None) -> Iterable[Problem]:  # noqa: ARG002
        """Tell what is wrong with the table as a whole; asked if nothing else is."""
        return ()


TableT = TypeVar("TableT", bound=Table)


class WrongTables(ValueError):
    """Tables are not as their class wants them; `problems` has all that is wrong."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(f"{key_text(place)}: {said}" for place, said in problems))
        self.problems = problems


class Key(Struct, frozen=True):
    """A key of a table, by its field."""

    name: str
    field: str
    default: object
    kind: Any
    """The type of the value without None, which TOML has not: a key may be absent. If `several`, that of each."""
    several: bool
    notes: tuple[object, ...]
    """What annotates the type, from the inside out."""

    @property
    def table(self) -> type[Table] | None:
        """The class of the table, or of each table, that the key has for a value."""
        return self.kind if isinstance(self.kind, type) and issubclass(self.kind, Table) else None

    @property
    def required(self) -> bool:
        """Whether the key must be there."""
        return self.default is NODEFAULT

    @property
    def header(self) -> str:
        """What stands above the keys of the table."""
        return f"[[{self.name}]]" if self.several else f"[{self.name}]"

    @property
    def meta(self) -> Meta:
        """The key's documentation, its examples, its bounds."""
        return next((note for note in self.notes if isinstance(note, Meta)), Meta())

    @property
    def choices(self) -> tuple[str, ...]:
        """All that the value may be, () if that has no end."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def example(self) -> str:
        """A good value, as TOML writes it."""
        return written_as(self.meta.examples[0] if self.meta.examples else self.default)

    def read(self, written: object, folder: Path | None) -> Any:
        """Return the value of a key, of those that are no tables. Raises ValueError."""
        parsers = [note.parse for note in self.notes if isinstance(note, Parsed)]
        value = parsers[0](written, folder) if parsers else self._as_it_is(written)
        for note in self.notes:
            if isinstance(note, Checked):
                value = note.check(value)
        return value

    def _as_it_is(self, value: Any) -> Any:
        if self.choices:
            if value not in self.choices:
                *others, last = map(quote, self.choices)
                raise ValueError(f"is {shown(value)}; write {', '.join(others)}{' or ' if others else ''}{last}")
        elif self.several:
            wanted = f"{self.header} with two brackets, for there may be several, and its keys under it"
            raise ValueError(wrong_type(value, wanted))
        elif type(value) is not self.kind:
            raise ValueError(wrong_type(value, _WANTED[self.kind].format(example=self.example)))
        least, most = self.meta.ge, self.meta.le
        if least is not None and value < least:
            raise ValueError(f"{shown(value)} is too small; write {least} or more")
        if most is not None and value > most:
            raise ValueError(f"{shown(value)} is too large; write {most} or less")
        return value


_WANTED = {
    str: "a string in quotes, like {example}",
    int: "an integer without quotes, like {example}",
    bool: "a boolean without quotes: true or false",
}


@cache
def keys_of(table: type[Table]) -> Mapping[str, Key]:
    """Return the keys that a table may have, by name."""
    keys = {}
    for field in fields(table):
        notes: list[object] = []
        kind = _without_notes(field.type, notes)
        several = get_origin(kind) is tuple and issubclass(get_args(kind)[0], Table)
        kind = get_args(kind)[0] if several else kind
        keys[field.encode_name] = Key(field.encode_name, field.name, field.default, kind, several, tuple(notes))
    return keys


def _without_notes(hint: Any, notes: list[object]) -> Any:
    if get_origin(hint) is Annotated:
        bare = _without_notes(hint.__origin__, notes)
        notes += hint.__metadata__
        return bare
    return _without_notes(get_args(hint)[0], notes) if get_origin(hint) in (Union, UnionType) else hint


class _Reader:
    """Reads tables of a file whose top is `top`, and collects what is wrong."""

    def __init__(self, top: type[Table], folder: Path | None) -> None:
        self._top, self._folder = top, folder
        self.problems: list[Problem] = []

    def table(self, cls: type[TableT], written: object, place: Place) -> TableT | None:
        """Return a table, None if something is wrong with it."""
        if not isinstance(written, dict):
            header = f"[[{place[-2]}]]" if isinstance(place[-1], int) else f"[{place[-1]}]"
            self.problems.append((place, wrong_type(written, f"a table: {header} and its keys under it")))
            return None
        before, good, keys = len(self.problems), dict[str, Any](), keys_of(cls)
        for name, key in keys.items():
            if name in written:
                value = self._value(key, written[name], (*place, name))
                if value is not None:
                    good[key.field] = value
            elif key.required:
                self.problems.append(((*place, name), _missing(key)))
            else:
                good[key.field] = key.default
        for name, value in written.items():
            if name not in keys:
                self.problems.append(((*place, name), _unknown(self._top, cls, (*place, name), value)))
        self.problems[before:before] = [((*place, *where), said) for where, said in cls.conflicts(written, good)]
        if len(self.problems) > before:
            return None
        made = cls(**good)
        self.problems += [((*place, *where), said) for where, said in made.problems(self._folder)]
        return made if len(self.problems) == before else None

    def _value(self, key: Key, written: object, place: Place) -> Any:
        """Return the value of a key, None if something is wrong with it."""
        if key.table and key.several and isinstance(written, list):
            made = [self.table(key.table, one, (*place, number)) for number, one in enumerate(written)]
            return None if None in made else tuple(made)
        if key.table and not key.several:
            return self.table(key.table, written, place)
        try:
            return key.read(written, self._folder)
        except ValueError as error:
            self.problems.append((place, str(error)))
            return None


def _missing(key: Key) -> str:
    if key.table:
        return f"the table is missing; write {key.header} and under it {key.example}"
    return f"missing; write {key.name} = {key.example}"


def _unknown(top: type[Table], table: type[Table], place: Place, written: object) -> str:
    """Say that a table has no such key, and where the key belongs, or which key may be meant."""
    import difflib  # for errors alone: it takes as long as reading a file

    name, at_top = str(place[-1]), len(place) == 1
    if at_top and name in top.refused:
        return top.refused[name]
    is_table = at_top and isinstance(written, dict | list)
    what = f"unknown table [{key_text(place)}]" if is_table else f"unknown key {quote(name)}"
    if table is not top and name in keys_of(top):
        return f"{what} here; {quote(name)} belongs at the top of the file, before the first table"
    for key in keys_of(top).values():
        if key.table and key.table is not table and name in keys_of(key.table):
            return f"{what} here; {quote(name)} belongs under {key.header}"
    known = {name: key.header if at_top and key.table else quote(name) for name, key in keys_of(table).items()}
    if near := difflib.get_close_matches(name.lower(), known, n=1):
        return f"{what}; did you mean {known[near[0]]}?"
    return f"{what}; known here are {', '.join(known.values())}"
