"""The live page in a browser, against the server's own chain with a script in place of vLLM."""

import itertools
import math
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.page.browser import DESKTOP, PHONE, READY, needs_chromium, open_page, picture, record_errors, violations
from tests.page.scripted import DENSITIES, ScriptedServer

pytestmark = needs_chromium


@pytest.fixture
def page(browser: Browser, server: ScriptedServer) -> Iterator[Page]:
    page = open_page(browser)
    yield page
    page.close()


def open_ready(page: Page, server: ScriptedServer) -> list[str]:
    errors = record_errors(page)
    server.ready()
    page.goto(server.url)
    page.wait_for_selector(READY)
    return errors


def test_a_prompt_is_answered_word_by_word_and_timed(page, server):
    errors = open_ready(page, server)
    server.going.clear()
    page.fill("#prompt", "Once upon a time")
    page.click("#send")
    output = page.locator("#output")
    expect(output).to_have_text("Once upon a time" + "".join(server.words[:3]))
    expect(page.locator("#stop")).to_be_visible()
    server.going.set()
    expect(page.locator("#requests tr").first).to_contain_text("end of text")
    assert output.text_content() == "Once upon a time" + "".join(server.words)
    (request,) = server.requests
    assert request["prompt"] == "Once upon a time"
    assert request["model"] == "scripted"
    assert request["stream"] is True
    cells = page.locator("#requests tr").first.locator("td").all_text_contents()
    assert cells[1:4] == ["completion", "7", "12"]
    assert all(re.fullmatch(r"[\d.]+ ms", cell) for cell in cells[4:6]), cells
    assert errors == []


def test_the_heat_map_shows_the_density_of_what_was_computed(page, server):
    open_ready(page, server)
    expect(page.locator("#heat-empty")).to_contain_text("Nothing computed in the last minute")
    at_rest = picture(page)
    page.click("#send")
    expect(page.locator("#density")).to_have_text(f"{100 * sum(DENSITIES) / len(DENSITIES):.1f} %")
    expect(page.locator("#heat-empty")).to_be_hidden()
    assert picture(page) != at_rest
    expect(page.locator("#path-share")).to_have_text("100 %")
    # The top of the scale is the next round share above the densest layer.
    expect(page.locator("#ramp-top")).to_have_text("20 %")
    page.click("summary")
    rows = page.locator("#layers tr")
    expect(rows).to_have_count(len(DENSITIES))
    for index, density in enumerate(DENSITIES):
        expect(rows.nth(index).locator("td").first).to_have_text(f"{100 * density:.1f} %")


def test_single_values_are_read_with_the_keyboard(page, server):
    open_ready(page, server)
    page.click("#send")
    expect(page.locator("#density")).not_to_have_text("–")
    page.focus("#heatmap")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    readout = page.locator("#readout")
    expect(readout).to_contain_text("Layer 1, ")
    # The newest second may have computed nothing; some second of the minute has.
    for _ in range(60):
        if f"density {100 * DENSITIES[1]:.1f} %" in readout.text_content():
            break
        page.keyboard.press("ArrowLeft")
    expect(readout).to_contain_text(f"density {100 * DENSITIES[1]:.1f} %")


def test_everything_is_done_with_the_keyboard_alone(page, server):
    open_ready(page, server)
    server.going.clear()
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("typed")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#output")).to_have_text("typed" + "".join(server.words[:3]))
    page.keyboard.press("Escape")
    expect(page.locator("#requests tr").first).to_contain_text("you")


def test_a_chat_sends_what_was_said_before(page, server):
    open_ready(page, server)
    page.click("text=Chat")
    for message in ("first", "second"):
        page.fill("#prompt", message)
        page.click("#send")
        page.wait_for_selector("#send")
        expect(page.locator("#outcome")).to_contain_text("12 tokens")
    said = "".join(server.words)
    assert server.requests[1]["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "second"},
    ]
    page.click("#clear")
    expect(page.locator("#output")).to_be_empty()


def test_the_key_is_asked_for_and_stays_in_the_tab(page, server):
    server.keys = ["right"]
    server.ready()
    page.goto(server.url)
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_visible()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server does not know this key.")
    page.keyboard.type("right")
    page.keyboard.press("Enter")
    page.wait_for_selector(READY)
    page.click("#send")
    expect(page.locator("#density")).not_to_have_text("–")
    page.reload()
    page.wait_for_selector(READY)
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("document.cookie") == ""
    page.click("#forget-key")
    expect(dialog).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_with_a_key_the_links_still_open(page, server):
    server.keys = ["right"]
    server.ready()
    page.goto(server.url)
    page.get_by_role("dialog").wait_for()
    page.keyboard.type("right")
    page.keyboard.press("Enter")
    page.wait_for_selector(READY)
    page.click("text=Metrics")
    expect(page.locator("body")).to_contain_text("sparse_ffn_rows_total")


def test_a_server_that_loads_says_so_and_becomes_usable(page, server):
    server.health.step = "loading the weights"
    page.goto(server.url)
    expect(page.locator("#status")).to_have_text("The server is not ready yet: loading the weights.")
    expect(page.locator("#send")).to_be_disabled()
    server.ready()
    page.wait_for_selector(READY)
    expect(page.locator("#status")).to_have_text("Ready")


def test_without_metrics_prompts_are_still_answered(page, server):
    page.route("**/metrics", lambda route: route.fulfill(status=404, json={"error": {"message": "Nothing here."}}))
    open_ready(page, server)
    expect(page.locator("#heat-empty")).to_have_text("This server does not show its metrics (metrics_access).")
    page.click("#send")
    expect(page.locator("#outcome")).to_contain_text("12 tokens")


def test_an_error_in_the_stream_is_shown_and_the_next_prompt_works(page, server):
    open_ready(page, server)
    server.failure = {"message": "The engine stopped working.", "code": 503}
    page.click("#send")
    expect(page.locator("#outcome.error")).to_have_text("The engine stopped working.")
    server.failure = None
    page.click("#send")
    expect(page.locator("#outcome")).to_contain_text("12 tokens")


def test_a_server_that_is_gone_is_said_to_be(page, server):
    open_ready(page, server)
    server.__exit__()
    expect(page.locator("#status")).to_have_text("No answer from the server")
    expect(page.locator("#send")).to_be_disabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_labels_roles_and_contrast(browser, server, scheme, size):
    page = open_page(browser, size, scheme)
    errors = open_ready(page, server)
    page.click("text=Chat")
    page.click("#send")
    expect(page.locator("#density")).not_to_have_text("–")
    page.click("summary")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_question_for_the_key_has_labels_and_contrast(browser, server, scheme):
    server.keys = ["right"]
    server.ready()
    page = open_page(browser, PHONE, scheme)
    page.goto(server.url)
    page.get_by_role("dialog").wait_for()
    assert violations(page) == []


def test_equal_steps_of_density_look_equal(page, server):
    open_ready(page, server)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours = page.evaluate(
            "import('/page/heatmap.js').then(({colour}) => [...Array(21).keys()].map(i => colour(i / 20)))"
        )
        points = [oklab(*map(float, re.fullmatch(r"oklch\((\S+) (\S+) (\S+)\)", text).groups())) for text in colours]
        steps = [math.dist(a, b) for a, b in itertools.pairwise(points)]
        assert max(steps) / min(steps) < 1.02
        assert (points[0][0] < points[-1][0]) == (scheme == "dark")


def oklab(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """OKLCH (hue in degrees) in OKLab, where distances are those the eye sees."""
    return lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
