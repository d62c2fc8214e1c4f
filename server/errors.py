"""Errors in the shape that OpenAI clients parse, with the type names vLLM uses."""

from http import HTTPStatus

from starlette.responses import JSONResponse


def error_type(status: int) -> str:
    """The ``type`` of an error by its status: 404 is "NotFoundError", 503 "ServiceUnavailableError"."""
    return HTTPStatus(status).phrase.replace(" ", "").removesuffix("Error") + "Error"


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An OpenAI-shaped error. ``message`` reaches the client as it is: give a fixed text."""
    body = {"error": {"message": message, "type": error_type(status), "param": None, "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)
