"""Hugging Face's route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from serve_app.images import MEDIA_TYPES
from serve_app.protocols import hugging_face
from serve_app.routes.answers import ERRORS, answered, json_error, read_body, with_headers
from serve_app.service import ImageService

ENVELOPES = {"/hugging-face": hugging_face.encode_error}


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`POST /hugging-face/text-to-image`."""
    limits = service.config.limits

    @app.post(
        "/hugging-face/text-to-image",
        tags=["Hugging Face"],
        summary="A prompt in, a picture back",
        response_class=Response,
        openapi_extra=_TEXT_TO_IMAGE,
    )
    async def text_to_image(request: Request) -> Response:
        async def answer(request_id: str) -> Response:
            asked = hugging_face.decode(await read_body(request, limits.max_body_bytes), request.headers.get("accept"))
            result = await service.generate(asked.request, request_id)
            picture = hugging_face.encode(result, asked.warnings)
            response = Response(picture.data, media_type=picture.media_type, headers={"Vary": "Accept"})
            for name, value in picture.headers:
                response.headers.append(name, value)
            return with_headers(response, [result], asked.warnings)

        return await answered(request, answer, hugging_face.encode_error)


_TEXT_TO_IMAGE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": hugging_face.text_to_image_schema()}},
    },
    "responses": ERRORS
    | {
        "200": {"description": "The picture", "content": {media_type: {} for media_type in MEDIA_TYPES.values()}},
        "406": json_error("`Accept` allows no format that a picture can have"),
    },
}
