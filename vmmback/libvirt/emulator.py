"""Becomes a domain's QEMU, which gets secret RAM: what the wrapper executes in QEMU's place, as QEMU's user.

Run as `main()` with the arguments QEMU ARGUMENT... It claims the domain's RAM from the broker, puts itself under the
filter whose listener it sends away with that RAM, and executes QEMU, with the same pid and the arguments that libvirt
gave. Whatever goes wrong, QEMU is not executed: there is no other memory to fall back to. What it says on standard
error is in libvirt's error. `vmmback libvirt install` puts a copy of it where QEMU's user finds it.
"""

import os
import sys

from vmmback.libvirt.broker_call import Failed, call, connected, decoded, socket_of
from vmmback.linux.bare_filter import listener_of

_ANSWER_S, _A_GIB_S = 15.0, 10.0
"""How long the broker may take, and for each GiB besides, which it may still have to touch."""

_MEMFD = "memory-backend-memfd"
_REPORT = "report this, with the domain's XML"


def main() -> int:
    """Execute QEMU; return an exit code if it was not."""
    qemu, arguments = sys.argv[1], sys.argv[2:]
    try:
        name, blocks = name_of(arguments), blocks_of(arguments)
        timeout_s = _ANSWER_S + _A_GIB_S * sum(size for _, _, size in blocks) / (1 << 30)
        broker = connected(timeout_s)
        told, descriptors = call(
            broker, "org.vmmback.Domains.Claim", {"name": name, "sizes": [size for _, _, size in blocks]}
        )
        listener = listener_of(bytes.fromhex(told["filter"]))
        # From here on, this process must open nothing to read and write, nor make a memfd: nobody answers yet.
        offers = [{"call": kind, "name": of, "descriptor": number} for number, (kind, of, _) in enumerate(blocks, 1)]
        call(
            socket_of(descriptors[told["channel"]], _ANSWER_S), "org.vmmback.Handoff.Answer",
            {"listener": 0, "offers": offers, "secret_memfds": False},
            (listener, *(descriptors[index] for index in told["memory"])),
        )  # fmt: skip
        os.execv(qemu, [qemu, *arguments])
    except Failed as failed:
        return failed.tell("vmmback")
    except OSError as error:
        return Failed(f"{qemu} cannot be executed with secret RAM: {error.strerror}", "").tell("vmmback")


def name_of(arguments: list[str]) -> str:
    """Return the domain's name, as libvirt says it: `-name guest=NAME,debug-threads=on`, commas doubled. Raises Failed.

    (qemuBuildNameCommandLine in libvirt's src/qemu/qemu_command.c.)
    """
    for option, value in zip(arguments, arguments[1:], strict=False):  # noqa: RUF007 (no import)
        if option == "-name" and value.startswith("guest="):
            return value.removeprefix("guest=").replace(",,", "\0").partition(",")[0].replace("\0", ",")
    raise Failed("QEMU's arguments name no domain", "let libvirt start it: this is a domain's <emulator>")


def blocks_of(arguments: list[str]) -> list[tuple[str, str, int]]:
    """Return the call by which QEMU will ask for each of its RAM blocks, in this order, path or name, and its bytes.

    Raises Failed for memory that cannot be secret. (qemuBuildMemoryBackendProps; JSON since libvirt 6.10.)
    """
    blocks = []
    for option, value in zip(arguments, arguments[1:], strict=False):  # noqa: RUF007 (no import)
        if option != "-object" or "memory-backend-" not in value:
            continue
        try:
            backend = decoded(value)
            kind, size = backend["qom-type"], backend["size"]
            if kind == _MEMFD and not backend.get("hugetlb"):
                blocks.append(("memfd_create", _MEMFD, size))
                continue
            if kind == "memory-backend-file" and backend.get("share"):
                blocks.append(("open", backend["mem-path"], size))
                continue
        except (ValueError, LookupError, TypeError):
            raise Failed(f"QEMU's memory is described in a way not known here: {value}", _REPORT) from None
        raise Failed(f"{kind} {backend.get('id')} cannot be secret RAM", "vmmback libvirt enable DOMAIN, once more")
    return blocks
