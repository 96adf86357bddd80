"""`vmmback libvirt audit`: what is measured of a domain of libvirt's."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import click

from vmmback.cli.files import ReportFiles, report_files
from vmmback.cli.output import exit_code_of, finish, print_result, show
from vmmback.cli.signals import stopped

if TYPE_CHECKING:
    from vmmback.libvirt.domain import Libvirt
    from vmmback.report import IsolationReport


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
    on-exposed says so, and so is one that the hook's audits could never examine. libvirt marks a domain as tainted
    whose QEMU it was asked to ask.

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
    with stopped("before the audit was done"):
        if when == "started":
            _started(uri, domain)
            return
        with Libvirt(uri) as connection:
            report = asyncio.run(_examined(connection, domain))

    def show_report() -> None:
        print_result(report.as_json() if as_json else rendered(*while_it_runs(report)))

    finish(exit_code_of(report.verdict), show_report, *files.outputs(report))


def _started(uri: str | None, name: str) -> None:
    """Have a domain examined that has just started; what is to be said of it goes to its log."""
    from vmmback.errors import VmmbackError
    from vmmback.libvirt.domain import Libvirt
    from vmmback.libvirt.started_audit import StandsStill, audit_started

    def examine() -> IsolationReport:
        with Libvirt(uri) as connection:
            try:
                return asyncio.run(_examined(connection, name))
            except VmmbackError as error:
                # It migrates in, say: libvirt lets nobody ask its monitor meanwhile (qemuMigrationJobStart).
                if connection.domain(name).state == "paused":
                    raise StandsStill(error.message, error.hint) from error
                raise

    def note(said: str) -> None:
        show(sys.stderr, f"vmmback: domain {name} {said}\n")

    audit_started(name, examine, note)


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
    pid = audit.pid_of_running(domain.name)
    with audit.held(pid) as pidfd:
        subject = audit.Subject(domain.name, domain.uuid, root.get("type", ""), pid)
        report = await audit.examine(subject, connection.hmp(domain.name))
        if audit.ends(pidfd, 0) or audit.pid_of_running(domain.name) != pid:
            raise NoSuchGuest(f"domain {domain.name} ended during the audit", "start it, then audit again")
        try:
            records.write(domain.uuid, report)
        finally:
            if report.verdict is GuestVerdict.EXPOSED and policy.on_exposed == "kill":
                show(sys.stderr, f"vmmback: domain {domain.name} is exposed and is ended (on-exposed is kill)\n")
                audit.end(pidfd)
    return report
