"""Which QMP commands other processes may send to a guest: pure, so that tests can ask it anything.

Three layers: what passes by default, what `[qmp] allow` of the guest file adds, and what nothing adds. A command
that vmmback does not know is denied. On top of that the supervisor can deny commands while the guest runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vmmback.qmp_commands import DEFAULT, NEGOTIATION, NEVER_ALLOWED, ON_REQUEST, UNSTABLE, UNSTABLE_PREFIX, Rule

MAX_NAME_CHARS = 80

# A command's name, or the start of one with a star.
ALLOW_PATTERN = r"([A-Za-z][A-Za-z0-9_-]{0,79}\*?|\*)"


class Denial(NamedTuple):
    """Why a command must not pass, as a QMP error: its class, and a description that is one line of text."""

    error_class: str
    desc: str


def never(command: str) -> str:
    """Return why nothing allows a command, "" if something may."""
    if command.startswith(UNSTABLE_PREFIX):
        return UNSTABLE
    return NEVER_ALLOWED.get(command, "")


def check_entry(entry: str) -> None:
    """Raise ValueError, with advice, for an entry of `[qmp] allow` that can have no effect."""
    if not re.fullmatch(ALLOW_PATTERN, entry):
        raise ValueError('is no command; write a name like "device_del", or the start of names and a star like "job-*"')
    if reason := never(entry):
        raise ValueError(f"is never allowed, as it {reason}; remove it")
    if not _matched([entry], {**DEFAULT, **ON_REQUEST}):
        import difflib  # for errors alone: it takes 1 ms

        near = difflib.get_close_matches(entry.rstrip("*"), ON_REQUEST, n=1)
        advice = f'did you mean "{near[0]}"?' if near else "remove it"
        raise ValueError(f"matches no command that may be allowed; {advice}")


def _matched(allow: Sequence[str], known: Mapping[str, Rule]) -> dict[str, Rule]:
    """Return the commands that an entry names; a trailing star stands for any rest."""
    exact = {entry for entry in allow if not entry.endswith("*")}
    starts = tuple(entry[:-1] for entry in allow if entry.endswith("*"))
    return {name: rule for name, rule in known.items() if name in exact or name.startswith(starts)}


class Policy:
    """What passes for one guest. `allow` are the entries of `[qmp] allow`."""

    def __init__(self, allow: Iterable[str] = ()) -> None:
        # The entries only ever choose from what may be chosen: no text in them reaches beyond that.
        self._rules = {**DEFAULT, **_matched(tuple(allow), ON_REQUEST)}
        self._denied: dict[str, str] = {}

    def deny(self, command: str, reason: str) -> None:
        """Deny a command from now on, such as cont while the guest must stay paused."""
        self._denied[command] = reason

    def permit(self, command: str) -> None:
        """Take back what `deny` said of a command; the rest of the policy holds as before."""
        self._denied.pop(command, None)

    def check(self, command: str, arguments: Mapping[str, object]) -> Denial | None:
        """Return why a command with these arguments must not pass, None if it may."""
        # Clients make up names, and a denial is also shown on a terminal.
        shown = re.sub("[^ -~]", "?", command[:MAX_NAME_CHARS])
        rule = self._rules.get(command)
        if rule is None:
            # The class and the words that QEMU has for a command that is switched off (qapi/qmp-dispatch.c).
            return Denial("CommandNotFound", f"Command {shown} has been disabled: {self._why(command)}")
        if reason := self._denied.get(command):
            return Denial("GenericError", f"Command {shown} is denied for now: {reason}")
        if problem := rule(arguments):
            return Denial("GenericError", f"Command {shown} is denied with these arguments: {problem}")
        return None

    def _why(self, command: str) -> str:
        if reason := never(command):
            return f"it {reason}"
        if command in ON_REQUEST:
            return "the guest file's [qmp] allow does not name it"
        return "vmmback does not know it"


def is_known(command: str) -> bool:
    """Tell whether a command is in one of the tables; names that are not come from anyone, and are without number."""
    return command in DEFAULT or command in ON_REQUEST or command in NEVER_ALLOWED or command == NEGOTIATION
