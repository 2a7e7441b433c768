"""Who may ask, and how: what is refused before any route sees it. Pure ASGI.

Browsers carry out what the pages of strangers say, with the user's own way to services on the machine or behind a
firewall. `OriginGuard` lets none of them drive this service or read from it: names that lead here without being ours
(DNS rebinding), forms, pictures and scripts of other origins. `RequestGuard` holds what is asked to its terms: the type
of its body, how it is compressed, how long it takes, and Ray's own headers, with which a client could lift the
operator's limits. docs/security.md has the rules in words.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config.settings import HttpConfig
from serve_app.formats.answers import MAX_BYTES
from serve_app.http.body import decompressed, in_time, is_compressed
from serve_app.http.envelopes import error_answer, path_of
from serve_app.request.errors import (
    Forbidden,
    InvalidRequest,
    RequestTimeout,
    ServiceError,
    UnexpectedBody,
    UnsupportedMediaType,
)
from serve_app.request.limits import Limits

# Pages for people: a link on any site may lead to them. They draw nothing by themselves.
PAGES = ("/", "/docs")
EXPOSED_HEADERS = (
    "Retry-After",
    "Server-Timing",
    "X-Request-Id",
    "X-SDXL-Seed",
    "X-SDXL-Warnings",
    "x-should-retry",
    "seed",
    "finish-reason",
    "x-ms-client-request-id",
    "x-ms-request-id",
)
# Of the time that a request has, what is left to the way back: our answer is there before Ray's proxy gives up.
_MARGIN, _MOST_MARGIN_S = 0.1, 1.0
_TIMEOUT, _DISCONNECT_DISABLED = "x-request-timeout-seconds", "x-request-disconnect-disabled"


class OriginGuard:
    """Refuses with 403 what comes from the pages of strangers, and under names that are not this service's."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                check_host(Headers(scope=scope).getlist("host"), self._config.allowed_hosts)
                check_origin(scope, self._config.cors_origins)
            except ServiceError as error:
                await error_answer(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_host(given: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises `Forbidden` where `Host` is a name that is not ours.

    A browser always sends it. Without one, as some health checks ask, nothing can have been rebound.
    """
    if "*" in allowed:
        return
    if len(given) > 1:
        raise InvalidRequest("Host is given more than once")
    host = _without_port(given[0]) if given else ""
    if host in ("", "localhost") or _is_address(host):
        return
    for name in allowed:
        if host == name or (name.startswith("*.") and host.endswith(name[1:])):
            return
    raise Forbidden(
        f"Host {host[:100]!r} is no name of this service; the operator can add it to http.allowed_hosts", param="Host"
    )


def check_origin(scope: Scope, allowed: Sequence[str]) -> None:
    """Raises `Forbidden` where a browser says that a page of another origin asks, unless that page may.

    `Origin` goes with every request of a script and every form's POST. `Sec-Fetch-Site` also goes with what has no
    origin, such as pictures, wherever the browser holds the connection safe: HTTPS, and loopback.
    """
    if "*" in allowed:
        return
    headers = Headers(scope=scope)
    site = headers.get("sec-fetch-site", "")
    origin = headers.get("origin")
    if origin is not None:
        # Behind a gateway neither the scheme nor the host need be what the browser sees; it says so itself.
        own = f"{scope.get('scheme', 'http')}://{headers.get('host', '')}".lower()
        if site == "same-origin" or origin.lower() == own or origin in allowed:
            return
        raise Forbidden(
            f"Origin {origin[:100]!r} may not use this service; the operator can add it to http.cors_origins",
            param="Origin",
        )
    if site in ("cross-site", "same-site") and not _is_visit(scope, headers):
        raise Forbidden(
            "a page of another origin may not use this service; the operator can add its origin to http.cors_origins",
            param="Sec-Fetch-Site",
        )


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """Whether a person follows a link to one of our pages."""
    return (
        headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest", "document") == "document"
        and scope["method"] == "GET"
        and path_of(scope) in PAGES
    )


def _without_port(host: str) -> str:
    """The name or address in a `Host`, in lower case, without the brackets of an IPv6 address."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Cors(CORSMiddleware):
    """Starlette's, for the pages in `cors_origins`: they can read every answer, errors of all layers among them.

    It is the outermost layer. A preflight is answered further in, by `Preflights`.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        super().__init__(
            app,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            allow_private_network=True,  # the operator has named the page
            expose_headers=EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "origin" in headers and not _is_preflight(scope, headers):
            await self.simple_response(scope, receive, send, request_headers=headers)
        else:
            await self.app(scope, receive, send)


class Preflights(Cors):
    """Answers the preflights of the pages in `cors_origins`; what it refuses is refused in an envelope."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "origin" in headers and _is_preflight(scope, headers):
            await self.preflight_response(headers)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            raise InvalidRequest(bytes(response.body).decode())
        return response


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers


class RequestGuard:
    """Holds a request to its terms before a route reads it: 400, 408, 415.

    `routes` are asked for the types of body that they describe in their OpenAPI.
    """

    def __init__(
        self, app: ASGIApp, config: HttpConfig, limits: Limits, routes: Callable[[], Sequence[BaseRoute]]
    ) -> None:
        self._app = app
        self._config = config
        self._limits = limits
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            seconds = request_seconds(headers, self._config.request_timeout_s)
            types = body_types(self._routes(), scope)
            if types == ():
                check_no_body(scope, headers, self._limits.max_text_body_bytes)
            if scope["method"] == "POST":
                check_content_type(headers, types)
                receive = in_time(receive, self._config.body_timeout_s)
                if is_compressed(headers.get("content-encoding", "")):
                    scope = plain = _as_plain(scope)
                    # Set by the route that reads the body: it has a limit of its own.
                    receive = decompressed(receive, lambda: plain[MAX_BYTES])
        except ServiceError as error:
            await error_answer(scope, error)(scope, receive, send)
            return
        await self._answer_in_time(seconds, scope, receive, send)

    async def _answer_in_time(self, seconds: float, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 408 in an envelope where no answer has begun a little before Ray's proxy gives up, in plain text."""
        timer = asyncio.timeout(seconds - min(seconds * _MARGIN, _MOST_MARGIN_S))

        async def send_in_time(message: Message) -> None:
            if message["type"] == "http.response.start":
                if timer.expired():  # too late: the task is being cancelled
                    await asyncio.Event().wait()
                timer.reschedule(None)  # a stream has begun
            await send(message)

        try:
            async with timer:
                await self._app(scope, receive, send_in_time)
        except TimeoutError:
            if not timer.expired():
                raise
            late = RequestTimeout(f"no answer within {seconds:g} s; the work on it has ended")
            await error_answer(scope, late)(scope, receive, send)


def request_seconds(headers: Headers, most: float) -> float:
    """How long a request may take. Raises `InvalidRequest` for headers that would lift the operator's limits.

    Ray's proxy takes both from anybody: with the one it never ends a request, with the other it draws on for a client
    that is gone.
    """
    if _DISCONNECT_DISABLED in headers:
        raise InvalidRequest(f"{_DISCONNECT_DISABLED} is not taken from clients", param=_DISCONNECT_DISABLED)
    seconds = most
    for given in headers.getlist(_TIMEOUT):
        try:
            seconds = float(given)  # as Ray's proxy reads it
        except ValueError:
            seconds = math.nan
        if not 0 < seconds <= most:
            raise InvalidRequest(f"{_TIMEOUT}: {given[:40]!r} is not above 0 and at most {most:g}", param=_TIMEOUT)
    return seconds


def check_no_body(scope: Scope, headers: Headers, most: int) -> None:
    """Raises `UnexpectedBody` where a route that takes no body is sent one.

    Nobody would read it, and Ray would hold what arrives of it until the answer. With a POST some clients send `{}`.
    """
    length = headers.get("content-length", "0")
    if "transfer-encoding" not in headers and (
        length == "0" or (scope["method"] == "POST" and length.isdecimal() and len(length) < 10 and int(length) <= most)
    ):
        return
    raise UnexpectedBody(f"{scope['method']} {path_of(scope)[:100]} takes no body")


def check_content_type(headers: Headers, types: Sequence[str] | None) -> None:
    """Raises `UnsupportedMediaType` where a POST's body is of no type that its route takes.

    Types of none: the route takes no body, and needs no type where there is none. None: there is no such route.
    """
    if types is None:
        return
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not types:
        if given == "application/json" or (not given and headers.get("content-length", "0") == "0"):
            return
        types = ("application/json",)
    if given not in types:
        raise UnsupportedMediaType(f"Expects Content-Type to be {' or '.join(types)}")


def body_types(routes: Sequence[BaseRoute], scope: Scope) -> tuple[str, ...] | None:
    """The types of body that the route of a request describes; empty where it takes none, None without a route."""
    for route in routes:
        if route.matches(scope)[0] is Match.FULL:
            described = getattr(route, "openapi_extra", None) or {}
            return tuple(described.get("requestBody", {}).get("content", {}))
    return None


def _as_plain(scope: Scope) -> Scope:
    """The request as if its body had come uncompressed; its length is not known yet."""
    scope = dict(scope)
    scope["headers"] = list(scope["headers"])
    headers = MutableHeaders(scope=scope)
    for name in ("content-encoding", "content-length"):
        del headers[name]
    return scope
