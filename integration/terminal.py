"""A terminal for programs that behave otherwise on one."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from typing import Self

from integration.conftest import ROOT, eventually


class Terminal:
    """A program on a terminal of its own, 120 columns wide."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 120))
        self.mode_before = termios.tcgetattr(slave)
        self.output = b""
        try:
            # setsid --ctty makes the terminal the controlling one, so that Ctrl-C works.
            self.process = subprocess.Popen(
                ["setsid", "--ctty", *argv],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=ROOT,
                env={**os.environ, "TERM": "xterm"},
            )
        finally:
            os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    @property
    def text(self) -> str:
        """What is on the terminal, without colours and cursor movements."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output.decode(errors="replace"))
        return plain.replace("\r\n", "\n").replace("\r", "\n")

    @property
    def echoes(self) -> bool:
        """Tell whether what is typed is shown."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    @property
    def mode(self) -> list[object]:
        """What termios(3) knows of it: cooked or raw, and all the rest."""
        return termios.tcgetattr(self._master)

    def resize(self, rows: int, columns: int) -> None:
        """Have another size, of which the program gets SIGWINCH."""
        termios.tcsetwinsize(self._master, (rows, columns))

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def read_until(self, found: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not found():
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"waited {timeout_s} s in vain until {what}: {self.text}"
            if select.select([self._master], [], [], left_s)[0]:
                try:
                    self.output += os.read(self._master, 1 << 16)
                except OSError:  # EIO: nobody has the terminal open any more
                    assert found(), f"the program ended before {what}: {self.text}"

    def shows_within(self, text: str, timeout_s: float) -> bool:
        """Read once what comes within this time, and tell whether the text is there."""
        if select.select([self._master], [], [], timeout_s)[0]:
            self.output += os.read(self._master, 1 << 16)
        return text in self.text

    def ended(self) -> int:
        """Read to the end; return the exit code."""

        def closed() -> bool:
            try:
                self.output += os.read(self._master, 1 << 16)
            except OSError:
                return True
            return False

        eventually(closed, "the program closes its terminal", 60)
        return self.process.wait(30)
