"""Chromium in a test's hands, and what axe finds wrong with a page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.deploy import chromium


@contextmanager
def started() -> Iterator[Browser]:
    """Start the system's Chromium with a profile of its own."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium.find(),
            headless=True,
            chromium_sandbox=False,
            args=list(chromium.FLAGS),
        )
        try:
            yield browser
        finally:
            browser.close()


def violations(page: Page) -> list[str]:
    """Return what axe finds, as ``rule: element`` with the reason."""
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8"))
    found: dict[str, Any] = page.evaluate("axe.run()")
    return [
        f"{violation['id']}: {node['html'][:120]}: {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
