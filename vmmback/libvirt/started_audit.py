"""The audit of a domain that has just started: it is tried until it comes to an end, or the domain's time is up.

What `vmmback launch` makes of a guest holds here too: one that was never examined does not go on, one that was, and
later could not be, is inconclusive and goes on.
"""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from vmmback.errors import ConfigError, HostUnfit, VmmbackError
from vmmback.libvirt import audit, domain_xml
from vmmback.libvirt.domain_xml import OnExposed
from vmmback.linux import procfs
from vmmback.report import IsolationReport

# Firmware has run, and has set up the guest's memory map, by then.
_BOOTED_S = 10.0

# For what never comes, not for what is slow: libvirt has a call wait 30 s for another one of the same domain
# (VIR_JOB_WAIT_TIME, src/conf/virdomainjob.c), and an audit takes some 0.2 s for each GiB where nobody else is busy.
_PATIENCE_S, _PATIENCE_S_PER_GIB = 120.0, 4.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0

# Where libvirt keeps what it needs to find a domain that runs again: <domstatus> (virDomainObjSave, src/conf).
_STATUS = Path("/run/libvirt/qemu")


class StandsStill(HostUnfit):
    """The domain cannot be examined, and its guest does not run: its time does not begin before it does."""


def audit_started(name: str, examine: Callable[[], IsolationReport], note: Callable[[str], None]) -> None:
    """Examine a domain when it has started, and again when its firmware has run; what is found is kept.

    `examine` may be called again while an earlier call hangs. `note` is told what is to be said of the domain. One that
    could never be examined is ended where its on-exposed says kill. Raises NoSuchGuest, QemuFailed, OSError.
    """
    pid = audit.pid_of_running(name)
    with audit.held(pid) as pidfd:
        asks = _asks(name)
        if asks is None:
            return
        uuid, on_exposed = asks
        _keep(uuid, name, "its first audit has not come to an end")  # should this process end before
        was_examined = False
        for wait_s in (0.0, _BOOTED_S):
            if audit.ends(pidfd, wait_s):
                return
            report, reason = _tried(pid, pidfd, examine, note)
            if report:
                was_examined = True
                reasons = "".join(f"; {each}" for each in report.reasons)
                note(f"is {report.verdict} while it runs{reasons}")
                continue
            if audit.ends(pidfd, 0):
                return
            _keep(uuid, name, reason)
            if not was_examined and on_exposed == "kill":
                note("was never examined and is ended (on-exposed is kill)")
                audit.end(pidfd)
                return


def _tried(
    pid: int, pidfd: int, examine: Callable[[], IsolationReport], note: Callable[[str], None]
) -> tuple[IsolationReport | None, str]:
    """Examine a domain until that comes to an end; None, and why, where its time is up or it ended."""
    patience_s, pause_s = _PATIENCE_S, _PAUSE_S
    with suppress(OSError):  # it has ended
        patience_s += _PATIENCE_S_PER_GIB * _secret_bytes(pid) / (1 << 30)
    deadline = time.monotonic() + patience_s
    while True:
        # A call of libvirt's library that hangs cannot be broken off; this process ends without it.
        executor = ThreadPoolExecutor(1, "audit")
        future = executor.submit(examine)
        executor.shutdown(wait=False)
        try:
            error = future.exception(max(deadline - time.monotonic(), 0))
        except TimeoutError:
            return None, f"no answer within {patience_s:g} s"
        if error is None:
            return future.result(), ""
        reason = error.message if isinstance(error, VmmbackError) else f"{type(error).__name__}: {error}"
        if isinstance(error, StandsStill):
            deadline = time.monotonic() + patience_s
        left_s = deadline - time.monotonic()
        note(f"could not be examined: {reason}")
        if audit.ends(pidfd, max(min(pause_s, left_s), 0)) or left_s <= pause_s:
            return None, reason
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _secret_bytes(pid: int) -> int:
    return sum(mapping.size for mapping in procfs.maps(pid) if mapping.path == procfs.SECRETMEM)


def _keep(uuid: str, name: str, reason: str) -> None:
    with suppress(OSError, ValueError):  # what follows of it does not wait for a place to write it down
        if uuid:
            audit.record_unexamined(uuid, name, reason)


def _asks(name: str) -> tuple[str, OnExposed] | None:
    """Return UUID and policy of a domain that runs, though libvirt may not answer; None if it does not ask.

    What cannot be read is "", or kill. Its file is named by the domain's name.
    """
    with suppress(OSError, ET.ParseError, ConfigError):
        root = ET.parse(_STATUS / f"{name}.xml").getroot().find("domain")  # noqa: S314 (only root can write there)
        if root is not None:
            policy = domain_xml.policy_of(root)
            return (root.findtext("uuid") or "", policy.on_exposed) if policy else None
    return "", "kill"
