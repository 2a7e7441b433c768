"""The bound of what comes before a body: the address and the headers of a request."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.http.envelopes import error_answer
from serve_app.request.errors import HeadTooLarge

MAX_HEAD_BYTES = 64 * 2**10


class BoundedHead:
    """Refuses a longer head before anything reads it: to take a query of megabytes apart holds the event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _bytes(scope) > MAX_HEAD_BYTES:
            error = HeadTooLarge(f"the request's address and headers are longer than {MAX_HEAD_BYTES} bytes")
            await error_answer(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    return headers + len(scope["path"]) + len(scope["query_string"])
