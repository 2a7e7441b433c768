"""Ray's own example route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from serve_app.formats.answers import HEAD_ONLY, answered, with_headers, with_warnings
from serve_app.formats.imagine import wire as imagine
from serve_app.formats.openai import wire as openai
from serve_app.formats.openapi import BINARY, PICTURE_ERRORS, answer, errors
from serve_app.pictures.files import MEDIA_TYPES
from serve_app.request.schema import ImageRequest
from serve_app.runtime.service import ImageService


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`GET /imagine`."""

    @app.get(
        "/imagine",
        tags=["Ray"],
        summary="A prompt in the address, a picture back",
        response_class=Response,
        openapi_extra=_IMAGINE,
    )
    async def imagine_picture(request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            asked = imagine.decode(request.scope["query_string"])
            if request.scope.get(HEAD_ONLY):  # nobody will see the picture: it is checked and not drawn
                service.check(asked.request)
                response = Response(media_type=MEDIA_TYPES[asked.request.output_format])
                del response.headers["Content-Length"]
                return with_warnings(response, asked.warnings)
            result = await service.generate(asked.request, request_id)
            picture = result.images[0]
            response = Response(picture.data, media_type=MEDIA_TYPES[picture.output_format])
            response.headers["X-SDXL-Seed"] = str(picture.seed)
            return with_headers(response, [result], asked.warnings)

        return await answered(request, draw, openai.encode_error)


_IMAGINE: dict[str, Any] = {
    "parameters": [
        {"name": "img_size", "in": "query", "schema": {"type": "integer"}, "description": "Both sides, in pixels."},
        *(
            {"name": name, "in": "query", "schema": schema, "required": name == "prompt"}
            for name, schema in ImageRequest.model_json_schema()["properties"].items()
        ),
    ],
    "responses": answer("The picture", dict.fromkeys(MEDIA_TYPES.values(), BINARY))
    | errors(openai.ERROR_SCHEMA, *PICTURE_ERRORS),
}
