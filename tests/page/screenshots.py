"""Takes the pictures of the live page in docs/images, from a running server at rest:

python -m tests.page.screenshots http://127.0.0.1:8000/
"""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize

from tests.page.browser import READY, chromium, open_page

IMAGES = Path(__file__).parents[2] / "docs" / "images"

# Tokens of each request and milliseconds of rest after it, so that the minute shown has something in it.
REQUESTS = ((120, 2500), (900, 1500), (300, 3000), (1500, 500), (400, 2500), (1200, 0))

PICTURES = {
    "page-light": (ViewportSize(width=1280, height=992), "light"),
    "page-dark": (ViewportSize(width=1280, height=992), "dark"),
    "page-phone": (ViewportSize(width=390, height=844), "dark"),
}


def generate(page: Page) -> None:
    """Requests one after another; returns while the last one runs."""
    for max_tokens, pause in REQUESTS:
        page.fill("#max-tokens", str(max_tokens))
        page.click("#send")
        if pause:
            page.wait_for_selector("#send")
            page.wait_for_timeout(pause)
    page.wait_for_timeout(3000)


def take(browser: Browser, url: str, name: str) -> None:
    """One picture, in 256 colours: half the bytes, and nobody sees it."""
    size, scheme = PICTURES[name]
    page = open_page(browser, size, scheme)
    page.set_default_timeout(120_000)
    page.goto(url)
    page.wait_for_selector(READY)
    generate(page)
    shot = Image.open(io.BytesIO(page.screenshot(full_page=size["width"] < 600)))
    shot.convert("RGB").quantize(256).save(IMAGES / f"{name}.png", optimize=True)
    page.close()


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name in PICTURES:
            take(browser, sys.argv[1], name)
