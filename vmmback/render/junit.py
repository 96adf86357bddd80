"""A report as JUnit XML, as Jenkins, GitLab and readers for GitHub take it: <testsuites>, <testsuite>, <testcase>.

Such a reader knows four ends of a test, and this is how a report becomes them:

- failure: a probe was readable, a RAM block that the guest can write is ordinary memory, the hunt found its needle in
  the guest's frames, something drifted, the verdict is `exposed` or `failed`;
- skipped: a probe for which the host lacks something (`missing`);
- error: any other inconclusive probe, and an inconclusive verdict;
- passed: all else. Exposures and what QEMU's process is pass too, with what was measured as their output: they are
  known, the verdict does not cover them, and a build that fails for ever tells nothing. Settings of the host are
  properties, for the same reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from xml.etree import ElementTree as ET

from msgspec.structs import asdict

from vmmback.render.text import count, process_facts, visible
from vmmback.report import (
    GuestVerdict,
    Host,
    HostSetting,
    Hunt,
    IsolationReport,
    ProbeResult,
    Process,
    RamBlock,
    SelftestReport,
    SelftestVerdict,
    VectorResult,
    Verdict,
)

_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'


@dataclass(frozen=True)
class _Case:
    """One test: `end` is "failure", "error", "skipped" or "" (passed), `message` why, `output` lines of detail."""

    name: str
    end: str = ""
    message: str = ""
    output: tuple[str, ...] = ()
    seconds: float = 0.0


def guest_xml(report: IsolationReport) -> str:
    """Return a guest's report as JUnit XML, in ASCII.

    Suites: verdict, ram-blocks, probes, process, hunt, drifts, exposures.
    """
    suites = {
        "verdict": [_verdict(report.verdict, report.reasons)],
        "ram-blocks": [_ram_block(block) for block in report.ram_blocks],
        "probes": [_probe(probe) for probe in report.probes],
        "process": [_process(report.process)] if report.process else [],
        "hunt": [_hunt(report.hunt)] if report.hunt else [],
        "drifts": [_Case(drift.probe, "failure", f"{drift.at}: {drift.detail}") for drift in report.drifts],
        "exposures": [
            _Case(exposure.name, output=(f"who holds the key: {exposure.holders}", exposure.detail))
            for exposure in report.exposures
        ],
    }
    properties = {
        **_host(report.host, report.host.settings),
        "validated_after": report.validated_after,
        **{f"memory.{name}": str(value) for name, value in asdict(report.memory).items()},
        **{f"timing.{name}": f"{seconds:.6f}" for name, seconds in report.timings.items()},
    }
    return _document(f"vmmback.guest.{report.guest}", suites, properties)


def selftest_xml(report: SelftestReport) -> str:
    """Return a self-test's report as JUnit XML, in ASCII. Suites: verdict, probes, exposures."""
    suites = {
        "verdict": [_verdict(report.verdict, report.reasons)],
        "probes": [_probe(vector) for vector in report.vectors if vector.kind == "probe"],
        "exposures": [_exposure(vector) for vector in report.vectors if vector.kind == "exposure"],
    }
    properties = {**_host(report.host, report.settings), "seconds": f"{report.seconds:.6f}"}
    return _document("vmmback.selftest", suites, properties)


def _verdict(verdict: GuestVerdict | SelftestVerdict, reasons: Iterable[str]) -> _Case:
    end = {"exposed": "failure", "failed": "failure", "inconclusive": "error"}.get(verdict, "")
    return _Case("verdict", end, verdict.value if end else "", (f"verdict: {verdict.value}", *reasons))


def _probe(probe: ProbeResult | VectorResult) -> _Case:
    if probe.verdict is Verdict.READABLE:
        end, message = "failure", f"readable: {probe.detail}"
    elif probe.verdict is Verdict.BLOCKED:
        end, message = "", ""
    elif probe.missing:
        end, message = "skipped", f"this host lacks {probe.missing}"
    else:
        end, message = "error", f"inconclusive: {probe.detail}"
    output = [f"verdict: {probe.verdict.value}", f"control: {probe.control.value}", probe.detail]
    if probe.errno:
        output.append(f"errno: {probe.errno}")
    if isinstance(probe, VectorResult):
        output += [f"tried: {probe.vector}", f"source: {probe.source}"]
    return _Case(probe.name, end, message, tuple(output), probe.seconds)


def _exposure(vector: VectorResult) -> _Case:
    end = "skipped" if vector.missing else ""
    output = (
        f"verdict: {vector.verdict.value}",
        f"who holds the key: {vector.holders}",
        vector.detail,
        f"tried: {vector.vector}",
        f"source: {vector.source}",
    )
    return _Case(vector.name, end, f"this host lacks {vector.missing}" if end else "", output, vector.seconds)


def _ram_block(block: RamBlock) -> _Case:
    exposed = block.guest_writable and block.backing != "secretmem"
    writable = "the guest can write to it" if block.guest_writable else "the guest cannot write to it"
    output = f"{block.size} bytes, {block.backing}; {writable}"
    message = "ordinary memory that the guest can write to"
    return _Case(block.name, *(("failure", message) if exposed else ("", "")), (output,))


def _process(process: Process) -> _Case:
    """Return what QEMU is; like an exposure it passes, for the verdict does not cover it."""
    return _Case("qemu", output=tuple(f"{name}: {seen}" for name, seen in process_facts(process)))


def _hunt(hunt: Hunt) -> _Case:
    places = [
        f"{place.place} ({place.owner}): {count(place.hits, 'frame')}: "
        + ", ".join(f"{example:x}" for example in place.examples)
        for place in hunt.places
    ]
    searched = (
        f"{count(hunt.hits, 'hit')} of {hunt.needle_bytes} bytes in {hunt.scanned_bytes} bytes; "
        f"{hunt.unreadable_bytes} bytes were not readable; {hunt.gib_per_s:.1f} GiB/s"
    )
    found = ("failure", f"{count(hunt.guest_hits, 'hit')} in the guest's frames") if hunt.guest_hits else ("", "")
    return _Case("guest-frames", *found, (searched, *places), hunt.seconds)


def _host(host: Host, settings: Iterable[HostSetting]) -> dict[str, str]:
    return {
        "host.kernel": host.kernel,
        "host.qemu": host.qemu,
        "host.accel": host.accel,
        **{f"setting.{one.name}": f"{one.value} ({one.risk}: {one.detail})" for one in settings},
    }


def _document(name: str, suites: dict[str, list[_Case]], properties: dict[str, str]) -> str:
    """Return the XML; the properties stand in the first suite, and an empty suite is left out."""
    cases = [case for suite in suites.values() for case in suite]
    root = ET.Element("testsuites", {"name": visible(name), **_counts(cases)})
    for title, members in suites.items():
        if not members:
            continue
        suite = ET.SubElement(root, "testsuite", {"name": visible(f"{name}.{title}"), **_counts(members)})
        if len(root) == 1:
            listed = ET.SubElement(suite, "properties")
            for key, value in properties.items():
                ET.SubElement(listed, "property", {"name": visible(key), "value": visible(value)})
        seen: Counter[str] = Counter()
        for case in members:
            # Two nics are two exposures of one name, and a reader keeps one test of a name.
            seen[case.name] += 1
            times = seen[case.name]
            _append(suite, f"{name}.{title}", case if times == 1 else replace(case, name=f"{case.name} ({times})"))
    ET.indent(root)
    # ASCII with character references says the same in whatever encoding it is written.
    body: bytes = ET.tostring(root, encoding="us-ascii", xml_declaration=False)
    return f"{_DECLARATION}{body.decode('ascii')}\n"


def _append(suite: ET.Element, classname: str, case: _Case) -> None:
    names = {"classname": visible(classname), "name": visible(case.name), "time": f"{case.seconds:.6f}"}
    element = ET.SubElement(suite, "testcase", names)
    output = "\n".join(visible(line) for line in case.output)
    if case.end:
        end = ET.SubElement(element, case.end, {"message": visible(case.message)})
    if case.end in {"failure", "error"}:
        end.set("type", case.end)
        end.text = output
    elif output:
        ET.SubElement(element, "system-out").text = output


def _counts(cases: list[_Case]) -> dict[str, str]:
    """Return the attributes that say how many tests there are, and how many ended in which way."""
    ends = [case.end for case in cases]
    return {
        "tests": str(len(cases)),
        "failures": str(ends.count("failure")),
        "errors": str(ends.count("error")),
        "skipped": str(ends.count("skipped")),
        "time": f"{sum(case.seconds for case in cases):.6f}",
    }
