"""`vmmback console`: a terminal, or a pipe, at a guest's serial console."""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import time
import tty
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from vmmback.cli.completion import GuestName
from vmmback.cli.output import is_terminal, show
from vmmback.cli.signals import stopped
from vmmback.errors import QemuFailed, UsageError

ESCAPE = 0x1D  # Ctrl-]
_KEYS_HELP = (
    "Ctrl-] and then: q or . leaves (the guest runs on), r types `stty rows R cols C` with this terminal's size, "
    "Ctrl-] sends Ctrl-], ? shows this"
)
# After the end of input that is no terminal: a guest that has been silent for so long has answered.
QUIET_S = 2.0
_BUFFER_BYTES = 1 << 14
# What a pipe that is ready takes at once (PIPE_BUF, pipe(7)).
_WRITE_BYTES = 4096


@click.command(
    epilog="Exit codes: 0 you left, the input ended, or the guest did; 2 wrong argument, 6 the supervisor is gone, "
    "7 no such guest, 128 + signal when stopped."
)
@click.argument("name", type=GuestName())
@click.option("--no-scrollback", is_flag=True, help="Show only what the guest prints from now on.")
def console(name: str, no_scrollback: bool) -> None:
    """Show the serial console of the guest NAME, from its last 64 KiB on, and type to it.

    Ctrl-] and then q leaves, ? shows the other keys. Several people can be at one console. What the guest prints goes
    to your terminal as it is: a guest can command it, as it cannot where `vmmback launch` shows it.

    Without a terminal it is a plain pipe. At the end of its input it goes on until the guest has been silent for 2 s.

    Should it be killed, so that the terminal stays raw: type `reset` and Ctrl-J.

    \b
    Examples:
      vmmback console demo
      echo uname -a | vmmback console demo --no-scrollback
    """
    import asyncio

    from vmmback import control_client
    from vmmback.config.values import check_name
    from vmmback.runtime import runtime_folder

    folder = runtime_folder() / check_name(name)
    if sys.__stdout__ is None:  # another descriptor may have its number by now
        raise UsageError("standard output is closed", "give the console a place to go to")

    async def attached() -> int:
        async with control_client.connect(folder) as supervisor:
            return await supervisor.console(scrollback=not no_scrollback)

    with stopped("at the console"), socket.socket(fileno=asyncio.run(attached())) as connection:
        if is_terminal(sys.__stdin__):
            if is_terminal(sys.stderr):
                show(sys.stderr, f"vmmback: the console of {name}; Ctrl-] q leaves, Ctrl-] ? shows all keys\n")
            with _raw(0):
                ended = _Session(connection, keys=Keys()).run()
        else:
            ended = _Session(connection).run()
    if ended:
        show(sys.stderr, f"vmmback: guest {name} has ended\n")
    elif is_terminal(sys.__stdin__):
        show(sys.stderr, f"vmmback: you left the console of {name}, which runs on\n")


class Keys:
    """What is typed on a terminal, parted into what is for the guest and what is for us."""

    def __init__(self) -> None:
        self._escaped = False

    def parted(self, typed: memoryview) -> Iterator[memoryview | str]:
        """Yield, in order, parts for the guest and the keys that followed Ctrl-]."""
        start = 0
        for at, byte in enumerate(typed):
            if self._escaped:
                self._escaped = False
                start = at + 1
                if byte == ESCAPE:
                    yield typed[at : at + 1]
                else:
                    yield chr(byte)
            elif byte == ESCAPE:
                yield typed[start:at]
                self._escaped = True
                start = at + 1
        if not self._escaped:
            yield typed[start:]


class _Buffer:
    """Bytes on their way, in a place that is used again and overwritten: they may be secret."""

    def __init__(self) -> None:
        self.data = bytearray(_BUFFER_BYTES)
        self._first = self._last = 0

    @property
    def is_empty(self) -> bool:
        return self._first == self._last

    def append(self, more: memoryview) -> bool:
        """Add all of it; False, and nothing of it, if there is no room."""
        kept = self._last - self._first
        if kept + len(more) > len(self.data):
            return False
        if self._last + len(more) > len(self.data):
            with memoryview(self.data) as data:
                data[:kept] = data[self._first : self._last]
            self._first, self._last = 0, kept
        self.data[self._last : self._last + len(more)] = more
        self._last += len(more)
        return True

    def filled(self, count: int) -> None:
        """Take the first `count` bytes of `data` as what is on its way; it was empty before."""
        self._first, self._last = 0, count

    @contextmanager
    def next(self, most: int = _BUFFER_BYTES) -> Iterator[memoryview]:
        """Lend what is to go next."""
        with memoryview(self.data) as data, data[self._first : min(self._last, self._first + most)] as part:
            yield part

    def gone(self, count: int) -> None:
        """Forget the first `count` bytes, which are where they were to go."""
        self._first += count
        if self.is_empty:
            self._first = self._last = 0
            self.wipe()

    def wipe(self) -> None:
        """Overwrite all of it."""
        self.data[:] = bytes(len(self.data))


class _Session:
    """Standard input and output at the console. With `keys` the input is a terminal, in raw mode."""

    def __init__(self, connection: socket.socket, keys: Keys | None = None) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._keys = keys
        self._typed, self._read, self._shown = _Buffer(), _Buffer(), _Buffer()
        self._input_ended = sys.__stdin__ is None  # Python's word for one that was closed at the start
        self._left = self._guest_ended = self._told_lost = False
        self._quiet_since = time.monotonic()

    def run(self) -> bool:
        """Pass bytes on until the guest's end, True, or until the user leaves. Raises QemuFailed, UsageError."""
        try:
            while not self._left:
                if self._guest_ended and self._shown.is_empty:
                    return True
                if not self._pass_on():
                    return False
            return False
        finally:
            for buffer in (self._typed, self._read, self._shown):
                buffer.wipe()

    def _pass_on(self) -> bool:
        """Wait until something can be done, and do it; False once the input has ended and the guest is silent."""
        ready = self._ready()
        if not ready and self._input_ended:
            return False
        if ready.get(0):
            self._take_input()
        number = self._connection.fileno()
        if ready.get(number, 0) & select.POLLOUT:
            self._type()
        if self._shown.is_empty and ready.get(number, 0) & ~select.POLLOUT:
            self._receive()
        if ready.get(1):
            self._show()
        return True

    def _ready(self) -> dict[int, int]:
        poll = select.poll()
        events = 0 if self._typed.is_empty else select.POLLOUT
        if self._shown.is_empty and not self._guest_ended:
            events |= select.POLLIN
        if events:  # else its end would be told over and over, while the output stands still
            poll.register(self._connection.fileno(), events)
        # From a terminal all is read, so that Ctrl-] works whatever the guest does; a pipe waits for the guest.
        if not self._input_ended and (self._keys or self._typed.is_empty):
            poll.register(0, select.POLLIN)
        if not self._shown.is_empty:
            poll.register(1, select.POLLOUT)
        timeout_ms = None
        if self._input_ended and self._shown.is_empty and self._typed.is_empty:
            timeout_ms = max(0.0, self._quiet_since + QUIET_S - time.monotonic()) * 1000
        return dict(poll.poll(timeout_ms))

    def _take_input(self) -> None:
        try:
            count = os.readv(0, [self._read.data])
        except OSError:  # the terminal is gone
            count = 0
        if not count:
            self._input_ended = True
            self._left = self._keys is not None
            self._quiet_since = time.monotonic()
            return
        self._read.filled(count)
        with self._read.next() as read:
            for part in self._keys.parted(read) if self._keys else (read,):
                if isinstance(part, str):
                    self._obey(part)
                elif not self._typed.append(part) and not self._told_lost:
                    self._told_lost = True
                    self._say("the guest reads nothing: what you type is lost")
        self._read.gone(count)

    def _obey(self, key: str) -> None:
        if key in {"q", "."}:
            self._left = True
        elif key == "r":
            self._tell_size()
        elif key == "?":
            self._say(_KEYS_HELP)
        else:
            self._say("no such key after Ctrl-]; Ctrl-] ? shows all")

    def _tell_size(self) -> None:
        """Type the command that tells a guest's shell the size of this terminal: a serial line does not carry it."""
        with suppress(OSError):
            columns, rows = os.get_terminal_size(0)
            if columns and rows:
                self._typed.append(memoryview(f"stty rows {rows} cols {columns}\r".encode()))
                return
        self._say("this terminal does not tell its size")

    def _type(self) -> None:
        with self._typed.next() as typed, suppress(BlockingIOError):
            try:
                count = self._connection.send(typed)
            except ConnectionError:  # what comes, or comes not, tells the reason
                count = len(typed)
            self._typed.gone(count)
            self._told_lost = False
            self._quiet_since = time.monotonic()

    def _receive(self) -> None:
        room = socket.CMSG_SPACE(array("i").itemsize)
        try:
            count, ancillary, _, _ = self._connection.recvmsg_into([self._shown.data], room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionError:
            count, ancillary = 0, []
        if not count:
            raise QemuFailed(
                "the guest's supervisor is gone, and its guest with it", "or it could not wait for this output any more"
            )
        for _, _, numbers in ancillary:  # with the last byte, which is none of the guest's: console_clients.py
            self._guest_ended = True
            for number in array("i", numbers):
                os.close(number)
        self._shown.filled(count - self._guest_ended)
        self._quiet_since = time.monotonic()

    def _show(self) -> None:
        with self._shown.next(_WRITE_BYTES) as shown:
            try:
                count = os.write(1, shown)
            except BlockingIOError:
                return
            except OSError as error:
                raise UsageError(f"standard output cannot be written: {error.strerror}") from error
        self._shown.gone(count)
        self._quiet_since = time.monotonic()

    def _say(self, message: str) -> None:
        show(sys.stderr, f"\r\nvmmback: {message}\r\n")  # a terminal in raw mode does not begin the line anew by itself


@contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """Have a terminal in raw mode: every key is the guest's. It gets back what it had, whatever happens."""
    before = termios.tcgetattr(terminal)
    try:
        tty.setraw(terminal, termios.TCSANOW)
        yield
    finally:
        with suppress(OSError, termios.error):  # it is gone
            # Neither waits for the terminal, as TCSAFLUSH would; what was typed for the guest is for nobody else.
            termios.tcflush(terminal, termios.TCIFLUSH)
            termios.tcsetattr(terminal, termios.TCSANOW, before)
        if is_terminal(sys.stderr):
            show(sys.stderr, "\n")
