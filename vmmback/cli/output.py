"""Writing to standard output and error, so that neither a reader who stands still nor one who is gone ends a guest."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TextIO

from vmmback.errors import HostUnfit, UsageError, VmmbackError

EXIT_REFUSED, EXIT_EXPOSED, EXIT_INCONCLUSIVE = 4, 5, 8

_CHUNK = 1024  # characters: at most 4 bytes each


def show(stream: TextIO | None, text: str) -> int:
    """Write as much as can be had without waiting; return how many characters were left out.

    A reader that stands still (Ctrl-S, a full pipe) must not keep a launch from its deadlines and its signals. What is
    ready to be written to takes PIPE_BUF bytes, 4 KiB, at once (pipe(7)).
    """
    for start in range(0, len(text), _CHUNK):
        if not _is_ready(stream):
            return len(text) - start
        write(stream, text[start : start + _CHUNK])
    return 0


def _is_ready(stream: TextIO | None) -> bool:
    try:
        return stream is None or bool(select.select([], [stream.fileno()], [], 0)[1])
    except (OSError, ValueError):  # it has no descriptor, or a bad one: writing will tell
        return True


def write(stream: TextIO | None, text: str) -> str:
    """Write and flush; return what went wrong, "" if nothing did. `stream` is None where it was closed at the start.

    A terminal, a pipe or a disk that is gone or full does not end a guest. From then on nothing is written to it.
    """
    if stream is None:
        return "it is closed"
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except OSError as error:
        with suppress(OSError):  # what is buffered would be tried again when Python ends, and fail again
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return error.strerror or str(error)
    return ""


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a stream, None if it was closed at the start, is a terminal."""
    return stream is not None and stream.isatty()


def print_result(text: str) -> None:
    """Write what a command is for to standard output. Raises UsageError when it cannot be written."""
    if problem := write(sys.stdout, text):
        raise UsageError(f"the report could not be written to standard output: {problem}", "give it a place to go to")


def print_error(error: VmmbackError) -> None:
    """Write what was wrong, and what to do, to standard error."""
    hint = f"vmmback: hint: {error.hint}\n" if error.hint else ""
    write(sys.stderr, f"vmmback: error: {error.message}\n{hint}")


def as_user_error(error: Exception) -> VmmbackError | None:
    """Return what to tell the user; None for an error that is a mistake of ours."""
    if isinstance(error, VmmbackError):
        return error
    if not isinstance(error, (OSError, MemoryError)) and "can't start new thread" not in str(error):
        return None
    return HostUnfit(
        f"the kernel refused what the command needs: {str(error) or 'out of memory'}",
        "look at the limits of this process (`ulimit -a`), its cgroup, and what confines it",
    )


def exit_code_of(verdict: str) -> int:
    """Return the exit code of a verdict of a report."""
    if verdict in {"exposed", "failed"}:
        return EXIT_EXPOSED
    return EXIT_INCONCLUSIVE if verdict == "inconclusive" else 0


def finish(exit_code: int, *outputs: Callable[[], None]) -> NoReturn:
    """Try every output, and end with the verdict's exit code; only one of 0 gives way to that of an output's error."""
    for output in outputs:
        try:
            output()
        except (VmmbackError, OSError, MemoryError, RuntimeError) as caught:
            error = as_user_error(caught)
            if error is None:
                raise
            print_error(error)
            exit_code = exit_code or error.exit_code
    sys.exit(exit_code)
