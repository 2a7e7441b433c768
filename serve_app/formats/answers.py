"""What the routes of all formats share: reading a body, an answer with its headers, an error in its envelope."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from serve_app.pictures.text import json_text
from serve_app.request.errors import (
    BodyTimeout,
    BodyTooLarge,
    InternalError,
    RequestTimeout,
    ServiceError,
    UnexpectedBody,
)
from serve_app.request.schema import ImageResult
from serve_app.runtime.admission import Bodies
from serve_app.runtime.service import ImageService

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
Envelope = Callable[[ServiceError], dict[str, Any]]

# In the ASGI scope of a GET that came as HEAD: its answer's body goes nowhere.
HEAD_ONLY = "serve_app.head_only"
# In the ASGI scope of a request whose body a route reads: how many bytes it takes.
MAX_BYTES = "serve_app.max_bytes"
# Bytes. Proxies in front hold all headers of an answer in 4 or 8 KB.
_MAX_WARNING, _MAX_WARNINGS_HEADER = 250, 990
# The largest body that is decoded on the event loop; there a worse one of this size takes some milliseconds.
_INLINE_BYTES = 16 * 2**10
# One thread: several large bodies at once would keep the interpreter from the event loop for that much longer.
_DECODER = ThreadPoolExecutor(1, thread_name_prefix="decode")


async def answered(request: Request, answer: Callable[[str], Awaitable[Response]], envelope: Envelope) -> Response:
    """Runs a route's work and renders what it raises."""
    request_id = request.headers["x-request-id"]  # `http/conventions.py` sees to it
    try:
        return await answer(request_id)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody is there to read it
    except Exception as error:
        return error_response(as_service_error(error, request_id), envelope)


def as_service_error(error: Exception, request_id: str) -> ServiceError:
    """What a caller may see of an error; the log has the rest."""
    if isinstance(error, ServiceError):
        if error.status >= 500:
            logger.warning("request %s: %s", request_id, error.message)
        return error
    logger.error("request %s failed", request_id, exc_info=error)
    return InternalError(f"internal error; the log has it under request {request_id}")


async def json_response(encode: Callable[[], Any]) -> Response:
    """A JSON answer, encoded in a thread: pictures in base64 are megabytes."""
    content = await asyncio.to_thread(lambda: _json(encode()))
    return Response(content, media_type="application/json")


def _json(content: Any) -> bytes:
    # Text by text: all in one call would keep the interpreter from the event loop until the last picture.
    written = bytearray()
    for part in json.JSONEncoder(separators=(",", ":")).iterencode(content):
        written += part.encode()
    return bytes(written)


async def _decoded(body: bytes, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of a body: in a thread where it is large, so that the event loop goes on meanwhile."""
    if len(body) <= _INLINE_BYTES:
        return decode(body)
    return await asyncio.get_running_loop().run_in_executor(_DECODER, decode, body)


async def read_request(request: Request, service: ImageService, max_bytes: int, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of the body of a request for pictures. Raises what `read_body` does, and `Draining`."""
    service.admission.check_open()  # before megabytes are read for nothing
    return await read_body(request, service.bodies, max_bytes, decode)


async def read_body(request: Request, bodies: Bodies, max_bytes: int, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of the whole body, decompressed.

    Raises `BodyTooLarge` as soon as it is known to be larger, `Overloaded` where too much is being read at once, and
    what `decode` raises.
    """
    request.scope[MAX_BYTES] = max_bytes
    too_large = BodyTooLarge(f"the body is larger than {max_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise too_large
    body = bytearray()
    with bodies.reading() as arrived:
        async for chunk in request.stream():
            if len(body) + len(chunk) > max_bytes:
                raise too_large
            arrived(len(chunk))
            body += chunk
        return await _decoded(bytes(body), decode)


def error_response(error: ServiceError, envelope: Envelope, headers: Any = None) -> JSONResponse:
    response = JSONResponse(envelope(error), status_code=error.status, headers=dict(headers or {}))
    if isinstance(error, BodyTimeout | UnexpectedBody):
        response.headers["Connection"] = "close"  # the rest of the body may still come, and is no request
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif error.status >= 500 or isinstance(error, RequestTimeout):
        response.headers["x-should-retry"] = "false"  # OpenAI's client would try again in vain
    return response


def with_headers(response: Response, results: Sequence[ImageResult], asked: Sequence[str]) -> Response:
    timed = [result for result in results if result.timings]  # an interrupted one has none
    if timed:
        times = {timing.stage: timing.seconds for timing in _slowest(timed)}
        # Beside the stages: from arrival to the first denoising step.
        times["queue"] = times["encode"] + max(
            t.queue_seconds for r in timed for t in r.timings if t.stage == "denoise"
        )
        response.headers["Server-Timing"] = ", ".join(f"{name};dur={s * 1000:.1f}" for name, s in times.items())
    return with_warnings(response, [*asked, *(line for result in results for line in result.warnings)])


def with_warnings(response: Response, warnings: Sequence[str]) -> Response:
    if warnings:
        response.headers["X-SDXL-Warnings"] = _warnings_header(list(dict.fromkeys(warnings)))
    return response


def _slowest(results: Sequence[ImageResult]) -> list[Any]:
    """Of each stage the longest: the rows of one body run side by side."""
    return [
        max(timings, key=lambda timing: timing.seconds) for timings in zip(*(r.timings for r in results), strict=True)
    ]


def _warnings_header(warnings: list[str]) -> str:
    """A JSON list in ASCII: as many warnings as there is room for, long ones cut."""
    lines: list[str] = []
    left = _MAX_WARNINGS_HEADER
    for line in warnings:
        cut = _cut(line)
        left -= len(json_text(cut)) + len(", ")
        if left < 0:
            lines.append(f"... and {len(warnings) - len(lines)} more")
            break
        lines.append(cut)
    return json_text(lines)


def _cut(line: str) -> str:
    """As much of a line as has room in JSON: a character beyond ASCII takes up to 12 bytes there."""
    if len(json_text(line[: _MAX_WARNING + 1])) <= _MAX_WARNING:
        return line
    room = _MAX_WARNING - len('" ..."')
    for end, character in enumerate(line):
        room -= len(json_text(character)) - len('""')
        if room < 0:
            return line[:end] + " ..."
    return line
