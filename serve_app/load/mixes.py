"""What a benchmark asks for: mixes of requests, and the request at each place of a run.

The request at place i depends on the mix, the seed and i alone: a longer run begins with the shorter
one, and every service that is compared gets the same requests.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve_app.demo.grammar import caption, sample_scene
from serve_app.request.errors import ConfigurationError, InvalidRequest, first_fault
from serve_app.request.fields import MAX_IMAGES, MAX_SEED, MAX_STEPS
from serve_app.request.schedulers import SchedulerName
from serve_app.request.schema import parse_request


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Span(_Strict):
    """Whole numbers from `first` to `last`, both included."""

    first: int = Field(ge=1, le=MAX_STEPS)
    last: int = Field(ge=1, le=MAX_STEPS)

    @model_validator(mode="after")
    def _goes_up(self) -> Span:
        if self.first > self.last:
            raise ValueError(f"first {self.first} is above last {self.last}")
        return self


_Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
_Size = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]
# JSON and YAML have lists where Python has tuples; each alternative in it is read strictly.
_Many = Field(min_length=1, strict=False)


class Kind(_Strict):
    """One kind of request. Of every field an alternative is drawn evenly, each request anew."""

    name: str = Field("all", min_length=1, description="How the report calls it.")
    weight: float = Field(1.0, gt=0.0, description="Its share of the requests, relative to the other kinds'.")
    num_inference_steps: Span | Annotated[tuple[_Steps, ...], _Many] = Field(description="Steps: a list or a span.")
    sizes: Annotated[tuple[_Size, ...], _Many] | None = Field(
        None, description="`WIDTHxHEIGHT` in pixels; the checkpoint's own if absent."
    )
    n: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_IMAGES)], ...], _Many] = Field((1,), description="Pictures.")
    guidance_scale: Annotated[tuple[float, ...], _Many] = Field((7.5,), description="Guidance scales.")
    schedulers: Annotated[tuple[SchedulerName, ...], _Many] | None = Field(
        None, description="Scheduler names; the checkpoint's own if absent."
    )
    priority: Annotated[tuple[int, ...], _Many] | None = Field(
        None, description="Passed on as `priority`, which the service bounds by its `limits.max_priority`."
    )
    deadline_s: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], _Many] | None = Field(
        None, description="Passed on as `deadline_s`, and the request's own SLO."
    )

    @model_validator(mode="after")
    def _every_alternative_can_be_asked(self) -> Kind:
        for size in self.sizes or ():
            _checked(dict(zip(("width", "height"), map(int, size.split("x")), strict=True)))
        for scale in self.guidance_scale:
            _checked({"guidance_scale": scale})
        return self


class RequestMix(_Strict):
    """A mix of kinds, and where prompts and seeds come from."""

    kinds: Annotated[tuple[Kind, ...], _Many]
    prompts: Literal["grammar"] | Annotated[tuple[str, ...], _Many] = Field(
        "grammar", description="A list to draw from, or the embedded model's grammar."
    )
    seeds: Literal["unique"] | Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_SEED - MAX_IMAGES)], ...], _Many] = (
        Field("unique", description="A list to draw from, or no two pictures of a run with the same.")
    )

    @field_validator("kinds")
    @classmethod
    def _names_differ(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len({kind.name for kind in kinds}) < len(kinds):
            raise ValueError("two kinds have the same name")
        return kinds

    @field_validator("prompts")
    @classmethod
    def _prompts_can_be_asked(cls, prompts: Any) -> Any:
        for prompt in () if prompts == "grammar" else prompts:
            _checked({"prompt": prompt})
        return prompts


def _checked(fields: dict[str, Any]) -> None:
    try:
        parse_request({"prompt": "x"} | fields)
    except InvalidRequest as error:
        raise ValueError(error.message) from None


class Asked(_Strict):
    """The request at one place of a run."""

    kind: str
    body: dict[str, Any]  # the fields of POST /v1/images/generations

    @property
    def images(self) -> int:
        return int(self.body["n"])

    @property
    def steps(self) -> int:
        return int(self.body["num_inference_steps"])

    @property
    def deadline_s(self) -> float | None:
        return self.body.get("deadline_s")


def request_at(mix: RequestMix, place: int, seed: int) -> Asked:
    """The request at `place` (from 0) of a run with `seed`."""
    rng = random.Random(f"{seed}/{place}")
    (kind,) = rng.choices(mix.kinds, [kind.weight for kind in mix.kinds])
    steps = kind.num_inference_steps
    body: dict[str, Any] = {
        "prompt": caption(sample_scene(rng)) if mix.prompts == "grammar" else rng.choice(mix.prompts),
        "seed": _first_seed(mix, place, seed, rng),
        "num_inference_steps": rng.randint(steps.first, steps.last) if isinstance(steps, Span) else rng.choice(steps),
        "guidance_scale": rng.choice(kind.guidance_scale),
        "n": rng.choice(kind.n),
    }
    if kind.sizes is not None:
        body["width"], body["height"] = map(int, rng.choice(kind.sizes).split("x"))
    for name, alternatives in (
        ("scheduler", kind.schedulers),
        ("priority", kind.priority),
        ("deadline_s", kind.deadline_s),
    ):
        if alternatives is not None:
            body[name] = rng.choice(alternatives)
    return Asked(kind=kind.name, body=body)


def _first_seed(mix: RequestMix, place: int, seed: int, rng: random.Random) -> int:
    if mix.seeds == "unique":
        # A request's pictures take seeds upwards from its first.
        return (seed * 1_000_003 + place) * MAX_IMAGES % (MAX_SEED - MAX_IMAGES)
    return rng.choice(mix.seeds)


def parse_mix(content: Any, where: str) -> RequestMix:
    """A mix of plain data. Raises `ConfigurationError`, one line that names `where` and the key at fault."""
    try:
        return RequestMix.model_validate(content)
    except ValidationError as error:
        place, reason = first_fault(error)
        key = ".".join(str(part) for part in place if not _is_branch(part))
        raise ConfigurationError(f"{where}: {key + ': ' if key else ''}{reason[:1].lower() + reason[1:]}") from None


def _is_branch(part: int | str) -> bool:
    """Whether a part of an error's place is pydantic's word for an alternative, not a key of the file."""
    return (isinstance(part, str) and not part.isidentifier()) or part in ("Span", "literal")


_ALL = Span(first=10, last=50)
MIXES: dict[str, RequestMix] = {
    "mixed": RequestMix(kinds=(Kind(num_inference_steps=_ALL),)),
    "presets": RequestMix(kinds=(Kind(num_inference_steps=(10, 20, 30, 40, 50)),)),
    "uniform": RequestMix(kinds=(Kind(num_inference_steps=(25,)),)),
    "sizes": RequestMix(kinds=(Kind(num_inference_steps=_ALL, sizes=("64x64", "128x128", "128x64", "96x160")),)),
    "many": RequestMix(kinds=(Kind(num_inference_steps=_ALL, n=(1, 2, 4)),)),
    "schedulers": RequestMix(
        kinds=(
            Kind(
                num_inference_steps=_ALL,
                guidance_scale=(0.0, 5.0, 7.5),
                schedulers=("euler", "euler_ancestral", "dpmpp_2m_karras", "heun", "ddim", "unipc"),
            ),
        )
    ),
    "short-behind-long": RequestMix(
        kinds=(
            Kind(name="short", weight=1.0, num_inference_steps=(10,)),
            Kind(name="long", weight=3.0, num_inference_steps=(50,)),
        )
    ),
}
"""The mixes with a name. Sizes are ones that the embedded demo model draws."""
