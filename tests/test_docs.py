"""What the pages for people say of the project: that it is there, that it is all, and that it can be read as text."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import click
import pytest

from vmmback.cli import commands

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MAX_COLUMNS = 126  # of prose; a row of a table is one line


def prose(page: Path) -> str:
    return "\n".join(line for line in page.read_text().splitlines() if not line.startswith("|"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert gone == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_prose_is_left_unbroken_and_no_row_stands_twice(page: Path) -> None:
    assert [line for line in prose(page).splitlines() if len(line) > MAX_COLUMNS] == []
    lines = page.read_text().splitlines()
    headers = {above for above, line in pairwise(lines) if line.startswith("|--")}
    rows = [line for line in lines if line.startswith("| ") and line not in headers]
    assert sorted({row for row in rows if rows.count(row) > 1}) == []


def test_every_page_of_docs_is_named_in_the_readme_or_by_a_page_that_is() -> None:
    named = {ROOT / "README.md"}
    while found := {page for page in PAGES for by in named if page.name in by.read_text()} - named:
        named |= found
    assert set(PAGES) - named - {ROOT / "CHANGELOG.md"} == set()


def test_the_readme_has_every_command() -> None:
    table = (ROOT / "README.md").read_text().split("## Commands")[1].split("\n## ")[0]
    words = set(re.findall(r"[a-z]+", " ".join(re.findall(r"`([^`]*)`", table))))
    assert set(commands.list_commands(click.Context(commands))) - words == set()


def test_every_folder_and_module_that_contributors_are_sent_to_is_there() -> None:
    named = re.findall(r"\| `([\w/.*]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_every_exposure_is_described() -> None:
    text = "".join(page.read_text() for page in PAGES if page.parent.name == "docs")
    found = set()
    for module in (ROOT / "vmmback").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Exposure":
                found |= {ast.literal_eval(word.value) for word in node.keywords
                          if word.arg == "name" and isinstance(word.value, ast.Constant)}  # fmt: skip
    assert {"network", "share", "qemu-memory"} < found
    assert [name for name in sorted(found) if f"`{name}`" not in text] == []
