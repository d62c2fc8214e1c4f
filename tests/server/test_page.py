"""The live page as the server hands it out."""

import re

import httpx
import pytest

from server.page import PAGE_PATHS
from tests.server.test_app import build

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}


async def get(path: str) -> httpx.Response:
    async with build("k") as client:
        return await client.get(path)


@pytest.mark.parametrize("path", PAGE_PATHS)
async def test_every_file_is_everybodys_and_forbids_all_that_is_not_ours(path):
    answer = await get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"].split(";")
    assert dict(part.strip().split(" ", 1) for part in policy) == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", PAGE_PATHS)
async def test_what_a_file_loads_is_served_from_here(path):
    text = (await get(path)).text
    loaded = re.findall(r"""(?:from|src=|href=|url\()\s*["']([^"']+)["']""", text)
    pages = {"/metrics", "/docs", "#prompt"}
    assert set(loaded) - pages <= set(PAGE_PATHS)
    assert "https://" not in text


async def test_media_types():
    types = {path: (await get(path)).headers["content-type"].split(";")[0] for path in PAGE_PATHS}
    assert types["/"] == "text/html"
    assert types["/page/app.js"] in ("text/javascript", "application/javascript")
    assert types["/page/page.css"] == "text/css"
    assert types["/page/icon.svg"] == "image/svg+xml"
