"""The HTTP routes: bytes in, a protocol's decode, the service, the protocol's encode, bytes out.

Each route renders every error in its own protocol's envelope. Nothing here knows of Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_app import __version__, sse
from serve_app.errors import (
    BodyTooLarge,
    InternalError,
    MethodNotAllowed,
    RouteNotFound,
    ServiceError,
)
from serve_app.images import MEDIA_TYPES
from serve_app.page import add_page
from serve_app.protocols import azure_ml, imagine, openai
from serve_app.protocols.info import ServiceInfo, service_info
from serve_app.schema import Accepted, ImageRequest, ImageResult
from serve_app.service import ImageService

logger = logging.getLogger("ray.serve")

Envelope = Callable[[ServiceError], dict[str, Any]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MAX_WARNING_CHARS, _MAX_WARNINGS_HEADER = 300, 6_000

DESCRIPTION = """\
Stable Diffusion XL as a Ray Serve graph: text encoders, base denoiser, refiner and VAE decoder are
separate deployments, and requests share every denoising step.

Every picture answer carries `X-Request-Id`, `Server-Timing` with the four stages, and, where something of
the request had no effect, `X-SDXL-Warnings`, a JSON list.
"""


def build_http_app(service: ImageService) -> FastAPI:
    """The ASGI application over a service."""
    app = FastAPI(title="sdxl-serve", version=__version__, description=DESCRIPTION)
    started = int(time.time())
    limits, names = service.config.limits, service.config.model_names

    @app.post("/v1/images/generations", tags=["OpenAI"], summary="Draw pictures", openapi_extra=_GENERATIONS)
    async def generations(request: Request) -> Response:
        async def answer(request_id: str) -> Response:
            asked = openai.decode(await _body(request, limits.max_body_bytes), names)
            if asked.stream:
                return await _stream(service, asked, request_id)
            result = await service.generate(asked.request, request_id)
            body = await _json(lambda: openai.encode(result, asked.response_format, asked.warnings))
            return _with_headers(body, [result], asked.warnings)

        return await _answer(request, answer, openai.encode_error)

    @app.get("/v1/models", tags=["OpenAI"], summary="List the models")
    async def models() -> dict[str, Any]:
        return openai.encode_models(names, started)

    @app.get("/v1/sdxl/info", tags=["operations"], summary="What is served, and within which limits")
    async def info() -> ServiceInfo:
        return service_info(service.config, service.facts)

    @app.post("/score", tags=["Azure ML"], summary="Score rows of prompts", openapi_extra=_SCORE)
    async def score(request: Request) -> Response:
        async def answer(request_id: str) -> Response:
            body = await _body(request, limits.max_body_bytes)
            asked = azure_ml.decode(body, request.headers.get("content-type"), limits.max_images_in_flight)
            results = await service.generate_all(asked.requests, request_id)
            rows = await _json(lambda: azure_ml.encode(list(zip(asked.requests, results, strict=True))))
            return _with_headers(rows, results, asked.warnings)

        response = await _answer(request, answer, azure_ml.encode_error)
        request_id = response.headers.get("x-request-id") or request.headers["x-request-id"]
        response.headers["x-ms-request-id"] = request_id
        if client_id := request.headers.get("x-ms-client-request-id"):
            response.headers["x-ms-client-request-id"] = client_id
        return response

    @app.get("/imagine", tags=["Ray"], summary="A prompt in the address, a picture back", openapi_extra=_IMAGINE)
    async def imagine_picture(request: Request) -> Response:
        async def answer(request_id: str) -> Response:
            asked = imagine.decode(request.scope["query_string"])
            result = await service.generate(asked.request, request_id)
            picture = result.images[0]
            response = Response(picture.data, media_type=MEDIA_TYPES[picture.output_format])
            response.headers["X-SDXL-Seed"] = str(picture.seed)
            return _with_headers(response, [result], asked.warnings)

        return await _answer(request, answer, openai.encode_error)

    @app.get("/health", tags=["operations"], summary="Alive: the ingress is up")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": names[0], "images_in_flight": service.admission.in_flight}

    add_page(app)

    @app.exception_handler(HTTPException)
    async def unmatched(request: Request, error: HTTPException) -> Response:
        kind = MethodNotAllowed if error.status_code == 405 else RouteNotFound
        what = f"{request.method} {request.url.path}"
        message = f"{what}: method not allowed" if error.status_code == 405 else f"{what}: no such route; see /docs"
        envelope = azure_ml.encode_error if request.url.path == "/score" else openai.encode_error
        return _error(kind(message), envelope, error.headers)

    return app


async def _answer(request: Request, answer: Callable[[str], Awaitable[Response]], envelope: Envelope) -> Response:
    """Runs a route's work and renders what it raises."""
    given = request.headers.get("x-request-id")
    request_id = given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    try:
        response = await answer(request_id)
    except ClientDisconnect:
        response = Response(status_code=499)  # nobody is there to read it
    except Exception as error:
        response = _error(_as_service_error(error, request_id), envelope)
    if given is None:  # Ray's proxy gives every request an id and puts it on the answer itself
        response.headers["X-Request-Id"] = request_id
    return response


async def _stream(service: ImageService, asked: openai.Decoded, request_id: str) -> Response:
    """Server-sent events. What can be refused is refused before the first: with a status of its own."""
    events = service.stream(asked.request, request_id, asked.partial_images, asked.progress)
    accepted = await anext(events)
    assert isinstance(accepted, Accepted)
    encoder = openai.StreamEncoder(asked.request.n, int(time.time()), asked.warnings)

    async def body() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                data = await asyncio.to_thread(encoder.encode, event)
                if data is not None:
                    yield sse.encode_event(data["type"], data)
        except Exception as error:
            fault = _as_service_error(error, request_id)
            yield sse.encode_event("error", openai.encode_error(fault))

    response = StreamingResponse(sse.keep_alive(body()), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
    return _with_warnings(response, [*asked.warnings, *accepted.warnings])


def _as_service_error(error: Exception, request_id: str) -> ServiceError:
    """What a caller may see of an error; the log has the rest."""
    if isinstance(error, ServiceError):
        if error.status >= 500:
            logger.warning("request %s: %s", request_id, error.message)
        return error
    logger.error("request %s failed", request_id, exc_info=error)
    return InternalError(f"internal error; the log has it under request {request_id}")


async def _json(encode: Callable[[], Any]) -> Response:
    """A JSON answer, encoded in a thread: pictures in base64 are megabytes."""
    content = await asyncio.to_thread(lambda: json.dumps(encode(), separators=(",", ":")).encode())
    return Response(content, media_type="application/json")


async def _body(request: Request, max_bytes: int) -> bytes:
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


def _error(error: ServiceError, envelope: Envelope, headers: Any = None) -> JSONResponse:
    response = JSONResponse(envelope(error), status_code=error.status, headers=dict(headers or {}))
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif error.status >= 500:
        response.headers["x-should-retry"] = "false"  # OpenAI's client would try again in vain
    return response


def _with_headers(response: Response, results: Sequence[ImageResult], asked: Sequence[str]) -> Response:
    if results:
        times = {timing.stage: timing.seconds for timing in _slowest(results)}
        # Beside the stages: from arrival to the first denoising step.
        times["queue"] = times["encode"] + max(
            t.queue_seconds for r in results for t in r.timings if t.stage == "denoise"
        )
        response.headers["Server-Timing"] = ", ".join(f"{name};dur={s * 1000:.1f}" for name, s in times.items())
    return _with_warnings(response, [*asked, *(line for result in results for line in result.warnings)])


def _with_warnings(response: Response, warnings: Sequence[str]) -> Response:
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


def _json_error(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"type": "object"}}}}


_ERRORS = {
    "400": _json_error("The request is wrong: one line says what"),
    "413": _json_error("The body is too large"),
    "503": _json_error("The service is full, or a stage is being replaced: Retry-After says when to come back"),
}
_GENERATIONS: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": openai.generations_schema()}}},
    "responses": _ERRORS | {"404": _json_error("No such model")},
}
_SCORE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["input_data"]},
                "example": {
                    "input_data": {
                        "columns": ["prompt"],
                        "data": ["a photograph of an astronaut riding a horse"],
                        "index": [0],
                        "parameters": {"num_inference_steps": 50, "guidance_scale": 7.5},
                    }
                },
            }
        },
    },
    "responses": _ERRORS | {"415": _json_error("The Content-Type is not application/json")},
}
_IMAGINE: dict[str, Any] = {
    "parameters": [
        {"name": "img_size", "in": "query", "schema": {"type": "integer"}, "description": "Both sides, in pixels."},
        *(
            {"name": name, "in": "query", "schema": schema, "required": name == "prompt"}
            for name, schema in ImageRequest.model_json_schema()["properties"].items()
        ),
    ],
    "responses": _ERRORS | {"200": {"description": "The picture", "content": {m: {} for m in MEDIA_TYPES.values()}}},
}
