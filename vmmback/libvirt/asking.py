"""Whether a domain of libvirt's asks for secret RAM, and having it ask: what is said of it before it starts."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmmback.errors import ConfigError
from vmmback.libvirt import domain_edit, domain_xml, own_user, qemu_user
from vmmback.libvirt.domain import Domain
from vmmback.libvirt.domain_refusals import refusals, refused
from vmmback.libvirt.domain_xml import OnExposed, Source
from vmmback.libvirt.installed_files import see_wrapper
from vmmback.libvirt.places import LIBEXEC, RECORDS, SECRET, Places, wrapper_of
from vmmback.linux import kvm


class Standing(NamedTuple):
    """A domain, as a list shows it."""

    name: str
    uuid: str
    state: str
    asks: bool
    source: str
    """What backs its RAM, or would: file, memfd, or nothing."""
    against: tuple[str, ...]
    """Places in its XML that speak against secret RAM, were it to ask."""
    verdict: str
    """What the last audit on this host said; nothing if there was none."""
    reasons: tuple[str, ...] = ()
    """Why it is not isolated; "not examined: ..." where the audits of its start came to nothing."""


def enabled(domain: Domain, on_exposed: OnExposed, source: Source | None, places: Places | None) -> str:
    """Return a domain's XML such that it asks for secret RAM. Raises ConfigError, UsageError, HostUnfit.

    `places` are those of the host where it runs, if that is this one: what is there is looked at.
    """
    qemu = _qemu(domain_xml.parse(domain.xml))
    wrapper = wrapper_of(qemu)
    group = qemu_user.of_host(places).group if places else own_user.GROUP
    xml = domain_edit.enabled(domain.xml, wrapper, on_exposed, source, group)
    root = domain_xml.parse(xml)
    if problems := refusals(root, wrapper, _kvm_maps_secret(root, is_here=places is not None)):
        raise refused(root, problems)
    if places:
        see_wrapper(places, qemu)
    return xml


def standing(domain: Domain, places: Places | None) -> Standing:
    """Return what is to be said of a domain, of its RAM and of what speaks against its being secret."""
    # One that runs and was not announced has ordinary memory, whatever an earlier run had.
    is_of_this_run = places and (not domain.is_active or (places.below(SECRET) / domain.uuid).exists())
    verdict, reasons = _last_verdict(places, domain.uuid) if places and is_of_this_run else ("", ())
    asks, source, against = False, "", tuple[str, ...]()
    try:
        root = domain_xml.parse(domain.xml)
        asks = domain_xml.policy_of(root) is not None
        if not asks:
            root = domain_xml.parse(domain_edit.enabled(domain.xml, wrapper_of(_qemu(root)), "kill"))
        found = domain_xml.domain_of(root)
        assert found
        source = found.source or ""
        problems = refusals(root, wrapper_of(found.policy.emulator), _kvm_maps_secret(root, is_here=places is not None))
        against = tuple(problem.place for problem in problems)
    except ConfigError as error:
        asks = asks or domain.may_ask
        against = (error.message.splitlines()[0],)
    return Standing(domain.name, domain.uuid, domain.state, asks, source, against, verdict, reasons)


def needs_us(xml: str) -> bool:
    """Tell whether a domain needs what is installed: it may ask, or its emulator is ours. Raises ConfigError."""
    return domain_xml.mentions(xml) or LIBEXEC in _emulator(domain_xml.parse(xml)).parents


def _qemu(root: ET.Element) -> Path:
    """Return the QEMU of a domain, whether it asks already or not."""
    policy = domain_xml.policy_of(root)
    # One that has none is told so by whoever changes it.
    return policy.emulator if policy else _emulator(root)


def _emulator(root: ET.Element) -> Path:
    return Path((root.findtext("devices/emulator") or "").strip() or "/none")


def _kvm_maps_secret(root: ET.Element, *, is_here: bool) -> bool:
    """Tell whether KVM of the domain's host can map secret RAM; of another host its own hook has to find out."""
    return not is_here or root.get("type") != "kvm" or kvm.can_map_secret_ram().usable


def _last_verdict(places: Places, uuid: str) -> tuple[str, tuple[str, ...]]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads((places.below(RECORDS) / f"{uuid}.json").read_text())
        return str(report["verdict"]), tuple(map(str, report["reasons"]))
    return "", ()
