"""The live page at ``/``: static files that hold no secret; their scripts ask the API and ``/metrics`` with the user's key."""

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

_STATIC = Path(__file__).with_name("static")

_FILES = {"/": "index.html"} | {f"/page/{file.name}": file.name for file in _STATIC.iterdir() if file.suffix != ".html"}

PAGE_PATHS = tuple(_FILES)
"""Served to everybody and in every phase."""

_HEADERS = {
    # Only files of our own, and nobody's frame. Scripts cannot make markup out of text (trusted types without a policy).
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A server of another version may stand at this address tomorrow.
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """The page and each of its files, at exact paths."""
    router = APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        router.add_api_route(path, _answer_with(_STATIC / name), methods=["GET", "HEAD"])
    return router


def _answer_with(file: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(file, headers=_HEADERS)
