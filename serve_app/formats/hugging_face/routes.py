"""Hugging Face's route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from serve_app.formats.answers import answered, read_request, with_headers
from serve_app.formats.hugging_face import wire as hugging_face
from serve_app.formats.openapi import BINARY, PICTURE_ERRORS, answer, errors, json_body, or_null
from serve_app.pictures.files import MEDIA_TYPES
from serve_app.runtime.service import ImageService

ENVELOPES = {"/hugging-face": hugging_face.encode_error}


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`POST /hugging-face/text-to-image` and the address that `InferenceClient.health_check` asks."""
    limits = service.config.limits

    @app.post(
        "/hugging-face/text-to-image",
        tags=["Hugging Face"],
        summary="A prompt in, a picture back",
        response_class=Response,
        openapi_extra=_TEXT_TO_IMAGE,
    )
    async def text_to_image(request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            most, accept = limits.max_text_body_bytes, request.headers.get("accept")
            asked = await read_request(request, service, most, lambda body: hugging_face.decode(body, accept))
            result = await service.generate(asked.request, request_id)
            picture = hugging_face.encode(result, asked.warnings)
            response = Response(picture.data, media_type=picture.media_type, headers={"Vary": "Accept"})
            for name, value in picture.headers:
                response.headers.append(name, value)
            return with_headers(response, [result], asked.warnings)

        return await answered(request, draw, hugging_face.encode_error)

    @app.get("/hugging-face/text-to-image/health", tags=["Hugging Face"], summary="What its client's health_check asks")
    async def health() -> dict[str, str]:
        return {"status": "ok"}


_SCHEMA = hugging_face.text_to_image_schema()
_SCHEMA["properties"]["parameters"] = or_null(_SCHEMA["properties"]["parameters"])
_SCHEMA = or_null(_SCHEMA)
_TEXT_TO_IMAGE: dict[str, Any] = {
    "requestBody": json_body(_SCHEMA),
    "responses": answer("The picture", dict.fromkeys(MEDIA_TYPES.values(), BINARY))
    | errors(hugging_face.ERROR_SCHEMA, *PICTURE_ERRORS, 406),
}
