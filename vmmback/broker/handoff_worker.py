"""Answers the calls of one program, for the broker, in a process of its own.

What such a program has in its memory, and the descriptors that it sends, may be a file of FUSE whose server never
answers: who reads the one, or closes the other, waits for ever then, and not even SIGKILL ends him (fs/fuse/dev.c,
request_wait_answer; fs/fuse/file.c, fuse_flush). That must not be the broker, nor the worker of another guest.

Run as `python -I -S -c START FOLDER CHANNEL`, see handoffs.py: the descriptor of a socket. There the broker says first
who calls, with a descriptor of that process, and what is on offer for him anyway; then the caller makes one Varlink
call. It ends with the caller, or with the last task under his filter; the broker's end is none of its business, so that
QEMU goes on as it was.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmmback.answers import Answers
from vmmback.broker.more_ram import More
from vmmback.errors import UsageError, VmmbackError
from vmmback.linux import capabilities, dumpable, procfs
from vmmback.linux.memfd_secret import memfd_secret

START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from vmmback.broker.handoff_worker import main; main()"
METHOD, REFUSED = "org.vmmback.Handoff.Answer", "org.vmmback.Broker.Refused"

# Read the caller's memory and see his descriptors (ptrace(2), PTRACE_MODE_ATTACH), in his folders of /proc.
_RIGHTS = ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")
_CALL_TIMEOUT_S = 10.0
_MOST_BYTES, _MOST_DESCRIPTORS = 1 << 16, 253  # net/scm.h, SCM_MAX_FD
_SEE = "see docs/BROKER.md"
_LISTENER = "anon_inode:seccomp notify"  # kernel/seccomp.c, init_listener


def main() -> None:
    """Answer until the caller, or all that it filters, has ended."""
    dumpable.forbid()
    capabilities.keep(_RIGHTS)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            # When there is a caller: a domain of libvirt's has none for a while.
            text, (pidfd, *lent) = _message(connection)
        except (OSError, ValueError):  # the broker has ended, or nobody has called
            return
        who = json.loads(text)
        pid: int = who["pid"]
        threading.Thread(target=_end_with, args=(pidfd,), daemon=True).start()

        def is_caller(tid: int) -> bool:
            """Tell whether the thread is the caller's: while he has not ended, his pid is nobody else's."""
            try:
                return procfs.thread_group(tid) == pid and not _has_ended(pidfd, 0)
            except OSError:
                return False

        more = More(pid, **who["more"]) if who["more"] else None
        connection.settimeout(_CALL_TIMEOUT_S)
        try:
            parameters, descriptors = _call(connection)
            listener, answers = _agreed(parameters, descriptors, is_caller, more)
            if lent and answers.on_offer:
                raise UsageError("this channel takes no offers: the broker has made them", _SEE)
            for (call, name), descriptor in zip(who["offers"], lent, strict=True):
                _offer(answers, call, name, descriptor)
            connection.sendall(b'{"parameters": {}}\0')
        except VmmbackError as error:
            refusal = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
            with suppress(OSError):
                connection.sendall(json.dumps({"error": REFUSED, "parameters": refusal}).encode() + b"\0")
            return
        except OSError:  # the caller says nothing, or takes no answer
            return
    _answer(listener, answers, {*lent, *descriptors} - {listener}, more)


def _answer(listener: int, answers: Answers, held: set[int], more: More | None) -> None:
    """Answer as long as there is a task under the filter; close those of `held` that are no more on offer."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        for descriptor in held - answers.on_offer:
            os.close(descriptor)
        held &= answers.on_offer
        stopped = poll.poll(more.look_again_ms if more else None)
        if more and not stopped:
            more.release_unplugged()
            continue
        if not any(events & select.POLLIN for _, events in stopped):
            return
        answers.answer_next(listener)


def _end_with(pidfd: int) -> None:
    """Wait in a thread of its own for the caller's end: the main thread may be waiting for what never comes."""
    _has_ended(pidfd, None)
    os._exit(0)


def _has_ended(pidfd: int, timeout_ms: int | None) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_ms))


def _message(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return one message, without the NUL at its end, and the descriptors that came with it. Raises OSError."""
    received, descriptors = b"", list[int]()
    while not received.endswith(b"\0"):
        # A read ends with the message that brings descriptors (net/unix/af_unix.c, unix_stream_read_generic).
        data, passed, _, _ = socket.recv_fds(connection, _MOST_BYTES, _MOST_DESCRIPTORS)
        received, descriptors = received + data, descriptors + passed
        if not data or len(received) > _MOST_BYTES or len(descriptors) > _MOST_DESCRIPTORS:
            raise ConnectionAbortedError
    return received[:-1], descriptors


def _call(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return the parameters of the call, and the descriptors that came with it. Raises OSError, UsageError."""
    text, descriptors = _message(connection)
    try:
        call = json.loads(text)
        _require(call["method"] == METHOD and isinstance(call["parameters"], dict))
    except (ValueError, RecursionError, LookupError, TypeError):
        raise UsageError(f"this channel is for one call of {METHOD}", _SEE) from None
    return call["parameters"], descriptors


def _agreed(
    parameters: dict[str, Any], descriptors: list[int], is_caller: Callable[[int], bool], more: More | None
) -> tuple[int, Answers]:
    """Return the listener, and what its notifications are answered with. Raises UsageError."""
    try:
        listener = descriptors[_index(parameters["listener"])]
        secret_memfds = parameters["secret_memfds"]
        offers = [
            (each["call"], each["name"], descriptors[_index(each["descriptor"])]) for each in parameters["offers"]
        ]
        names = [(call, name) for call, name, _ in offers]
        _require(isinstance(secret_memfds, bool) and all(_is_known(*each) for each in names))
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"the parameters are not those of {METHOD}", _SEE) from None
    if str(Path(f"/proc/self/fd/{listener}").readlink()) != _LISTENER:
        raise UsageError("the descriptor is not the listener of a seccomp filter", _SEE)
    if len({name for call, name in names if call == "open"}) != [call for call, _ in names].count("open"):
        raise UsageError("one path is offered twice", _SEE)
    answers = Answers(is_caller, secret_memfds=secret_memfds, more=more)
    for offer in offers:
        _offer(answers, *offer)
    return listener, answers


def _offer(answers: Answers, call: str, name: str, descriptor: int) -> None:
    """Offer a descriptor. Raises UsageError."""
    _check_secret(descriptor, name)
    if call == "open":
        answers.offer(Path(name), descriptor)
    else:
        answers.offer_memfd(name, descriptor)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _index(value: Any) -> int:
    _require(type(value) is int and value >= 0)
    return int(value)


def _is_known(call: object, name: object) -> bool:
    """Tell whether it is a path with a folder of its own, all else in which is denied, or the name of a memfd.

    Raises ValueError for what is no text.
    """
    if not isinstance(name, str) or b"\0" in os.fsencode(name):
        return False
    if call == "open":
        return name == os.path.normpath(name) and name.startswith("/") and name.count("/") > 1
    return call == "memfd_create" and bool(name)


def _check_secret(descriptor: int, name: str) -> None:
    """Raise UsageError unless it is a file of memfd_secret(2) that has its size; QEMU crashes on one that has none.

    Its device tells, which nobody can give to a file of his own, as he can its name.
    """
    own = memfd_secret()
    device = os.fstat(own).st_dev
    os.close(own)
    status = os.fstat(descriptor)
    if status.st_dev != device or not status.st_size:
        raise UsageError(f"what is offered for {name} is no secret RAM with a size", "offer what the broker has lent")
