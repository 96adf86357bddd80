"""The hook, the wrapper and what claims a domain's RAM, as libvirt runs them, with a made-up broker and QEMU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmmback.libvirt import installed_files
from vmmback.libvirt.places import PERL
from vmmback.linux import procfs, seccomp

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
text = "" if os.isatty(0) else sys.stdin.read()
calls = pathlib.Path("@FOLDER@", here.name + ".calls")
with calls.open("a") as file:
    file.write(json.dumps([sys.argv[1:], text]) + "\\n")
print("a word of " + here.name, file=sys.stderr)
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""
OK: dict[str, Any] = {"parameters": {}}
IPC_LOCK = 1 << 14
NEEDS_IPC_LOCK = pytest.mark.skipif(
    not int(procfs.status(os.getpid())["CapPrm"], 16) & IPC_LOCK, reason="needs CAP_IPC_LOCK"
)


def refusal(message: str, hint: str = "do it", exit_code: int = 4) -> dict[str, Any]:
    return {
        "error": "org.vmmback.Broker.Refused",
        "parameters": {"message": message, "hint": hint, "exit_code": exit_code},
    }


class FakeBroker:
    """Answers each call with `answer`, and what comes after a claim with `answer_at_channel`; knows what was said."""

    def __init__(self, path: Path) -> None:
        self.calls = list[tuple[str, dict[str, Any]]]()
        self.answer: object = OK
        self.answer_at_channel: object = OK
        self.filter = seccomp.program(memfds=True)
        self.listeners = list[str]()
        """What the descriptors are that came over a channel."""
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                if self._heard(connection) is None:
                    continue
                if self.calls[-1][0] != "org.vmmback.Domains.Claim" or self.answer is not OK:
                    self._say(connection, self.answer)
                    continue
                ours, theirs = socket.socketpair()
                answer = {"parameters": {"channel": 0, "filter": self.filter.hex()}}
                with ours:
                    with theirs:
                        socket.send_fds(connection, [json.dumps(answer).encode() + b"\0"], [theirs.fileno()])
                    listeners = self._heard(ours) or []
                    for listener in listeners:
                        self.listeners.append(str(Path(f"/proc/self/fd/{listener}").readlink()))
                    self._say(ours, self.answer_at_channel)
                    connection.recv(1)  # until it has executed QEMU, or ended: a listener that is closed is no answer
                    for listener in listeners:
                        os.close(listener)

    def _heard(self, connection: socket.socket) -> list[int] | None:
        """Return the descriptors that came with a call, None if there came none."""
        data, descriptors = b"", list[int]()
        while not data.endswith(b"\0"):
            more, passed, _, _ = socket.recv_fds(connection, 1000, 4)
            if not more:
                break
            data, descriptors = data + more, descriptors + passed
        if not data:
            return None
        call = json.loads(data[:-1])
        self.calls.append((call["method"], call["parameters"]))
        return descriptors

    def _say(self, connection: socket.socket, what: object) -> None:
        if what is None:
            return
        with suppress(BrokenPipeError):  # who called has ended
            connection.sendall(what if isinstance(what, bytes) else json.dumps(what).encode() + b"\0")


class Scripts:
    """All of them, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = FakeBroker(folder / "socket")

    def render(self, name: str) -> Path:
        values = {"LIBEXEC": str(self.folder), "QEMU": str(self.folder / "real"), "SOCKET": str(self.folder / "socket")}
        values |= {"RUN": str(self.folder / "run"), "SECRET": str(self.folder / "run/secret")}
        values |= {"VMMBACK": f"'{self.folder}/vmm back' -m vmmback"}
        names = {"hook": "50-vmmback", "emulator": "qemu-system-x86_64"}
        for each in ("announce", "broker_call", name):
            path = self.folder / names.get(each, each)
            path.write_text(installed_files.filled(each, **values))
            path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[tuple[list[str], str]]:
        record = self.folder / f"{name}.calls"
        lines = record.read_text().splitlines() if record.exists() else []
        return [(argv, text) for argv, text in map(json.loads, lines)]

    def hook(self, *arguments: str, xml: str = ASKS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.render("hook"), *arguments], input=xml, capture_output=True, text=True, timeout=30, check=False,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )  # fmt: skip

    def emulator(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.render("emulator"), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
            check=False, env={"PATH": os.environ["PATH"], "LC_ALL": "C", **environment},
        )  # fmt: skip


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    for name in ("vmm back", "real"):
        (tmp_path / name).write_text(RECORDER.replace("@FOLDER@", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "perl").symlink_to(PERL)  # without a capability of its own: root has it anyway
    made = Scripts(tmp_path)
    yield made
    made.broker.close()


def test_a_domain_that_asks_is_announced_with_its_xml(scripts: Scripts) -> None:
    done = scripts.hook("a 'name'", "prepare", "begin", "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert scripts.broker.calls == [("org.vmmback.Domains.Announce", {"xml": ASKS})]


def test_a_domain_that_has_ended_is_withdrawn_and_nothing_is_said_if_it_cannot_be(scripts: Scripts) -> None:
    assert scripts.hook("a 'na\\me", "release", "end", "-").returncode == 0
    assert scripts.broker.calls == [("org.vmmback.Domains.Withdraw", {"name": "a 'na\\me"})]
    scripts.broker.answer = refusal("no")
    done = scripts.hook("name", "release", "end", "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@given(xml=st.text(st.characters(exclude_categories=["Cs"])), name=st.text("ab'\"\\é\t😀", min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_the_broker_gets_all_text_as_it_is(scripts: Scripts, xml: str, name: str) -> None:
    scripts.broker.calls.clear()
    xml = ASKS.replace("%s", xml.replace("\r", ""))  # (a text of Python's own making has other ends of lines)
    assert scripts.hook(name, "prepare", "begin", "-", xml=xml).returncode == 0
    assert scripts.hook(name, "release", "end", "-", xml=xml).returncode == 0
    assert [told for _, told in scripts.broker.calls] == [{"xml": xml}, {"name": name}]


@pytest.mark.parametrize(
    "message", ['no "room" \\ here\n\tat all', "für 😀", "a\\nb", 'x" }'], ids=["quotes", "unicode", "escapes", "end"]
)
def test_a_refusal_is_told_as_it_is(scripts: Scripts, message: str) -> None:
    scripts.broker.answer = refusal(message)
    done = scripts.hook("name", "prepare", "begin", "-")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == f"vmmback: error: {message}\n  do it\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "the broker hung up"),
        (b'{"param', "the broker hung up"),
        ({"error": "org.varlink.service.MethodNotFound", "parameters": {"method": "x"}}, "knows no org.vmmback"),
    ],
)
def test_what_is_no_answer_is_an_error(scripts: Scripts, answer: object, said: str) -> None:
    scripts.broker.answer = answer
    done = scripts.hook("name", "prepare", "begin", "-")
    assert (done.returncode, done.stdout) == (3, "")
    assert said in done.stderr


def test_a_broker_that_takes_no_more_calls_is_said_to_be_stopped(scripts: Scripts) -> None:
    hook, broker_call = scripts.render("hook"), scripts.folder / "broker_call"
    broker_call.write_text(broker_call.read_text().replace("pack 'q2', 10,", "pack 'q2', 1,"))
    path = scripts.folder / "socket"
    path.unlink()
    with ExitStack() as stack:
        stopped, waiting = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        stopped.bind(str(path))
        stopped.listen(0)
        waiting.connect(str(path))
        done = subprocess.run(
            [hook, "name", "prepare", "begin", "-"], input=ASKS, capture_output=True, text=True, timeout=30, check=False
        )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith("Resource temporarily unavailable\n  look whether it is stopped\n")


def test_a_broker_that_is_silent_is_not_waited_for_for_ever(scripts: Scripts) -> None:
    hook, announce = scripts.render("hook"), scripts.folder / "announce"
    announce.write_text(announce.read_text().replace("connected(10)", "connected(1)"))
    with socket.socket(socket.AF_UNIX) as silent:
        path = scripts.folder / "socket"
        path.unlink()
        silent.bind(str(path))
        silent.listen()
        done = subprocess.run(
            [hook, "name", "prepare", "begin", "-"], input=ASKS, capture_output=True, text=True, timeout=30, check=False
        )
    assert (done.returncode, done.stdout) == (3, "")
    assert "did not answer org.vmmback.Domains.Announce in time" in done.stderr


@pytest.mark.parametrize(
    "element",
    [
        '<vmmback:secretram xmlns:vmmback="urn:vmmback:domain:1.0"/>',
        "<secret-ram xmlns='urn:vmmback:domain:1.0'/>",
        '<o:app xmlns:o="o" xmlns:x="urn:vmmback:domain:1.0"><x:secret-ram/></o:app>',
        '<o:app xmlns:x="urn:vmmback:domain:1.0" xmlns:y="urn:vmmback:domain:1.0"><y:secret-ram/></o:app>',
    ],
    ids=["mistyped", "without a prefix", "within another", "of two prefixes"],
)
def test_the_broker_judges_each_element_of_ours(scripts: Scripts, element: str) -> None:
    xml = XML.replace("METADATA", element)
    assert scripts.hook("name", "prepare", "begin", "-", xml=xml).returncode == 0
    assert scripts.broker.calls == [("org.vmmback.Domains.Announce", {"xml": xml})]


def test_a_domain_that_does_not_ask_is_left_alone(scripts: Scripts) -> None:
    tells = "<description> &lt;vmmback:secret-ram xmlns=&quot;urn:vmmback:domain:1.0&quot;</description></domain>"
    declared = PLAIN.replace("xmlns:a=", 'xmlns:v="urn:vmmback:domain:1.0" xmlns:a=')
    another = ASKS.replace("urn:vmmback:domain:1.0", "urn:vmmback:domain:2.0")
    for xml in (PLAIN, PLAIN.replace("</domain>", tells), declared, another):
        for operation in ("prepare begin", "start begin", "started begin", "stopped end", "release end"):
            done = scripts.hook("name", *operation.split(), "-", xml=xml)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (scripts.broker.calls, scripts.calls("vmm back")) == ([], [])
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
    assert (scripts.broker.calls, scripts.calls("vmm back")) == ([], [])


@pytest.mark.parametrize(
    ("step", "argued"),
    [("started begin", ["--started", "--", "-a name"]), ("release end", ["--ended", "--", UUID])],
)
def test_an_audit_is_started_apart(scripts: Scripts, step: str, argued: list[str]) -> None:
    """It asks libvirt, which waits for the hook: the hook does not wait for it, and it holds nothing of the hook's."""
    slow, gate = scripts.folder / "vmm back", scripts.folder / "gate"
    os.mkfifo(gate)
    slow.write_text(slow.read_text().replace("print(", f"open({str(gate)!r}).close(); print(", 1))
    assert scripts.hook("-a name", "prepare", "begin", "-").returncode == 0
    try:
        done = scripts.hook("-a name", *step.split(), "-")  # its pipes are closed: run() has seen their end
        assert (done.returncode, done.stdout, scripts.calls("vmm back")) == (0, "", [])
    finally:
        opened = os.open(gate, os.O_RDWR)  # and the audit goes on
    deadline = time.monotonic() + 20
    while not scripts.calls("vmm back"):
        assert time.monotonic() < deadline, "no audit was started"
        time.sleep(0.01)
    os.close(opened)
    assert scripts.calls("vmm back") == [(["-m", "vmmback", "libvirt", "audit", *argued], "")]


def test_only_of_a_domain_that_was_announced_an_audit_is_started(scripts: Scripts) -> None:
    """What the hook leaves behind is of its session."""
    hook = scripts.render("hook")
    for is_announced in (False, True):
        if is_announced:
            scripts.hook("name", "prepare", "begin", "-")
        process = subprocess.Popen(
            [hook, "name", "started", "begin", "-"], stdin=subprocess.DEVNULL, start_new_session=True
        )
        assert process.wait(30) == 0
        if is_announced:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_without_a_process_for_it_there_is_no_audit_and_the_hook_ends(scripts: Scripts) -> None:
    """It must not become the audit, which asks libvirt, which waits for the hook."""
    scripts.render("hook")
    program = "BEGIN { *CORE::GLOBAL::fork = sub { undef } } do shift; die $@ if $@"
    subprocess.run(
        ["perl", "-e", program, scripts.folder / "announce", "name", "release"], input=ASKS, text=True, timeout=30,
        check=True,
    )  # fmt: skip
    assert scripts.broker.calls == [("org.vmmback.Domains.Withdraw", {"name": "name"})]
    assert scripts.calls("vmm back") == []


def test_without_its_program_a_domain_that_asks_does_not_start_and_others_do(scripts: Scripts) -> None:
    hook = scripts.render("hook")
    (scripts.folder / "announce").unlink()
    ended = {}
    for xml in (ASKS, PLAIN):
        ended[xml] = subprocess.run(
            [hook, "name", "prepare", "begin", "-"], input=xml, capture_output=True, text=True, timeout=30, check=False
        )
    assert (ended[ASKS].returncode, ended[PLAIN].returncode, ended[PLAIN].stderr) == (3, 0, "")
    assert ended[ASKS].stderr == f"vmmback: error: {scripts.folder}/announce is missing: vmmback libvirt install\n"


def test_polkits_rule_is_told_which_domains_have_secret_ram(scripts: Scripts) -> None:
    mark = scripts.folder / "run/secret" / UUID
    scripts.broker.answer = refusal("no")
    scripts.hook("name", "prepare", "begin", "-")
    assert mark.exists()  # libvirt calls release also where prepare failed
    scripts.hook("name", "stopped", "end", "-")
    assert mark.exists()
    assert scripts.hook("name", "release", "end", "-").returncode == 0
    assert [path for path in mark.parents[1].rglob("*") if path.is_file()] == []


def test_a_domain_whose_uuid_is_none_does_not_start(scripts: Scripts) -> None:
    done = scripts.hook("name", "prepare", "begin", "-", xml=ASKS.replace(UUID, "../../../etc/passwd"))
    assert (done.returncode, done.stderr) == (2, "vmmback: error: domain name has no UUID\n")
    assert scripts.broker.calls == []


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


ARGV = ["-name", "guest=a,,b,debug-threads=on"]
RAM = ["-object", '{"qom-type":"memory-backend-memfd","id":"pc.ram","size":100663296}']
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


@pytest.mark.parametrize(
    "asked", [[], ["-version"], ["-help"], ["-S", "-machine", "none,accel=tcg", "-qmp", "unix:x"]], ids=" ".join
)
def test_who_asks_what_a_qemu_can_do_gets_it_at_once(scripts: Scripts, asked: list[str]) -> None:
    odd = ODD if len(asked) > 1 else []
    assert scripts.emulator(*asked, *odd).returncode == 0
    assert [argv for argv, _ in scripts.calls("real")] == [[*asked, *odd]]
    assert scripts.broker.calls == []


@pytest.mark.parametrize(
    "argv",
    [
        ["-name", "guest=x -machine none,x", "-machine", "q35"],
        ["-name", "guest=x", "-machine", "none"],
        ["-machine", "q35", *ODD],
        ["-name", "-machine", "none"],
        ["-machine", "none", "-name", "guest=x"],
        ["-m", "512"],
    ],
    ids=range(6),
)
def test_all_else_has_to_claim(scripts: Scripts, argv: list[str]) -> None:
    scripts.broker.answer = refusal("no")
    assert scripts.emulator(*argv).returncode == 4
    assert scripts.calls("real") == []


@NEEDS_IPC_LOCK
def test_a_domains_qemu_has_its_arguments_as_they_are_and_its_calls_are_answered(
    scripts: Scripts,
) -> None:
    done = scripts.emulator(*ARGV, *ODD, *RAM, "-S")
    assert (done.returncode, done.stderr) == (0, "a word of real\n")
    assert scripts.calls("real") == [([*ARGV, *ODD, *RAM, "-S"], "")]
    nothing = {"listener": 0, "offers": [], "secret_memfds": False}
    told = [("org.vmmback.Domains.Claim", {"arguments": [*ARGV, *RAM]}), ("org.vmmback.Handoff.Answer", nothing)]
    assert scripts.broker.calls == told
    assert scripts.broker.listeners == ["anon_inode:seccomp notify"]


@NEEDS_IPC_LOCK
def test_its_qemu_keeps_one_capability(scripts: Scripts) -> None:
    (scripts.folder / "real").write_text("#!/bin/sh\ngrep CapAmb /proc/self/status\n")
    done = scripts.emulator(*ARGV, *RAM)
    assert done.stdout.split() == ["CapAmb:", f"{IPC_LOCK:016x}"]


def test_without_the_capability_there_is_no_qemu(scripts: Scripts) -> None:
    by = ["setpriv", "--bounding-set=-ipc_lock"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*by, scripts.render("emulator"), *ARGV, *RAM], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "vmmback: error: QEMU cannot have CAP_IPC_LOCK: Operation not permitted\n  vmmback libvirt install\n"
    )
    assert (len(scripts.broker.calls), scripts.calls("real")) == (1, [])


def test_without_its_perl_there_is_no_qemu(scripts: Scripts) -> None:
    (scripts.folder / "perl").unlink()
    with pytest.raises(FileNotFoundError):
        scripts.emulator(*ARGV, *RAM)
    assert (scripts.broker.calls, scripts.calls("real")) == ([], [])


def test_without_its_ram_there_is_no_qemu(scripts: Scripts) -> None:
    scripts.broker.answer = refusal("no domain 'a,b' was announced")
    done = scripts.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stderr) == (4, "vmmback: error: no domain 'a,b' was announced\n  do it\n")
    scripts.broker.answer = {"parameters": {"channel": 0, "filter": "06000000"}}  # without a channel
    done = scripts.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("vmmback: error: ")
    assert scripts.calls("real") == []


@NEEDS_IPC_LOCK
@pytest.mark.parametrize("answer", [refusal("no"), None, b"{}"])
def test_whose_calls_nobody_will_answer_is_no_qemu(scripts: Scripts, answer: object) -> None:
    scripts.broker.answer_at_channel = answer
    wrapper = scripts.render("emulator")
    wrapper.write_text(wrapper.read_text().replace("$answer_s = 15", "$answer_s = 1"))
    done = subprocess.run([wrapper, *ARGV, *RAM], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (4 if isinstance(answer, dict) else 3, "")
    assert done.stderr.startswith("vmmback: error: ")
    assert scripts.calls("real") == []


@NEEDS_IPC_LOCK
def test_without_a_filter_there_is_no_qemu(scripts: Scripts) -> None:
    scripts.broker.filter = bytes(8)  # it does not end by a return (bpf_check_classic of net/core/filter.c)
    done = scripts.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stderr) == (
        3,
        "vmmback: error: QEMU cannot be put under a filter: Invalid argument\n",
    )
    assert scripts.calls("real") == []


@NEEDS_IPC_LOCK
def test_a_qemu_that_is_not_there_is_told(scripts: Scripts) -> None:
    (scripts.folder / "real").unlink()
    done = scripts.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"vmmback: error: {scripts.folder}/real cannot be executed: No such file or directory\n"


@NEEDS_IPC_LOCK
def test_the_wrapper_ends_as_what_it_executes(scripts: Scripts) -> None:
    assert scripts.emulator(*ARGV, *RAM, ENDS_WITH="3").returncode == 3
    assert scripts.emulator("-version", ENDS_WITH="3").returncode == 3
