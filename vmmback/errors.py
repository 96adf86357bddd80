"""The errors a user can meet.

Each carries a message (what was wrong, and where), a hint (what to do) and the exit code of the command line::

    VmmbackError
    +-- UsageError            2   an argument or a configuration file is wrong
    |   +-- ConfigError       2   every error of one guest file, with key path and line
    |   +-- GuestNameTaken    2   another live guest has this name
    |   +-- NoSuchGuest       7   no live guest has this name
    +-- HostUnfit             3   the host cannot do it: kernel, limit or program missing
    +-- AdmissionRefused      4   the host has not enough memory
    +-- QemuFailed            6   QEMU did not start, died, or did not answer in time
    |   +-- CommandRefused    6   QEMU answered a QMP command with an error
    |   +-- HandoffFailed     6   QEMU never took the descriptor, or the RAM is not where it must be
    +-- Interrupted     128+signal  the user stopped a command before it was done

Exit codes 5 (guest exposed) and 8 (inconclusive) are verdicts of a report, not errors.
"""

from __future__ import annotations

import signal


class VmmbackError(Exception):
    """Base of every error that a user sees: a message, and a hint that says what to do."""

    exit_code: int = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(VmmbackError):
    """An argument, an environment variable or a file given by the user is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A guest file is wrong; the message lists every error found in it."""


class GuestNameTaken(UsageError):
    """Another live guest of this runtime folder has the same name."""


class NoSuchGuest(UsageError):
    """No live guest of this runtime folder has that name."""

    exit_code = 7


class HostUnfit(VmmbackError):
    """The host cannot do it: a kernel feature, a limit, a permission or a program is missing."""

    exit_code = 3


class AdmissionRefused(VmmbackError):
    """The host has not enough memory for the guest, or ran out while its RAM was prefaulted."""

    exit_code = 4
    largest: int = 0
    """Bytes that would have fitted, as far as admission can tell."""


class QemuFailed(VmmbackError):
    """QEMU did not start, died, or missed a deadline; the message carries its own last words."""

    exit_code = 6


class CommandRefused(QemuFailed):
    """QEMU answered a QMP command with an error, whose class and description these are."""

    error_class = ""
    desc = ""


class HandoffFailed(QemuFailed):
    """QEMU did not take the descriptor that was meant for it, or its RAM is not where it must be."""


class Interrupted(VmmbackError):
    """A signal ended a command: a launch before its guest ran, an audit before its report."""

    def __init__(self, signum: int, when: str = "before the guest ran") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {when}")
        self.exit_code = 128 + signum  # as a shell says it
