"""What the worker of a domain's QEMU has on offer: a program in its place asks for more, or would offer files itself.

Real are the kernel, which stops its calls, and the worker that answers them; there is no broker to borrow from.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import MIB
from vmmback.broker import handoff_worker, handoffs
from vmmback.broker.handoffs import Offer
from vmmback.linux.memfd_secret import memfd_secret

pytestmark = pytest.mark.usefixtures("needs_seccomp", "needs_secretmem")

NAME = "memory-backend-memfd"
ROOT = Path(__file__).parents[1]

# Puts itself under the filter as the wrapper of a domain does, and calls the worker.
CALLS = """
import json, os, socket, sys
from vmmback.linux import memfd_secret, seccomp
sys.stdin.readline()
channel = socket.socket(fileno=int(sys.argv[1]))
own = memfd_secret.memfd_secret()
os.ftruncate(own, 4096)
listener = seccomp.install_listener(memfds=True, mappings=True)
def answered(offers):
    parameters = {"listener": 0, "offers": offers, "secret_memfds": False}
    call = {"method": "org.vmmback.Handoff.Answer", "parameters": parameters}
    socket.send_fds(channel, [json.dumps(call).encode() + b"\\0"], [listener, own])
    return json.loads(channel.recv(1 << 16)[:-1])
"""

# Takes what the domain starts with. Then it has as many files promised as it is told, and says what became of the
# calls, and of making each of the files 1 MiB long.
TAKES = f"""{CALLS}
assert answered([]) == {{"parameters": {{}}}}
os.close(listener)
assert os.fstat(os.memfd_create("{NAME}")).st_size == {MIB}
promised, error = [], 0
try:
    for _ in range(int(sys.argv[2])):
        promised.append(os.memfd_create("{NAME}"))
except OSError as failed:
    error = failed.errno
for descriptor in promised:
    os.ftruncate(descriptor, {MIB})
print(json.dumps([error, [os.fstat(descriptor).st_size for descriptor in promised]]))
"""

# Offers a file of its own, under the name argv[2], and says how that was answered.
OFFERS = f"""{CALLS}
print(json.dumps(answered([{{"call": "memfd_create", "name": sys.argv[2], "descriptor": 1}}])))
"""


def asked(program: str, argument: object, room: int = 0) -> Any:
    """Return what the program says whose domain has so much room; the worker has ended as well."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", handoff_worker.START, str(ROOT), str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={},
        )  # fmt: skip
        qemu = subprocess.Popen(
            [sys.executable, "-c", program, str(ours.fileno()), str(argument)], pass_fds=[ours.fileno()], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        pidfd, memory = os.pidfd_open(qemu.pid), memfd_secret()
        try:
            os.ftruncate(memory, MIB)
            more = {"broker": "/nowhere", "purpose": "domain one", "room": room}
            handoffs.tell(ours.fileno(), qemu.pid, pidfd, [Offer("memfd_create", NAME, memory)], more)
            output, _ = qemu.communicate(b"\n", timeout=30)
            worker.wait(30)
        finally:
            for process in (qemu, worker):
                process.kill()
                process.wait()
            os.close(pidfd)
            os.close(memory)
    return json.loads(output)


def test_without_room_nothing_is_promised() -> None:
    error, sizes = asked(TAKES, 1)
    assert (os.strerror(error), sizes) == ("Cannot allocate memory", [])


def test_of_many_promises_only_the_last_ones_are_kept() -> None:
    """The size of a file that is kept is said when it is mapped; one that was forgotten is the program's own affair."""
    assert asked(TAKES, 66, 1 << 30) == [0, [MIB] * 2 + [0] * 64]


@pytest.mark.parametrize("name", [NAME, "another"])
def test_beside_what_the_broker_has_on_offer_nobody_offers_anything(name: str) -> None:
    """A QEMU that could would be given RAM of its own choice, which the broker knows nothing of."""
    refused = asked(OFFERS, name)
    assert refused["error"] == "org.vmmback.Broker.Refused"
    assert refused["parameters"]["message"] == "this channel takes no offers: the broker has made them"
    assert refused["parameters"]["exit_code"] == 2
