"""The tree that errors.py draws is the tree that it defines."""

from __future__ import annotations

import inspect
import re
import signal

import pytest

from vmmback import errors
from vmmback.errors import Interrupted, VmmbackError

BRANCH = re.compile(r"(?P<indent>[| ]*)\+-- (?P<name>\w+) +(?P<code>\S+) +(?P<meaning>.+)")


def drawn() -> dict[str, tuple[str, str]]:
    """Return, by the name of each class in the drawing, its parent and its exit code."""
    tree: dict[str, tuple[str, str]] = {}
    ancestors = ["VmmbackError"]
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        if match := BRANCH.fullmatch(line.strip()):
            depth = len(match["indent"]) // 4
            ancestors = [*ancestors[: depth + 1], match["name"]]
            tree[match["name"]] = (ancestors[depth], match["code"])
    return tree


def defined() -> dict[str, type[VmmbackError]]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, VmmbackError) and kind is not VmmbackError
    }


def test_the_drawing_has_every_class_below_its_parent() -> None:
    assert {name: parent for name, (parent, _) in drawn().items()} == {
        name: kind.__bases__[0].__name__ for name, kind in defined().items()
    }


@pytest.mark.parametrize("name", sorted(set(defined()) - {"Interrupted"}))
def test_a_class_has_the_exit_code_that_is_drawn_and_keeps_message_and_hint(name: str) -> None:
    error = defined()[name]("what was wrong", "what to do")
    assert str(error.exit_code) == drawn()[name][1]
    assert (str(error), error.message, error.hint) == ("what was wrong", "what was wrong", "what to do")
    assert defined()[name]("what was wrong").hint == ""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_exits_with_128_plus_the_signal(signum: signal.Signals) -> None:
    assert drawn()["Interrupted"][1] == "128+signal"
    assert Interrupted(signum).exit_code == 128 + signum


def test_interrupted_names_the_signal() -> None:
    assert "SIGTERM" in Interrupted(signal.SIGTERM).message


def test_no_error_has_an_exit_code_that_means_something_else() -> None:
    verdicts = {0, 5, 8}
    assert not verdicts & {kind.exit_code for kind in defined().values()}
