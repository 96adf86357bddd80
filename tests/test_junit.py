"""JUnit XML: what each result becomes, that numbers add up, and that it is XML whatever a guest or a host chose."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import junitparser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.sample_reports import (
    HOSTILE,
    bare_report,
    exposed_report,
    guest_report,
    hostile_report,
    probe,
    process,
    selftest_report,
    vector,
)
from vmmback.render.junit import guest_xml, selftest_xml
from vmmback.render.text import visible
from vmmback.report import Drift, Exposure, SelftestVerdict, Verdict

DOCUMENTS = {
    "isolated": guest_xml(guest_report()),
    "exposed": guest_xml(exposed_report()),
    "bare": guest_xml(bare_report()),
    "hostile": guest_xml(hostile_report(" ".join(HOSTILE))),
    "selftest": selftest_xml(selftest_report()),
    "failed selftest": selftest_xml(selftest_report(vector("evil", Verdict.READABLE))),
}
every_document = pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)


def ends(document: str) -> dict[str, str]:
    """Return how each test ended: "passed", or the name of the element that says otherwise."""
    found = {}
    for case in ET.fromstring(document).iter("testcase"):
        (end,) = [child.tag for child in case if child.tag != "system-out"] or ["passed"]
        suite = case.attrib["classname"].rpartition(".")[2]
        found[f"{suite}/{case.attrib['name']}"] = end
    return found


def message(document: str, name: str) -> str:
    (case,) = [case for case in ET.fromstring(document).iter("testcase") if case.attrib["name"] == name]
    return next(child.attrib["message"] for child in case if child.tag != "system-out")


def test_an_isolated_guest_passes_and_what_the_host_lacks_is_skipped() -> None:
    assert {name: end for name, end in ends(DOCUMENTS["isolated"]).items() if end != "passed"} == {
        "probes/kcore": "skipped"
    }
    assert message(DOCUMENTS["isolated"], "kcore") == "this host lacks /proc/kcore"


def test_every_result_of_a_guest_is_a_test() -> None:
    report = exposed_report()
    expected = {
        "verdict/verdict",
        *(f"probes/{one.name}" for one in report.probes),
        *(f"ram-blocks/{one.name}" for one in report.ram_blocks),
        *(f"exposures/{one.name}" for one in report.exposures),
        *(f"drifts/{one.probe}" for one in report.drifts),
        "hunt/guest-frames",
        "process/qemu",
    }
    assert set(ends(DOCUMENTS["exposed"])) == expected


def test_what_exposes_a_guest_is_a_failure() -> None:
    assert ends(DOCUMENTS["exposed"]) == {
        "verdict/verdict": "failure",
        "ram-blocks/ram0": "failure",
        "probes/direct-map": "failure",
        "probes/proc-mem": "failure",
        "probes/fd-reopen": "failure",
        "probes/process-vm-readv": "error",
        "process/qemu": "passed",
        "hunt/guest-frames": "failure",
        "drifts/vma-flags": "failure",
        "exposures/pidfd-getfd": "passed",
        "exposures/serial-console": "passed",
    }
    assert message(DOCUMENTS["exposed"], "guest-frames") == "16,128 hits in the guest's frames"


@pytest.mark.parametrize(
    ("verdict", "control", "missing", "end"),
    [
        (Verdict.BLOCKED, Verdict.READABLE, "", "passed"),
        (Verdict.READABLE, Verdict.READABLE, "", "failure"),
        (Verdict.READABLE, Verdict.BLOCKED, "a thing", "failure"),
        (Verdict.INCONCLUSIVE, Verdict.BLOCKED, "", "error"),
        (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE, "a thing", "skipped"),
    ],
)
def test_a_probe_becomes(verdict: Verdict, control: Verdict, missing: str, end: str) -> None:
    fields: dict[str, Any] = {"control": control, "missing": missing}
    assert ends(guest_xml(guest_report(probes=(probe("one", verdict, "seen", **fields),))))["probes/one"] == end
    assert ends(selftest_xml(selftest_report(vector("one", verdict, **fields))))["probes/one"] == end


def test_a_guest_of_which_nothing_was_shown_is_an_error() -> None:
    assert ends(DOCUMENTS["bare"]) == {"verdict/verdict": "error"}


def test_an_exposure_passes_and_says_what_was_measured_and_who_holds_the_key() -> None:
    selftest = ends(DOCUMENTS["selftest"])
    assert selftest["exposures/pidfd-getfd"] == selftest["exposures/same-uid-pidfd-getfd"] == "passed"
    (case,) = [one for one in ET.fromstring(DOCUMENTS["selftest"]).iter("testcase") if one.get("name") == "pidfd-getfd"]
    output = (case.findtext("system-out") or "").splitlines()
    assert {"verdict: readable", "who holds the key: root, CAP_SYS_PTRACE"} <= set(output)


def test_what_two_have_by_one_name_are_two_tests() -> None:
    report = guest_report()
    network = [Exposure(name="network", holders="root", detail=f"nic {number}") for number in (0, 1)]
    drifts = [Drift(at="2026-01-01T00:00:00Z", probe="tracer", detail=text) for text in ("one", "two")]
    document = guest_xml(replace(report, exposures=tuple(network), drifts=tuple(drifts)))
    names = [(case.attrib["classname"], case.attrib["name"]) for case in ET.fromstring(document).iter("testcase")]
    assert len(names) == len(set(names))
    assert {name for place, name in names if place.endswith("exposures")} == {"network", "network (2)"}
    assert {name for place, name in names if place.endswith("drifts")} == {"tracer", "tracer (2)"}


def test_what_qemu_is_and_should_not_be_is_its_output() -> None:
    document = guest_xml(replace(guest_report(), process=process(lacking=("it may dump core",))))
    (case,) = [case for case in ET.fromstring(document).iter("testcase") if case.attrib["name"] == "qemu"]
    assert case.attrib["classname"].endswith(".process")
    assert "not as it should be: it may dump core" in (case.findtext("system-out") or "")


def test_a_self_test_says_why_it_did_not_pass() -> None:
    failed = ET.fromstring(DOCUMENTS["failed selftest"])
    assert failed.findtext(".//testcase[@name='verdict']/failure") == "verdict: failed\nevil: evil: readable"
    empty = replace(selftest_report(), verdict=SelftestVerdict.INCONCLUSIVE, reasons=("no probe was blocked",))
    assert "no probe was blocked" in (ET.fromstring(selftest_xml(empty)).findtext(".//error") or "")


def test_the_host_is_told_in_properties() -> None:
    for name in ("isolated", "selftest"):
        told = {one.attrib["name"]: one.attrib["value"] for one in ET.fromstring(DOCUMENTS[name]).iter("property")}
        assert told["host.kernel"] == "6.1.0-18-amd64"
        assert told["setting.hibernation"].startswith("[disabled] platform (risk: ")
    assert DOCUMENTS["isolated"].count("<properties>") == 1


@every_document
def test_the_numbers_of_tests_and_ends_add_up(document: str) -> None:
    root = ET.fromstring(document)
    for element in [root, *root.findall("testsuite")]:
        cases = list(element.iter("testcase"))
        counted = {end: sum(case.find(end) is not None for case in cases) for end in ("failure", "error", "skipped")}
        assert int(element.attrib["tests"]) == len(cases) >= 1
        assert int(element.attrib["failures"]) == counted["failure"]
        assert int(element.attrib["errors"]) == counted["error"]
        assert int(element.attrib["skipped"]) == counted["skipped"]
        seconds = sum(float(case.attrib["time"]) for case in cases)
        assert float(element.attrib["time"]) == pytest.approx(seconds, abs=1e-6)


@every_document
def test_elements_have_the_attributes_and_the_order_that_readers_ask_for(document: str) -> None:
    root = ET.fromstring(document)
    assert root.tag == "testsuites"
    for suite in root:
        assert [child.tag for child in suite if child.tag != "testcase"] == (["properties"] if suite is root[0] else [])
        for case in suite.findall("testcase"):
            assert set(case.attrib) == {"classname", "name", "time"}
            assert [child.tag for child in case][-1:] != ["skipped"]  # its detail follows
            for end in case.findall("failure") + case.findall("error"):
                assert set(end.attrib) == {"message", "type"}


@every_document
def test_another_reader_of_junit_finds_the_same(document: str) -> None:
    read = junitparser.JUnitXml.fromstring(document.encode())
    root = ET.fromstring(document)
    assert isinstance(read, junitparser.JUnitXml)
    assert [len(list(suite)) for suite in read] == [len(suite.findall("testcase")) for suite in root]
    kinds = [type(result).__name__.lower() for suite in read for case in suite for result in case.result]
    assert sorted(kinds) == sorted(end for end in ends_in_order(root) if end)


def ends_in_order(root: ET.Element) -> list[str]:
    return [child.tag for case in root.iter("testcase") for child in case if child.tag != "system-out"]


def test_the_same_report_gives_the_same_xml() -> None:
    assert guest_xml(exposed_report()) == DOCUMENTS["exposed"]
    assert selftest_xml(selftest_report()) == DOCUMENTS["selftest"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_guest_or_a_host_chose_is_text_and_nothing_else(hostile: str) -> None:
    parsed, harmless = (ET.fromstring(guest_xml(hostile_report(text))) for text in (hostile, "harmless"))
    assert [element.tag for element in parsed.iter()] == [element.tag for element in harmless.iter()]
    for element, plain in zip(parsed.iter(), harmless.iter(), strict=True):
        expected = {name: value.replace("harmless", visible(hostile)) for name, value in plain.attrib.items()}
        assert element.attrib == expected
        assert element.text == (plain.text and plain.text.replace("harmless", visible(hostile)))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=40))
def test_it_is_xml_whatever_a_guest_or_a_host_chose(anything: str) -> None:
    document = guest_xml(hostile_report(anything))
    assert document.isascii()
    assert document.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<testsuites ')
    root = ET.fromstring(document)
    assert root.attrib["name"] == f"vmmback.guest.{visible(anything)}"
    assert document == guest_xml(hostile_report(anything))
