"""The live page in a browser, on the real engine: type a prompt, see tokens stream and the heat map change."""

import re

import pytest
from playwright.sync_api import expect

from tests.e2e.servers import Server
from tests.page.browser import READY, chromium, needs_chromium, open_page, picture, record_errors

pytestmark = [pytest.mark.engine, needs_chromium]


def test_a_prompt_typed_into_the_page_streams_and_shows_in_the_heat_map(server: Server) -> None:
    with chromium() as browser:
        page = open_page(browser)
        errors = record_errors(page)
        page.goto(server.url)
        page.wait_for_selector(READY)
        expect(page.locator("#model")).to_have_text("demo")
        expect(page.locator("#kernel")).not_to_be_empty()
        # Layers are known from the first scrape on; the picture changes once these tokens are counted.
        page.wait_for_function("() => document.getElementById('heatmap').ariaLabel.includes('8 layers')")
        before = picture(page)
        page.fill("#prompt", "def read_lines(path):\n")
        page.fill("#max-tokens", "1900")
        page.fill("#temperature", "0")
        page.click("#send")
        output = page.locator("#output[aria-busy=true]")
        expect(output).to_contain_text("def read_lines(path):\n    ")
        early = output.text_content()
        expect(page.locator("#requests")).to_contain_text("completion")
        answer = page.text_content("#output")
        assert answer.startswith(early)
        assert len(answer) > len(early)
        expect(page.locator("#density")).to_have_text(re.compile(r"^\d+\.\d %$"))
        assert picture(page) != before
        assert errors == []
