"""Who may import whom: import-linter's contracts, and the modules that alone may use a foreign library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "vmmback").rglob("*.py"))


def test_the_contracts_are_kept() -> None:
    linter = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    )
    done = subprocess.run([sys.executable, "-c", linter], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def imported(source: str) -> Iterator[str]:
    """Name the packages that a module imports, also within functions and for type checkers alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("library", "where"),
    [
        ("ctypes", ("linux/",)),
        ("click", ("cli/",)),
        ("rich", ("cli/",)),
        ("qemu", ("monitor.py",)),
        ("jinja2", ("render/",)),
        ("pyroute2", ("network.py",)),
        ("libvirt", ("libvirt/domain.py",)),
        ("libvirt_qemu", ("libvirt/domain.py",)),
    ],
)
def test_a_foreign_library_is_imported_in_its_one_place(library: str, where: tuple[str, ...]) -> None:
    importers = {
        str(path.relative_to(ROOT / "vmmback"))
        for path in SOURCES
        if any(name.split(".")[0] == library for name in imported(path.read_text()))
    }
    assert [name for name in importers if not name.startswith(where)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    if path.parent.name != "cli":
        assert not called & {"print", "sys.exit", "exit", "input"}


def test_help_does_not_wait_for_what_it_does_not_need() -> None:
    # Startup is part of the product: rich, msgspec, asyncio and QMP are imported when a command needs them.
    heavy = ["rich", "msgspec", "asyncio", "qemu", "ctypes", "subprocess", "jinja2"]
    program = f"import sys, vmmback.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_launch_does_not_wait_for_what_its_guest_file_does_not_need() -> None:
    heavy = ["difflib", "hashlib", "vmmback.config.schema"]
    imports = "sys, vmmback.config, vmmback.broker.config"
    program = f"import {imports}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
