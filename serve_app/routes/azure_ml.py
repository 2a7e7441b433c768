"""Azure ML's route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from serve_app.protocols import azure_ml, azure_swagger
from serve_app.routes.answers import ERRORS, answered, json_error, json_response, read_body, with_headers
from serve_app.service import ImageService

ENVELOPES = {"/score": azure_ml.encode_error, "/swagger.json": azure_ml.encode_error}


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`POST /score` and `GET /swagger.json`."""
    limits = service.config.limits

    @app.post("/score", tags=["Azure ML"], summary="Score rows of prompts", openapi_extra=_SCORE)
    async def score(request: Request) -> Response:
        async def answer(request_id: str) -> Response:
            body = await read_body(request, limits.max_body_bytes)
            asked = azure_ml.decode(body, request.headers.get("content-type"), limits.max_images_in_flight)
            results = await service.generate_all(asked.requests, request_id)
            rows = await json_response(lambda: azure_ml.encode(list(zip(asked.requests, results, strict=True))))
            return with_headers(rows, results, asked.warnings)

        response = await answered(request, answer, azure_ml.encode_error)
        request_id = response.headers.get("x-request-id") or request.headers["x-request-id"]
        response.headers["x-ms-request-id"] = request_id
        if client_id := request.headers.get("x-ms-client-request-id"):
            response.headers["x-ms-client-request-id"] = client_id
        return response

    @app.get("/swagger.json", tags=["Azure ML"], summary="What that server says of /score", openapi_extra=_SWAGGER)
    async def swagger(request: Request) -> Response:
        async def answer(request_id: str) -> Response:
            return JSONResponse(azure_swagger.swagger(request.query_params.get("version")))

        return await answered(request, answer, azure_ml.encode_error)


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
    "responses": ERRORS | {"415": json_error("The Content-Type is not application/json")},
}
_SWAGGER: dict[str, Any] = {
    "parameters": [{"name": "version", "in": "query", "schema": {"enum": ["2", "3"], "default": "2"}}],
    "responses": {"400": ERRORS["400"]},
}
