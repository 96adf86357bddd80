"""`vmmback libvirt audit`: what is measured of a domain of libvirt's."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from vmmback.cli.files import ReportFiles, report_files
from vmmback.cli.output import exit_code_of, finish, print_result, show
from vmmback.cli.signals import stopped

if TYPE_CHECKING:
    from vmmback.libvirt.domain import Libvirt
    from vmmback.report import IsolationReport

# Firmware has run, and has set up the guest's memory map, by then.
_BOOTED_S = 10.0


@click.command(
    epilog="Exit codes: 0 isolated, 2 wrong argument, 3 host cannot do it, 5 exposed, 6 QEMU failed, 7 no such domain, "
    "or it does not run, 8 inconclusive."
)
@click.argument("domain")
@click.option("--connect", "-c", "uri", metavar="URI", help='Which libvirt of this host (default "qemu:///system").')
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document; all else goes to stderr.")
@report_files
@click.option("--started", "when", flag_value="started", help="It has just started: now, and 10 s later (the hook).")
@click.option("--ended", "when", flag_value="ended", help="It has ended; DOMAIN is its UUID (the hook).")
def audit(domain: str, uri: str | None, files: ReportFiles, when: str | None, *, as_json: bool) -> None:
    """Try every vector that is safe on a live guest on the domain DOMAIN, and report what was measured.

    The hook does so when a domain has started, and 10 s later. A domain that turns out to be exposed is ended where its
    on-exposed says so. libvirt marks a domain as tainted whose QEMU it was asked to ask.

    \b
    Example:
      vmmback libvirt audit web1 --json | jq .verdict
    """
    from vmmback.cli.tables import rendered, while_it_runs
    from vmmback.libvirt.audit import observe_end
    from vmmback.libvirt.domain import Libvirt

    if when == "ended":
        observe_end(domain)
        return
    with stopped("before the audit was done"), Libvirt(uri) as connection:
        if when == "started":
            asyncio.run(_started(connection, domain))
            return
        report = asyncio.run(_examined(connection, domain))

    def show_report() -> None:
        print_result(report.as_json() if as_json else rendered(*while_it_runs(report)))

    finish(exit_code_of(report.verdict), show_report, *files.outputs(report))


async def _started(connection: Libvirt, name: str) -> None:
    """Examine a domain twice; what is found is in its log, and kept."""
    from vmmback.libvirt.audit import has_ended

    pid = _pid_of(name)
    for wait_s in (0.0, _BOOTED_S):
        if has_ended(pid, wait_s):
            return
        report = await _examined(connection, name)
        reasons = "".join(f"; {reason}" for reason in report.reasons)
        show(sys.stderr, f"vmmback: domain {name} is {report.verdict} while it runs{reasons}\n")


async def _examined(connection: Libvirt, name: str) -> IsolationReport:
    from vmmback.errors import NoSuchGuest, UsageError
    from vmmback.libvirt import audit, records
    from vmmback.libvirt.domain_xml import parse, policy_of
    from vmmback.report import GuestVerdict

    if not connection.is_here:
        raise UsageError(f"{connection.uri} is another host", "audit its domains there")
    domain = connection.domain(name)
    root = parse(connection.running_xml(name))
    policy = policy_of(root)
    if policy is None:
        raise UsageError(f"domain {domain.name} does not ask for secret RAM", "vmmback libvirt enable DOMAIN")
    pid = _pid_of(domain.name)
    with _held(pid) as pidfd:
        subject = audit.Subject(domain.name, domain.uuid, root.get("type", ""), pid)
        report = await audit.examine(subject, connection.hmp(domain.name))
        if audit.has_ended(pid, 0) or _pid_of(domain.name) != pid:
            raise NoSuchGuest(f"domain {domain.name} ended during the audit", "start it, then audit again")
        records.write(domain.uuid, report)
        if report.verdict is GuestVerdict.EXPOSED and policy.on_exposed == "kill":
            show(sys.stderr, f"vmmback: domain {domain.name} is exposed and is ended (on-exposed is kill)\n")
            audit.end(pidfd)
    return report


@contextmanager
def _held(pid: int) -> Iterator[int]:
    """Hold a descriptor of a process: nobody else is meant by it, whoever gets its pid."""
    from vmmback.errors import NoSuchGuest

    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise NoSuchGuest("the domain has ended", "start it: virsh start DOMAIN") from None
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _pid_of(name: str) -> int:
    from vmmback.errors import NoSuchGuest
    from vmmback.libvirt.domains import pid_of

    if (pid := pid_of(name)) < 0:
        raise NoSuchGuest(f"domain {name} does not run", "start it: virsh start DOMAIN")
    return pid
