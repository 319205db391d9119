"""The page of recent requests as a person meets it: by eye, by pointer, by keyboard, by ear."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

pytest.importorskip("playwright", reason="no playwright: make test-deploy")
pytest.importorskip("axe_playwright_python", reason="no axe: make test-deploy")

from playwright.sync_api import Browser, Page

from tests.deploy.browser import started, violations
from tests.support import page_samples
from tests.support.page_samples import LONG_ID, NOW, request
from vllm_parallel_think.observability.page import endpoint
from vllm_parallel_think.observability.page.endpoint import PATH, PageEndpoint

WIDTHS = pytest.mark.parametrize("width", [390, 1280])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


class Data:
    """What the page's server answers: counted, and changed by a test."""

    def __init__(self) -> None:
        self.step = 0
        self.more: list[dict[str, Any]] = []
        self.broken = False

    def read(self, _: object) -> dict[str, Any]:
        """Stand in for ``timelines.read``."""
        if self.broken:
            raise RuntimeError("a test says so")
        requests = [*self.more, *page_samples.requests(self.step)]
        return {"now": NOW + self.step, "exported": True, "requests": requests}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Data:
    data = Data()
    monkeypatch.setattr(endpoint.timelines, "read", data.read)
    return data


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The plugin's routes in a server without an engine."""
    app = FastAPI()
    PageEndpoint().attach_router(app)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    (port,) = {s.getsockname()[1] for one in server.servers for s in one.sockets}
    yield f"http://127.0.0.1:{port}{PATH}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as browser:
        yield browser


def visit(browser: Browser, url: str, width: int = 1280, scheme: str = "light") -> Page:
    """Open the page and wait until it shows something."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 640
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("article")
    return page


def wait_for_step(page: Page, data: Data, step: int) -> None:
    """Let the server know more, and wait until the page does."""
    data.step = step
    page.get_by_text(f"{20 + step} tokens", exact=True).wait_for()


@WIDTHS
def test_timelines_have_room_at_every_width(
    browser: Browser, url: str, data: Data, width: int
) -> None:
    page = visit(browser, url, width)
    for track in page.locator(".track").all():
        box = track.bounding_box()
        assert box is not None and box["width"] >= 0.5 * width
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for row in page.locator(".row").all():
        (name, count) = (row.locator(part).bounding_box() for part in (".name", ".count"))
        assert name and count and name["width"] > 20
        assert name["x"] + name["width"] <= count["x"] + 1, "words do not overlap"


@SCHEMES
@WIDTHS
def test_axe_finds_nothing_wrong(
    browser: Browser, url: str, data: Data, width: int, scheme: str
) -> None:
    page = visit(browser, url, width, scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert violations(page) == []
    page.locator(".row").nth(2).focus()
    assert violations(page) == []


@SCHEMES
def test_every_text_can_be_read(browser: Browser, url: str, data: Data, scheme: str) -> None:
    """A contrast of 4.5 to 1, measured on what is drawn."""
    page = visit(browser, url, 1280, scheme)
    measured = page.evaluate(
        """() => {
          const light = (text) => {
            const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map((value) => value / 255)
              .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (element) => {
            for (let at = element; at; at = at.parentElement) {
              const color = getComputedStyle(at).backgroundColor;
              if (color !== "rgba(0, 0, 0, 0)") return color;
            }
          };
          return [...document.querySelectorAll("body *")]
            .filter((element) => [...element.childNodes].some(
              (node) => node.nodeType === 3 && node.data.trim()))
            .filter((element) => element.getClientRects().length)
            .map((element) => {
              const pair = [getComputedStyle(element).color, behind(element)].map(light);
              return [element.className, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
            });
        }"""
    )
    assert {"ratio forked gain", "count", "name", "cutmark", "chip live"} <= {
        m[0] for m in measured
    }
    assert [one for one in measured if one[1] < 4.5] == []


@WIDTHS
def test_what_was_cut_stays_and_is_pale(browser: Browser, url: str, data: Data, width: int) -> None:
    page = visit(browser, url, width)
    card = page.locator("article", has_text=LONG_ID)
    marks = {
        row.locator(".name").inner_text(): row.locator(".cutmark").is_visible()
        for row in card.locator(".row").all()
    }
    assert marks == {
        "trunk": False,
        "1. Seen": False,
        "2. Half seen": True,
        "3. Unseen": True,
        "4. Not begun": True,
    }
    for row, pale in zip(card.locator(".row").all(), (False, False, True, True), strict=False):
        for bar in row.locator(".bar:not(.mark)").all():
            opacity = float(bar.evaluate("bar => getComputedStyle(bar).opacity"))
            assert (opacity < 0.5) == pale
    assert page.locator(".cutmark:visible").count() == 3


def test_rows_can_be_reached_and_say_what_they_show(browser: Browser, url: str, data: Data) -> None:
    page = visit(browser, url)
    page.locator("button").focus()
    heard = []
    for _ in range(4):
        page.keyboard.press("Tab")
        heard.append(page.evaluate("document.activeElement.ariaLabel"))
        assert page.evaluate("document.activeElement.role") == "listitem"
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        assert page.locator(".detail:visible").inner_text() == heard[-1]
    assert heard[0].startswith("trunk: 40 tokens; waits and reads: 200 ms; trunk: 40 tokens in")
    assert heard[1].startswith("1. Sleep: 20 tokens;")
    assert "waits for its join" in heard[2]
    rows = page.get_by_role("listitem", name="3. Unseen: 48 tokens; cut")
    assert rows.count() == 1


def test_rows_are_updated_under_pointer_and_focus(browser: Browser, url: str, data: Data) -> None:
    page = visit(browser, url)
    row = page.locator(".row", has_text="1. Sleep")
    row.hover()
    row.focus()
    page.evaluate(
        """() => {
          window.removed = [];
          new MutationObserver((changes) => {
            for (const change of changes) for (const node of change.removedNodes)
              if (node.nodeType === 1) window.removed.push(node.className);
          }).observe(document.body, { childList: true, subtree: true });
          window.focused = document.activeElement;
        }"""
    )
    wait_for_step(page, data, 3)
    assert page.evaluate("window.removed") == []
    assert page.evaluate("document.activeElement === window.focused")
    assert page.evaluate("window.focused.ariaLabel").startswith("1. Sleep: 23 tokens;")
    data.more = [request("cmpl-new", 0.5, "unbranched", [], forks=0, paths=0)]
    page.get_by_text("cmpl-new").wait_for()
    assert page.evaluate("document.activeElement === window.focused"), "newer ones come in front"
    assert page.locator("article .id").first.inner_text() == "cmpl-new"
    data.more = []
    page.get_by_text("cmpl-new").wait_for(state="detached")
    assert page.evaluate("window.removed") == [""], "of what is shown only the card that is gone"


def test_a_request_without_forks_is_no_success(browser: Browser, url: str, data: Data) -> None:
    page = visit(browser, url)
    card = page.locator("article", has_text="cmpl-plain")
    assert card.locator(".ratio").inner_text() == "no fork"
    assert "1.00" not in card.inner_text() and "0 forks" not in card.inner_text()
    ratios = "article .ratio"
    color = "one => getComputedStyle(one).color"
    plain = card.locator(".ratio").evaluate(color)
    gained = page.locator("article", has_text="cmpl-joined").locator(".ratio").evaluate(color)
    assert plain != gained
    assert page.locator(ratios).all_inner_texts() == [
        "1.40×",
        "1.64×",
        "1.81×",
        "no fork",
        "no fork",
    ]


def test_a_server_that_is_gone_leaves_what_was_known(
    browser: Browser, url: str, data: Data
) -> None:
    page = visit(browser, url)
    data.broken = True
    page.get_by_text("The server does not answer").wait_for()
    assert page.locator("article").count() == 5
    data.broken = False
    page.get_by_text("The server does not answer").wait_for(state="hidden")


def test_texts_stay_texts_and_the_policy_holds(browser: Browser, url: str, data: Data) -> None:
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    page.wait_for_selector("article")
    assert page.get_by_text("3. <b>not bold</b>", exact=True).count() == 1
    assert [line for line in said if "favicon" not in line and "404" not in line] == []
