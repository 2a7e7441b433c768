"""Errors in the envelope of the format that was asked, whoever raised them: by the beginning of the path."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from serve_app.formats.answers import Envelope, as_service_error, error_response
from serve_app.formats.automatic1111 import routes as automatic1111
from serve_app.formats.automatic1111 import status as automatic1111_status
from serve_app.formats.azure_ml import routes as azure_ml
from serve_app.formats.azure_ml import swagger as azure_swagger
from serve_app.formats.hugging_face import routes as hugging_face
from serve_app.formats.hugging_face import wire as hugging_face_wire
from serve_app.formats.openai import wire as openai
from serve_app.formats.openapi import Schema
from serve_app.formats.stability import routes as stability
from serve_app.formats.stability import wire as stability_wire

_SCHEMAS: tuple[tuple[Mapping[str, Envelope], Mapping[str, Any]], ...] = (
    (azure_ml.ENVELOPES, azure_swagger.ERROR_SCHEMA),
    (hugging_face.ENVELOPES, hugging_face_wire.ERROR_SCHEMA),
    (automatic1111.ENVELOPES, automatic1111_status.ERROR_SCHEMA),
    (stability.ENVELOPES, stability_wire.ERROR_SCHEMA),
)
_BY_PATH = {start: (encode, dict(schema)) for starts, schema in _SCHEMAS for start, encode in starts.items()}


def path_of(scope: Scope) -> str:
    """The path as routes have it: without Ray's route_prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def envelope_of(path: str) -> tuple[Envelope, Schema]:
    """How the errors of a path look, and their schema. Where no format claims the path, they are OpenAI's."""
    found = (pair for start, pair in _BY_PATH.items() if path == start or path.startswith(f"{start}/"))
    return next(found, (openai.encode_error, openai.ERROR_SCHEMA))


def error_answer(scope: Scope, error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that an error is. One that is no `ServiceError` is a fault of ours, and the log has it."""
    request_id = Headers(scope=scope).get("x-request-id", "")
    encode: Any = envelope_of(path_of(scope))[0]
    if encode is stability_wire.encode_error:  # the one envelope that names the request
        encode = functools.partial(encode, request_id=request_id)
    return error_response(as_service_error(error, request_id), encode, headers)
