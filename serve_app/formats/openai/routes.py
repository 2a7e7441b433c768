"""OpenAI's routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from serve_app.formats import sse
from serve_app.formats.answers import (
    answered,
    as_service_error,
    json_response,
    read_request,
    with_headers,
    with_warnings,
)
from serve_app.formats.openai import wire as openai
from serve_app.formats.openapi import PICTURE_ERRORS, answer, errors, json_body, or_null
from serve_app.request.schema import Accepted, StreamEvent
from serve_app.runtime.service import ImageService


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`POST /v1/images/generations`, `GET /v1/models` and `GET /v1/models/{name}`."""
    started = int(time.time())
    limits, names = service.config.limits, service.config.model_names

    @app.post("/v1/images/generations", tags=["OpenAI"], summary="Draw pictures", openapi_extra=_GENERATIONS)
    async def generations(request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            most = limits.max_text_body_bytes
            asked = await read_request(request, service, most, lambda body: openai.decode(body, names))
            if asked.stream:
                return await _streamed(service, asked, request_id)
            result = await service.generate(asked.request, request_id)
            body = await json_response(lambda: openai.encode(result, asked.response_format, asked.warnings))
            return with_headers(body, [result], asked.warnings)

        return await answered(request, draw, openai.encode_error)

    @app.get("/v1/models", tags=["OpenAI"], summary="List the models", openapi_extra=_MODELS)
    async def models() -> dict[str, Any]:
        return openai.encode_models(names, started)

    @app.get("/v1/models/{name:path}", tags=["OpenAI"], summary="One model", openapi_extra=_MODEL)
    async def model(name: str, request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            return JSONResponse(openai.encode_model(name, names, started))

        return await answered(request, draw, openai.encode_error)


async def _streamed(service: ImageService, asked: openai.Decoded, request_id: str) -> Response:
    """Server-sent events. What can be refused is refused before the first: with a status of its own."""
    events = service.stream(asked.request, request_id, asked.partial_images, asked.progress)
    accepted = await anext(events)
    assert isinstance(accepted, Accepted)
    encoder = openai.StreamEncoder(asked.request.n, int(time.time()), asked.warnings)

    def encode(event: StreamEvent) -> bytes | None:
        data = encoder.encode(event)
        return None if data is None else sse.encode_event(data["type"], data)

    async def body() -> AsyncIterator[bytes]:
        try:
            async with aclosing(events):  # its slots are free when this ends, however it ends
                async for event in events:
                    data = await asyncio.to_thread(encode, event)
                    if data is not None:
                        yield data
        except Exception as error:
            fault = as_service_error(error, request_id)
            yield sse.encode_event("error", openai.encode_error(fault))

    response = StreamingResponse(sse.keep_alive(body()), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
    return with_warnings(response, [*asked.warnings, *accepted.warnings])


_GENERATIONS: dict[str, Any] = {
    "requestBody": json_body(or_null(openai.generations_schema())),
    "responses": answer(
        "The pictures; with `stream` server-sent events",
        {"application/json": openai.IMAGES_SCHEMA, "text/event-stream": openai.STREAM_SCHEMA},
    )
    | errors(openai.ERROR_SCHEMA, *PICTURE_ERRORS, 404),
}
_MODELS: dict[str, Any] = {
    "responses": answer("The names this service answers to", {"application/json": openai.MODELS_SCHEMA})
}
_MODEL: dict[str, Any] = {
    "responses": answer("The model", {"application/json": openai.MODEL_SCHEMA}) | errors(openai.ERROR_SCHEMA, 404)
}
