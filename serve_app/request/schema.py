"""The one definition of what can be asked: fields, defaults, bounds, descriptions.

OpenAPI, the command line's flags, the client and the table in the docs are all made from
`ImageRequest`. Bounds that depend on the checkpoint or on the configuration (sizes, the number of
steps, clip_skip) are checked in `resolve.py`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serve_app.request.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

SchedulerName = Literal[
    "euler",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "heun",
    "ddim",
    "unipc",
    "lms",
]
OutputFormat = Literal["png", "jpeg", "webp"]
StageName = Literal["encode", "denoise", "refine", "decode"]

MAX_PROMPT_CHARS = 4_000
DEFAULT_STEPS = 50
MAX_STEPS = 500
MAX_IMAGES = 10
MAX_SEED = 2**63 - 1
MAX_PARTIAL_IMAGES = 3

# JSON has lists where Python has tuples: the pair itself is read leniently, its numbers are not.
_PixelPair = Annotated[
    tuple[Annotated[int, Field(ge=1, le=65536)], Annotated[int, Field(ge=1, le=65536)]], Field(strict=False)
]
_CropPair = Annotated[
    tuple[Annotated[int, Field(ge=0, le=65536)], Annotated[int, Field(ge=0, le=65536)]], Field(strict=False)
]


class ImageRequest(BaseModel):
    """A request for n pictures of one prompt. Image i is drawn with `seed + i`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: str = Field(
        max_length=MAX_PROMPT_CHARS,
        description="What to draw; not empty. CLIP reads 77 tokens; what is cut off is said in `warnings`.",
    )
    prompt_2: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="Prompt for the second text encoder of the base; `prompt` where absent. "
        "The refiner is fed `prompt`, as in diffusers.",
    )
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="What not to draw; acts where guidance is on. Absent and empty differ: SDXL's base "
        "replaces an absent one by zeros and encodes an empty one.",
    )
    negative_prompt_2: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="Negative prompt for the base's second text encoder; `negative_prompt` where absent.",
    )
    width: int | None = Field(
        None,
        ge=8,
        le=65536,
        multiple_of=8,
        description="Width in pixels, a multiple of 8; the checkpoint's own if absent.",
    )
    height: int | None = Field(
        None,
        ge=8,
        le=65536,
        multiple_of=8,
        description="Height in pixels, a multiple of 8; the checkpoint's own if absent.",
    )
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Number of pictures; picture i uses seed + i.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Seed of the first picture; drawn and returned if absent."
    )
    num_inference_steps: int = Field(
        DEFAULT_STEPS, ge=1, le=MAX_STEPS, description="Denoising steps, base and refiner together."
    )
    guidance_scale: float = Field(
        7.5,
        ge=0.0,
        le=100.0,
        description="Classifier-free guidance scale; guidance is on above 1. 7.5 is Azure's default; diffusers' is 5.",
    )
    guidance_rescale: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Rescales the guided noise against overexposure (arXiv 2305.08891, section 3.4).",
    )
    eta: float = Field(0.0, ge=0.0, le=1.0, description="DDIM's eta; the other schedulers by name have none.")
    scheduler: SchedulerName | None = Field(
        None, description="Scheduler, made from the checkpoint's own configuration; the checkpoint's own if absent."
    )
    high_noise_frac: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="The base's share of the trajectory (diffusers' denoising_end / denoising_start); 1 is the "
        "base alone. 0.8 if absent, 1 where no refiner is configured.",
    )
    refiner_guidance_scale: float | None = Field(
        None, ge=0.0, le=100.0, description="Guidance scale of the refiner; `guidance_scale` if absent."
    )
    original_size: _PixelPair | None = Field(
        None, description="Micro-conditioning: (height, width) of the original; the picture's own if absent."
    )
    crops_coords_top_left: _CropPair = Field(
        (0, 0), description="Micro-conditioning: (top, left) of the crop, in pixels."
    )
    target_size: _PixelPair | None = Field(
        None, description="Micro-conditioning: (height, width) aimed at; the picture's own if absent."
    )
    negative_original_size: _PixelPair | None = Field(
        None,
        description="Negative counterpart of original_size. The base uses it only together with negative_target_size.",
    )
    negative_crops_coords_top_left: _CropPair = Field(
        (0, 0), description="Negative counterpart of crops_coords_top_left."
    )
    negative_target_size: _PixelPair | None = Field(
        None,
        description="Negative counterpart of target_size. The base uses it only together with negative_original_size.",
    )
    aesthetic_score: float = Field(6.0, ge=0.0, le=100.0, description="Aesthetic score that conditions the refiner.")
    negative_aesthetic_score: float = Field(
        2.5, ge=0.0, le=100.0, description="Negative aesthetic score of the refiner."
    )
    clip_skip: int | None = Field(
        None,
        ge=0,
        le=100,
        description="CLIP layers to skip before the penultimate one; bounded by the text encoders' layers.",
    )
    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="Larger goes first in every stage; what waits is overtaken a bounded number of times. Over HTTP "
        "at most the service's `limits.max_priority`, 0 unless it is set.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0.0,
        le=86_400.0,
        description="Seconds from now within which the pictures are wanted. Work that can't make it yields to work "
        "that still can; it is finished all the same, with a warning.",
    )
    output_format: OutputFormat = Field("png", description="File format of the pictures.")
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Quality of a jpeg or webp, 0 to 100; 95 if absent. PNG has none; JPEG takes 0 for 1.",
    )

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("is empty")
        return prompt

    @field_validator("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
    @classmethod
    def _is_unicode(cls, text: str | None) -> str | None:
        # A lone surrogate ("\ud800" in JSON) is no text: no tokenizer and no picture file can hold it.
        if text is not None:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("is not valid Unicode text") from None
        return text


def parse_request(fields: dict[str, Any]) -> ImageRequest:
    """Makes an `ImageRequest` of plain data, or raises `InvalidRequest` with one line about one field."""
    try:
        return ImageRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error) from None


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first fault that pydantic found, as one line that names its field."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    where = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if first["type"] == "extra_forbidden":
        reason = "is not a field of this request"
    return InvalidRequest(f"{where}: {reason}" if where else reason, param=param)


@dataclass(frozen=True)
class GeneratedImage:
    """One finished picture: the bytes of its file and the seed that draws it again."""

    data: bytes = field(repr=False)
    seed: int
    output_format: OutputFormat
    width: int
    height: int

    def to_pil(self) -> Image.Image:
        from PIL import Image

        picture = Image.open(io.BytesIO(self.data))
        picture.load()
        return picture


@dataclass(frozen=True)
class StageTiming:
    """Wall time of one stage of a request, in seconds, from its first image's start to its last's end.

    `queue_seconds`: of a denoiser, how much of it the first image waited before its first step, the way there and
    back included; 0 in stages that take no steps.
    """

    stage: StageName
    seconds: float
    steps: int = 0  # of the first image; 0 in stages that take no steps
    queue_seconds: float = 0.0


@dataclass(frozen=True)
class ImageResult:
    """What a request gave: the pictures in order of their seeds, what to warn of, and where the time went."""

    images: list[GeneratedImage]
    warnings: list[str] = field(default_factory=list)
    timings: list[StageTiming] = field(default_factory=list)
    request_id: str = ""
    created: int = 0  # Unix time, seconds
    text_tokens: int = 0  # of the request's texts, each counted once, as far as CLIP reads


@dataclass(frozen=True)
class Progress:
    """An event on the way to an `ImageResult`: where image number `image` is."""

    stage: StageName
    image: int = 0
    step: int = 0
    steps: int = 0
    queue_position: int | None = None  # while it waits for its first step in this stage; 0 is next


@dataclass(frozen=True)
class PartialImage:
    """A rough picture of image number `image` on its way, the `index`-th of those asked for."""

    image: int
    index: int
    data: bytes = field(repr=False)
    output_format: OutputFormat
    width: int
    height: int


@dataclass(frozen=True)
class ImageReady:
    """Image number `image` of a request is finished; others may not be."""

    image: int
    picture: GeneratedImage


@dataclass(frozen=True)
class Accepted:
    """A request is taken in: the first event of a stream. `warnings` are those that are known by now."""

    request_id: str
    seed: int
    warnings: tuple[str, ...] = ()


StreamEvent = Accepted | Progress | PartialImage | ImageReady | ImageResult


@dataclass(frozen=True)
class FieldKind:
    """How a field of `ImageRequest` is read from text: a flag or a query parameter."""

    base: type
    values: int = 1  # 2 for a pair of sizes
    choices: tuple[str, ...] = ()


def field_kinds() -> dict[str, FieldKind]:
    """The kind of every field of `ImageRequest`, derived from its annotation."""
    return {name: _kind(info.annotation) for name, info in ImageRequest.model_fields.items()}


def _kind(annotation: Any) -> FieldKind:
    for option in (annotation, *get_args(annotation)):
        origin = get_origin(option)
        if origin is Annotated:
            option = get_args(option)[0]
            origin = get_origin(option)
        if origin is Literal:
            return FieldKind(str, choices=get_args(option))
        if origin is tuple:
            return FieldKind(int, values=len(get_args(option)))
        if option in (int, float, str):
            return FieldKind(option)
    raise TypeError(f"{annotation}: no way to read it from text")


def read_text(name: str, kind: FieldKind, texts: Sequence[str]) -> Any:
    """A field's value from text. Raises `InvalidRequest` where the text is no such value."""
    if len(texts) != kind.values:
        raise InvalidRequest(
            f"{name}: needs {kind.values} value{'s' * (kind.values > 1)}, got {len(texts)}", param=name
        )
    # Python's own readers also take "1_000", full-width digits and "nan".
    pattern, wanted = _NUMBERS.get(kind.base, (".*", ""))
    for text in texts:
        if not re.fullmatch(pattern, text, re.ASCII | re.DOTALL):
            raise InvalidRequest(f"{name}: {text[:40]!r} is not {wanted}", param=name)
    values = [kind.base(text) for text in texts]
    return values[0] if kind.values == 1 else tuple(values)


_NUMBERS = {
    int: (r"[+-]?\d{1,30}", "a whole number"),
    float: (r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,3})?", "a number"),
}
