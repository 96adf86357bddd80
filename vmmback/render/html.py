"""A report as one HTML page: no script, nothing from elsewhere, and a policy that forbids the browser both.

The strings of a report are chosen by guests and hosts. Jinja2 escapes each one, after `visible` has taken what cannot
be seen out of it, and the page's Content-Security-Policy allows its own style sheet alone, by its hash: were a string
to get through, it could neither run nor fetch anything. The same report always gives the same page, in ASCII.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from vmmback.render import memory_map, text
from vmmback.report import (
    GuestVerdict,
    IsolationReport,
    ProbeResult,
    SelftestReport,
    SelftestVerdict,
    VectorResult,
    Verdict,
)

Docs = Mapping[str, tuple[str, str, str]]
"""For the names of probes: what is tried, what its control is, and the source of the quirk it relies on."""

_TONES = {
    "isolated": "good",
    "passed": "good",
    "blocked": "good",
    "exposed": "bad",
    "failed": "bad",
    "readable": "bad",
    "inconclusive": "unsure",
}
_EXPOSURES = {
    Verdict.READABLE: ("open", "unsure"),
    Verdict.BLOCKED: ("refused here", "plain"),
    Verdict.INCONCLUSIVE: ("not measured", "plain"),
}
_CONTROLS = {
    Verdict.READABLE: ("was read", "good"),
    Verdict.BLOCKED: ("refused too", "unsure"),
    Verdict.INCONCLUSIVE: ("failed", "unsure"),
}


def guest_page(report: IsolationReport, docs: Docs | None = None) -> str:
    """Return the page of a guest; `docs` add what is known of its probes beyond the report."""
    drawn = list(memory_map.rows(report.memory_map))
    return _page(
        "guest.html",
        report=report,
        docs=docs or {},
        headline=_GUEST_HEADLINES[report.verdict],
        rows=drawn,
        totals=memory_map.totals(drawn),
        counts=_counts(report.probes),
        process=text.process_facts(report.process) if report.process else [],
    )


def selftest_page(report: SelftestReport) -> str:
    """Return the page of a self-test of the host."""
    probes = [vector for vector in report.vectors if vector.kind == "probe"]
    return _page(
        "selftest.html",
        report=report,
        headline=_SELFTEST_HEADLINES[report.verdict],
        probes=probes,
        exposures=[vector for vector in report.vectors if vector.kind == "exposure"],
        counts=_counts(probes),
        docs={vector.name: (vector.vector, "", vector.source) for vector in report.vectors},
    )


_GUEST_HEADLINES = {
    GuestVerdict.ISOLATED: "The host could not read this guest's RAM in any way that was tried.",
    GuestVerdict.EXPOSED: "The host can read this guest, or the guest can write to memory that the host can read.",
    GuestVerdict.INCONCLUSIVE: "It was not shown that the host cannot read this guest's RAM.",
}
_SELFTEST_HEADLINES = {
    SelftestVerdict.PASSED: "Secret RAM of this host refused every probe that could be tried.",
    SelftestVerdict.FAILED: "Secret RAM of this host was read.",
    SelftestVerdict.INCONCLUSIVE: "It was not shown that secret RAM of this host cannot be read.",
}


def _counts(probes: list[VectorResult] | tuple[ProbeResult, ...]) -> dict[str, int]:
    """Count the probes by verdict; those that lacked something are `missing`, not `inconclusive`."""
    counted = dict.fromkeys([*Verdict, "missing"], 0)
    for probe in probes:
        counted["missing" if _was_not_tried(probe) else probe.verdict] += 1
    return {"all": len(probes), **counted}


def _was_not_tried(probe: ProbeResult | VectorResult) -> bool:
    return probe.verdict is Verdict.INCONCLUSIVE and bool(probe.missing)


def _finalize(value: Any) -> Any:
    return text.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vmmback.render"),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=text.size,
        duration=text.duration,
        address=text.address,
        counted=text.count,
        tone=lambda verdict: _TONES[verdict],
        exposure=lambda verdict: _EXPOSURES[verdict],
        control=lambda verdict: _CONTROLS[verdict],
    )
    environment.tests["not_tried"] = _was_not_tried
    return environment


def _page(template: str, **context: Any) -> str:
    style = files(__package__).joinpath("templates/style.css").read_text("ascii")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = _environment().get_template(template).render(style=Markup(style), style_hash=Markup(digest), **context)  # noqa: S704  our own file, and Base64
    return page.encode("ascii", "xmlcharrefreplace").decode()
