"""What a check came to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

State = Literal["ok", "note", "missing"]


class Finding(NamedTuple):
    """A check's outcome before it has its name."""

    state: State
    evidence: str
    remedy: str = ""


class Check(NamedTuple):
    """One thing that a guest needs of its host, or that bears on what is in its RAM.

    `state` is `ok`; `note` where a launch works, but less well or less safely than it could; `missing` where it would
    fail. `evidence` is what was seen, `remedy` what an operator can do about it, "" where nothing is to be done.
    """

    name: str
    state: State
    evidence: str
    remedy: str


def checked(name: str, find: Callable[[], Finding]) -> Check:
    """Carry out a check; one that could not be made says so, and never raises."""
    try:
        finding = find()
    except Exception as error:  # noqa: BLE001 (one check must not keep the others from being told)
        finding = Finding("note", f"could not be tried: {str(error) or type(error).__name__}", "run it as root")
    return Check(name, *finding)
