"""What the OpenAPI description says of answers: the pieces that all formats share."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_MEANINGS = {
    400: "The request is wrong: one line says what",
    403: "Asked by a page of another origin, or under a name that is not this service's",
    404: "No such model, or no such task",
    406: "`Accept` allows no form that the answer has",
    408: "The body did not arrive in time, or no answer was there in the time that the request has",
    413: "The body is too large",
    415: "The Content-Type is not application/json, or the Content-Encoding not gzip",
    431: "The address and the headers are too long",
    500: "A fault of the service, or a picture that is not finite; sending it again does not help",
    503: "The service is full or ends, or a stage is being replaced: Retry-After says when to come back",
}
_REQUEST_ID = {"X-Request-Id": {"schema": {"type": "string"}, "description": "The request's id, also in the log."}}
_PICTURE_HEADERS = _REQUEST_ID | {
    "Server-Timing": {
        "schema": {"type": "string"},
        "description": "Milliseconds of `encode`, `denoise`, `refine` and `decode`; and of `queue`, from arrival to "
        "the first denoising step.",
    },
    "X-SDXL-Warnings": {
        "schema": {"type": "string"},
        "description": "What of the request had no effect: a JSON list of lines. Absent where there is none.",
    },
}


def json_body(schema: Schema) -> dict[str, Any]:
    """A request body in JSON."""
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def or_null(schema: Schema) -> Schema:
    """An object whose fields may be null, which means absent; those that it requires may not."""
    properties = {
        name: field if name in schema.get("required", ()) else {"anyOf": [field, {"type": "null"}]}
        for name, field in schema["properties"].items()
    }
    return schema | {"properties": properties}


def answer(description: str, content: dict[str, Schema]) -> dict[str, Any]:
    """A picture's answer: its media types and their schemas."""
    return {
        "200": {
            "description": description,
            "headers": _PICTURE_HEADERS,
            "content": {media_type: {"schema": schema} for media_type, schema in content.items()},
        }
    }


def errors(envelope: Schema, *statuses: int) -> dict[str, Any]:
    """Answers that are errors, in a format's envelope; those of every picture route, or the given ones."""
    return {
        str(status): {"description": _MEANINGS[status], "content": {"application/json": {"schema": envelope}}}
        for status in sorted(statuses)
    }


PICTURE_ERRORS = (400, 413, 500, 503)
# The guard's and the router's, of every route; those of a route that reads a body.
COMMON_ERRORS, BODY_ERRORS = (400, 403, 408, 431, 500), (413, 415)
BINARY: Schema = {"type": "string", "format": "binary"}
