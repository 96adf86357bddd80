"""The page of a report: all that was measured is on it, and nothing that a guest or a host chose leaves its place."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.sample_reports import (
    DOCS,
    HOSTILE,
    bare_report,
    exposed_report,
    guest_report,
    hostile_report,
    hostile_setting,
    hunt,
    probe,
    selftest_report,
    vector,
)
from vmmback.render import text
from vmmback.render.html import guest_page, selftest_page
from vmmback.report import IsolationReport, SelftestReport, SelftestVerdict, Verdict

VOID = {"meta", "path", "circle", "br"}
FORBIDDEN = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "use", "image"}
STYLE = files("vmmback.render").joinpath("templates/style.css").read_text("ascii")


@dataclass
class Node:
    """An element, and all text in it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Parsed(HTMLParser):
    """A page, parsed: its elements in their order, the text of it all, and faults in its nesting."""

    page: str
    nodes: list[Node] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _open: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.page)
        self.close()
        self.faults += [f"{node.tag} stays open" for node in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.nodes.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.nodes.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop().tag != tag:
            self.faults.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        for node in self._open:
            node.text += data

    def all(self, tag: str, **attributes: str) -> list[Node]:
        """Return the elements of one tag that have these attributes."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [node for node in self.nodes if node.tag == tag and wanted.items() <= node.attributes.items()]

    def one(self, tag: str, **attributes: str) -> Node:
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def shape(self) -> list[tuple[str, dict[str, str]]]:
        return [(node.tag, node.attributes) for node in self.nodes]


def words(node: Node) -> str:
    return " ".join(node.text.split())


def section(page: str, name: str) -> str:
    """Return the text of one section."""
    return words(Parsed(page).one("section", id=name))


GUESTS = {"isolated": guest_report(), "exposed": exposed_report(), "bare": bare_report()}
PAGES = {
    **{name: guest_page(report, DOCS) for name, report in GUESTS.items()},
    "hostile": guest_page(hostile_report(" ".join(HOSTILE)), DOCS),
    "selftest": selftest_page(selftest_report()),
    "empty selftest": selftest_page(
        replace(
            selftest_report(),
            vectors=(),
            settings=(),
            verdict=SelftestVerdict.INCONCLUSIVE,
            reasons=("no probe was blocked",),
        )
    ),
}
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


# --- All of the report is there ---------------------------------------------------------------------------------------


def assert_has(where: str, *expected: str) -> None:
    assert [text for text in expected if " ".join(text.split()) not in where] == []


@pytest.mark.parametrize("report", GUESTS.values(), ids=GUESTS)
def test_everything_that_was_measured_of_a_guest_is_on_its_page(report: IsolationReport) -> None:
    page = guest_page(report)
    assert_has(words(Parsed(page).one("header")), report.guest, report.verdict, *report.reasons, report.validated_after)
    for one in report.probes:
        assert_has(section(page, "probes"), one.name, one.detail, one.errno, one.missing)
    for block in report.ram_blocks:
        assert_has(section(page, "blocks"), block.name, text.size(block.size), block.backing)
    for exposure in report.exposures:
        assert_has(section(page, "exposures"), exposure.name, exposure.holders, exposure.detail)
    for setting in report.host.settings:
        assert_has(section(page, "host"), setting.name, setting.value, setting.risk, setting.detail, setting.source)
    assert_has(section(page, "host"), report.host.kernel, report.host.qemu, report.host.accel)
    for drift in report.drifts:
        assert_has(section(page, "drifts"), drift.at, drift.probe, drift.detail)
    for name, times in report.denied_commands.items():
        assert_has(section(page, "denied"), name, f"{times:,}")
    for name, seconds in report.timings.items():
        assert_has(section(page, "timings"), name, text.duration(seconds))
    for place in report.hunt.places if report.hunt else ():
        assert_has(section(page, "hunt"), place.place, place.owner, f"{place.hits:,}")
        assert_has(section(page, "hunt"), *(hex(example)[2:] for example in place.examples))


@pytest.mark.parametrize("report", GUESTS.values(), ids=GUESTS)
def test_every_range_of_the_memory_map_is_drawn_with_its_addresses_and_backing(report: IsolationReport) -> None:
    drawn = Parsed(guest_page(report))
    rows = [words(node) for node in drawn.all("tr") if node.attributes.get("class", "").startswith("step-")]
    assert len(rows) == len(report.memory_map)
    for row, one in zip(rows, report.memory_map, strict=True):
        backing = {"secretmem": "secret", "ordinary": "ordinary", "none": "device"}[one.backing]
        assert_has(row, text.address(one.first), text.address(one.last), one.region, backing)
        assert ("exposed" in row) == (one.backing == "ordinary" and one.guest_writable)
    assert len(drawn.all("tr", class_="gap")) == (6 if report.memory_map else 0)


def test_the_docs_of_the_probes_are_shown_beside_them() -> None:
    assert_has(section(guest_page(guest_report(), DOCS), "probes"), *DOCS["direct-map"])
    assert DOCS["direct-map"][0] not in guest_page(guest_report())


def test_everything_of_a_self_test_is_on_its_page() -> None:
    report = selftest_report()
    page = selftest_page(report)
    for one in report.vectors:
        where = section(page, "probes" if one.kind == "probe" else "exposures")
        assert_has(where, one.name, one.vector, one.errno, one.missing, one.detail, one.holders, one.source)
    for setting in report.settings:
        assert_has(section(page, "host"), setting.name, setting.value, setting.risk, setting.detail, setting.source)


def test_a_self_test_says_why_it_did_not_pass() -> None:
    failed = selftest_page(selftest_report(vector("evil", Verdict.READABLE)))
    assert_has(words(Parsed(failed).one("header")), "failed", "Why evil: evil: readable")
    doubted = vector("vague", Verdict.INCONCLUSIVE, control=Verdict.BLOCKED)
    doubtful = words(Parsed(selftest_page(selftest_report(doubted))).one("header"))
    assert_has(doubtful, "inconclusive", "Why vague: vague: inconclusive")
    assert "dev-mem" not in doubtful  # it names what it lacks
    assert_has(words(Parsed(PAGES["empty selftest"]).one("header")), "Why no probe was blocked")
    assert "Why" not in words(Parsed(PAGES["selftest"]).one("header"))


def badges(page: str, where: str, kind: str) -> list[str]:
    """Return the words of the badges of one kind within a section."""
    start = page.index(f'<section id="{where}"')
    part = Parsed(page[start : page.index("</section>", start) + len("</section>")])
    return [words(node) for node in part.all("span", class_=f"badge {kind}")]


def test_an_exposure_is_never_shown_as_blocked_nor_as_failed() -> None:
    assert badges(PAGES["selftest"], "exposures", "good") == badges(PAGES["selftest"], "exposures", "bad") == []
    assert badges(PAGES["selftest"], "exposures", "unsure") == ["open"]
    assert badges(PAGES["selftest"], "exposures", "plain") == ["refused here"]


def test_blocked_beside_a_control_that_failed_is_not_shown_as_blocked() -> None:
    doubted = probe("proc-mem", Verdict.INCONCLUSIVE, "refused; the control failed", control=Verdict.BLOCKED)
    page = guest_page(guest_report(probes=(doubted,)))
    assert badges(page, "probes", "good") == badges(page, "probes", "bad") == []
    assert badges(page, "probes", "unsure") == ["inconclusive", "refused too"]


def test_a_probe_that_lacks_something_says_what_and_claims_nothing() -> None:
    lacking = probe("kcore", Verdict.INCONCLUSIVE, "", control=Verdict.INCONCLUSIVE, missing="/proc/kcore")
    page = guest_page(guest_report(probes=(lacking,)))
    assert_has(section(page, "probes"), "Missing: /proc/kcore")
    assert badges(page, "probes", "plain") == ["not tried", "not tried"]
    assert badges(page, "probes", "good") == badges(page, "probes", "bad") == []


def test_the_page_of_a_guest_that_was_not_validated_claims_nothing() -> None:
    page = PAGES["bare"]
    assert "badge good" not in page
    assert_has(words(Parsed(page).one("header")), "inconclusive", "the probes did not run", "none checked")
    assert_has(section(page, "map"), "The report holds no map", "No page was checked", "was not searched")
    assert_has(section(page, "hunt"), "None was made")


def test_the_hunt_is_told_beside_the_map() -> None:
    assert_has(section(PAGES["exposed"], "map"), "16,128 copies of the hunt's needle in the guest's frames")
    assert_has(section(PAGES["isolated"], "map"), "no copy of the hunt's needle in the guest's frames")
    nothing = replace(hunt(0), hits=0, places=())
    assert_has(section(guest_page(guest_report(hunt=nothing)), "hunt"), "No copy was found.")


# --- Nothing gets out of its place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_guest_chose_adds_no_element_and_no_attribute(hostile: str) -> None:
    harmless = Parsed(guest_page(hostile_report("harmless")))
    parsed = Parsed(guest_page(hostile_report(hostile)))
    assert parsed.shape == harmless.shape
    assert parsed.faults == []
    shown = [node.text for node in parsed.nodes]
    expected = [node.text.replace("harmless", text.visible(hostile)) for node in harmless.nodes]
    assert shown == expected


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_host_chose_adds_no_element_and_no_attribute(hostile: str) -> None:
    def parsed(text: str) -> Parsed:
        evil = vector(text, detail=text, vector=text, source=text, errno=text, missing=text, holders=text)
        report = SelftestReport(
            verdict=SelftestVerdict.FAILED,
            reasons=(text,),
            vectors=(evil, replace(evil, kind="exposure"), vector(text, Verdict.READABLE, detail=text)),
            settings=(hostile_setting(text),),
            host=selftest_report().host,
            seconds=1.0,
        )
        return Parsed(selftest_page(report))

    assert parsed(hostile).shape == parsed("harmless").shape
    assert parsed(hostile).faults == []


def test_the_docs_are_escaped_too() -> None:
    docs = {"direct-map": ("<b>", '"><i>', "</td>")}
    plain = {"direct-map": ("b", "i", "td")}
    assert Parsed(guest_page(guest_report(), docs)).shape == Parsed(guest_page(guest_report(), plain)).shape


# An empty text leaves out what would say it: `missing` and `errno` are shown only where there are any.
SHAPES = {bool(text): Parsed(guest_page(hostile_report(text))).shape for text in ("harmless", "")}


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=40))
def test_no_text_at_all_leaves_its_place(anything: str) -> None:
    assert Parsed(guest_page(hostile_report(anything))).shape == SHAPES[bool(anything)]


@every_page
def test_the_page_is_ascii_and_has_no_control_character(page: str) -> None:
    assert set(page) <= {"\n", *map(chr, range(0x20, 0x7F))}


# --- Self-contained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PAGES if name != "hostile"])
def test_the_page_names_nothing_that_lies_elsewhere(name: str) -> None:
    page = PAGES[name].lower()
    found = re.findall(r"https?:|//[a-z]|src\s*=|href|url\(|@import|srcset|<script|javascript:|\bon[a-z]+\s*=", page)
    assert found == []


@every_page
def test_the_page_has_no_element_that_loads_or_runs_something(page: str) -> None:
    parsed = Parsed(page)
    assert {node.tag for node in parsed.nodes} & FORBIDDEN == set()
    attributes = {name for node in parsed.nodes for name in node.attributes}
    assert {name for name in attributes if name.startswith("on") or name in {"style", "src", "href"}} == set()


@every_page
def test_the_policy_allows_the_one_style_sheet_and_nothing_else(page: str) -> None:
    style = Parsed(page).one("style").text
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("</style>") < page.index("<body>")


def test_every_template_is_packed_with_the_module() -> None:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["vmmback"]
    for path in files("vmmback.render").joinpath("templates").iterdir():
        assert any(fnmatch(f"render/templates/{path.name}", pattern) for pattern in patterns)


def test_the_same_report_gives_the_same_page() -> None:
    assert guest_page(exposed_report(), DOCS) == PAGES["exposed"]
    assert selftest_page(selftest_report()) == PAGES["selftest"]


# --- Readable for all -------------------------------------------------------------------------------------------------


@every_page
def test_the_page_is_sound_html_with_a_language_a_title_and_one_main_heading(page: str) -> None:
    parsed = Parsed(page)
    assert parsed.faults == []
    assert page.startswith("<!doctype html>")
    assert parsed.one("html").attributes == {"lang": "en"}
    assert len(parsed.one("title").text) > 10
    assert len(parsed.all("h1")) == len(parsed.all("main")) == 1
    levels = [int(node.tag[1]) for node in parsed.nodes if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1
    assert all(deeper <= level + 1 for level, deeper in pairwise(levels))


@every_page
def test_ids_are_unique_and_labels_point_to_them(page: str) -> None:
    parsed = Parsed(page)
    ids = [node.attributes["id"] for node in parsed.nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    labels = {node.attributes["aria-labelledby"] for node in parsed.all("section")}
    assert labels <= set(ids)


@every_page
def test_every_table_has_a_caption_scoped_headings_and_cells_that_know_their_column(page: str) -> None:
    parsed = Parsed(page)
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    assert {node.attributes.get("scope") for node in parsed.all("th")} <= {"row", "col"}
    for table in page.split('<table role="table">')[1:]:
        one = Parsed(table.split("</table>")[0])
        columns = [words(node) for node in one.all("th", scope="col")]
        labels = [node.attributes["data-label"] for node in one.all("td")]
        rows = len(one.all("th", scope="row"))
        assert rows >= 1
        assert labels == columns[1:] * rows


@every_page
def test_icons_are_hidden_from_screen_readers_and_every_badge_has_words(page: str) -> None:
    parsed = Parsed(page)
    assert {node.attributes.get("aria-hidden") for node in parsed.all("svg")} == {"true"}
    marked = [node for node in parsed.all("span") if node.attributes.get("class", "").startswith("badge")]
    assert [node for node in marked if not words(node)] == []


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


PALETTES = {
    name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", f"\n{STYLE}".split(start)[1].split("}")[0]))
    for name, start in {"light": "\n:root", "dark": "dark) {", "print": "@media print"}.items()
}


@pytest.mark.parametrize("name", PALETTES)
@pytest.mark.parametrize(
    ("ink", "paper"),
    [
        *((ink, paper) for ink in ("ink", "soft", "code") for paper in ("page", "sheet")),
        *((tone, f"{tone}-tint") for tone in ("good", "bad", "unsure", "plain")),
        *(("ink", f"{tone}-tint") for tone in ("good", "bad", "unsure")),
        ("bad", "sheet"),
        *(("on-bar", bar) for bar in ("secret", "ordinary", "read-only", "device")),
    ],
)
def test_text_stands_out_from_its_background(name: str, ink: str, paper: str) -> None:
    palette = {**PALETTES["light"], **PALETTES[name]}
    assert contrast(palette[ink], palette[paper]) >= 4.5


@pytest.mark.parametrize(("name", "stripe"), [("light", 0.16), ("dark", 0.1)])
@pytest.mark.parametrize("bar", ["ordinary", "read-only", "device"])
def test_text_stands_out_from_the_stripes_of_a_bar(name: str, bar: str, stripe: float) -> None:
    assert f"--stripe: rgb(255 255 255 / {f'{stripe:g}'.removeprefix('0')})" in STYLE
    channels = [int(PALETTES[name][bar][place : place + 2], 16) for place in (1, 3, 5)]
    lighter = "#" + "".join(f"{round(channel + (255 - channel) * stripe):02x}" for channel in channels)
    assert contrast("#ffffff", lighter) >= 4.5
