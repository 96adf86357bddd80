"""`vmmback libvirt`: domains of libvirt's on secret RAM."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmmback.cli import libvirt_audit
from vmmback.cli.output import print_result, show
from vmmback.errors import HostUnfit, NoSuchGuest, UsageError

if TYPE_CHECKING:
    from vmmback.libvirt.asking import Standing
    from vmmback.libvirt.domain import Domain, Event, Libvirt
    from vmmback.libvirt.domain_xml import OnExposed, Source
    from vmmback.libvirt.places import Places

_CONNECT = click.option(
    "--connect", "-c", "uri", metavar="URI", help='Which libvirt (default $LIBVIRT_DEFAULT_URI, else "qemu:///system").'
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def libvirt() -> None:
    """Domains of libvirt's on secret RAM.

    docs/LIBVIRT.md walks through it: install once, enable a domain, start it as always.

    \b
    Examples:
      vmmback libvirt install
      vmmback libvirt enable web1
      virsh start web1
    """


@libvirt.command(epilog="Exit codes: 0 installed, 2 something is in the way, 3 host cannot do it.")
@click.option(
    "--emulator", "emulators", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
    help="A QEMU that domains may have, besides /usr/bin/qemu-system-*; may be given again.",
)  # fmt: skip
@_JSON
def install(emulators: tuple[Path, ...], *, as_json: bool) -> None:
    """Install the hook, the emulators and the rules that libvirt is to find. Doing it again repairs and updates them.

    \b
    Example:
      vmmback libvirt install
    """
    from vmmback.libvirt import host_checks, installation
    from vmmback.libvirt.places import Places

    _see_root("install")
    places = Places()
    host = host_checks.host(places, emulators)
    steps = host_checks.next_steps(places)
    changed = installation.install(places, host)
    for doubt in host_checks.doubts(host.program):
        show(sys.stderr, f"vmmback: warning: {doubt}\n")
    _print_changes("installed", changed, steps if changed else [], as_json=as_json)


@libvirt.command(epilog="Exit codes: 0 nothing is left, 2 domains need it, 3 libvirt cannot be asked.")
@click.option("--force", is_flag=True, help="Also while domains need it, which then cannot start, and are not guarded.")
@_JSON
def uninstall(*, force: bool, as_json: bool) -> None:
    """Remove all that `install` installed.

    \b
    Example:
      vmmback libvirt uninstall
    """
    from vmmback.libvirt import host_checks, installation
    from vmmback.libvirt.places import Places

    _see_root("uninstall")
    if not force:
        _see_nobody_needs_it()
    places = Places()
    host_checks.stop_units(places, installation.manifest(places).files)
    removed = installation.uninstall(places)
    _print_changes("removed", removed, host_checks.steps_after(places, removed), as_json=as_json)


@libvirt.command(epilog="Exit codes: 0 fine, 2 its XML forbids it, 3 libvirt cannot do it, 7 no such domain.")
@click.argument("domain")
@click.option("--on-exposed", type=click.Choice(["kill", "warn"]), default="kill", show_default=True,
              help="What is to happen when its RAM turns out to be readable.")  # fmt: skip
@click.option(
    "--source", type=click.Choice(["memfd", "file"]), help="What backs its RAM (default: as it is, or memfd)."
)
@click.option("--dry-run", is_flag=True, help="Print what would be different in its XML, and change nothing.")
@_CONNECT
def enable(domain: str, on_exposed: OnExposed, source: Source | None, uri: str | None, *, dry_run: bool) -> None:
    """Have DOMAIN ask for secret RAM from its next start on, or tell all that its XML has against it.

    \b
    Examples:
      vmmback libvirt enable web1 --dry-run
      vmmback libvirt enable web1
    """
    from vmmback.libvirt import asking
    from vmmback.libvirt.domain import Libvirt

    with Libvirt(uri) as connection:
        found = connection.domain(domain)
        xml = asking.enabled(found, on_exposed, source, _places(connection))
        _change(connection, found, xml, "asks for secret RAM", dry_run=dry_run)


@libvirt.command(epilog="Exit codes: 0 fine, 2 its XML is wrong, 3 libvirt cannot do it, 7 no such domain.")
@click.argument("domain")
@click.option("--dry-run", is_flag=True, help="Print what would be different in its XML, and change nothing.")
@_CONNECT
def disable(domain: str, uri: str | None, *, dry_run: bool) -> None:
    """Have DOMAIN no longer ask for secret RAM, from its next start on; its XML is what it was.

    \b
    Example:
      vmmback libvirt disable web1
    """
    from vmmback.libvirt.domain import Libvirt
    from vmmback.libvirt.domain_edit import disabled

    with Libvirt(uri) as connection:
        found = connection.domain(domain)
        _change(connection, found, disabled(found.xml), "does not ask for secret RAM", dry_run=dry_run)


@libvirt.command("list", epilog="Exit codes: 0 fine, 3 libvirt cannot be asked.")
@click.option("--all", "everything", is_flag=True, help="Also domains that do not ask for secret RAM.")
@_JSON
@_CONNECT
def list_(uri: str | None, *, everything: bool, as_json: bool) -> None:
    """Show the domains that ask for secret RAM, and what in their XML forbids it.

    \b
    Example:
      vmmback libvirt list --all --json | jq '.[] | select(.against == [])'
    """
    from vmmback.libvirt import asking
    from vmmback.libvirt.domain import Libvirt

    with Libvirt(uri) as connection:
        places = _places(connection)
        domains = connection.domains()
        found = [asking.standing(domain, places) for domain in domains if everything or domain.may_ask]
    rows = [standing for standing in found if everything or standing.asks]
    print_result(json.dumps([row._asdict() for row in rows], indent=2) + "\n" if as_json else _table(rows))


@libvirt.command(epilog="Exit codes: 130 ended by Ctrl-C, 3 libvirt cannot be asked, or ended.")
@click.option("--all", "everything", is_flag=True, help="Also domains that do not ask for secret RAM.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document on each line.")
@_CONNECT
def watch(uri: str | None, *, everything: bool, as_json: bool) -> None:
    """Show what happens to domains that ask for secret RAM, as libvirt and their QEMUs tell it, until Ctrl-C.

    \b
    Example:
      vmmback libvirt watch --json
    """
    from vmmback.cli.signals import stopped
    from vmmback.libvirt.domain import Libvirt

    def tell(event: Event) -> None:
        print_result(json.dumps(event._asdict()) + "\n" if as_json else _line(event))

    with stopped("while it watched"), Libvirt(uri) as connection:
        show(sys.stderr, f"vmmback: watching {connection.uri} until Ctrl-C\n")
        connection.watch(tell, everything=everything)


libvirt.add_command(libvirt_audit.audit)


def _see_root(command: str) -> None:
    if os.geteuid() != 0:
        raise HostUnfit("libvirt's folders are root's", f"run it as root: sudo vmmback libvirt {command}")


def _see_nobody_needs_it() -> None:
    from vmmback.libvirt import asking
    from vmmback.libvirt.domain import Libvirt

    with Libvirt("qemu:///system") as connection:
        domains = connection.domains()
        defined = [domain.name for domain in domains if asking.needs_us(domain.xml)]
        running = [domain.name for domain in domains if domain.is_active and _runs_on_ours(connection, domain)]
    problems = []
    if running:
        problems.append(f"these domains run on secret RAM, and polkit's rule would be gone: {', '.join(running)}")
    if defined:
        problems.append(f"these domains ask for secret RAM, and could not start any more: {', '.join(defined)}")
    if problems:
        raise UsageError(
            "\n".join(problems),
            "shut down those that run; vmmback libvirt disable each, or correct its <emulator> by virsh edit where "
            "nothing else is left of it; or uninstall with --force",
        )


def _runs_on_ours(connection: Libvirt, domain: Domain) -> bool:
    from vmmback.libvirt import asking

    with suppress(NoSuchGuest):  # it ended meanwhile
        return asking.needs_us(connection.running_xml(domain.uuid))
    return False


def _places(connection: Libvirt) -> Places | None:
    """Return the places of the host whose domains these are, None if that is another one."""
    from vmmback.libvirt.places import Places

    return Places() if connection.is_here else None


def _change(connection: Libvirt, domain: Domain, xml: str, what: str, *, dry_run: bool) -> None:
    from vmmback.libvirt.domain_edit import difference

    if dry_run:
        print_result(difference(domain.xml, xml, domain.name))
        return
    if xml == domain.xml:
        show(sys.stderr, f"vmmback: domain {domain.name} is as it is to be\n")
        return
    connection.define(domain, xml)
    show(sys.stderr, f"vmmback: domain {domain.name} {what} from its next start on\n")
    if domain.is_active:
        show(sys.stderr, "vmmback: hint: it runs as it was; shut it down and start it (a reboot starts no new QEMU)\n")


def _print_changes(what: str, changed: list[Path], steps: list[str], *, as_json: bool) -> None:
    if as_json:
        print_result(json.dumps({what: [str(path) for path in changed], "next": steps}, indent=2) + "\n")
        return
    lines = [f"{what} {path}\n" for path in changed] or ["nothing to do\n"]
    print_result("".join([*lines, *(f"next: {step}\n" for step in steps)]))


def _table(rows: list[Standing]) -> str:
    from vmmback.cli.tables import plain_table, rendered

    table = plain_table("domain", "state", "asks", "source", "against it", "last verdict")
    for row in rows:
        table.add_row(
            row.name, row.state, "yes" if row.asks else "no", row.source or "-", ", ".join(row.against) or "-",
            ": ".join([row.verdict, *row.reasons[:1]]) or "-",
        )  # fmt: skip
    return rendered(table)


def _line(event: Event) -> str:
    from vmmback.render.text import visible

    when = time.strftime("%H:%M:%S", time.localtime(event.seconds or None))
    return f"{when} {visible(event.domain)}: {event.source}: {event.event} {visible(event.detail)}".rstrip() + "\n"
