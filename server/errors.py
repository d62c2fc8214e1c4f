"""Errors in the shape that OpenAI clients parse, with the type names vLLM uses."""

import json
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Seconds a client is told to wait before it tries again where nothing was measured.
RETRY_AFTER = 5

# Nobody but the client reads it: it went away before its answer was complete (nginx's number, for the log and metrics).
CLIENT_CLOSED_REQUEST = 499

# What a client is told of a failure inside the engine or this server; the log has the cause.
INTERNAL_TEXTS = {
    500: "The server failed to answer this request.",
    501: "The model cannot do what the request asks for.",
    503: "The engine stopped working; it is being started anew.",
}


class RefusalError(Exception):
    """A request is not served. ``message`` reaches the client as it is: a fixed text, with nothing of ours in it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        reason: str = "policy",
        retry_after: float | None = None,
    ) -> None:
        """Hold the answer.

        Args:
            status: HTTP status.
            message: text for the client.
            param: the field at fault.
            reason: what the metrics count it as.
            retry_after: seconds the client is told to wait.
        """
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.reason = reason
        self.retry_after = retry_after

    def response(self) -> JSONResponse:
        """The answer to the client."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        return JSONResponse(error_body(self.status, self.message, self.param), status_code=self.status, headers=headers)


def error_type(status: int) -> str:
    """The ``type`` of an error by its status: 404 is "NotFoundError", 503 "ServiceUnavailableError"."""
    return HTTPStatus(status).phrase.replace(" ", "").removesuffix("Error") + "Error"


def error_body(status: int, message: str, param: str | None = None) -> dict[str, object]:
    """The JSON object that clients parse."""
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": status}}


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An OpenAI-shaped error. ``message`` reaches the client as it is: give a fixed text."""
    return JSONResponse(error_body(status, message), status_code=status, headers=headers)


def stream_error(status: int, message: str) -> bytes:
    """The last events of a stream that cannot go on."""
    return f"data: {json.dumps(error_body(status, message))}\n\ndata: [DONE]\n\n".encode()


class InternalErrors:
    """Answers every status from 500 on with a fixed text, whatever the app wrote."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        failed: int | None = None

        async def send_checked(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start" and message["status"] >= 500:
                failed = message["status"]
            if failed is None:
                await send(message)

        await self._app(scope, receive, send_checked)
        if failed is not None:
            headers = {"Retry-After": str(RETRY_AFTER)} if failed == 503 else None
            await error_response(failed, INTERNAL_TEXTS.get(failed, INTERNAL_TEXTS[500]), headers)(scope, receive, send)
