"""A headless Chromium for tests of the live page, and what an audit of the page finds."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None
)

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium found: on Debian `apt-get install chromium-headless-shell`"
)

# CSS pixels.
DESKTOP = ViewportSize(width=1280, height=960)
PHONE = ViewportSize(width=390, height=844)

# Milliseconds that anything on the page may take on a busy machine.
LIMIT = 30_000
expect.set_options(timeout=LIMIT)

READY = "#send:enabled"


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser; each test opens a page of its own in it."""
    with sync_playwright() as playwright:
        # In a container Chromium's sandbox has no user namespaces to work with; it only ever sees our own page here.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Browser, size: ViewportSize = DESKTOP, scheme: Literal["light", "dark"] = "light") -> Page:
    """An empty page of its own session."""
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.set_default_timeout(LIMIT)
    return page


def record_errors(page: Page) -> list[str]:
    """A list that every error in the page's console is added to, uncaught exceptions and refused resources included."""
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return errors


def violations(page: Page) -> list[str]:
    """What axe finds against WCAG 2.1 A and AA: labels, roles, names, contrast (4.5 for text) and the like."""
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
    found: dict[str, Any] = Axe().run(page, options=rules).response
    assert {"color-contrast", "label", "aria-required-attr"} <= {rule["id"] for rule in found["passes"]}, (
        "axe looked at nothing"
    )
    return [f"{v['id']}: {node['target']} {node['failureSummary']}" for v in found["violations"] for node in v["nodes"]]


def picture(page: Page) -> str:
    """The heat map's pixels as a data URL."""
    return page.evaluate("document.getElementById('heatmap').toDataURL()")
