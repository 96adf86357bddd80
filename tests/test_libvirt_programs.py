"""The hook and what executes wrappers, compiled, as libvirt runs them, with a made-up broker and QEMU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmmback.errors import HostUnfit
from vmmback.libvirt import installed_files, programs
from vmmback.libvirt.qemu_user import QemuUser
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
VALUES = dict.fromkeys(("LIBEXEC", "SOCKET", "RUN", "SECRET", "VMMBACK"), "/somewhere")
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
        self.pause_s = 0.0
        """How long it takes to answer a claim."""
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
                time.sleep(self.pause_s)
                with ours:
                    with theirs, suppress(BrokenPipeError):
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


class Programs:
    """Both of them, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = FakeBroker(folder / "socket")
        self.hook_program = folder / "50-vmmback"
        self.wrapper = folder / "qemu-system-x86_64"
        self.wrapper.write_text(f"#!{folder}/emulator {folder}/real\n")
        self.wrapper.chmod(0o755)

    def compile(self, name: str, old: str = "", new: str = "") -> None:
        """Compile a program, with something else in its text."""
        sources = self.folder / "sources"
        shutil.copytree(programs.SOURCES, sources, dirs_exist_ok=True)
        if old:
            texts = [sources / f"{name}.c", sources / "broker_call.c"]
            (path,) = [path for path in texts if old in path.read_text()]
            path.write_text(path.read_text().replace(old, new))
        values: dict[str, str | list[str]] = {"LIBEXEC": str(self.folder), "SOCKET": str(self.folder / "socket")}
        values |= {"RUN": str(self.folder / "run"), "SECRET": str(self.folder / "run/secret")}
        values |= {"VMMBACK": [str(self.folder / "vmm back"), "-m", "vmmback"]}
        path = self.folder / {"hook": self.hook_program.name}.get(name, name)
        path.write_bytes(programs.compiled(name, values, sources))
        path.chmod(0o755)

    def calls(self, name: str) -> list[tuple[list[str], str]]:
        record = self.folder / f"{name}.calls"
        lines = record.read_text().splitlines() if record.exists() else []
        return [(argv, text) for argv, text in map(json.loads, lines)]

    def hook(self, *arguments: str, xml: str = ASKS, **environment: str) -> subprocess.CompletedProcess[str]:
        if not self.hook_program.exists():
            self.compile("hook")
        return subprocess.run(
            [self.hook_program, *arguments], input=xml, capture_output=True, text=True, timeout=30, check=False,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", **environment},
        )  # fmt: skip

    def emulator(self, *arguments: str, by: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        if not (self.folder / "emulator").exists():
            self.compile("emulator")
        return subprocess.run(
            [*by, self.wrapper, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
            check=False, env={"PATH": os.environ["PATH"], "LC_ALL": "C", **environment},
        )  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Programs]:
    for name in ("vmm back", "real"):
        (tmp_path / name).write_text(RECORDER.replace("@FOLDER@", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    programs = Programs(tmp_path)
    yield programs
    programs.broker.close()


def test_a_domain_that_asks_is_announced_with_its_xml(made: Programs) -> None:
    done = made.hook("a 'name'", "prepare", "begin", "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert made.broker.calls == [("org.vmmback.Domains.Announce", {"xml": ASKS})]


def test_a_domain_that_has_ended_is_withdrawn_and_nothing_is_said_if_it_cannot_be(made: Programs) -> None:
    assert made.hook("a 'na\\me", "release", "end", "-").returncode == 0
    assert made.broker.calls == [("org.vmmback.Domains.Withdraw", {"name": "a 'na\\me"})]
    made.broker.answer = refusal("no")
    done = made.hook("name", "release", "end", "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@given(xml=st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])), name=st.text("ab'\"\\é\t😀", min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_the_broker_gets_all_text_as_it_is(made: Programs, xml: str, name: str) -> None:
    made.broker.calls.clear()
    xml = ASKS.replace("%s", xml.replace("\r", ""))  # (a text of Python's own making has other ends of lines)
    assert made.hook(name, "prepare", "begin", "-", xml=xml).returncode == 0
    assert made.hook(name, "release", "end", "-", xml=xml).returncode == 0
    assert [told for _, told in made.broker.calls] == [{"xml": xml}, {"name": name}]


def test_what_is_no_text_starts_no_domain(made: Programs) -> None:
    done = made.hook("name", "prepare", "begin", "-", xml="<domain>\0" + ASKS)
    assert (done.returncode, done.stderr) == (3, "vmmback: error: its input is no text\n")


@pytest.mark.parametrize(
    "message",
    ['no "room" \\ here\n\tat all', "für 100 € 😀", "a\\nb", 'x" }'],
    ids=["quotes", "unicode", "escapes", "end"],
)
def test_a_refusal_is_told_as_it_is(made: Programs, message: str) -> None:
    made.broker.answer = refusal(message)
    done = made.hook("name", "prepare", "begin", "-")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == f"vmmback: error: {message}\n  do it\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "the broker hung up"),
        (b'{"param', "the broker hung up"),
        ({"error": "org.varlink.service.MethodNotFound", "parameters": {"method": "x"}}, "knows no org.vmmback"),
        (b"OK\0", "the broker's answer to org.vmmback.Domains.Announce is none"),
        ({"error": None}, "the broker's answer to org.vmmback.Domains.Announce is none"),
        (b'{"error":\t"x"}\0', "knows no org.vmmback.Domains.Announce: x"),
        (refusal("no", exit_code=0), "error: no"),
        (refusal("no", exit_code=256), "error: no"),
        ({"error": "org.vmmback.Broker.Refused", "parameters": {"exit_code": None}}, "error: {"),
    ],
)
def test_what_is_no_answer_is_an_error(made: Programs, answer: object, said: str) -> None:
    made.broker.answer = answer
    done = made.hook("name", "prepare", "begin", "-")
    assert (done.returncode, done.stdout) == (3, "")
    assert said in done.stderr


def test_a_broker_that_takes_no_more_calls_is_said_to_be_stopped(made: Programs) -> None:
    made.compile("hook", "CONNECT_S = 10", "CONNECT_S = 1")
    path = made.folder / "socket"
    path.unlink()
    with ExitStack() as stack:
        stopped, waiting = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        stopped.bind(str(path))
        stopped.listen(0)
        waiting.connect(str(path))
        done = made.hook("name", "prepare", "begin", "-")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith("Resource temporarily unavailable\n  look whether it is stopped\n")


def test_a_broker_that_is_silent_is_not_waited_for_for_ever(made: Programs) -> None:
    made.compile("hook", "ANNOUNCE_S = 10", "ANNOUNCE_S = 1")
    with socket.socket(socket.AF_UNIX) as silent:
        path = made.folder / "socket"
        path.unlink()
        silent.bind(str(path))
        silent.listen()
        done = made.hook("name", "prepare", "begin", "-")
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
def test_the_broker_judges_each_element_of_ours(made: Programs, element: str) -> None:
    xml = XML.replace("METADATA", element)
    assert made.hook("name", "prepare", "begin", "-", xml=xml).returncode == 0
    assert made.broker.calls == [("org.vmmback.Domains.Announce", {"xml": xml})]


def test_a_domain_that_does_not_ask_is_left_alone(made: Programs) -> None:
    tells = "<description> &lt;vmmback:secret-ram xmlns=&quot;urn:vmmback:domain:1.0&quot;</description></domain>"
    declared = PLAIN.replace("xmlns:a=", 'xmlns:v="urn:vmmback:domain:1.0" xmlns:a=')
    others = [ASKS.replace("urn:vmmback:domain:1.0", f"urn:vmmback:domain:{version}") for version in ("2.0", "1.01")]
    for xml in (PLAIN, PLAIN.replace("</domain>", tells), declared, *others):
        for operation in ("prepare begin", "start begin", "started begin", "stopped end", "release end"):
            done = made.hook("name", *operation.split(), "-", xml=xml)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (made.broker.calls, made.calls("vmm back")) == ([], [])
    assert not (made.folder / "run").exists()


def test_a_domain_that_asks_no_longer_has_no_marks(made: Programs) -> None:
    """Its XML may have been changed while it ran, and its end not have been told us."""
    marks = [made.folder / "run/secret" / UUID, made.folder / "run/names/name"]
    made.hook("name", "prepare", "begin", "-")
    assert all(mark.exists() for mark in marks)
    assert made.hook("name", "release", "end", "-", xml=PLAIN).returncode == 0
    assert made.broker.calls[1:] == [("org.vmmback.Domains.Withdraw", {"name": "name"})]
    assert not any(mark.exists() for mark in marks)

    made.hook("name", "prepare", "begin", "-")
    made.broker.calls.clear()
    assert made.hook("name", "prepare", "begin", "-", xml=PLAIN).returncode == 0
    assert made.broker.calls == []
    assert not any(mark.exists() for mark in marks)


def test_a_domain_called_as_a_folder_is_another_ones_affair(made: Programs) -> None:
    made.hook("name", "prepare", "begin", "-")
    process = subprocess.Popen([made.hook_program, ".", "started", "begin", "-"], start_new_session=True)
    assert process.wait(30) == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_a_domain_of_many_declarations_is_the_brokers_to_judge(made: Programs) -> None:
    """Not one element is ours; to look for each declaration's takes the square of their number, and minutes."""
    many = "<app>" + '<a xmlns:v="urn:vmmback:domain:1.0"/>' * 50_000 + "</app>"
    assert made.hook("name", "prepare", "begin", "-", xml=XML.replace("METADATA", many)).returncode == 0
    assert len(made.broker.calls) == 1


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
def test_all_other_steps_are_nothing_to_it(made: Programs, operation: str) -> None:
    done = made.hook("name", *operation.split(), "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (made.broker.calls, made.calls("vmm back")) == ([], [])


@pytest.mark.parametrize(
    ("step", "argued"),
    [("started begin", ["--started", "--", "-a name"]), ("release end", ["--ended", "--", UUID])],
)
def test_an_audit_is_started_apart(made: Programs, step: str, argued: list[str]) -> None:
    """It asks libvirt, which waits for the hook: the hook does not wait for it, and it holds nothing of the hook's."""
    slow, gate = made.folder / "vmm back", made.folder / "gate"
    os.mkfifo(gate)
    slow.write_text(slow.read_text().replace("print(", f"open({str(gate)!r}).close(); print(", 1))
    assert made.hook("-a name", "prepare", "begin", "-").returncode == 0
    try:
        done = made.hook("-a name", *step.split(), "-")  # its pipes are closed: run() has seen their end
        assert (done.returncode, done.stdout, made.calls("vmm back")) == (0, "", [])
    finally:
        opened = os.open(gate, os.O_RDWR)  # and the audit goes on
    deadline = time.monotonic() + 20
    while not made.calls("vmm back"):
        assert time.monotonic() < deadline, "no audit was started"
        time.sleep(0.01)
    os.close(opened)
    assert made.calls("vmm back") == [(["-m", "vmmback", "libvirt", "audit", *argued], "")]


def test_an_audit_holds_up_nobody_and_has_a_session_of_its_own(made: Programs) -> None:
    audit, found = made.folder / "vmm back", made.folder / "found"
    audit.write_text(
        f"#!{sys.executable} -IS\nimport os, pathlib\n"
        f"draft = pathlib.Path({str(found)!r} + '.draft')\n"
        "draft.write_text(f'{os.getpriority(os.PRIO_PROCESS, 0)} {os.getsid(0) == os.getpid()}')\n"
        f"draft.rename({str(found)!r})\n"
    )
    made.hook("name", "release", "end", "-")
    deadline = time.monotonic() + 20
    while not found.exists():
        assert time.monotonic() < deadline, "no audit was started"
        time.sleep(0.01)
    assert found.read_text() == "19 True"


def test_only_of_a_domain_that_was_announced_an_audit_is_started(made: Programs) -> None:
    """What the hook leaves behind is of its session."""
    made.compile("hook")
    for is_announced in (False, True):
        if is_announced:
            made.hook("name", "prepare", "begin", "-")
        process = subprocess.Popen(
            [made.hook_program, "name", "started", "begin", "-"], stdin=subprocess.DEVNULL, start_new_session=True
        )
        assert process.wait(30) == 0
        if is_announced:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_without_a_process_for_it_there_is_no_audit_and_the_hook_ends(made: Programs) -> None:
    """It must not become the audit, which asks libvirt, which waits for the hook."""
    made.compile("hook", "fork()", "(errno = EAGAIN, -1)")
    assert made.hook("name", "release", "end", "-").returncode == 0
    assert made.broker.calls == [("org.vmmback.Domains.Withdraw", {"name": "name"})]
    assert made.calls("vmm back") == []


def test_polkits_rule_is_told_which_domains_have_secret_ram(made: Programs) -> None:
    mark = made.folder / "run/secret" / UUID
    made.broker.answer = refusal("no")
    former = os.umask(0o077)
    try:
        made.hook("name", "prepare", "begin", "-")
    finally:
        os.umask(former)
    assert mark.exists()  # libvirt calls release also where prepare failed
    # polkit, which is not root, sees whether it is there.
    assert [path.stat().st_mode & 0o777 for path in (mark, mark.parent, mark.parents[1])] == [0o644, 0o755, 0o755]
    made.hook("name", "stopped", "end", "-")
    assert mark.exists()
    assert made.hook("name", "release", "end", "-").returncode == 0
    assert [path for path in mark.parents[1].rglob("*") if path.is_file()] == []


def test_a_domain_whose_uuid_is_none_does_not_start(made: Programs) -> None:
    for uuid in ("../../../etc/passwd", "", "0d7e5a4f/../..", "0d7e<b/>"):
        done = made.hook("name", "prepare", "begin", "-", xml=ASKS.replace(UUID, uuid))
        assert (done.returncode, done.stderr) == (2, "vmmback: error: domain name has no UUID\n")
    assert made.broker.calls == []


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_wrapper_shows_that_its_qemu_is_another_one(made: Programs, seconds: int) -> None:
    """Also an upgrade whose files are older than the wrapper: packages keep the times of their build."""
    wrapper, qemu = made.wrapper, made.folder / "real"
    now = wrapper.stat().st_mtime
    os.utime(qemu, (now + seconds, now + seconds))
    made.hook("name", "prepare", "begin", "-")
    assert wrapper.stat().st_mtime_ns == qemu.stat().st_mtime_ns
    unchanged = wrapper.stat().st_ctime_ns
    made.hook("name", "prepare", "begin", "-")
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
def test_who_asks_what_a_qemu_can_do_gets_it_at_once(made: Programs, asked: list[str]) -> None:
    odd = ODD if len(asked) > 1 else []
    assert made.emulator(*asked, *odd).returncode == 0
    assert [argv for argv, _ in made.calls("real")] == [[*asked, *odd]]
    assert made.broker.calls == []


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
def test_all_else_has_to_claim(made: Programs, argv: list[str]) -> None:
    made.broker.answer = refusal("no")
    assert made.emulator(*argv).returncode == 4
    assert made.calls("real") == []


@NEEDS_IPC_LOCK
def test_a_domains_qemu_has_its_arguments_as_they_are_and_its_calls_are_answered(
    made: Programs,
) -> None:
    done = made.emulator(*ARGV, *ODD, *RAM, "-S")
    assert (done.returncode, done.stderr) == (0, "a word of real\n")
    assert made.calls("real") == [([*ARGV, *ODD, *RAM, "-S"], "")]
    nothing = {"listener": 0, "offers": [], "secret_memfds": False}
    told = [("org.vmmback.Domains.Claim", {"arguments": [*ARGV, *RAM]}), ("org.vmmback.Handoff.Answer", nothing)]
    assert made.broker.calls == told
    assert made.broker.listeners == ["anon_inode:seccomp notify"]


@NEEDS_IPC_LOCK
def test_its_qemu_keeps_one_capability_and_no_descriptor(made: Programs) -> None:
    shows = "#!/bin/sh\ngrep -E '^(Cap|NoNew)' /proc/self/status; for each in /proc/$$/fd/*; do readlink $each; done\n"
    (made.folder / "real").write_text(shows)
    lines = made.emulator(*ARGV, *RAM).stdout.splitlines()
    found = dict(line.split(":\t") for line in lines[:6])
    ours = int(procfs.status(os.getpid())["CapInh"], 16)
    assert (found["CapAmb"], found["CapInh"]) == (f"{IPC_LOCK:016x}", f"{ours | IPC_LOCK:016x}")
    assert found["NoNewPrivs"] == "1"
    # Its input and output, and its own text, as the shell has that open.
    assert sorted(line.split(":")[0] for line in lines[6:]) == ["/dev/null", f"{made.folder}/real", "pipe", "pipe"]


@NEEDS_IPC_LOCK
@pytest.mark.parametrize("argv", [["-Z"], [*ARGV, *RAM]], ids=["asked", "a domain"])
def test_its_qemu_is_called_by_its_path(made: Programs, argv: list[str]) -> None:
    (made.folder / "real").unlink()
    (made.folder / "real").symlink_to("/bin/cat")
    assert made.emulator(*argv).stderr.startswith(f"{made.folder}/real: invalid option -- '")


@NEEDS_IPC_LOCK
def test_a_broker_has_more_time_for_more_ram(made: Programs) -> None:
    """What it may have to touch first; here a second for each GiB, and none besides."""
    made.compile("emulator", "ANSWER_S = 15, MORE_FOR_EACH_GIB_S = 10", "ANSWER_S = 1, MORE_FOR_EACH_GIB_S = 2")
    made.broker.pause_s = 2
    assert made.emulator(*ARGV, *RAM).returncode == 3
    assert made.emulator(*ARGV, *RAM, "-object", '{"id":"more","size":2147483648}').returncode == 0


def test_a_wrappers_line_can_be_as_long_as_it_may_be(made: Programs) -> None:
    """Of a longer one the kernel would cut the end off, and another program be executed, if there were one."""
    for length in (installed_files.FIRST_LINE_BYTES, installed_files.FIRST_LINE_BYTES + 1):
        missing = length - len(f"#!{made.folder}/emulator {made.folder}//real")
        folder = made.folder / ("x" * missing)
        folder.mkdir()
        (folder / "real").symlink_to(made.folder / "real")
        made.wrapper.write_text(f"#!{made.folder}/emulator {folder}/real\n")
        done = made.emulator("-version")
        is_whole = length == installed_files.FIRST_LINE_BYTES
        assert (done.returncode, len(made.calls("real"))) == (0 if is_whole else 3, 1)


def test_a_program_that_is_named_by_no_path_is_not_executed(made: Programs) -> None:
    made.compile("emulator")
    argv = [str(made.folder / "emulator"), "real", str(made.wrapper)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=made.folder)
    assert (done.returncode, made.calls("real")) == (2, [])


def test_without_the_capability_there_is_no_qemu(made: Programs) -> None:
    by = ["setpriv", "--bounding-set=-ipc_lock"] if os.geteuid() == 0 else []
    done = made.emulator(*ARGV, *RAM, by=by)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "vmmback: error: QEMU cannot have CAP_IPC_LOCK: Operation not permitted\n  vmmback libvirt install\n"
    )
    assert (len(made.broker.calls), made.calls("real")) == (1, [])


def test_without_what_executes_it_there_is_no_qemu(made: Programs) -> None:
    with pytest.raises(FileNotFoundError):
        subprocess.run([made.wrapper, *ARGV, *RAM], check=False)
    assert (made.broker.calls, made.calls("real")) == ([], [])


def test_without_its_ram_there_is_no_qemu(made: Programs) -> None:
    made.broker.answer = refusal("no domain 'a,b' was announced")
    done = made.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stderr) == (4, "vmmback: error: no domain 'a,b' was announced\n  do it\n")
    made.broker.answer = {"parameters": {"channel": 0, "filter": "06000000"}}  # without a channel
    done = made.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("vmmback: error: ")
    assert made.calls("real") == []


@NEEDS_IPC_LOCK
@pytest.mark.parametrize("answer", [refusal("no"), None, b"{}"])
def test_whose_calls_nobody_will_answer_is_no_qemu(made: Programs, answer: object) -> None:
    made.broker.answer_at_channel = answer
    made.compile("emulator", "ANSWER_S = 15", "ANSWER_S = 1")
    done = made.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stdout) == (4 if isinstance(answer, dict) else 3, "")
    assert done.stderr.startswith("vmmback: error: ")
    assert made.calls("real") == []


@NEEDS_IPC_LOCK
def test_without_a_filter_there_is_no_qemu(made: Programs) -> None:
    made.broker.filter = bytes(8)  # it does not end by a return (bpf_check_classic of net/core/filter.c)
    done = made.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stderr) == (
        3,
        "vmmback: error: QEMU cannot be put under a filter: Invalid argument\n",
    )
    made.broker.filter = seccomp.program(memfds=True) + bytes(8 << 16)  # its length is a number of 16 bits
    done = made.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stderr) == (3, "vmmback: error: the broker's answer came without a filter\n")
    assert made.calls("real") == []


@NEEDS_IPC_LOCK
def test_a_qemu_that_is_not_there_is_told(made: Programs) -> None:
    (made.folder / "real").unlink()
    done = made.emulator(*ARGV, *RAM)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"vmmback: error: {made.folder}/real cannot be executed: No such file or directory\n"


@NEEDS_IPC_LOCK
def test_the_wrapper_ends_as_what_it_executes(made: Programs) -> None:
    assert made.emulator(*ARGV, *RAM, ENDS_WITH="3").returncode == 3
    assert made.emulator("-version", ENDS_WITH="3").returncode == 3


def test_it_says_which_capabilities_it_has_itself(made: Programs) -> None:
    made.compile("emulator")
    told = subprocess.run([made.folder / "emulator"], capture_output=True, text=True, check=True).stdout
    status = procfs.status(os.getpid())
    is_root = os.geteuid() == 0  # whose programs get all that may be got
    has = status["CapBnd"] if is_root else "0" * 16
    assert told.split() == ["permitted", has, "effective", has]
    done = subprocess.run([made.folder / "emulator", "/bin/true"], capture_output=True, text=True, check=False)
    assert (done.returncode, "usage: " in done.stderr) == (2, True)


def test_without_a_compiler_or_with_one_that_fails_there_is_no_program(
    made: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostUnfit, match=r"cannot compile hook.c: .*no_such_function"):
        made.compile("hook", "int main(", "static int x = no_such_function(); int main(")
    with pytest.raises(HostUnfit, match="a socket's path is shorter"):
        programs.compiled("hook", {**VALUES, "SOCKET": "/" + 107 * "x"}, programs.SOURCES)
    programs.compiled("hook", {**VALUES, "SOCKET": "/" + 106 * "x"}, programs.SOURCES)
    monkeypatch.setenv("PATH", str(made.folder))
    with pytest.raises(HostUnfit, match="no C compiler") as refused:
        made.compile("hook")
    assert refused.value.hint == "apt-get install gcc libc6-dev"


def test_a_compiler_that_hangs_is_no_compiler(made: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    (made.folder / "cc").write_text("#!/bin/sh\nexec sleep 60\n")
    (made.folder / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(programs, "_COMPILES_S", 0.1)
    with pytest.raises(HostUnfit, match=r"cannot compile hook.c: .* timed out after 0.1 seconds"):
        made.compile("hook")


def test_a_host_without_a_static_c_library_has_it_linked_at_run_time(
    made: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = made.folder / "cc"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -static "*) exit 1 ;; esac\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
    assert made.hook("name", "prepare", "begin", "-").returncode == 0
    assert len(made.broker.calls) == 1
    assert b"ld-linux" in made.hook_program.read_bytes()


def test_a_value_is_in_a_program_as_it_is(made: Programs) -> None:
    odd = "/a \"b\" \\c %s $(d) 'é'"
    program = programs.compiled("hook", {**VALUES, "RUN": odd}, programs.SOURCES)
    assert f"{odd}/names".encode() in program


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (f"permitted {IPC_LOCK:016x}\neffective {IPC_LOCK:016x}", ""),
        (f"permitted {IPC_LOCK | 1:016x}\neffective {IPC_LOCK:016x}", "gets other capabilities"),
        (f"permitted {0:016x}\neffective {0:016x}", "gets other capabilities"),
        ("nothing", "gets other capabilities"),
        (None, "cannot execute"),
    ],
)
def test_an_emulator_has_to_have_the_one_capability(tmp_path: Path, told: str | None, said: str) -> None:
    emulator = tmp_path / "emulator"
    emulator.write_text(f"#!/bin/sh\necho '{told}'\n")
    emulator.chmod(0o700 if told else 0o600)
    user = QemuUser(os.getuid(), os.getgid())
    with pytest.raises(HostUnfit, match=said) if said else nullcontext():
        programs.verify(emulator, user)
