"""Hugging Face's text-to-image task: `POST /hugging-face/text-to-image`, answered with a picture's bytes.

`huggingface_hub.InferenceClient(model=ADDRESS).text_to_image(...)` posts to an address exactly as given. Errors
keep the status 400: of it that client makes a `BadRequestError` that shows `error` once, while of a 422 it
shows the body twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from serve_app.formats.accept import accepted, choose
from serve_app.formats.json_body import parse_object
from serve_app.formats.words import Refused, Warns, in_words, unknown_fields
from serve_app.pictures.files import MEDIA_TYPES
from serve_app.request.errors import InvalidRequest, ServiceError
from serve_app.request.schedulers import BY_CLASS
from serve_app.request.schema import ImageRequest, ImageResult, parse_request

# Field -> what it does.
FIELDS: dict[str, str] = {
    "inputs": "The prompt.",
    "parameters": "An object of SDXL's fields, under diffusers' names.",
    "options": Warns("The old inference API's options. No effect (warns)."),
}
PARAMETERS: dict[str, str] = {
    "num_images_per_prompt": Refused("More than 1 is refused: the answer is one picture."),
    **{
        name: info.description or ""
        for name, info in ImageRequest.model_fields.items()
        if name not in ("prompt", "n", "scheduler", "output_format")
    },
    "n": Refused("More than 1 is refused: the answer is one picture."),
    "scheduler": "A scheduler of this service, or the diffusers class of one, such as EulerDiscreteScheduler.",
    "output_format": "File format where `Accept` leaves a choice; one that `Accept` rules out is an error.",
}
OPTIONS: dict[str, str] = {
    "use_cache": Warns("No effect (warns): every request is drawn."),
    "wait_for_model": Warns("No effect (warns): the model is loaded."),
    "use_gpu": Warns("No effect (warns)."),
}
HEADERS: dict[str, str] = {"Accept": "Decides the file format: image/png, image/jpeg or image/webp."}

_WORDS = {"prompt": "inputs"}
# Bytes. Proxies in front hold all headers of an answer in 4 or 8 KB.
_WARNING, _MAX_WARNING, _MAX_WARNINGS = "X-HF-Warning", 250, 1_000


@dataclass(frozen=True)
class Decoded:
    request: ImageRequest
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A picture as a whole response body."""

    data: bytes
    media_type: str
    headers: tuple[tuple[str, str], ...]  # a name may stand more than once


def decode(body: bytes, accept: str | None) -> Decoded:
    """A body's request. Null means absent. Raises `InvalidRequest`, and `NotAcceptable` on an `Accept` without us."""
    fields = _given(parse_object(body))
    warnings = unknown_fields(name for name in fields if name not in FIELDS)
    options = _object(fields, "options")
    warnings += [f"options.{name} has no effect" for name in options if name in OPTIONS]
    warnings += unknown_fields(f"options.{name}" for name in options if name not in OPTIONS)
    parameters = _object(fields, "parameters")
    warnings += unknown_fields(f"parameters.{name}" for name in parameters if name not in PARAMETERS)
    if "inputs" not in fields:
        raise InvalidRequest("inputs: field required", param="inputs")
    request_fields = {name: value for name, value in parameters.items() if name in PARAMETERS}
    _one_picture(request_fields)
    scheduler = request_fields.get("scheduler")
    if isinstance(scheduler, str) and scheduler in BY_CLASS:
        request_fields["scheduler"] = BY_CLASS[scheduler].name
    try:
        request = parse_request(request_fields | {"prompt": fields["inputs"]})
    except InvalidRequest as error:
        raise in_words(error, _WORDS) from None
    return Decoded(_in_accepted_format(request, accept), tuple(warnings))


def encode(result: ImageResult, warnings: tuple[str, ...] = ()) -> Answer:
    """The picture, with its seed and what to warn of in headers: huggingface_hub logs each `X-HF-Warning`.

    As many of those as there is room for, long ones cut.
    """
    picture = result.images[0]
    lines = dict.fromkeys([*warnings, *result.warnings])
    headers = [("X-SDXL-Seed", str(picture.seed)), *((_WARNING, _topic(line)) for line in _within(list(lines)))]
    return Answer(picture.data, MEDIA_TYPES[picture.output_format], tuple(headers))


def encode_error(error: ServiceError) -> dict[str, Any]:
    return {"error": in_words(error, _WORDS).message}


def text_to_image_schema() -> dict[str, Any]:
    """JSON schema of the request body."""
    ours = ImageRequest.model_json_schema()["properties"]
    parameters = {name: ours[name] for name in PARAMETERS if name in ours}
    parameters["scheduler"] = {"type": "string", "description": PARAMETERS["scheduler"]}
    one = {"type": "integer", "minimum": 1, "maximum": 1, "default": 1}
    for name in ("n", "num_images_per_prompt"):
        parameters[name] = one | {"description": PARAMETERS[name]}
    options = {name: {"description": note} for name, note in OPTIONS.items()}
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "inputs": ours["prompt"],
            "parameters": {"type": "object", "description": FIELDS["parameters"], "properties": parameters},
            "options": {"type": "object", "description": FIELDS["options"], "properties": options},
        },
        "example": {
            "inputs": "a small red circle above a blue square",
            "parameters": {"num_inference_steps": 25, "guidance_scale": 7.5, "seed": 7},
        },
    }


def _one_picture(fields: dict[str, Any]) -> None:
    """Takes the number of pictures out of the fields: it can only be one."""
    for name in ("num_images_per_prompt", "n"):
        value = fields.pop(name, 1)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{name}: must be a whole number", param=name)
        if value != 1:
            raise InvalidRequest(f"{name}: this route answers with one picture", param=name)


def _in_accepted_format(request: ImageRequest, accept: str | None) -> ImageRequest:
    if "output_format" in request.model_fields_set:
        if not accepted(accept, MEDIA_TYPES[request.output_format]):
            raise InvalidRequest(
                f"output_format: {request.output_format} is ruled out by Accept: {(accept or '')[:100]!r}",
                param="output_format",
            )
        return request
    media_type = choose(accept, list(MEDIA_TYPES.values()))
    return request.model_copy(
        update={"output_format": next(name for name, media in MEDIA_TYPES.items() if media == media_type)}
    )


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name}: must be an object", param=name)
    return _given(value)


def _topic(line: str) -> str:
    """A warning as that client reads it, "topic; message". It shows a topic once: each line is its own."""
    return f"{zlib.crc32(line.encode()):08x}; {line}"


def _within(lines: list[str]) -> Iterator[str]:
    """Header texts of the lines that there is room for, and how many more there are."""
    left = _MAX_WARNINGS
    for number, line in enumerate(lines):
        text = _ascii(line)
        left -= len(f"{_WARNING}: {_topic(text)}\r\n")
        if left < 0:
            yield f"... and {len(lines) - number} more"
            return
        yield text


def _ascii(text: str) -> str:
    """Header text: printable ASCII, the rest escaped; cut where it is long."""
    written = ""
    for character in text:
        escaped = character if " " <= character <= "~" else character.encode("unicode_escape").decode("ascii")
        if len(written) + len(escaped) > _MAX_WARNING:
            return f"{written} ..."
        written += escaped
    return written


ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
