"""Tells the broker of a domain that libvirt is about to start, or has ended: what libvirt's hook executes.

Run as `main()` with the arguments prepare or release, and NAME, with the domain's XML on standard input. What it says
on standard error becomes part of libvirt's own error. `vmmback libvirt install` puts a copy beside the emulator's.
"""

import sys

from vmmback.libvirt.broker_call import Failed, call, connected

_ANSWER_S = {"prepare": 10.0, "release": 2.0}
"""How long the broker may take: it judges a domain, and takes its RAM, or begins to make it."""


def main() -> int:
    """Return the exit code: anything but 0 keeps libvirt from starting the domain."""
    operation, name = sys.argv[1:3]
    xml = sys.stdin.buffer.read().decode(errors="replace")
    try:
        connection = connected(_ANSWER_S[operation])
        if operation == "prepare":
            call(connection, "org.vmmback.Domains.Announce", {"xml": xml})
        else:
            call(connection, "org.vmmback.Domains.Withdraw", {"name": name})
    except Failed as failed:
        if operation == "prepare":
            return failed.tell("vmmback")
    return 0
