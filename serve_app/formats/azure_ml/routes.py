"""Azure ML's route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from serve_app.formats.answers import answered, json_response, read_request, with_headers
from serve_app.formats.azure_ml import swagger as azure_swagger
from serve_app.formats.azure_ml import wire as azure_ml
from serve_app.formats.openapi import PICTURE_ERRORS, answer, errors, json_body, or_null
from serve_app.request.schema import ImageRequest
from serve_app.runtime.service import ImageService

ENVELOPES = {"/score": azure_ml.encode_error, "/swagger.json": azure_ml.encode_error}


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`POST /score` and `GET /swagger.json`."""
    limits = service.config.limits

    @app.post("/score", tags=["Azure ML"], summary="Score rows of prompts", openapi_extra=_SCORE)
    async def score(request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            media_type, most = request.headers.get("content-type"), limits.max_images_in_flight
            asked = await read_request(
                request, service, limits.max_body_bytes, lambda body: azure_ml.decode(body, media_type, most)
            )
            results = await service.generate_all(asked.requests, request_id)
            rows = await json_response(lambda: azure_ml.encode(list(zip(asked.requests, results, strict=True))))
            return with_headers(rows, results, asked.warnings)

        response = await answered(request, draw, azure_ml.encode_error)
        response.headers["x-ms-request-id"] = request.headers["x-request-id"]
        if client_id := request.headers.get("x-ms-client-request-id"):
            response.headers["x-ms-client-request-id"] = client_id
        return response

    @app.get("/swagger.json", tags=["Azure ML"], summary="What that server says of /score", openapi_extra=_SWAGGER)
    async def swagger(request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            return JSONResponse(azure_swagger.swagger(request.query_params.get("version")))

        return await answered(request, draw, azure_ml.encode_error)


_FIELDS = ImageRequest.model_json_schema()["properties"]
_PARAMETERS = or_null(
    {"type": "object", "properties": {name: _FIELDS[field] for name, field in azure_ml.parameter_names().items()}}
)
_INPUT: dict[str, Any] = or_null(
    {
        "type": "object",
        "required": ["input_data"],
        "properties": {
            "input_data": {
                "anyOf": [
                    {"type": "object", "properties": {"parameters": _PARAMETERS}},
                    {"type": "array", "items": {"type": "object", "required": ["prompt"]}},
                ],
                "description": "Columns and data, a list a column, or a list of rows.",
            },
            "parameters": _PARAMETERS,
            "params": _PARAMETERS,
        },
        "example": azure_swagger.EXAMPLE,
    }
)
_ROWS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["prompt", "generated_image", "nsfw_content_detected"],
        "properties": {
            "prompt": {"type": "string"},
            "generated_image": {"type": "string", "description": "The picture's file in base64."},
            "nsfw_content_detected": {"type": "null"},
        },
    },
}
_SCORE: dict[str, Any] = {
    "requestBody": json_body(_INPUT),
    "responses": answer("A row a picture, in the order of the data", {"application/json": _ROWS})
    | errors(azure_swagger.ERROR_SCHEMA, *PICTURE_ERRORS, 415),
}
_SWAGGER: dict[str, Any] = {
    "parameters": [{"name": "version", "in": "query", "schema": {"enum": ["2", "3"], "default": "2"}}],
    "responses": answer("The document", {"application/json": {"type": "object"}})
    | errors(azure_swagger.ERROR_SCHEMA, 400),
}
