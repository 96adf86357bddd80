"""`vmmback selftest` from outside: every vector, on this host, with its control."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from junitparser import Failure, JUnitXml

from integration.conftest import ROOT, Start, processes_of
from vmmback.isolation.audit import REQUIRED
from vmmback.isolation.catalogue import CATALOGUE, LIVE_PROBES, RIGHTS_PROBES

pytestmark = pytest.mark.usefixtures("needs_qemu", "needs_direct_map")

SELFTEST = [sys.executable, "-m", "vmmback", "selftest"]
NEEDED = REQUIRED | {"freed-frames"}
ON_GUESTS = NEEDED | {probe.name for probe in (*LIVE_PROBES, *RIGHTS_PROBES)}

# What a machine may lack; all else is tried on every one that runs these tests.
MAY_BE_MISSING = {
    "numa-migration",  # a second NUMA node
    "soft-dirty",  # CONFIG_MEM_SOFT_DIRTY
    "page-idle",  # CONFIG_IDLE_PAGE_TRACKING
    "proc-kcore",  # CONFIG_PROC_KCORE
    "dev-mem",  # CONFIG_DEVMEM
    "dev-mem-mmap",
    "gcore",  # gdb
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One self-test, with its page and its XML beside it."""
    folder = tmp_path_factory.mktemp("selftest")
    argv = [*SELFTEST, "--json", "--html", str(folder / "page.html"), "--junit", str(folder / "junit.xml")]
    environment = {**os.environ, "VMMBACK_RUNTIME_DIR": str(folder / "run")}
    ended = subprocess.run(
        argv,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert processes_of(folder / "run") == {}
    return folder, ended


@pytest.fixture
def path_without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).iterdir() if Path(folder).is_dir() else ():
            if not program.name.startswith("qemu-system-") and not (programs / program.name).is_symlink():
                (programs / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(programs))


@pytest.fixture(autouse=True)
def no_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It makes temporary folders, here in one that is this test's alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield
    assert list(folder.iterdir()) == []


def vectors_of(text: str) -> dict[str, Any]:
    return {vector["name"]: vector for vector in json.loads(text)["vectors"]}


def failures_in(xml: Path) -> set[str]:
    cases = [case for suite in JUnitXml.fromfile(str(xml)) for case in suite]
    return {case.name for case in cases if any(isinstance(result, Failure) for result in case.result)}


def test_every_vector_is_tried_and_its_control_works(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, ended = whole
    assert (ended.returncode, ended.stderr) == (0, "")
    report = json.loads(ended.stdout)
    vectors = vectors_of(ended.stdout)
    assert (report["verdict"], report["reasons"]) == ("passed", [])
    assert report["seconds"] < 120
    assert len(vectors) == len(report["vectors"]) >= 30
    assert vectors.keys() == {kind.name for kind in CATALOGUE}
    assert {
        name for name, vector in vectors.items() if vector["control"] != "readable" and not vector["missing"]
    } == set()
    assert {name for name, vector in vectors.items() if vector["verdict"] == "inconclusive"} == {
        name for name, vector in vectors.items() if vector["missing"]
    }
    probes = {name: vector for name, vector in vectors.items() if vector["kind"] == "probe" and not vector["missing"]}
    assert {name for name, vector in probes.items() if vector["verdict"] != "blocked"} == set()
    assert len(probes) >= 30
    assert {vector["verdict"] for name, vector in vectors.items() if vector["kind"] == "exposure"} >= {"readable"}
    assert all(vector["holders"] for vector in vectors.values() if vector["kind"] == "exposure")
    assert report["host"]["qemu"]
    assert report["settings"]


def test_what_is_missing_is_known(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    missing = {name: vector["missing"] for name, vector in vectors_of(whole[1].stdout).items() if vector["missing"]}
    unknown = {name: what for name, what in missing.items() if name not in MAY_BE_MISSING}
    if os.environ.get("CI") != "true" and unknown:
        pytest.skip(f"this machine lacks what those of CI have: {unknown}")
    assert unknown == {}


def test_its_page_and_its_xml(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, ended = whole
    vectors = vectors_of(ended.stdout)
    page = (folder / "page.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert all(f">{name}<" in page for name in vectors)
    assert vectors.keys() <= {case.name for suite in JUnitXml.fromfile(str(folder / "junit.xml")) for case in suite}
    assert failures_in(folder / "junit.xml") == set()
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["junit.xml", "page.html"]


@pytest.mark.usefixtures("path_without_qemu")
def test_without_qemu_what_needs_a_guest_is_missing_and_the_host_does_not_pass(start: Start) -> None:
    """That QEMU is not there is something the host lacks, which is named; all else is tried and blocked."""
    ended = start(*SELFTEST, "--json").ended()
    assert ended.code == 8, ended.stderr
    vectors = vectors_of(ended.stdout)
    report = json.loads(ended.stdout)
    assert report["verdict"] == "inconclusive"
    assert {reason.partition(":")[0] for reason in report["reasons"]} == NEEDED
    assert vectors.keys() == {kind.name for kind in CATALOGUE}
    without = {name for name, vector in vectors.items() if "qemu-system-" in vector["missing"]}
    assert without == ON_GUESTS
    assert sum(vector["verdict"] == "blocked" for vector in vectors.values()) >= 30


# Vectors fail on purpose: what should be secret RAM is ordinary memory for one of them.
BROKEN = """
from vmmback import cli
from vmmback.isolation.file_calls import FileReadProbe
FileReadProbe.target = FileReadProbe.control
cli.main()
"""


@pytest.mark.usefixtures("path_without_qemu")
def test_a_vector_that_reads_its_target_makes_it_fail(start: Start, tmp_path: Path) -> None:
    ended = start(sys.executable, "-c", BROKEN, "selftest", "--json", "--junit", tmp_path / "junit.xml").ended()
    assert ended.code == 5, ended.stderr
    assert json.loads(ended.stdout)["verdict"] == "failed"
    assert vectors_of(ended.stdout)["file-read"]["verdict"] == "readable"
    assert failures_in(tmp_path / "junit.xml") >= {"file-read"}


# The guest that should be on secret RAM is like its twin.
BOTH_ORDINARY = """
from msgspec.structs import replace
from vmmback import cli, selftest
config = selftest._config
selftest._config = lambda folder, backing: replace(config(folder, "ordinary"), name="a-" + backing)
selftest.DISTURBING_PROBES = ()
cli.main()
"""


def test_a_guest_that_is_not_on_secret_ram_makes_it_fail(start: Start) -> None:
    ended = start(sys.executable, "-c", BOTH_ORDINARY, "selftest", "--json").ended()
    assert ended.code == 5, ended.stderr
    readable = {name for name, vector in vectors_of(ended.stdout).items() if vector["verdict"] == "readable"}
    assert readable == ON_GUESTS - {"holders", "tracer", "unprivileged"}


# QEMU is there, but the guest does not come up: nothing that the host lacks.
NEVER_READY = """
from vmmback import cli, selftest
selftest._READY_TIMEOUT_S = 0
selftest.DISTURBING_PROBES = selftest.DISTURBING_PROBES[:1]
cli.main()
"""


def test_a_guest_that_fails_is_inconclusive_and_nothing_that_is_missing(start: Start) -> None:
    ended = start(sys.executable, "-c", NEVER_READY, "selftest", "--json").ended()
    assert ended.code == 8, ended.stderr
    vectors = vectors_of(ended.stdout)
    assert {vectors[name]["verdict"] for name in ON_GUESTS} == {"inconclusive"}
    assert {vectors[name]["missing"] for name in ON_GUESTS} == {""}
    assert "was not ready within 0 s" in vectors["direct-map"]["detail"]


@pytest.mark.parametrize(
    ("signum", "what"),
    [(signal.SIGINT, "qemu-system-"), (signal.SIGTERM, "throwaway_worker.py")],
    ids=["SIGINT-with-guests", "SIGTERM-with-a-throwaway"],
)
def test_a_signal_ends_it_and_leaves_nothing(
    start: Start, runtime_dir: Path, signum: signal.Signals, what: str
) -> None:
    running = start(*SELFTEST, "--json")
    running.wait_until(lambda: any(what in line for line in processes_of(runtime_dir).values()), f"there is a {what}")
    running.process.send_signal(signum)
    ended = running.ended()
    assert ended.code == 128 + signum, ended.stderr
    assert ended.stderr == f"vmmback: error: stopped by {signum.name} before the self-test was done\n"
    assert ended.stdout == ""
    assert processes_of(runtime_dir) == {}
