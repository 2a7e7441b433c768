"""What Azure ML's inference server says of itself: `GET /swagger.json?version=2|3` and `GET /`.

Both documents describe `POST /score` (`azure_ml.py`): Swagger 2.0, whose schemas know no alternatives and so show
the published shape alone, and OpenAPI 3.0 with every shape.
"""

from __future__ import annotations

from typing import Any

from serve_app import __version__
from serve_app.formats.azure_ml.wire import parameter_names
from serve_app.request.errors import InvalidRequest
from serve_app.request.schema import ImageRequest

HEALTHY = "Healthy"  # the body of `GET /`, text/plain

EXAMPLE = {
    "input_data": {
        "columns": ["prompt"],
        "data": ["a photograph of an astronaut riding a horse"],
        "index": [0],
        "parameters": {"num_inference_steps": 50, "guidance_scale": 7.5},
    }
}
_EXAMPLE_ANSWER = [
    {
        "prompt": "a photograph of an astronaut riding a horse",
        "generated_image": "iVBORw0KGgo...",
        "nsfw_content_detected": None,
    }
]
_ERRORS = {
    "400": "The request is wrong: the message says what",
    "413": "The body is too large",
    "415": "The Content-Type is not application/json",
    "503": "The service is full, or a stage is being replaced: Retry-After says when to come back",
}


def swagger(version: str | None) -> dict[str, Any]:
    """The document of a version as it stands in the address; 2 where it says none. Raises `InvalidRequest`."""
    if version in (None, "2"):
        return swagger_2()
    if version == "3":
        return openapi_3()
    raise InvalidRequest(f"version: {version[:40]!r} is not 2 or 3", param="version")


def swagger_2() -> dict[str, Any]:
    """Swagger 2.0."""
    nullable = {"x-nullable": True}
    definitions = {
        "ServiceInput": _service_input(_split(nullable), nullable) | {"example": EXAMPLE},
        "ServiceOutput": _service_output(nullable) | {"example": _EXAMPLE_ANSWER},
        "ErrorResponse": ERROR_SCHEMA,
    }
    error = {"schema": {"$ref": "#/definitions/ErrorResponse"}}
    return {
        "swagger": "2.0",
        "info": _INFO,
        "schemes": ["http", "https"],
        "consumes": ["application/json"],
        "produces": ["application/json"],
        "securityDefinitions": {"Bearer": _API_KEY},
        "paths": {
            "/": {
                "get": _HEALTH
                | {
                    "produces": ["text/plain"],
                    "responses": {
                        "200": {"description": "The server is up", "schema": {"type": "string"}},
                    },
                }
            },
            "/score": {
                "post": _SCORE
                | {
                    "parameters": [
                        {
                            "name": "serviceInputPayload",
                            "in": "body",
                            "required": True,
                            "schema": {"$ref": "#/definitions/ServiceInput"},
                        }
                    ],
                    "responses": {
                        "200": {"description": _OUTPUT, "schema": {"$ref": "#/definitions/ServiceOutput"}},
                        **{status: {"description": text} | error for status, text in _ERRORS.items()},
                    },
                }
            },
        },
        "definitions": definitions,
    }


def openapi_3() -> dict[str, Any]:
    """OpenAPI 3.0."""
    nullable = {"nullable": True}
    rows = {"type": "array", "items": _row(nullable), "description": "A row an object."}
    columns = {
        "type": "object",
        "required": ["prompt"],
        "properties": {
            "prompt": {"type": "array", "items": {"type": "string"}},
            "negative_prompt": {"type": "array", "items": {"type": "string"} | nullable},
            "parameters": _parameters(nullable),
        },
        "description": "A list a column, all of one length.",
    }
    input_data = {"oneOf": [_split(nullable), rows, columns]}
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}}
    return {
        "openapi": "3.0.3",
        "info": _INFO,
        "paths": {
            "/": {
                "get": _HEALTH
                | {
                    "responses": {
                        "200": {
                            "description": "The server is up",
                            "content": {"text/plain": {"schema": {"type": "string"}, "example": HEALTHY}},
                        }
                    }
                }
            },
            "/score": {
                "post": _SCORE
                | {
                    "security": [{"Bearer": []}, {}],
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/json": {
                                "schema": {"$ref": "#/components/schemas/ServiceInput"},
                                "example": EXAMPLE,
                            }
                        },
                    },
                    "responses": {
                        "200": {
                            "description": _OUTPUT,
                            "content": {
                                "application/json": {
                                    "schema": {"$ref": "#/components/schemas/ServiceOutput"},
                                    "example": _EXAMPLE_ANSWER,
                                }
                            },
                        },
                        **{status: {"description": text} | error for status, text in _ERRORS.items()},
                    },
                }
            },
        },
        "components": {
            "securitySchemes": {"Bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "ServiceInput": _service_input(input_data, nullable),
                "ServiceOutput": _service_output(nullable),
                "ErrorResponse": ERROR_SCHEMA,
            },
        },
    }


_INFO = {
    "title": "sdxl-serve",
    "description": "Stable Diffusion XL behind Azure ML's scoring interface. The service itself asks for no key.",
    "version": __version__,
}
_API_KEY = {
    "type": "apiKey",
    "name": "Authorization",
    "in": "header",
    "description": "Bearer and the endpoint's key, where something in front of the service asks for one.",
}
_HEALTH = {"operationId": "ServiceHealthCheck", "description": f"Answers {HEALTHY!r} while the server is up."}
_SCORE = {"operationId": "RunMLService", "description": "Draws a picture of each row's prompt."}
_OUTPUT = "A row a picture, in the order of the data"
ERROR_SCHEMA = {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}


def _service_input(input_data: dict[str, Any], nullable: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["input_data"],
        "properties": {
            "input_data": input_data,
            "parameters": _parameters(nullable),
            "params": _parameters(nullable),
        },
    }


def _service_output(nullable: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["prompt", "generated_image", "nsfw_content_detected"],
            "properties": {
                "prompt": {"type": "string"},
                "generated_image": {"type": "string", "format": "byte", "description": "The picture's file in base64."},
                "nsfw_content_detected": {"type": "boolean"} | nullable,
            },
        },
    }


def _split(nullable: dict[str, Any]) -> dict[str, Any]:
    """pandas' `split` orientation, the published shape. A row of one column may be bare, so `data` has any items."""
    return {
        "type": "object",
        "required": ["columns", "data"],
        "properties": {
            "columns": {
                "type": "array",
                "items": {"type": "string", "enum": ["prompt", "negative_prompt"]},
                "uniqueItems": True,
            },
            "data": {"type": "array", "items": {}, "description": "A row a prompt, or a list of the columns' values."},
            "index": {"type": "array", "items": {}, "description": "As long as data; names nothing."},
            "parameters": _parameters(nullable),
        },
    }


def _row(nullable: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": {"prompt": {"type": "string"}, "negative_prompt": {"type": "string"} | nullable},
    }


def _parameters(nullable: dict[str, Any]) -> dict[str, Any]:
    """The parameters of all rows: the fields of `ImageRequest`, and Azure's own name of `n`."""
    ours = ImageRequest.model_json_schema()["properties"]
    properties = {name: _draft_4(ours[renamed]) | nullable for name, renamed in parameter_names().items()}
    return {"type": "object", "properties": properties}


def _draft_4(schema: dict[str, Any]) -> dict[str, Any]:
    """A pydantic property in the older dialect of both documents: no null type, no tuples, no numeric exclusives."""
    kept = {name: value for name, value in schema.items() if name not in ("anyOf", "title", "default")}
    for option in schema.get("anyOf", ()):
        if option.get("type") != "null":
            kept |= option
    if "prefixItems" in kept:
        kept["items"] = _draft_4(kept.pop("prefixItems")[0])
    if "exclusiveMinimum" in kept:
        kept |= {"minimum": kept["exclusiveMinimum"], "exclusiveMinimum": True}
    if schema.get("default") is not None:
        kept["default"] = schema["default"]
    return kept
