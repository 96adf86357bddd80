"""The hook and the wrapper, as sh runs them, with programs of the test's own in place of Python, vmmback and QEMU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from vmmback.libvirt import installed_files

UUID = "0d7e5a4f-8a1c-4b1e-9b0e-6a1f7e5d3c2b"
XML = f"""<domain type='qemu' id='1'>
  <name>a name; $(reboot) 'quoted'</name>
  <uuid>{UUID}</uuid>
  <metadata>
    <a:b xmlns:a="https://example.org">\\n \\\\ %s &amp;</a:b>
    METADATA
  </metadata>
</domain>
"""
ASKS = XML.replace("METADATA", '<vmmback:secret-ram xmlns:vmmback="urn:vmmback:domain:1.0" emulator="/q"/>')
PLAIN = XML.replace("METADATA", "")

# Writes down its arguments and its input, byte for byte, and ends as it is told to.
RECORDER = f"""#!{sys.executable} -IS
import json, os, pathlib, sys
here = pathlib.Path(sys.argv[0])
text = "" if os.isatty(0) or here.name == "setpriv" else sys.stdin.read()
calls = pathlib.Path("@FOLDER@", here.name + ".calls")
with calls.open("a") as file:
    file.write(json.dumps([sys.argv[1:], text]) + "\\n")
if here.name == "setpriv":
    os.execv(sys.argv[4], sys.argv[4:])
print("a word of " + here.name, file=sys.stderr)
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""


class Scripts(NamedTuple):
    folder: Path

    def render(self, name: str) -> Path:
        values = {"LIBEXEC": str(self.folder), "PYTHON": str(self.folder / "python"), "QEMU": str(self.folder / "real")}
        values |= {"SECRET": str(self.folder / "run/secret"), "VMMBACK": f"'{self.folder}/vmm back' -m vmmback"}
        path = self.folder / ("50-vmmback" if name == "hook" else "qemu-system-x86_64")
        path.write_text(installed_files.filled(name, **values))
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[tuple[list[str], str]]:
        record = self.folder / f"{name}.calls"
        lines = record.read_text().splitlines() if record.exists() else []
        return [(argv, text) for argv, text in map(json.loads, lines)]

    def hook(self, *arguments: str, xml: str = ASKS, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.render("hook"), *arguments], input=xml, capture_output=True, text=True, timeout=30, check=False,
            env={"PATH": os.environ["PATH"], **environment},
        )  # fmt: skip


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    for name in ("python", "vmm back", "real", "setpriv"):
        (tmp_path / name).write_text(RECORDER.replace("@FOLDER@", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    return Scripts(tmp_path)


@pytest.mark.parametrize("operation", ["prepare", "release"])
def test_a_domain_that_asks_is_handed_on_with_its_xml(scripts: Scripts, operation: str) -> None:
    phase = "begin" if operation == "prepare" else "end"
    done = scripts.hook("a 'name'", operation, phase, "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "a word of python\n")
    expected = ["-I", "-S", f"{scripts.folder}/hook.py", operation, "a 'name'"]
    assert scripts.calls("python") == [(expected, ASKS)]


def test_a_refusal_is_passed_on(scripts: Scripts) -> None:
    done = scripts.hook("name", "prepare", "begin", "-", ENDS_WITH="4")
    assert (done.returncode, done.stdout, done.stderr) == (4, "", "a word of python\n")


def test_a_domain_that_does_not_ask_is_left_alone(scripts: Scripts) -> None:
    for operation in ("prepare begin", "start begin", "started begin", "stopped end", "release end"):
        done = scripts.hook("name", *operation.split(), "-", xml=PLAIN)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert scripts.calls("python") == scripts.calls("vmm back") == []
    assert not (scripts.folder / "run").exists()


@pytest.mark.parametrize(
    "operation",
    [
        "start begin",
        "stopped end",
        "reconnect begin",
        "attach begin",
        "migrate begin",
        "restore begin",
        "prepare end",
        "",
    ],
)
def test_all_other_steps_are_nothing_to_it(scripts: Scripts, operation: str) -> None:
    done = scripts.hook("name", *operation.split(), "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert scripts.calls("python") == scripts.calls("vmm back") == []


@pytest.mark.parametrize(
    ("step", "argued"),
    [("started begin", ["--started", "--", "-a name"]), ("release end", ["--ended", "--", UUID])],
)
def test_an_audit_is_started_apart(scripts: Scripts, step: str, argued: list[str]) -> None:
    """It asks libvirt, which waits for the hook: the hook does not wait for it, and it holds nothing of the hook's."""
    slow = scripts.folder / "vmm back"
    slow.write_text(slow.read_text().replace("print(", "import time; time.sleep(0.5); print(", 1))
    began = time.monotonic()
    done = scripts.hook("-a name", *step.split(), "-")  # its pipes are closed: run() has seen their end
    assert (done.returncode, done.stdout) == (0, "")
    took = time.monotonic() - began
    deadline = time.monotonic() + 20
    while not scripts.calls("vmm back"):
        assert time.monotonic() < deadline, "no audit was started"
        time.sleep(0.01)
    assert took < 0.5
    assert scripts.calls("vmm back") == [(["-m", "vmmback", "libvirt", "audit", *argued], "")]


def test_polkits_rule_is_told_which_domains_have_secret_ram(scripts: Scripts) -> None:
    mark = scripts.folder / "run/secret" / UUID
    scripts.hook("name", "prepare", "begin", "-", ENDS_WITH="4")
    assert mark.exists()  # libvirt calls release also where prepare failed
    scripts.hook("name", "stopped", "end", "-")
    assert mark.exists()
    scripts.hook("name", "release", "end", "-")
    assert list(mark.parent.iterdir()) == []


def test_a_domain_whose_uuid_is_none_does_not_start(scripts: Scripts) -> None:
    done = scripts.hook("name", "prepare", "begin", "-", xml=ASKS.replace(UUID, "../../../etc/passwd"))
    assert (done.returncode, done.stderr) == (2, "vmmback: error: domain name has no UUID\n")
    assert scripts.calls("python") == []


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_wrapper_shows_that_its_qemu_is_another_one(scripts: Scripts, seconds: int) -> None:
    """Also an upgrade whose files are older than the wrapper: packages keep the times of their build."""
    wrapper, qemu = scripts.render("emulator"), scripts.folder / "real"
    now = wrapper.stat().st_mtime
    os.utime(qemu, (now + seconds, now + seconds))
    scripts.hook("name", "prepare", "begin", "-")
    assert wrapper.stat().st_mtime_ns == qemu.stat().st_mtime_ns
    unchanged = wrapper.stat().st_ctime_ns
    scripts.hook("name", "prepare", "begin", "-")
    assert wrapper.stat().st_ctime_ns == unchanged


RAM = '{"qom-type":"memory-backend-memfd","id":"pc.ram","size":100663296}'
ODD = [
    "",
    " ",
    "a b",
    "it's",
    'a "quoted" word',
    "two\nlines\n",
    "*",
    "$(false) `false` $HOME",
    "\\n",
    "-",
    "--",
    "\t\x01é",
]


def argv_of(script: Path, arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([script, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)


def test_a_qemu_without_ram_is_executed_at_once(scripts: Scripts) -> None:
    script = scripts.render("emulator")
    assert argv_of(script, ["-machine", "none", *ODD]).returncode == 0
    assert argv_of(script, []).returncode == 0
    assert [argv for argv, _ in scripts.calls("real")] == [["-machine", "none", *ODD], []]
    assert scripts.calls("python") == []


def test_a_qemu_with_ram_is_left_to_our_program_with_its_arguments_as_they_are(scripts: Scripts) -> None:
    argv_of(scripts.render("emulator"), ["-object", RAM, *ODD])
    start = ["-I", "-S", f"{scripts.folder}/emulator.py", f"{scripts.folder}/real"]
    assert [argv for argv, _ in scripts.calls("python")] == [[*start, "-object", RAM, *ODD]]
    assert scripts.calls("real") == []


def test_the_launcher_comes_before(scripts: Scripts) -> None:
    argv_of(scripts.render("emulator"), ["-object", RAM, *ODD])
    start = ["--inh-caps=+ipc_lock", "--ambient-caps=+ipc_lock", "--", f"{scripts.folder}/python"]
    start += ["-I", "-S", f"{scripts.folder}/emulator.py", f"{scripts.folder}/real"]
    assert [argv for argv, _ in scripts.calls("setpriv")] == [[*start, "-object", RAM, *ODD]]


def test_without_the_launcher_there_is_no_qemu(scripts: Scripts) -> None:
    (scripts.folder / "setpriv").unlink()
    assert argv_of(scripts.render("emulator"), ["-object", RAM]).returncode == 127
    assert scripts.calls("python") == scripts.calls("real") == []


def test_the_wrapper_ends_as_what_it_executes(scripts: Scripts) -> None:
    script = scripts.render("emulator")
    os.environ["ENDS_WITH"] = "3"
    try:
        assert argv_of(script, ["-object", RAM]).returncode == 3
        assert argv_of(script, ["-version"]).returncode == 3
    finally:
        del os.environ["ENDS_WITH"]
