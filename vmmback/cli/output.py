"""Writing to standard output and error, so that neither a reader who stands still nor one who is gone ends a guest."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from typing import TextIO

from vmmback.errors import UsageError

EXIT_EXPOSED, EXIT_INCONCLUSIVE = 5, 8

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


def exit_with(verdict: str) -> None:
    """End with the exit code of a verdict of a report, unless that is 0."""
    if verdict in {"exposed", "failed"}:
        sys.exit(EXIT_EXPOSED)
    if verdict == "inconclusive":
        sys.exit(EXIT_INCONCLUSIVE)
