"""Stability's routes, version 1."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI, Request, Response

from serve_app.formats.answers import Envelope, answered, json_response, read_request, with_headers
from serve_app.formats.openapi import BINARY, PICTURE_ERRORS, answer, errors, json_body, or_null
from serve_app.formats.stability import wire as stability
from serve_app.runtime.service import ImageService

ENVELOPES: dict[str, Envelope] = {"/v1/generation": stability.encode_error, "/v1/engines": stability.encode_error}


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`POST /v1/generation/{engine}/text-to-image` and `GET /v1/engines/list`."""
    limits, names = service.config.limits, service.config.model_names

    @app.post(
        "/v1/generation/{engine:path}/text-to-image",
        tags=["Stability"],
        summary="Draw pictures",
        openapi_extra=_TEXT_TO_IMAGE,
    )
    async def text_to_image(engine: str, request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            most, accept = limits.max_text_body_bytes, request.headers.get("accept")
            asked = await read_request(
                request, service, most, lambda body: stability.decode(body, engine, accept, names)
            )
            result = await service.generate(asked.request, request_id)
            if asked.media_type == "application/json":
                response = await json_response(lambda: stability.encode(result, asked.warnings))
            else:
                picture = stability.encode_picture(result)
                response = Response(picture.data, media_type=asked.media_type, headers=dict(picture.headers))
            response.headers["Vary"] = "Accept"
            return with_headers(response, [result], asked.warnings)

        request_id = request.headers["x-request-id"]
        return await answered(request, draw, functools.partial(stability.encode_error, request_id=request_id))

    @app.get("/v1/engines/list", tags=["Stability"], summary="List the engines", openapi_extra=_ENGINES)
    async def engines() -> list[dict[str, Any]]:
        return stability.encode_engines(names)


_TEXT_TO_IMAGE: dict[str, Any] = {
    "requestBody": json_body(or_null(stability.text_to_image_schema())),
    "responses": answer(
        "The pictures; with `Accept: image/png` one as it is, its seed in the header `seed`",
        {"application/json": stability.ARTIFACTS_SCHEMA, "image/png": BINARY},
    )
    | errors(stability.ERROR_SCHEMA, *PICTURE_ERRORS, 404, 406),
}
_ENGINES: dict[str, Any] = {"responses": answer("The engines", {"application/json": stability.ENGINES_SCHEMA})}
