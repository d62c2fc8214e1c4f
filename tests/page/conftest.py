from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.page.browser import chromium
from tests.page.scripted import ScriptedServer


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server
