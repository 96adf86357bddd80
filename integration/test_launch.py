"""`vmmback launch` from outside: a process with arguments, signals, an exit code and what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.capabilities import INITRD, KERNEL
from integration.conftest import (
    GONE_S,
    MIB,
    ROOT,
    TINY_BYTES,
    Ended,
    MemoryGroup,
    Start,
    Supervisor,
    eventually,
    guest_file,
    processes_of,
    qemu_of,
    tiny_rom,
    worker_of,
)
from integration.terminal import Terminal
from vmmback import tiny_guest
from vmmback.isolation.audit import REQUIRED
from vmmback.isolation.catalogue import HOLDER_PROBES, LIVE_PROBES, RIGHTS_PROBES
from vmmback.linux import direct_map_use
from vmmback.linux.direct_map_use import REGION
from vmmback.linux.procfs import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_direct_map")

BOTH = REQUIRED | {probe.name for probe in (*LIVE_PROBES, *RIGHTS_PROBES)} | {"freed-frames"}

# The CPU's first instructions pulse the keyboard controller's reset line; QEMU, run with -no-reboot, ends.
#     b0 fe  mov al, 0xfe;  e6 64  out 0x64, al;  f4  hlt;  eb fd  jmp hlt
RESETS = bytes(0xFFF0) + bytes.fromhex("b0fe e664 f4 ebfd") + bytes(9)


def report_of(ended: Ended) -> Any:
    """Return the report; standard output must hold nothing else."""
    assert "Traceback" not in ended.stderr
    return json.loads(ended.stdout)


def probes_of(report: Any) -> dict[str, Any]:
    return {probe["name"]: probe for probe in report["probes"]}


def assert_frames_came_back_zeroed(report: Any) -> None:
    """They are read after the end, of QEMU and of our own descriptor, and not all are in use again, by other tests."""
    zero, former = map(int, re.findall(r"\d+", probes_of(report)["freed-frames"]["detail"])[:2])
    assert former == report["memory"]["size"] // PAGE_SIZE
    assert zero > former // 8


# `vmmback` with two changes: so little patience with a guest that ignores its power button, as the tiny one does,
# and it says what it asks of QEMU, which nothing else shows.
IMPATIENT = """
import sys
from vmmback import cli, launch
from vmmback.isolation import audit
from vmmback.monitor import Monitor

def say(what):
    print("spy:", what, file=sys.stderr, flush=True)

def spy(owner, name):
    ask = getattr(owner, name)
    async def spied(*arguments):
        say(name + " begins")
        try:
            return await ask(*arguments)
        finally:
            say(name + " ends")
    setattr(owner, name, spied)

for name in ("powerdown", "quit"):
    spy(Monitor, name)
spy(audit, "audit")
launch._POWERDOWN_TIMEOUT_S = float(sys.argv.pop(1))
cli.main()
"""


def patient(start: Start, patience_s: float, *arguments: str | Path) -> Supervisor:
    """Start vmmback with so much patience after the power button, and a spy on what it asks of QEMU."""
    return start(sys.executable, "-c", IMPATIENT, str(patience_s), *arguments)


def run(start: Start, file: Path, *options: str) -> Ended:
    """Launch a guest that ends by itself, or right after its validation; wait for the end."""
    return patient(start, 0.1, "launch", file, *options).ended()


ENDS = 'after-validation = "powerdown"'


# --- The demo guest: Linux --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_guest_kernel")
def test_the_demo_is_isolated(vmmback: Start, other_blocks: str) -> None:
    ended = vmmback("launch", ROOT / "configs/demo.toml", "--json").ended(90)
    assert ended.code == 0, ended.stderr
    report = report_of(ended)
    memory = report["memory"]
    assert (report["guest"], report["verdict"], report["reasons"]) == ("demo", "isolated", [])
    assert report["validated_after"] == "'GUEST READY' on the console"
    assert memory["secret"] == memory["size"] == 256 * MIB
    assert memory["checked_pages"] == memory["present_pages"] == memory["size"] // PAGE_SIZE
    assert memory["readable_pages"] == 0
    probes = probes_of(report)
    assert probes.keys() == BOTH
    assert len(probes) == len(report["probes"])
    assert {name for name, probe in probes.items() if probe["control"] != "readable"} == set()
    assert {name for name, probe in probes.items() if probe["verdict"] != "blocked"} == set()
    # The canary's fingerprint came over the console, so the former frames were searched for it.
    assert re.search(r"vmmback-canary sha256:[0-9a-f]{64}\n", ended.stderr)
    assert_frames_came_back_zeroed(report)
    assert "none holds the guest's canary" in probes["freed-frames"]["detail"]
    writable = [block for block in report["ram_blocks"] if block["guest_writable"]]
    assert writable == [{"name": "ram0", "size": 256 * MIB, "backing": "secretmem", "guest_writable": True}]
    assert {block["backing"] for block in report["ram_blocks"] if not block["guest_writable"]} == {other_blocks}
    named = {"ordinary-ram-blocks"} if other_blocks == "ordinary" else set()
    assert {exposure["name"] for exposure in report["exposures"]} == {
        "pidfd-getfd",
        "code-injection",
        "qemu-memory",
        "serial-console",
    } | named
    assert (report["memory_map"][0]["first"], report["memory_map"][0]["block"]) == (0, "ram0")
    assert report["timings"].keys() >= {"prefault", "qmp_ready", "boot", "validate"}
    assert report["host"]["accel"] in {"tcg", "kvm"}
    assert "GUEST READY" in ended.stderr
    assert "power button pressed: powering off" in ended.stderr


@pytest.mark.usefixtures("needs_guest_kernel")
def test_the_control_is_exposed(vmmback: Start) -> None:
    """The same guest on ordinary memory: what blocks there, reads here."""
    ended = vmmback("launch", ROOT / "configs/control.toml", "--json").ended(90)
    assert ended.code == 5, ended.stderr
    report = report_of(ended)
    probes = probes_of(report)
    assert report["verdict"] == "exposed"
    assert report["memory"]["secret"] == 0
    assert report["direct_map"] is None
    assert report["memory"]["readable_pages"] == report["memory"]["present_pages"] == 256 * MIB // PAGE_SIZE
    assert probes.keys() == BOTH
    assert {name for name, probe in probes.items() if probe["control"] != "readable"} == set()
    # Of ordinary RAM, too, nobody but QEMU and its supervisor has a descriptor or a mapping.
    unread = {probe.name for probe in (*HOLDER_PROBES, *RIGHTS_PROBES)}
    assert {name for name, probe in probes.items() if probe["verdict"] != "readable"} == unread
    # Its former frames, which the kernel does not clear: of tens of thousands, some are not yet in use again.
    assert re.search(r", \d+ hold the canary$", probes["freed-frames"]["detail"])


def linux(folder: Path, isolation: str) -> Path:
    """Write the file of the demo guest, small, with other lines in [isolation]."""
    path = folder / "linux.toml"
    path.write_text(
        f'name = "linux-{os.getpid()}"\n[memory]\nsize = "128MiB"\n[cpu]\nmodel = "max,-erms,-fsrm"\n'
        f'[machine]\naccel = "tcg"\n[boot]\nkernel = "{KERNEL}"\ninitrd = "{INITRD}"\n'
        f'cmdline = "console=ttyS0 quiet panic=-1 no_timer_check"\n[isolation]\nready = "GUEST READY"\n{isolation}\n'
    )
    return path


@pytest.mark.usefixtures("needs_guest_kernel")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda signum: signum.name)
def test_one_signal_is_the_power_button(vmmback: Start, tmp_path: Path, signum: signal.Signals) -> None:
    """The guest notices and powers off by itself; it was validated, so the report is whole."""
    running = vmmback("launch", linux(tmp_path, ""), "--json")
    running.wait_for("is isolated while it runs")
    running.signal(signum)
    ended = running.ended()
    assert ended.code == 0, ended.stderr
    assert "power button pressed: powering off" in ended.stderr
    assert probes_of(report_of(ended)).keys() == BOTH


@pytest.mark.usefixtures("needs_guest_kernel")
def test_the_demo_on_a_terminal() -> None:
    """Progress bar, console, table, and the last word: what a user sees of `./dev demo`."""
    with Terminal([sys.executable, "-m", "vmmback", "launch", str(ROOT / "configs/demo.toml")]) as terminal:
        assert terminal.ended() == 0, terminal.text
        text = terminal.text
    lines = [line.rstrip() for line in text.splitlines()]
    assert re.search(r"prefault ━+ 256\.0/256\.0 MiB", text)
    assert (
        text.index("prefault")
        < text.index("Linux version")
        < text.index("\nGUEST READY\n")
        < text.index("│ direct-map")
    )
    rows = {cells[1].strip(): cells for line in lines if len(cells := line.split("│")) == 7}
    for name in BOTH:
        assert [cell.strip() for cell in rows[name][2:4]] == ["blocked", "readable"], text
    last = "guest demo: 256 MiB of 256 MiB secret, 65536 of 65536 pages checked, 0 readable: isolated"
    assert last in lines
    at = len(lines) - lines[::-1].index(last)
    direct_map, validated = [line for line in lines[at:] if line]
    assert re.fullmatch(r"  direct map   \d+ regions of 2 MiB touched \(ideal 128\), .*", direct_map)
    assert validated == "  validated after 'GUEST READY' on the console"


# --- The tiny guest: firmware instead of a kernel ---------------------------------------------------------------------


def test_a_firmware_guest_is_isolated(start: Start, tmp_path: Path) -> None:
    ended = run(start, guest_file(tmp_path, isolation=ENDS), "--json")
    assert ended.code == 0, ended.stderr
    report = report_of(ended)
    assert report["verdict"] == "isolated"
    assert report["memory"] == {
        "size": TINY_BYTES,
        "secret": TINY_BYTES,
        "present_pages": TINY_BYTES // PAGE_SIZE,
        "checked_pages": TINY_BYTES // PAGE_SIZE,
        "readable_pages": 0,
    }
    found = report["direct_map"]
    assert found["ideal"] == TINY_BYTES // REGION <= found["regions"] <= TINY_BYTES // PAGE_SIZE
    told = direct_map_use.of()  # the rest is the whole host's, and others split, too
    assert (found["splits_2m"] is None) == (told.splits_2m is None)
    assert (found["huge_before"] is None) == (found["huge_after"] is None) == (told.in_2m is None)
    assert (found["splits_2m"] or 0) <= (told.splits_2m or 0)
    assert {(probe["verdict"], probe["control"]) for probe in report["probes"]} == {("blocked", "readable")}
    assert_frames_came_back_zeroed(report)
    assert "the guest did not end within 0.1 s of powerdown" in ended.stderr


def test_its_twin_is_exposed_and_is_killed(vmmback: Start, tmp_path: Path) -> None:
    """on-exposed = "kill" is the default: such a guest is not asked to power off."""
    file = guest_file(tmp_path, backing="ordinary", isolation='on-exposed = "kill"')
    ended = vmmback("launch", file, "--json").ended()
    assert ended.code == 5, ended.stderr
    report = report_of(ended)
    assert report["verdict"] == "exposed"
    assert {name for name, probe in probes_of(report).items() if probe["verdict"] == "readable"} >= REQUIRED - {
        probe.name for probe in (*HOLDER_PROBES, *RIGHTS_PROBES)
    }
    assert report["memory"]["readable_pages"] == TINY_BYTES // PAGE_SIZE
    assert "the guest is exposed and is ended (on-exposed is kill)" in ended.stderr


def test_an_exposure_outlives_the_failure_of_qemu(vmmback: Start, tmp_path: Path, runtime_dir: Path) -> None:
    """Also where another process had the guest audited, before it was ready."""
    file = guest_file(tmp_path, backing="ordinary", isolation='on-exposed = "warn"', ready="NEVER")
    running = vmmback("launch", file, "--json")
    running.wait_for("READY")
    assert vmmback("audit", file.stem).ended().code == 5
    (qemu,) = qemu_of(runtime_dir)
    os.kill(qemu, signal.SIGKILL)
    ended = running.ended()
    assert ended.code == 5, ended.stderr
    assert report_of(ended)["verdict"] == "exposed"
    assert "it was ended by SIGKILL" in ended.stderr


def test_an_exposed_guest_may_run_on(start: Start, tmp_path: Path) -> None:
    file = guest_file(tmp_path, backing="ordinary", isolation='on-exposed = "warn"')
    running = patient(start, 0.1, "launch", file, "--json")
    running.wait_for("is exposed while it runs")
    assert "spy: powerdown" not in running.stderr
    running.signal(signal.SIGTERM)
    ended = running.ended()
    assert ended.code == 5, ended.stderr
    assert "spy: powerdown ends" in ended.stderr


def test_the_canary_is_found_in_former_frames_of_ordinary_ram(start: Start, tmp_path: Path) -> None:
    file = guest_file(tmp_path, backing="ordinary", isolation=f'on-exposed = "warn"\n{ENDS}')
    freed = probes_of(report_of(run(start, file, "--json")))["freed-frames"]
    assert freed["verdict"] == "readable", freed
    found = re.search(r", (\d+) hold the canary$", freed["detail"])
    assert found
    assert int(found[1]) > 100  # of 4000: the others are in use again


def test_former_frames_of_a_guest_without_fingerprint_are_judged_by_a_sample(start: Start, tmp_path: Path) -> None:
    """Ordinary memory is not cleared: the sample holds its canary still, or is in use again, but is not zero."""
    file = guest_file(
        tmp_path,
        backing="ordinary",
        rom=tiny_rom(fingerprint=False),
        isolation=f'on-exposed = "warn"\n{ENDS}',
    )
    freed = probes_of(report_of(run(start, file, "--json")))["freed-frames"]
    assert freed["verdict"] in {"readable", "inconclusive"}, freed


def test_a_ready_text_that_never_comes(start: Start, tmp_path: Path) -> None:
    """The guest is validated all the same, and the report says after what."""
    file = guest_file(tmp_path, ready="NEVER", isolation=f'ready-timeout = "500ms"\n{ENDS}')
    ended = run(start, file, "--json")
    assert ended.code == 0, ended.stderr
    report = report_of(ended)
    assert (report["verdict"], report["validated_after"]) == ("isolated", "0.5 s without 'NEVER' on the console")
    assert report["timings"]["boot"] >= 0.5


def test_without_a_ready_text_the_first_output_counts(start: Start, tmp_path: Path) -> None:
    ended = run(start, guest_file(tmp_path, ready=None, isolation=ENDS), "--json")
    assert ended.code == 0, ended.stderr
    assert report_of(ended)["validated_after"] == "the first output on the console"


def test_a_guest_that_powers_off_before_it_was_validated_is_inconclusive(vmmback: Start, tmp_path: Path) -> None:
    ended = vmmback("launch", guest_file(tmp_path, rom=RESETS), "--json").ended()
    assert ended.code == 8, ended.stderr
    report = report_of(ended)
    assert (report["verdict"], report["validated_after"], report["probes"]) == ("inconclusive", "", [])
    assert "direct-map: did not run" in report["reasons"]


@pytest.mark.parametrize("way", ["--no-validate", "never"])
def test_no_validation_runs_no_probe_and_is_no_failure(vmmback: Start, tmp_path: Path, way: str) -> None:
    """What is not asked for is not claimed either: exit code 0, but never `isolated`."""
    never = 'validate = "never"' if way == "never" else ""
    file = guest_file(tmp_path, rom=RESETS, isolation=never)
    ended = vmmback("launch", file, "--json", *([way] if not never else [])).ended()
    assert ended.code == 0, ended.stderr
    report = report_of(ended)
    assert (report["verdict"], report["validated_after"], report["probes"]) == ("inconclusive", "", [])
    assert report["memory"]["secret"] == TINY_BYTES  # confirmed before it ran: that is no option


def test_without_prefault_only_present_pages_are_claimed(start: Start, tmp_path: Path) -> None:
    ended = run(start, guest_file(tmp_path, memory="prefault = false", isolation=ENDS), "--json")
    assert ended.code == 0, ended.stderr
    report = report_of(ended)
    memory = report["memory"]
    assert report["verdict"] == "isolated"
    assert "prefault" not in report["timings"]
    assert report["direct_map"] is None  # its pages came while it ran, one by one
    # All but the video memory's place, which the guest leaves alone.
    filled = sum(end - begin for begin, end in tiny_guest.filled_ranges(TINY_BYTES)) // PAGE_SIZE
    assert filled <= memory["present_pages"] == memory["checked_pages"] < TINY_BYTES // PAGE_SIZE


def test_for_people_the_table_goes_to_standard_output(start: Start, tmp_path: Path) -> None:
    ended = run(start, guest_file(tmp_path, isolation=ENDS))
    assert ended.code == 0, ended.stderr
    assert ended.stdout.startswith("vmmback-canary sha256:")
    assert "\nREADY\n" in ended.stdout
    assert "16 MiB of RAM are prefaulted" in ended.stderr
    assert "\x1b" not in ended.stdout + ended.stderr
    words = " ".join(ended.stdout.split())  # rich folds lines to 80 columns where there is no terminal
    assert "4096 of 4096 pages checked, 0 readable: isolated direct map" in words
    assert re.search(r"direct map \d+ regions of 2 MiB touched \(ideal 8\), ", words)
    assert words.endswith(" validated after 'READY' on the console")


def test_a_qemu_that_is_killed_by_others_is_exit_code_6(vmmback: Start, tmp_path: Path, runtime_dir: Path) -> None:
    running = vmmback("launch", guest_file(tmp_path), "--json")
    running.wait_for("is isolated while it runs")
    (qemu,) = qemu_of(runtime_dir)
    os.kill(qemu, signal.SIGKILL)
    ended = running.ended()
    assert (ended.code, ended.stdout) == (6, "")
    assert ended.has_one_error()
    assert "it was ended by SIGKILL" in ended.stderr


def test_memory_is_back_after_the_end(start: Start, tmp_path: Path, memory_group: MemoryGroup) -> None:
    file = guest_file(tmp_path, size="256MiB", isolation=ENDS)
    ended = start(*memory_group.command([sys.executable, "-c", IMPATIENT, "0.1", "launch", file, "--json"])).ended()
    assert ended.code == 0, ended.stderr
    eventually(lambda: memory_group.used() < 64 * MIB, "memory is back", GONE_S)


# --- Signals, in each phase -------------------------------------------------------------------------------------------

SIGNALS = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda signum: signum.name)


def assert_interrupted(ended: Ended, signum: signal.Signals) -> None:
    assert (ended.code, ended.stdout) == (128 + signum, ""), ended.stderr
    assert ended.has_one_error()
    assert f"stopped by {signum.name} before the guest ran" in ended.stderr


@SIGNALS
def test_while_ram_is_prefaulted(
    start: Start, tmp_path: Path, runtime_dir: Path, memory_group: MemoryGroup, signum: signal.Signals
) -> None:
    file = guest_file(tmp_path, size="1GiB")
    running = start(*memory_group.command([sys.executable, "-m", "vmmback", "launch", file, "--json"]))
    running.wait_until(lambda: memory_group.used() > 128 * MIB, "the prefault is under way")
    (worker,) = worker_of(runtime_dir)
    assert os.getpgid(worker) != running.process.pid  # a terminal's Ctrl-C is not for it
    running.signal(signum)
    assert_interrupted(running.ended(), signum)
    assert processes_of(runtime_dir) == {}
    eventually(lambda: memory_group.used() < 64 * MIB, "memory is back", GONE_S)


# In setpriv's place stands a script that never starts QEMU.
STARTS_NEVER = """
import sys
from pathlib import Path
from vmmback import cli, handoff, jail
programs = sys.argv.pop(1)
handoff._ENVIRONMENT = {"PATH": programs + ":" + handoff._ENVIRONMENT["PATH"]}
jail._FOLDERS = (*jail._FOLDERS, Path(programs))
cli.main()
"""


@SIGNALS
def test_while_qemu_starts(start: Start, tmp_path: Path, runtime_dir: Path, signum: signal.Signals) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "setpriv").write_text("#!/bin/sh\nexec sleep 1000 # for ever; argv names the folder\n")
    (programs / "setpriv").chmod(0o755)
    running = start(sys.executable, "-c", STARTS_NEVER, str(programs), "launch", guest_file(tmp_path), "--json")
    running.wait_until(lambda: "sleep" in names_of_children(running), "QEMU's stand-in runs")
    running.signal(signum)
    assert_interrupted(running.ended(), signum)


def names_of_children(running: Supervisor) -> set[str]:
    names = set()
    for thread in Path(f"/proc/{running.process.pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            for pid in (thread / "children").read_text().split():
                names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


@SIGNALS
def test_while_the_guest_boots(start: Start, tmp_path: Path, signum: signal.Signals) -> None:
    """It runs, but was not validated."""
    running = patient(start, 0.1, "launch", guest_file(tmp_path, ready="NEVER"), "--json")
    running.wait_for("READY")
    running.signal(signum)
    ended = running.ended()
    assert ended.code == 8, ended.stderr
    assert report_of(ended)["verdict"] == "inconclusive"
    assert "spy: audit" not in ended.stderr


@SIGNALS
def test_while_the_probes_run(start: Start, tmp_path: Path, signum: signal.Signals) -> None:
    """They are over soon, so they are completed, and the report is whole."""
    running = patient(start, 0.1, "launch", guest_file(tmp_path, size="128MiB"), "--json")
    running.wait_for("spy: audit begins")
    running.signal(signum)
    ended = running.ended()
    assert ended.code == 0, ended.stderr
    assert report_of(ended)["verdict"] == "isolated"


@SIGNALS
def test_while_the_guest_runs(start: Start, tmp_path: Path, runtime_dir: Path, signum: signal.Signals) -> None:
    running = patient(start, 0.1, "launch", guest_file(tmp_path), "--json")
    running.wait_for("is isolated while it runs")
    (qemu,) = qemu_of(runtime_dir)
    assert os.getpgid(qemu) != running.process.pid  # nor is it for QEMU, which would end at once
    running.signal(signum)
    ended = running.ended()
    assert ended.code == 0, ended.stderr
    assert report_of(ended)["verdict"] == "isolated"
    assert ended.stderr.index("spy: powerdown ends") < ended.stderr.index("spy: quit begins")


def test_a_second_signal_cuts_the_patience_short(start: Start, tmp_path: Path) -> None:
    running = patient(start, 600, "launch", guest_file(tmp_path), "--json")
    running.wait_for("is isolated while it runs")
    running.signal(signal.SIGINT)
    running.wait_for("spy: powerdown ends")
    assert "spy: quit" not in running.stderr
    running.signal(signal.SIGINT)
    ended = running.ended()
    assert ended.code == 0, ended.stderr
    assert "spy: quit begins" in ended.stderr


def test_two_signals_at_once_count_as_two(start: Start, tmp_path: Path) -> None:
    """An impatient user, or Ctrl-C and a service manager at the same moment."""
    running = patient(start, 600, "launch", guest_file(tmp_path), "--json")
    running.wait_for("is isolated while it runs")
    running.signal(signal.SIGINT)
    running.signal(signal.SIGTERM)
    ended = running.ended()
    assert ended.code == 0, ended.stderr


def test_a_third_signal_kills_a_qemu_that_does_not_answer(start: Start, tmp_path: Path, runtime_dir: Path) -> None:
    """One that hangs: stopped here. It answers neither request, and must not make the user wait for that."""
    running = patient(start, 600, "launch", guest_file(tmp_path), "--json")
    running.wait_for("is isolated while it runs")
    (qemu,) = qemu_of(runtime_dir)
    os.kill(qemu, signal.SIGSTOP)
    for begins in ("spy: powerdown begins", "spy: quit begins"):
        running.signal(signal.SIGINT)
        running.wait_for(begins)
    running.signal(signal.SIGINT)
    ended = running.ended()
    assert ended.code == 0, ended.stderr
    assert report_of(ended)["verdict"] == "isolated"
    assert_frames_came_back_zeroed(report_of(ended))


def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    """The terminal signals the whole foreground group; QEMU, the worker and the keeper are not in it."""
    argv = [sys.executable, "-c", IMPATIENT, "0.1", "launch", str(guest_file(tmp_path))]
    with Terminal(argv) as terminal:
        terminal.read_until(lambda: "0 readable: isolated" in terminal.text, "the guest is validated")
        terminal.type(b"\x03")
        assert terminal.ended() == 0, terminal.text
    assert "spy: powerdown ends" in terminal.text
    assert "│ freed-frames" in terminal.text
