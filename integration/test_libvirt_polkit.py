"""Who may export the memory of a domain: a real libvirtd asks a real polkitd, and a user has leave for everything else.

polkitd and its message bus run in libvirtd's namespace. What libvirt's package says of its actions is not installed
with libvirtd's own, so the test says it: nobody but root may do anything, unless a rule allows it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from integration import capabilities

if TYPE_CHECKING:
    from integration.libvirtd import Libvirtd

CONNECT = ("getattr", "read", "write", "search-domains")
DOMAIN = (
    "getattr", "read", "read-secure", "write", "save", "start", "stop", "suspend", "core-dump", "hibernate", "migrate",
    "snapshot", "mem-read", "fs-freeze",
)  # fmt: skip

# A rule of an administrator's, for whom all of libvirt is one user's.
ALLOWED = """polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.libvirt.api.") == 0 && subject.user == "nobody") { return polkit.Result.YES; }
});
"""

CONF = """
access_drivers = [ "polkit" ]
unix_sock_rw_perms = "0777"
"""

EXPORTS = (
    ("dump", "--memory-only", "DOMAIN", "/run/libvirt/exported"),
    ("save", "DOMAIN", "/run/libvirt/exported"),
    ("managedsave", "DOMAIN"),
    ("snapshot-create-as", "DOMAIN", "--memspec", "/run/libvirt/exported"),
    ("migrate", "--live", "--p2p", "DOMAIN", "qemu+unix:///system?socket=/run/none"),
)


def policy() -> str:
    """Return the actions in the form of libvirt's own org.libvirt.api.policy."""
    no = "".join(f"<allow_{who}>no</allow_{who}>" for who in ("any", "inactive", "active"))
    actions = "".join(
        f'<action id="org.libvirt.api.{name}"><description>d</description><message>m</message>'
        f"<defaults>{no}</defaults></action>"
        for name in (*(f"connect.{right}" for right in CONNECT), *(f"domain.{right}" for right in DOMAIN))
    )
    return f"<policyconfig>{actions}</policyconfig>"


def as_nobody(libvirtd: Libvirtd, *arguments: str) -> str:
    """Run a command of virsh as a user without rights; return its error."""
    nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    return libvirtd.run(*nobody, "virsh", "--quiet", "--connect=qemu:///system", *arguments, check=False).stderr


@pytest.fixture
def guarded(libvirtd: Libvirtd) -> Iterator[Libvirtd]:
    """A libvirtd that asks polkit, with a domain on secret RAM and an ordinary one, which run."""
    capabilities.require(capabilities.POLKIT)
    conf = libvirtd.inside / "etc/libvirt/libvirtd.conf"
    before = conf.read_text()
    conf.write_text(before + CONF)
    for folder in ("actions", "dbus"):
        (libvirtd.inside / "run" / folder).mkdir()
    # virt-install asks for far more than these tests are about.
    xml = {name: libvirtd.domain_xml(name, "--memorybacking=source.type=memfd") for name in ("plain", "secret")}
    (libvirtd.inside / "run/actions/org.libvirt.api.policy").write_text(policy())
    libvirtd.run("mount", "--bind", "/run/actions", "/usr/share/polkit-1/actions")
    libvirtd.run(sys.executable, "-m", "vmmback", "libvirt", "install")
    (libvirtd.inside / "etc/polkit-1/rules.d/10-administrator.rules").write_text(ALLOWED)
    bus = libvirtd.start("dbus-daemon", "--system", "--nofork", "--nopidfile", "--nosyslog", "--print-address")
    bus.wait_for("unix:path=/run/dbus/system_bus_socket")
    polkitd = libvirtd.start("/usr/lib/polkit-1/polkitd")
    polkitd.wait_for("Acquired the name org.freedesktop.PolicyKit1")
    (libvirtd.inside / "run/broker.toml").touch()
    broker = libvirtd.start(sys.executable, "-m", "vmmback", "broker", "/run/broker.toml")
    broker.wait_until((libvirtd.inside / "run/vmmback-broker/socket").exists, "the broker listens")
    libvirtd.restart()
    for text in xml.values():
        libvirtd.define(text)
    libvirtd.run(sys.executable, "-m", "vmmback", "libvirt", "enable", "secret")
    for name in xml:
        libvirtd.virsh("start", name)
    yield libvirtd
    for name in libvirtd.virsh("list", "--name").split():
        libvirtd.virsh("destroy", name)
    conf.write_text(before)
    libvirtd.stop()  # it ends with its message bus
    for program in (broker, polkitd, bus):
        program.signal(signal.SIGTERM)
        program.ended()
    libvirtd.begin()


def test_memory_of_a_domain_on_secret_ram_is_exported_by_root_alone(guarded: Libvirtd) -> None:
    for arguments in EXPORTS:
        error = as_nobody(guarded, *(argument.replace("DOMAIN", "secret") for argument in arguments))
        assert "access denied: 'QEMU' denied access" in error, (arguments, error)
    assert not (guarded.inside / "run/libvirt/exported").exists()
    # The same user, the same calls: it is the domain that makes the difference.
    for arguments in EXPORTS:
        error = as_nobody(guarded, *(argument.replace("DOMAIN", "plain") for argument in arguments))
        assert "access denied" not in error, (arguments, error)
    # And of the domain on secret RAM: all that exports nothing.
    assert as_nobody(guarded, "suspend", "secret") == ""
    assert as_nobody(guarded, "dumpxml", "secret") == ""

    guarded.virsh("dump", "--memory-only", "secret", "/run/libvirt/by-root")
    assert (guarded.folder / "sockets/by-root").stat().st_size > 96 << 20


def test_a_peek_is_denied_too(guarded: Libvirtd) -> None:
    program = """if True:
        import libvirt, os, sys
        os.setgid(65534); os.setuid(65534)
        libvirt.registerErrorHandler(lambda *_: None, None)
        connection = libvirt.open("qemu:///system")
        for name in "plain", "secret":
            domain = connection.lookupByName(name)
            try:
                print(name, len(domain.memoryPeek(0x100000, 16, libvirt.VIR_MEMORY_PHYSICAL)))
            except libvirt.libvirtError as error:
                print(name, error.get_error_code() == libvirt.VIR_ERR_ACCESS_DENIED)
    """
    assert guarded.run(sys.executable, "-c", program).stdout.splitlines() == ["plain 16", "secret True"]


def test_what_is_denied_is_allowed_again_when_the_domain_has_ended(guarded: Libvirtd) -> None:
    """libvirt has taken its memory back, and no file is left for polkit's rule."""
    secret = guarded.inside / "run/vmmback-libvirt/secret"
    uuid = guarded.virsh("domuuid", "secret")
    assert [path.name for path in secret.iterdir()] == [uuid]
    guarded.virsh("destroy", "secret")
    assert list(secret.iterdir()) == []
    assert "denied" not in as_nobody(guarded, "dump", "--memory-only", "secret", "/run/libvirt/exported")
    guarded.virsh("start", "secret")
    assert [path.name for path in secret.iterdir()] == [uuid]
    assert "denied" in as_nobody(guarded, "dump", "--memory-only", "secret", "/run/libvirt/exported")


def test_where_polkits_rule_cannot_look_nobody_exports_any_memory(guarded: Libvirtd) -> None:
    def errors() -> list[str]:
        names = ("secret", "plain")
        return [as_nobody(guarded, "dump", "--memory-only", name, "/run/libvirt/exported") for name in names]

    run = guarded.inside / "run/vmmback-libvirt"
    for closed in (run, run / "secret"):
        closed.chmod(0o700)
        said = errors()
        closed.chmod(0o755)
        assert ["access denied" in error for error in said] == [True, True], (closed, said)
    assert ["access denied" in error for error in errors()] == [True, False]
