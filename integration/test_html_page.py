"""The HTML page of a report in a real Chromium: how it looks to a reader, and that it asks the network for nothing."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integration import capabilities
from integration.browser import Page, browser
from integration.conftest import LiveGuest
from tests.sample_reports import (
    DOCS,
    HOSTILE,
    bare_report,
    exposed_report,
    guest_report,
    hostile_report,
    selftest_report,
)
from vmmback.isolation.catalogue import CATALOGUE
from vmmback.render.html import guest_page, selftest_page

pytestmark = pytest.mark.usefixtures("needs_chromium")

NARROW, WIDE = 360, 1600
PAGES = {
    "isolated": guest_page(guest_report(), DOCS),
    "exposed": guest_page(exposed_report(), DOCS),
    "bare": guest_page(bare_report()),
    "hostile": guest_page(hostile_report(" ".join(text[:300] for text in HOSTILE))),
    "selftest": selftest_page(selftest_report()),
}

# What is wider than its own box: cut off, or to be scrolled sideways. `unseen` is for screen readers alone.
TOO_WIDE = """[...document.querySelectorAll("body *")]
  .filter(one => one.clientWidth && one.scrollWidth > one.clientWidth + 1 && !one.closest(".unseen"))
  .map(one => one.outerHTML.slice(0, 120))"""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("body *")]
  .filter(one => [...one.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()))
  .map(one => parseFloat(getComputedStyle(one).fontSize)))"""
BARS = """[...document.querySelectorAll("td.bar")].map(one => {
  const {left, top, width, height} = one.getBoundingClientRect();
  return {look: one.classList[1], left, top: top + scrollY, width, height};
})"""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "chromium.log") as opened:
        yield opened


def show(page: Page, folder: Path, text: str) -> None:
    """Write a page to a file of `folder`, and open it."""
    file = folder / "report.html"
    file.write_text(text)
    page.open(file)


def screenshot(page: Page, file: Path) -> Image.Image:
    """Take a screenshot, which stays in the test's folder."""
    png = page.screenshot()
    file.write_bytes(png)
    return Image.open(io.BytesIO(png)).convert("RGB")


def pixel(image: Image.Image, x: float, y: float) -> tuple[int, int, int]:
    found = image.getpixel((int(x), int(y)))
    assert isinstance(found, tuple)
    red, green, blue = found
    return red, green, blue


def requests(page: Page) -> list[str]:
    return [event["request"]["url"] for method, event in page.events if method == "Network.requestWillBeSent"]


def complaints(page: Page) -> list[Any]:
    """Return what the browser has to say of a page: errors, policy violations, dialogs that a script opened."""
    telling = ("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    return [event for event in page.events if event[0] in telling]


@pytest.mark.parametrize("name", PAGES)
def test_it_reads_well_narrow_and_wide_light_and_dark_and_asks_for_nothing(
    page: Page, tmp_path: Path, name: str
) -> None:
    show(page, tmp_path, PAGES[name])
    heights = {}
    for width in (NARROW, WIDE):
        corners = {}
        for scheme in ("light", "dark"):
            page.show(width, scheme)
            assert page.evaluate("[innerWidth, document.scrollingElement.scrollWidth]") == [width, width]
            assert page.evaluate(TOO_WIDE) == []
            assert page.evaluate(SMALLEST_TEXT) >= 12
            image = screenshot(page, tmp_path / f"{name}-{width}-{scheme}.png")
            assert image.width == width
            assert (
                len(image.crop((0, 0, width, 600)).getcolors(maxcolors=1 << 20) or ()) > 100
            )  # letters have soft edges
            heights[width] = image.height
            corners[scheme] = sum(pixel(image, 1, 1)) / 3
        assert corners["dark"] < 40
        assert corners["light"] > 220
    assert heights[NARROW] > heights[WIDE] > 800
    assert requests(page) == [(tmp_path / "report.html").as_uri()]
    assert complaints(page) == []
    assert page.evaluate("document.scripts.length + document.images.length + document.links.length") == 0


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize(
    ("scheme", "secret"), [("light", (0x0F, 0x73, 0x55)), ("dark", (0x12, 0x79, 0x5A))], ids=["light", "dark"]
)
def test_the_memory_map_is_one_strip_on_which_small_ranges_are_seen(
    page: Page, tmp_path: Path, width: int, scheme: str, secret: tuple[int, int, int]
) -> None:
    show(page, tmp_path, PAGES["isolated"])
    page.show(width, scheme)
    bars = page.evaluate(BARS)
    image = screenshot(page, tmp_path / "map.png")
    ranges = [bar for bar in bars if bar["look"] != "hole"]
    holes = [bar for bar in bars if bar["look"] == "hole"]
    assert [bar["look"] for bar in ranges] == ["secret"] * 5 + ["device"] * 6 + ["read-only"]
    for above, below in pairwise(bars):
        assert below["top"] == pytest.approx(above["top"] + above["height"], abs=0.5)
        assert (below["left"], below["width"]) == (above["left"], above["width"])
    assert min(bar["height"] for bar in ranges) >= 24
    assert max(bar["height"] for bar in holes) < max(bar["height"] for bar in ranges)
    assert ranges[4]["height"] > 1.5 * ranges[2]["height"]  # 255 MiB and 32 KiB
    colours = {bar["look"]: pixel(image, bar["left"] + 4, bar["top"] + bar["height"] / 2) for bar in bars}
    assert colours["secret"] == secret
    assert len(set(colours.values())) == 4


@contextmanager
def listener(visits: list[str]) -> Iterator[str]:
    """Listen for whoever is sent here; yield the address."""

    def greet() -> None:
        while True:
            try:
                connection, (host, _) = server.accept()
            except OSError:  # shut down, below
                return
            connection.close()
            visits.append(host)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=greet)
        thread.start()
        host, port = server.getsockname()
        yield f"http://{host}:{port}/leak"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("guarded", [True, False], ids=["with its policy", "without its policy"])
def test_its_policy_would_stop_what_got_into_it(page: Page, tmp_path: Path, guarded: bool) -> None:
    visits: list[str] = []
    with listener(visits) as address:
        evil = (
            f'<img src="{address}"><p id="victim">x</p><script>document.title = "owned"</script>'
            "<style>#victim { color: rgb(1, 2, 3) }</style>"
        )
        text = PAGES["isolated"].replace("<footer>", f"<footer>{evil}")
        show(page, tmp_path, text if guarded else text.replace("Content-Security-Policy", "x-nothing"))
        title, colour = page.evaluate("[document.title, getComputedStyle(document.getElementById('victim')).color]")
    assert (title == "demo: isolated - vmmback") == guarded
    assert (title == "owned") == (colour == "rgb(1, 2, 3)") == bool(visits) == (not guarded)
    assert complaints(page)  # which the other tests rely on: of a violation, or of a server that said nothing


def test_it_looks_the_same_without_a_network(tmp_path: Path) -> None:
    capabilities.require(capabilities.NETWORK_NAMESPACE)
    images = []
    for wrapper in ((), ("unshare", "--net")):
        folder = tmp_path / "-".join(("net", *wrapper))
        folder.mkdir()
        with browser(folder / "chromium.log", *wrapper) as page:
            show(page, folder, PAGES["exposed"])
            page.show(WIDE, "light")
            images.append(screenshot(page, folder / "page.png").tobytes())
    assert images[0] == images[1]


@pytest.mark.parametrize(("fixture", "verdict"), [("guest_running", "isolated"), ("ordinary_guest_running", "exposed")])
def test_the_page_of_a_real_guest_says_what_was_found(
    request: pytest.FixtureRequest, needs_direct_map: None, page: Page, tmp_path: Path, fixture: str, verdict: str
) -> None:
    live: LiveGuest = request.getfixturevalue(fixture)
    report = live.run(live.guest.examine())
    docs = {one.name: (one.vector, one.control_is, one.source) for one in CATALOGUE}
    show(page, tmp_path, guest_page(report, docs))
    page.show(WIDE, "light")
    screenshot(page, tmp_path / "real.png")
    assert page.evaluate("document.querySelector('h1').textContent") == verdict
    assert page.evaluate("document.title") == f"{report.guest}: {verdict} - vmmback"
    shown = page.evaluate("document.querySelector('#probes').innerText")
    assert [one.name for one in report.probes if one.name not in shown or one.detail not in shown] == []
    assert complaints(page) == []
