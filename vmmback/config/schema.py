"""The JSON Schema (draft 2020-12) of guest files, for editors."""

from __future__ import annotations

import inspect

from vmmback.config.guest import GuestConfig
from vmmback.toml_tables import Checked, Key, Parsed, Table, keys_of

_TYPES = {str: "string", int: "integer", bool: "boolean"}


def json_schema() -> dict[str, object]:
    """Return the schema, of which each table is a part by the name of its class."""
    tables = [key.table for key in keys_of(GuestConfig).values() if key.table]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {table.__name__: _of_table(table) for table in tables},
        **_of_table(GuestConfig),
        "title": "vmmback guest file",
    }


def _of_table(table: type[Table]) -> dict[str, object]:
    keys = keys_of(table)
    needed = [name for name, key in keys.items() if key.required]
    return {
        "title": table.__name__,
        "description": inspect.getdoc(table),
        "type": "object",
        "properties": {name: _of_key(key) for name, key in keys.items()},
        "additionalProperties": False,
        **({"required": needed} if needed else {}),
        **table.more_schema,
    }


def _of_key(key: Key) -> dict[str, object]:
    meta = key.meta
    schema: dict[str, object] = {"title": key.name.title(), "description": meta.description, "examples": meta.examples}
    if key.table:
        table = {"$ref": f"#/$defs/{key.table.__name__}"}
        schema |= {"type": "array", "items": table} if key.several else {"title": None, **table}
    else:
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        schema |= {"type": _TYPES.get(key.kind), "default": None if key.required else default}
        schema |= {"minimum": meta.ge, "maximum": meta.le, **_of_choices(key.choices)}
        for note in key.notes:
            schema |= note.schema if isinstance(note, Parsed | Checked) else {}
    return {name: value for name, value in (schema | (meta.extra_json_schema or {})).items() if value is not None}


def _of_choices(choices: tuple[str, ...]) -> dict[str, object]:
    if not choices:
        return {}
    return {"type": "string", "const": choices[0]} if len(choices) == 1 else {"type": "string", "enum": [*choices]}
