"""What holds for every answer, of whatever route: the outermost layer of the application, pure ASGI.

HEAD is GET without a body; a path with a slash at its end is the same without; each request has one id, in its answer
and in the log; no answer is kept by a cache or taken for another type than it says; what nobody else caught is an
error in the format's envelope.
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.formats.answers import HEAD_ONLY
from serve_app.http.envelopes import error_answer
from serve_app.request.errors import InvalidRequest

# Anything that a log line and a header can hold. Ray's proxy puts a client's id on the answer as it came, so one that
# can't be used is refused: another in its place would be in the log and not in the answer.
_REQUEST_ID = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,254}[\x21-\x7e])?")
# In the ASGI scope of a request for a route prefix itself, without a slash.
BARE_PREFIX = "serve_app.bare_prefix"
_EVERY_ANSWER = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class Conventions:
    """Wraps an application; see the module."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).getlist("x-request-id")
        # Ray's proxy gives every request an id and puts it on the answer itself.
        new_id = None if given else uuid.uuid4().hex
        head = scope["method"] == "HEAD"
        scope = _plain(scope, new_id)
        started = False

        async def send_as_agreed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _EVERY_ANSWER.items():
                    headers.setdefault(name, value)
                if new_id is not None:
                    headers["X-Request-Id"] = new_id
            elif head and message["type"] == "http.response.body":
                if message.get("more_body", False):
                    return
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            _check_id(given)
            await self._app(scope, receive, send_as_agreed)
        except Exception as error:
            if started:
                raise
            await error_answer(scope, error)(scope, receive, send_as_agreed)


def _plain(scope: Scope, new_id: str | None) -> Scope:
    """The request as the routes know it."""
    plain = dict(scope)
    root = scope.get("root_path", "")
    path = scope["path"].removeprefix(root)
    plain["path"] = root + (path.rstrip("/") or "/")
    if not path:
        plain[BARE_PREFIX] = True
    if scope["method"] == "HEAD":
        plain |= {"method": "GET", HEAD_ONLY: True}
    if new_id is not None:
        plain["headers"] = [*scope["headers"], (b"x-request-id", new_id.encode())]
    return plain


def _check_id(given: list[str]) -> None:
    if len(given) > 1:
        raise InvalidRequest("X-Request-Id is given more than once")
    if given and not _REQUEST_ID.fullmatch(given[0]):
        raise InvalidRequest("X-Request-Id must be 1 to 256 printable ASCII characters")
