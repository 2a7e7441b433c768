"""Stability's REST API, version 1: `POST /v1/generation/{engine}/text-to-image`.

`text_prompts` are weighted. SDXL takes one prompt and one negative prompt, so there must be exactly one with a weight
above 0; those below 0 are joined to the negative prompt. How far a weight is from 1 or -1 has no effect, and warns.
Of the format's two sizes, `width` and `height` may be any that the service draws; absent they are the
checkpoint's own. SDXL's own fields may stand in `extras`.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.formats.accept import choose
from serve_app.formats.json_body import parse_object
from serve_app.formats.words import Warns, in_words, unknown_fields
from serve_app.request.errors import InvalidRequest, ModelNotFound, ServiceError
from serve_app.request.fields import OutputFields
from serve_app.request.schedulers import BY_NAME, BY_STABILITY, NAMES, SchedulerName
from serve_app.request.schema import ImageRequest, ImageResult, invalid_request, parse_request

SDXL_ENGINE = "stable-diffusion-xl-1024-v1-0"

MediaType = Literal["application/json", "image/png"]
_MEDIA_TYPES: tuple[MediaType, ...] = ("application/json", "image/png")

StylePreset = Literal[
    "3d-model", "analog-film", "anime", "cinematic", "comic-book", "digital-art", "enhance", "fantasy-art", "isometric",
    "line-art", "low-poly", "modeling-compound", "neon-punk", "origami", "photographic", "pixel-art", "tile-texture",
]  # fmt: skip
ClipGuidance = Literal["NONE", "FAST_BLUE", "FAST_GREEN", "SIMPLE", "SLOW", "SLOWER", "SLOWEST"]


class TextPrompt(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    text: str
    weight: float | None = 1.0


class TextToImageFields(BaseModel):
    """The body of a request; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    text_prompts: list[TextPrompt] = Field(
        min_length=1,
        max_length=10,
        description="One text with a weight above 0, the prompt; those below 0 make the negative prompt.",
    )
    cfg_scale: float = Field(
        7.0, ge=0.0, le=35.0, description="Classifier-free guidance scale; guidance is on above 1."
    )
    steps: int = Field(50, ge=10, le=150, description="Denoising steps, base and refiner together.")
    samples: int = Field(1, ge=1, le=10, description="Number of pictures; picture i uses seed + i.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the first picture; 0 draws one.")
    sampler: str | None = Field(
        None, description=f"{', '.join(BY_STABILITY)}, or a scheduler of this service; the checkpoint's own if absent."
    )
    width: int | None = Field(None, description="Width in pixels, a multiple of 8; the checkpoint's own if absent.")
    height: int | None = Field(None, description="Height in pixels, a multiple of 8; the checkpoint's own if absent.")
    extras: dict[str, Any] = Field(default_factory=dict, description="SDXL's own fields.")
    style_preset: StylePreset | None = Field(None, description=Warns("No effect (warns)."))
    clip_guidance_preset: ClipGuidance = Field("NONE", description=Warns("No effect (warns)."))


HEADERS: dict[str, str] = {"Accept": "application/json for all pictures, image/png for one picture's bytes."}
# Fields of `ImageRequest` that the format has under a name of its own.
_COUNTERPARTS = {
    "prompt": "text_prompts",
    "negative_prompt": "text_prompts",
    "guidance_scale": "cfg_scale",
    "num_inference_steps": "steps",
    "n": "samples",
    "scheduler": "sampler",
}
# SDXL's own, which may stand in `extras`. The pictures are PNGs in this format.
EXTRAS: tuple[str, ...] = tuple(
    name
    for name in ImageRequest.model_fields
    if name not in TextToImageFields.model_fields
    and name not in _COUNTERPARTS
    and name not in OutputFields.model_fields
)
_WORDS = _COUNTERPARTS | {name: f"extras.{name}" for name in EXTRAS}


@dataclass(frozen=True)
class Decoded:
    request: ImageRequest
    media_type: MediaType
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One picture as the whole response body."""

    data: bytes
    headers: tuple[tuple[str, str], ...]


def decode(body: bytes, engine: str, accept: str | None, model_names: tuple[str, ...]) -> Decoded:
    """A body's request. Raises `InvalidRequest`; `ModelNotFound` and `NotAcceptable` are among them."""
    if engine not in (*model_names, SDXL_ENGINE):
        raise ModelNotFound(
            f"engine: {engine[:100]!r} was not found; this service has {', '.join((*model_names, SDXL_ENGINE))}",
            param="engine",
        )
    media_type = next(offer for offer in _MEDIA_TYPES if offer == choose(accept, _MEDIA_TYPES))
    fields = {name: value for name, value in parse_object(body).items() if value is not None}
    warnings = unknown_fields(name for name in fields if name not in TextToImageFields.model_fields)
    try:
        asked = TextToImageFields.model_validate(
            {n: v for n, v in fields.items() if n in TextToImageFields.model_fields}
        )
    except ValidationError as error:
        raise invalid_request(error) from None
    if media_type == "image/png" and asked.samples > 1:
        raise InvalidRequest("samples: Accept image/png takes one picture; send application/json", param="samples")
    for name, neutral in (("style_preset", None), ("clip_guidance_preset", "NONE")):
        if getattr(asked, name) != neutral:
            warnings.append(f"{name} has no effect on SDXL")
    request_fields = {name: value for name, value in asked.extras.items() if name in EXTRAS and value is not None}
    warnings += unknown_fields(f"extras.{name}" for name in asked.extras if name not in EXTRAS)
    for place, given in enumerate(fields["text_prompts"]):
        warnings += unknown_fields(
            f"text_prompts.{place}.{name}" for name in given if name not in TextPrompt.model_fields
        )
    request_fields |= _prompts(asked.text_prompts, warnings)
    request_fields |= {
        "guidance_scale": asked.cfg_scale,
        "num_inference_steps": asked.steps,
        "n": asked.samples,
        "seed": asked.seed or None,
        "scheduler": _scheduler(asked.sampler),
        "width": asked.width,
        "height": asked.height,
    }
    try:
        request = parse_request({name: value for name, value in request_fields.items() if value is not None})
    except InvalidRequest as error:
        raise in_words(error, _WORDS) from None
    return Decoded(request, media_type, tuple(warnings))


def encode(result: ImageResult, warnings: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON body. `warnings` is ours."""
    return {
        "artifacts": [
            {
                "base64": base64.b64encode(image.data).decode("ascii"),
                "seed": image.seed,
                "finishReason": "SUCCESS",
            }
            for image in result.images
        ],
        "warnings": list(dict.fromkeys([*warnings, *result.warnings])),
    }


def encode_picture(result: ImageResult) -> Answer:
    """The body and the headers of `Accept: image/png`."""
    picture = result.images[0]
    return Answer(picture.data, (("finish-reason", "SUCCESS"), ("seed", str(picture.seed))))


def encode_error(error: ServiceError, request_id: str = "") -> dict[str, Any]:
    """Stability's error envelope; `id` is the request's."""
    names = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 503: "service_unavailable"}
    name = names.get(error.status) or error.code or "server_error"
    return {"id": request_id, "name": name, "message": in_words(error, _WORDS).message}


def encode_engines(model_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """`GET /v1/engines/list`."""
    return [
        {"id": name, "name": name, "description": "Stable Diffusion XL", "type": "PICTURE"}
        for name in dict.fromkeys((*model_names, SDXL_ENGINE))
    ]


def text_to_image_schema() -> dict[str, Any]:
    """JSON schema of the request body."""
    ours = ImageRequest.model_json_schema()["properties"]
    theirs = TextToImageFields.model_json_schema()
    prompt = theirs["$defs"]["TextPrompt"] | {"title": "TextPrompt"}
    properties = theirs["properties"]
    return {
        "type": "object",
        "required": ["text_prompts"],
        "properties": properties
        | {
            "text_prompts": properties["text_prompts"] | {"items": prompt},
            "extras": properties["extras"] | {"properties": {name: ours[name] for name in EXTRAS}},
        },
        "example": {
            "text_prompts": [{"text": "a red circle above a blue square"}, {"text": "blurry", "weight": -1}],
            "steps": 25,
            "seed": 7,
        },
    }


def _prompts(prompts: list[TextPrompt], warnings: list[str]) -> dict[str, Any]:
    """The prompt and the negative prompt of weighted texts."""
    weighted = [(prompt.text, 1.0 if prompt.weight is None else prompt.weight) for prompt in prompts]
    positive = [(text, weight) for text, weight in weighted if weight > 0]
    negative = [(text, weight) for text, weight in weighted if weight < 0]
    if len(positive) != 1:
        raise InvalidRequest(
            f"text_prompts: {len(positive)} of {len(weighted)} have a weight above 0; SDXL takes exactly one",
            param="text_prompts",
        )
    if len(positive) + len(negative) < len(weighted):
        warnings.append("text_prompts of weight 0 have no effect")
    if any(abs(weight) != 1 for _, weight in (*positive, *negative)):
        warnings.append("text_prompts: a weight acts by its sign alone, as 1 or -1")
    if len(negative) > 1:
        warnings.append(f"text_prompts: {len(negative)} texts of negative weight were joined by commas")
    fields: dict[str, Any] = {"prompt": positive[0][0]}
    if negative:
        fields["negative_prompt"] = ", ".join(text for text, _ in negative)
    return fields


def _scheduler(sampler: str | None) -> SchedulerName | None:
    if sampler is None:
        return None
    found = BY_STABILITY.get(sampler) or BY_NAME.get(sampler)
    if found is None:
        names = [*BY_STABILITY, *(name for name in NAMES if BY_NAME[name].stability is None)]
        raise InvalidRequest(
            f"sampler: {sampler[:40]!r} is unknown; this service has {', '.join(names)}", param="sampler"
        )
    return found.name


_TEXT: dict[str, Any] = {"type": "string"}
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["id", "name", "message"],
    "properties": {"id": _TEXT, "name": _TEXT, "message": _TEXT},
}
ARTIFACTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["artifacts", "warnings"],
    "properties": {
        "artifacts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["base64", "seed", "finishReason"],
                "properties": {
                    "base64": _TEXT,
                    "seed": {"type": "integer", "minimum": 0},
                    "finishReason": {"const": "SUCCESS"},
                },
            },
        },
        "warnings": {"type": "array", "items": _TEXT},
    },
}
ENGINES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["id", "name", "description", "type"],
        "properties": {"id": _TEXT, "name": _TEXT, "description": _TEXT, "type": {"const": "PICTURE"}},
    },
}
