"""What the routes of all formats share: reading a body, an answer with its headers, an error in its envelope."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from serve_app.request.errors import BodyTooLarge, InternalError, ServiceError
from serve_app.request.schema import ImageResult

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
Envelope = Callable[[ServiceError], dict[str, Any]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# The largest body that is decoded on the event loop; there a worse one of this size takes some milliseconds.
_INLINE_BYTES = 16 * 2**10
# One thread: several large bodies at once would keep the interpreter from the event loop for that much longer.
_DECODER = ThreadPoolExecutor(1, thread_name_prefix="decode")
_MAX_WARNING_CHARS, _MAX_WARNINGS_HEADER = 300, 6_000


async def answered(request: Request, answer: Callable[[str], Awaitable[Response]], envelope: Envelope) -> Response:
    """Runs a route's work and renders what it raises."""
    given = request.headers.get("x-request-id")
    request_id = given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    try:
        response = await answer(request_id)
    except ClientDisconnect:
        response = Response(status_code=499)  # nobody is there to read it
    except Exception as error:
        response = error_response(as_service_error(error, request_id), envelope)
    if given is None:  # Ray's proxy gives every request an id and puts it on the answer itself
        response.headers["X-Request-Id"] = request_id
    return response


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


async def decoded(body: bytes, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of a body: in a thread where it is large, so that the event loop goes on meanwhile."""
    if len(body) <= _INLINE_BYTES:
        return decode(body)
    return await asyncio.get_running_loop().run_in_executor(_DECODER, decode, body)


async def read_body(request: Request, max_bytes: int) -> bytes:
    too_large = BodyTooLarge(f"the body is larger than {max_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def error_response(error: ServiceError, envelope: Envelope, headers: Any = None) -> JSONResponse:
    response = JSONResponse(envelope(error), status_code=error.status, headers=dict(headers or {}))
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif error.status >= 500:
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
    lines: list[str] = []
    left = _MAX_WARNINGS_HEADER
    for line in warnings:
        cut = line if len(line) <= _MAX_WARNING_CHARS else line[:_MAX_WARNING_CHARS] + " ..."
        left -= len(json.dumps(cut)) + len(", ")
        if left < 0:
            lines.append(f"... and {len(warnings) - len(lines)} more")
            break
        lines.append(cut)
    return json.dumps(lines)
