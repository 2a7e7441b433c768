"""OpenAI's Images API: `POST /v1/images/generations`, with SDXL's own fields beside OpenAI's."""

from __future__ import annotations

import base64
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.formats.json_body import parse_object
from serve_app.formats.words import Warns, unknown_fields
from serve_app.pictures.files import MEDIA_TYPES
from serve_app.request.errors import InvalidRequest, ModelNotFound, ServiceError
from serve_app.request.schema import (
    MAX_PARTIAL_IMAGES,
    GeneratedImage,
    ImageReady,
    ImageRequest,
    ImageResult,
    PartialImage,
    Progress,
    StreamEvent,
    invalid_request,
    parse_request,
)

ResponseFormat = Literal["b64_json", "url"]


class OpenAIFields(BaseModel):
    """The fields of OpenAI's format that `ImageRequest` does not have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="A name from /v1/models; the service's own if absent.")
    size: str | None = Field(
        None, description="`WIDTHxHEIGHT` in pixels, or `auto` for the checkpoint's own size.", examples=["auto"]
    )
    response_format: ResponseFormat | None = Field(None, description="b64_json (default), or url for a data: address.")
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description=Warns("No effect (warns): SDXL has num_inference_steps.")
    )
    style: Literal["vivid", "natural"] | None = Field(None, description=Warns("No effect (warns)."))
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description=Warns("SDXL draws opaque pictures; transparent warns.")
    )
    moderation: Literal["auto", "low"] | None = Field(None, description=Warns("No effect (warns)."))
    stream: bool | None = Field(
        None, description="Answer with server-sent events: previews, then each picture as soon as it is finished."
    )
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="Previews of each picture; acts with stream only."
    )
    progress: bool | None = Field(
        None,
        description="SDXL's own: events `image_generation.progress` with stage, step, steps and the place in the "
        "queue; acts with stream only.",
    )
    user: str | None = Field(None, description=Warns("No effect (warns)."))
    safety_identifier: str | None = Field(None, description=Warns("No effect (warns)."))
    complexity: Literal["low", "medium", "high"] | None = Field(None, description=Warns("No effect (warns): of svg."))
    svg: dict[str, Any] | None = Field(None, description=Warns("No effect (warns): SDXL draws pixels."))
    frame_count: int | None = Field(None, ge=1, description=Warns("No effect (warns): SDXL draws one still picture."))
    frame_duration_ms: int | None = Field(None, ge=1, description=Warns("No effect (warns): of moving pictures."))


@dataclass(frozen=True)
class Decoded:
    request: ImageRequest
    response_format: ResponseFormat
    warnings: tuple[str, ...]
    stream: bool = False
    partial_images: int = 0
    progress: bool = False


def decode(body: bytes, model_names: tuple[str, ...]) -> Decoded:
    """A body's request. Null means absent, as in OpenAI's own clients. Raises `InvalidRequest`."""
    fields = parse_object(body)
    given = {name: value for name, value in fields.items() if value is not None}
    warnings = unknown_fields(name for name in given if name not in _KNOWN)
    try:
        own = OpenAIFields.model_validate({n: v for n, v in given.items() if n in OpenAIFields.model_fields})
    except ValidationError as error:
        raise invalid_request(error) from None
    if own.model is not None and own.model not in model_names:
        raise ModelNotFound(
            f"model: {own.model[:100]!r} does not exist; this service has {', '.join(model_names)}", param="model"
        )
    request_fields = {n: v for n, v in given.items() if n in ImageRequest.model_fields}
    _apply_size(own.size, request_fields)
    if "prompt" not in request_fields:
        raise InvalidRequest("prompt: field required", param="prompt")
    for name in _IDLE:
        if getattr(own, name) not in (None, "auto"):
            warnings.append(f"{name} has no effect on SDXL")
    if own.stream:
        if own.response_format == "url":
            warnings.append("response_format url has no effect on a stream: its events hold base64")
    else:
        warnings += [
            f"{name} has no effect without stream" for name in ("partial_images", "progress") if getattr(own, name)
        ]
    if own.background == "transparent":
        warnings.append("background transparent has no effect: SDXL draws opaque pictures")
    return Decoded(
        parse_request(request_fields),
        own.response_format or "b64_json",
        tuple(warnings),
        stream=bool(own.stream),
        partial_images=own.partial_images or 0,
        progress=bool(own.progress),
    )


def encode(result: ImageResult, response_format: ResponseFormat, warnings: tuple[str, ...] = ()) -> dict[str, Any]:
    """The response body. `seed`, beside each picture, and `warnings` are SDXL's own."""
    first = result.images[0]
    return {
        "created": result.created,
        "background": "opaque",
        "output_format": first.output_format,
        "size": f"{first.width}x{first.height}",
        "data": [
            {
                "b64_json": text if response_format == "b64_json" else None,
                "url": f"data:{MEDIA_TYPES[image.output_format]};base64,{text}" if response_format == "url" else None,
                "revised_prompt": None,
                "seed": image.seed,
            }
            for image in result.images
            for text in (base64.b64encode(image.data).decode("ascii"),)
        ],
        "usage": encode_usage(result.text_tokens),
        "warnings": [*warnings, *result.warnings],
    }


@dataclass
class StreamEncoder:
    """Encodes the events of a stream.

    `image_index`, `seed` and the progress events are SDXL's own. The event of the picture that is finished last waits
    for the `ImageResult`: it holds what is known only then, `warnings` and `timings`. `created` is Unix time, seconds.
    """

    images: int
    created: int
    warnings: tuple[str, ...] = ()
    _ready: int = 0
    _last: ImageReady | None = None

    def encode(self, event: StreamEvent) -> dict[str, Any] | None:
        """An event's data, whose `type` is its name; None for what this format does not tell, or not yet."""
        match event:
            case Progress():
                return {
                    "type": "image_generation.progress",
                    "image_index": event.image,
                    "stage": event.stage,
                    "step": event.step,
                    "steps": event.steps,
                    "queue_position": event.queue_position,
                }
            case PartialImage():
                fields = {"partial_image_index": event.index, "image_index": event.image}
                return {"type": "image_generation.partial_image", **self._picture(event), **fields}
            case ImageReady():
                self._ready += 1
                if self._ready < self.images:
                    return self._completed(event)
                self._last = event
            case ImageResult():
                assert self._last is not None
                timings = [asdict(timing) for timing in event.timings]
                warnings = [*self.warnings, *event.warnings]
                own = {"warnings": warnings, "timings": timings}
                return self._completed(self._last) | {"usage": encode_usage(event.text_tokens), **own}
        return None

    def _completed(self, event: ImageReady) -> dict[str, Any]:
        fields = {"image_index": event.image, "seed": event.picture.seed}
        return {"type": "image_generation.completed", **self._picture(event.picture), **fields}

    def _picture(self, picture: GeneratedImage | PartialImage) -> dict[str, Any]:
        return {
            "b64_json": base64.b64encode(picture.data).decode("ascii"),
            "created_at": self.created,
            "size": f"{picture.width}x{picture.height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": picture.output_format,
        }


def encode_error(error: ServiceError) -> dict[str, Any]:
    """OpenAI's error envelope."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def encode_models(model_names: tuple[str, ...], created: int) -> dict[str, Any]:
    """`GET /v1/models`."""
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": created, "owned_by": "sdxl-serve"} for name in model_names],
    }


def generations_schema() -> dict[str, Any]:
    """JSON schema of the request body: OpenAI's fields and `ImageRequest`'s."""
    ours, theirs = ImageRequest.model_json_schema(), OpenAIFields.model_json_schema()
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": ours["properties"] | theirs["properties"],
        "example": {"prompt": "a small red circle above a blue square", "num_inference_steps": 25, "seed": 7},
    }


# Fields that no value but "auto" of which would be right.
_IDLE = (
    "quality", "style", "moderation", "user", "safety_identifier", "complexity", "svg", "frame_count",
    "frame_duration_ms",
)  # fmt: skip
_KNOWN = {*OpenAIFields.model_fields, *ImageRequest.model_fields}


def _apply_size(size: str | None, fields: dict[str, Any]) -> None:
    if size is None or size == "auto":
        return
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    if match is None:
        raise InvalidRequest(f"size: {size[:40]!r} is not WIDTHxHEIGHT or auto", param="size")
    for name, side in zip(("width", "height"), map(int, match.groups()), strict=True):
        if fields.setdefault(name, side) != side:
            raise InvalidRequest(f"size: {size} contradicts {name} {fields[name]}", param="size")


def encode_model(name: str, model_names: tuple[str, ...], created: int) -> dict[str, Any]:
    """`GET /v1/models/{name}`. Raises `ModelNotFound`."""
    if name not in model_names:
        raise ModelNotFound(
            f"model: {name[:100]!r} does not exist; this service has {', '.join(model_names)}", param="model"
        )
    return {"id": name, "object": "model", "created": created, "owned_by": "sdxl-serve"}


def encode_usage(text_tokens: int) -> dict[str, Any]:
    """`usage` of an answer or of a completed event, in all the keys that OpenAI's SDK requires.

    `text_tokens` are those that CLIP's tokenizer makes of the request's texts and that an encoder reads: 77 at most
    of each text, with the begin and the end. Nothing goes in as an image, and latents are no tokens: the output has
    none.
    """
    return {
        "input_tokens": text_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 0},
        "total_tokens": text_tokens,
    }


_TEXT_OR_NULL: dict[str, Any] = {"type": ["string", "null"]}
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_TOKENS = {
    "type": "object",
    "required": ["text_tokens", "image_tokens"],
    "properties": {"text_tokens": _COUNT, "image_tokens": _COUNT},
}
IMAGES_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["created", "background", "output_format", "size", "data", "usage", "warnings"],
    "properties": {
        "created": {"type": "integer", "description": "Unix time, seconds."},
        "background": {"const": "opaque"},
        "output_format": {"enum": list(MEDIA_TYPES)},
        "size": {"type": "string", "pattern": r"^\d+x\d+$"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["b64_json", "url", "revised_prompt", "seed"],
                "properties": {
                    "b64_json": _TEXT_OR_NULL | {"description": "The picture's file in base64."},
                    "url": _TEXT_OR_NULL | {"description": "The same as a data: address, with response_format url."},
                    "revised_prompt": {"type": "null"},
                    "seed": _COUNT | {"description": "Draws this picture again, alone."},
                },
            },
        },
        "usage": {
            "type": "object",
            "required": [
                "input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details", "total_tokens",
            ],
            "properties": {
                "input_tokens": _COUNT,
                "input_tokens_details": _TOKENS,
                "output_tokens": _COUNT,
                "output_tokens_details": _TOKENS,
                "total_tokens": _COUNT,
            },
        },
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}  # fmt: skip
STREAM_SCHEMA: dict[str, Any] = {
    "description": "With `stream`: server-sent events, each a JSON object whose `type` is the event's name. "
    "`image_generation.partial_image` (`partial_images` of them a picture, fewer where its stages have fewer steps), "
    "`image_generation.completed` (one a picture, as soon as it is finished; the last one holds `usage`, `warnings` "
    "and `timings`), with `progress` `image_generation.progress` (`stage`, `step`, `steps`, `queue_position`); all "
    "with `image_index`. A fault on the way is an event `error` with the error envelope.",
    "examples": [
        'event: image_generation.completed\ndata: {"type":"image_generation.completed","b64_json":"iVBORw0KGgo...",'
        '"created_at":1,"size":"1024x1024","quality":"auto","background":"opaque","output_format":"png",'
        '"image_index":0,"seed":7}\n\n'
    ],
}
MODEL_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}
MODELS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL_SCHEMA}},
}
