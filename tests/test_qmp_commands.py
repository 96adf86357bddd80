"""The tables of QMP commands, and the page that documents them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmback.qmp_commands import DEFAULT, NEGOTIATION, NEVER_ALLOWED, ON_REQUEST, UNSTABLE

DOCS = Path(__file__).parents[1] / "docs/QMP.md"


def test_a_command_is_in_one_table_only() -> None:
    tables = [set(DEFAULT), set(ON_REQUEST), set(NEVER_ALLOWED), {NEGOTIATION}]
    assert sum(map(len, tables)) == len(set[str]().union(*tables))


@pytest.mark.parametrize("table", [DEFAULT, ON_REQUEST, NEVER_ALLOWED])
def test_the_documentation_names_every_command(table: dict[str, object]) -> None:
    text = DOCS.read_text()
    assert [name for name in table if f"`{name}`" not in text] == []


def test_the_documentation_gives_the_reasons() -> None:
    text = " ".join(DOCS.read_text().split())
    assert [reason for reason in {*NEVER_ALLOWED.values(), UNSTABLE} if reason not in text] == []
