"""`vmmback libvirt`: arguments, output and exit codes. Domains are made up; integration/ has real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import pytest
from click.testing import CliRunner, Result

from vmmback.cli.libvirt import libvirt
from vmmback.errors import ConfigError, HostUnfit, NoSuchGuest, UsageError
from vmmback.libvirt import asking, domain, host_checks, installation, installed_files, qemu_user
from vmmback.libvirt.domain import Domain, Event
from vmmback.libvirt.places import Places, wrapper_of
from vmmback.libvirt.qemu_user import QemuUser

QEMU = Path("/usr/bin/qemu-system-x86_64")
UUID = "0d7e5a4f-8a1c-4b1e-9b0e-6a1f7e5d3c2b"
PLAIN = f"""<domain type='qemu'>
  <name>NAME</name>
  <uuid>{UUID}</uuid>
  <memory unit='KiB'>98304</memory>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
  </os>
  <devices>
    <emulator>{QEMU}</emulator>
  </devices>
</domain>
"""

WRAPPED = PLAIN.replace(str(QEMU), str(wrapper_of(QEMU)))


def made_up(name: str, xml: str = PLAIN, *, active: bool = False) -> Domain:
    state = "running" if active else "shut off"
    return Domain(name, UUID, state, active, True, False, xml.replace("NAME", name))


def asks(name: str, xml: str = PLAIN) -> Domain:
    places = None
    return made_up(name)._replace(xml=asking.enabled(made_up(name, xml), "kill", None, places))


class Libvirt:
    """In place of a connection: domains that are made up, and what was done to them."""

    known: tuple[Domain, ...] = ()
    running: Mapping[str, str] = {}
    told: tuple[Event, ...] = ()
    uri = "qemu:///system"
    is_here = False

    def __init__(self, uri: str | None) -> None:
        self.defined: list[tuple[str, str]] = []
        made.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def domains(self) -> list[Domain]:
        return list(self.known)

    def domain(self, name: str) -> Domain:
        for known in self.known:
            if known.name == name:
                return known
        raise NoSuchGuest(f"libvirt has no domain {name}")

    def running_xml(self, name: str) -> str:
        if name not in self.running:
            raise NoSuchGuest(f"libvirt has no domain {name}")
        return self.running[name]

    def define(self, of: Domain, xml: str) -> None:
        self.defined.append((of.name, xml))

    def watch(self, tell: Callable[[Event], None], *, everything: bool) -> None:
        for event in self.told:
            tell(event)
        raise HostUnfit("it ended")


made: list[Libvirt] = []


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    made.clear()
    monkeypatch.setattr(domain, "Libvirt", Libvirt)

    def know(*domains: Domain, here: bool = False) -> None:
        monkeypatch.setattr(Libvirt, "known", domains)
        monkeypatch.setattr(Libvirt, "is_here", here)

    return know


def run(*arguments: str) -> Result:
    return CliRunner().invoke(libvirt, arguments)


def test_enable_defines_what_its_dry_run_shows(known: Callable[..., None]) -> None:
    known(made_up("web1"))
    dry = run("enable", "web1", "--dry-run", "--on-exposed", "warn", "--source", "file")
    assert dry.exit_code == 0
    assert dry.stdout.startswith("--- web1 before\n+++ web1 after\n@@ ")
    assert "+    <emulator>/usr/local/libexec/vmmback/qemu-system-x86_64</emulator>" in dry.stdout
    assert made[-1].defined == []
    done = run("enable", "web1", "--on-exposed", "warn", "--source", "file")
    ((name, xml),) = made[-1].defined
    assert (name, done.stdout) == ("web1", "")
    assert done.stderr == "vmmback: domain web1 asks for secret RAM from its next start on\n"
    added = [line[1:] for line in dry.stdout.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert set(added) <= set(xml.splitlines())
    assert 'on-exposed="warn"' in xml
    assert "<source type='file'/>" in xml


def test_one_that_runs_is_told_to_start_anew(known: Callable[..., None]) -> None:
    known(made_up("web1", active=True))
    assert "shut it down and start it" in run("enable", "web1").stderr


def test_all_that_forbids_it_is_told(known: Callable[..., None]) -> None:
    xml = PLAIN.replace("</emulator>", "</emulator><tpm/><shmem name='x'/>")
    known(made_up("web1", xml))
    error = run("enable", "web1", "--dry-run").exception
    assert isinstance(error, ConfigError)
    assert "devices/tpm[0]" in error.message
    assert "devices/shmem[0]" in error.message
    assert made[-1].defined == []


@pytest.mark.parametrize("said", ["none", "another"])
def test_on_this_host_the_wrapper_must_be_there(
    known: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    known(made_up("web1"), here=True)
    monkeypatch.setattr("vmmback.cli.libvirt._places", lambda _: Places(tmp_path))
    wrapper = tmp_path / str(wrapper_of(QEMU))[1:]
    wrapper.parent.mkdir(parents=True)
    (tmp_path / "etc/libvirt").mkdir(parents=True)
    (tmp_path / "etc/libvirt/qemu.conf").write_text('user = "root"\n')
    if said == "another":
        wrapper.write_text(installed_files.wrapper(Path("/opt/bin/qemu-system-x86_64")))
    error = run("enable", "web1").exception
    assert isinstance(error, UsageError)
    assert error.hint == f"run vmmback libvirt install --emulator {QEMU}"
    wrapper.write_text(installed_files.wrapper(QEMU))
    assert run("enable", "web1").exception is None


def test_an_emulator_that_no_wrapper_can_be_made_for_is_not_to_be_installed(
    known: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known(made_up("web1", PLAIN.replace(str(QEMU), "/usr/bin/kvm")), here=True)
    monkeypatch.setattr("vmmback.cli.libvirt._places", lambda _: Places(tmp_path))
    monkeypatch.setattr(qemu_user, "of_host", lambda _: QemuUser(1, 1))
    error = run("enable", "web1").exception
    assert isinstance(error, UsageError)
    assert "the domain's QEMU is /usr/bin/kvm" in error.message
    assert error.hint == "have <emulator> name a program qemu…, such as /usr/bin/qemu-system-x86_64 (virsh edit)"


def test_disable_puts_all_back(known: Callable[..., None]) -> None:
    plain = PLAIN.replace("<memory", "<description>not on secret-ram</description><memory")
    known(asks("web1", plain))
    assert "-    <emulator>/usr/local" in run("disable", "web1", "--dry-run").stdout
    assert run("disable", "web1").stderr.startswith("vmmback: domain web1 does not ask for secret RAM")
    assert made[-1].defined == [("web1", made_up("web1", plain).xml)]
    known(made_up("web1"))
    assert run("disable", "web1").stderr == "vmmback: domain web1 is as it is to be\n"
    assert made[-1].defined == []


def test_the_list_has_who_asks_or_all(known: Callable[..., None]) -> None:
    malformed = made_up(
        "odd", PLAIN.replace("<os>", '<metadata><v:x xmlns:v="urn:vmmback:domain:1.0"/></metadata><os>')
    )
    known(asks("web1"), made_up("web2", PLAIN.replace("</emulator>", "</emulator><tpm/>")), malformed)
    rows = json.loads(run("list", "--json", "--all").stdout)
    assert [(row["name"], row["asks"], row["source"]) for row in rows] == [
        ("web1", True, "memfd"), ("web2", False, "memfd"), ("odd", True, ""),
    ]  # fmt: skip
    assert [row["against"][:1] for row in rows[:2]] == [[], ["devices/tpm[0]"]]
    assert "unknown element" in rows[2]["against"][0]
    assert [row["name"] for row in json.loads(run("list", "--json").stdout)] == ["web1", "odd"]
    table = run("list").stdout
    assert "web1" in table
    assert "web2" not in table


def test_the_list_has_the_last_verdict_of_this_host(
    known: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known(asks("web1"), here=True)
    monkeypatch.setattr("vmmback.cli.libvirt._places", lambda _: Places(tmp_path))
    record = tmp_path / "run/vmmback-libvirt/records" / f"{UUID}.json"
    record.parent.mkdir(parents=True)
    assert json.loads(run("list", "--json").stdout)[0]["verdict"] == ""
    record.write_text('{"verdict": "inconclusive", "reasons": ["not examined: busy", "another"]}')
    (row,) = json.loads(run("list", "--json").stdout)
    assert (row["verdict"], row["reasons"]) == ("inconclusive", ["not examined: busy", "another"])
    assert "not examined:" in run("list").stdout


def test_events_are_a_line_each(known: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    known()
    stopped = Event("a\x1b", UUID, "stopped", "crashed", "libvirt", 0.0)
    monkeypatch.setattr(Libvirt, "told", (stopped, Event("a", UUID, "RESUME", "", "qemu", 1.5)))
    lines = run("watch").stdout.splitlines()
    assert lines[0].endswith(r" a\x1b: libvirt: stopped crashed")
    assert lines[1].endswith(" a: qemu: RESUME")
    document = json.loads(run("watch", "--json").stdout.splitlines()[0])
    assert document == {"domain": "a\x1b", "uuid": UUID, "event": "stopped", "detail": "crashed", "source": "libvirt",
                        "seconds": 0.0}  # fmt: skip


def test_uninstall_keeps_what_domains_need(known: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    known(asks("web1"), made_up("web2"))
    removed: list[Places] = []

    def uninstall(places: Places) -> list[Path]:
        removed.append(places)
        return [places.hook]

    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(installation, "uninstall", uninstall)
    monkeypatch.setattr(host_checks, "stop_units", lambda *_: None)
    error = run("uninstall").exception
    assert isinstance(error, UsageError)
    assert error.message.endswith("could not start any more: web1")
    assert removed == []
    assert run("uninstall", "--force").stdout == "removed /etc/libvirt/hooks/qemu.d/50-vmmback\n"
    assert len(removed) == 1


@pytest.mark.parametrize(
    ("active", "runs", "said"),
    [
        (True, asks("web1").xml, "run on secret RAM"),  # disabled since
        (True, WRAPPED, "run on secret RAM"),
        (True, PLAIN, None),
        (True, None, None),  # it has ended meanwhile
        (False, None, None),
    ],
)
def test_uninstall_keeps_what_a_domain_that_runs_needs(
    known: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    active: bool,
    runs: str | None,
    said: str | None,
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("vmmback.libvirt.places.Places", lambda: Places(tmp_path))
    monkeypatch.setattr(Libvirt, "running", {UUID: runs} if runs else {})
    known(made_up("web1", active=active))
    error = run("uninstall").exception
    if said is None:
        assert error is None
    else:
        assert isinstance(error, UsageError)
        assert said in error.message
        assert run("uninstall", "--force").exception is None


def test_uninstall_keeps_the_emulator_of_a_domain_that_lost_its_metadata(
    known: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    known(made_up("web1", WRAPPED))
    error = run("uninstall").exception
    assert isinstance(error, UsageError)
    assert error.message.endswith("could not start any more: web1")


def test_a_broken_manifest_leaves_the_broker_running(
    known: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known()
    places = Places(tmp_path)
    unit = places.units / "vmmback-broker.socket"
    for path, text in ((places.manifest, "{"), (unit, ""), (places.below("/run/systemd/system/x"), "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("vmmback.libvirt.places.Places", lambda: places)
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: calls.append(argv))
    error = run("uninstall").exception
    assert isinstance(error, UsageError)
    assert "is not as it was written" in error.message
    assert calls == []
    # One that is fine, and names the unit.
    manifest = {"files": [f"/{unit.relative_to(tmp_path)}"], "blocks": [], "made": []}
    places.manifest.write_text(json.dumps(manifest))
    assert json.loads(run("uninstall", "--json").stdout)["next"] == ["systemctl daemon-reload"]
    assert calls == [["systemctl", "disable", "--now", "vmmback-broker.socket"]]


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_libvirts_folders_are_for_root_to_write(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    error = run(command).exception
    assert isinstance(error, HostUnfit)
    assert error.hint == f"run it as root: sudo vmmback libvirt {command}"


def test_a_missing_binding_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    error = run("list").exception
    assert isinstance(error, HostUnfit)
    assert "pip install 'vmmback[libvirt]'" in error.hint
