"""The ground of all tests with libvirt: a libvirtd of a test's own, and an ordinary domain of its."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from integration.libvirtd import Libvirtd


def test_an_ordinary_domain_boots_and_answers(libvirtd: Libvirtd) -> None:
    libvirtd.define(libvirtd.domain_xml("plain"))
    libvirtd.virsh("start", "plain")
    libvirtd.wait_for("plain", "GUEST READY")
    answer = json.loads(libvirtd.virsh("qemu-monitor-command", "plain", '{"execute": "query-status"}'))
    assert answer["return"]["running"]
