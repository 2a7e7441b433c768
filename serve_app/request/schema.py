"""The one definition of what can be asked, and what comes back.

OpenAPI, the command line's flags, the client and the table in the docs are all made from `ImageRequest`, whose fields
stand in `fields.py`. Bounds that depend on the checkpoint or on the configuration (sizes, the number of
steps, clip_skip) are checked in `resolve.py`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from serve_app.request.errors import InvalidRequest
from serve_app.request.fields import (
    FieldGroup,
    FrameFields,
    MicroConditioningFields,
    OutputFields,
    OutputFormat,
    RefinementFields,
    SamplingFields,
    TextFields,
    UrgencyFields,
)

if TYPE_CHECKING:
    from PIL import Image

StageName = Literal["encode", "denoise", "refine", "decode"]
STAGES: tuple[StageName, ...] = get_args(StageName)
MAX_PARTIAL_IMAGES = 3


class ImageRequest(
    # pydantic takes the fields of the last base first.
    OutputFields,
    UrgencyFields,
    MicroConditioningFields,
    RefinementFields,
    SamplingFields,
    FrameFields,
    TextFields,
):
    """A request for n pictures of one prompt. Image i is drawn with `seed + i`."""


GROUPS: dict[str, type[FieldGroup]] = {
    "text": TextFields,
    "frame": FrameFields,
    "sampling": SamplingFields,
    "refinement": RefinementFields,
    "micro-conditioning": MicroConditioningFields,
    "urgency": UrgencyFields,
    "output": OutputFields,
}
"""The groups in the order of their fields."""


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
