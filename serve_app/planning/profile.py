"""How long everything takes on a machine: a strict model of a profile file (JSON). Pure; seconds throughout.

A table says how long a forward pass takes by its rows. Between two measured numbers of rows it is linear; below the
first it is the first's; beyond the last it goes on with the last two's slope, or in proportion where there is one
alone. Denoisers and the decoder have a table for each picture size: between two sizes it is linear in pixels, below
the smallest it is the smallest's, beyond the largest it goes on like beyond the last row. Attention grows faster than
pixels: a size beyond the largest measured one is a guess, and `measured_sizes` says so.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.config.settings import PolicyName
from serve_app.request.errors import ConfigurationError, first_fault
from serve_app.runtime.scheduling import Budget

SHIPPED = Path(__file__).parent / "profiles"

Seconds = Annotated[float, Field(ge=0.0)]
_Rows = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}$")]
_Size = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
SecondsByRows = Annotated[dict[_Rows, Seconds], Field(min_length=1)]
SecondsBySize = Annotated[dict[_Size, SecondsByRows], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Line:
    """Seconds over a whole number (rows, pixels), by measured points."""

    def __init__(self, points: dict[int, float]) -> None:
        self._points = sorted(points.items())

    def __call__(self, x: int) -> float:
        points = self._points
        if x <= points[0][0]:
            return points[0][1]
        if len(points) == 1:
            return points[0][1] * x / points[0][0]
        high = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
        (x0, y0), (x1, y1) = points[high - 1], points[high]
        slope = (y1 - y0) / (x1 - x0)
        if x > x1:
            return y1 + max(slope, 0.0) * (x - x1)  # more work never takes less time
        return y0 + slope * (x - x0)


class PassTable:
    """Seconds of a forward pass by rows and by the picture pixels of each."""

    def __init__(self, by_size: dict[str, dict[str, float]]) -> None:
        self._by_pixels = {pixels_of(size): _line(rows) for size, rows in by_size.items()}
        self._known: dict[tuple[int, int], float] = {}

    def seconds(self, rows: int, pixels: int) -> float:
        known = self._known.get((rows, pixels))
        if known is None:
            known = Line({at: line(rows) for at, line in self._by_pixels.items()})(pixels)
            self._known[rows, pixels] = known
        return known

    def measured(self, pixels: int) -> bool:
        """Whether a size lies within those that were measured."""
        return min(self._by_pixels) <= pixels <= max(self._by_pixels)


def pixels_of(size: str) -> int:
    """The pixels of a size written as 1024x768."""
    width, height = size.split("x")
    return int(width) * int(height)


def _line(rows: dict[str, float]) -> Line:
    return Line({int(count): seconds for count, seconds in rows.items()})


class Provenance(_Strict):
    """How a profile came about."""

    how: Literal["measured", "derived"] = Field(description="derived: on paper, from published figures.")
    machine: str
    dtype: str
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    notes: list[str] = Field([], description="What was done, and the source of each figure.")


class Cores(_Strict):
    """A machine whose cores all replicas share, one core each while they compute."""

    count: int = Field(ge=1)
    slowdown: float = Field(1.0, ge=1.0, description="A pass's time with all cores busy over that with one busy.")
    beside_s: Seconds = Field(
        0.0, description="Of each call between deployments: what is computed beside it that nobody waits for."
    )

    @model_validator(mode="after")
    def _one_core_has_no_neighbours(self) -> Cores:
        if self.count == 1 and self.slowdown != 1.0:
            raise ValueError(f"slowdown: {self.slowdown:g}, but one core is all of them: it must be 1")
        return self


class Stage(_Strict):
    """What all four stages have: the order of their work. The same settings as in a configuration's `args:`."""

    policy: PolicyName = "first_come"
    patience: int = Field(100, ge=0)


class EncodeStage(Stage):
    passes: dict[str, SecondsByRows] = Field(
        min_length=1, description="Seconds of a pass by texts, for each encoder that reads a prompt."
    )
    max_batch_size: int = Field(8, ge=1)

    @cached_property
    def lines(self) -> dict[str, Line]:
        return {name: _line(rows) for name, rows in self.passes.items()}

    @property
    def budget(self) -> Budget:
        return Budget(self.max_batch_size)


class _SizedStage(Stage):
    passes: SecondsBySize = Field(description="Seconds of a forward pass by rows, for each size in pixels.")
    max_batch_pixels: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _sizes_differ(self) -> _SizedStage:
        seen: dict[int, str] = {}
        for size in self.passes:
            if (other := seen.setdefault(pixels_of(size), size)) != size:
                raise ValueError(f"passes: {other} and {size} have the same number of pixels")
        return self

    @cached_property
    def table(self) -> PassTable:
        return PassTable(self.passes)


class DenoiseStage(_SizedStage):
    begin_s: Seconds = Field(description="Of each image before its first step: schedule, noise, conditioning.")
    pass_s: Seconds = Field(description="Of each pass outside the UNet: choosing, and the loop.")
    step_s: Seconds = Field(description="Of each image in a pass outside the UNet: guidance and the scheduler's step.")
    finish_s: Seconds = Field(description="Of each image after its last step.")
    max_batch_rows: int = Field(16, ge=2)

    @property
    def budget(self) -> Budget:
        return Budget(self.max_batch_rows, self.max_batch_pixels)

    def pass_seconds(self, rows: int, pixels: int, images: int) -> float:
        """A whole pass of `images` images that have `rows` rows of `pixels` pixels each."""
        return self.table.seconds(rows, pixels) + self.pass_s + self.step_s * images


class DecodeStage(_SizedStage):
    max_batch_size: int = Field(8, ge=1)

    @property
    def budget(self) -> Budget:
        return Budget(self.max_batch_size, self.max_batch_pixels)


class IngressStage(_Strict):
    files: Annotated[dict[_Size, Seconds], Field(min_length=1)] = Field(
        description="Seconds to make a picture file, for each size in pixels."
    )
    threads: int = Field(1, ge=1, description="Files that a replica makes at a time.")
    max_images_in_flight: int = Field(128, ge=1)

    @cached_property
    def line(self) -> Line:
        return Line({pixels_of(size): seconds for size, seconds in self.files.items()})


class Profile(_Strict):
    """A machine's figures. `refine` is absent where no refiner is configured."""

    made: Provenance
    hop_s: Seconds = Field(description="Of each call between deployments, there and back, besides the work itself.")
    cores: Cores | None = Field(None, description="Shared cores; absent where each replica has a device of its own.")
    encode: EncodeStage
    denoise: DenoiseStage
    refine: DenoiseStage | None = None
    decode: DecodeStage
    ingress: IngressStage

    def measured_sizes(self, pixels: int) -> bool:
        """Whether a picture size lies within those that were measured, in every stage."""
        stages = (self.denoise, self.refine, self.decode)
        return all(stage.table.measured(pixels) for stage in stages if stage is not None)

    def with_policy(self, policy: PolicyName) -> Profile:
        """The same machine with another order of work in both denoisers."""
        refine = self.refine and self.refine.model_copy(update={"policy": policy})
        return self.model_copy(update={"denoise": self.denoise.model_copy(update={"policy": policy}), "refine": refine})


def parse_profile(content: Any) -> Profile:
    """Checks a profile's content; raises `ConfigurationError`, one line that names the key at fault."""
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        place, reason = first_fault(error)
        where = ".".join(map(str, place))
        raise ConfigurationError(f"{where}: {reason}" if where else reason) from None


def shipped_profiles() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def read_profile(name: str) -> Profile:
    """Reads a file; a name that is no file may be that of a profile that ships with the project."""
    path = Path(name)
    if not path.exists() and path.name == name and path.stem in shipped_profiles() and path.suffix in ("", ".json"):
        path = SHIPPED / f"{path.stem}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{name}: no such file, nor one of ours: {', '.join(shipped_profiles())}") from None
    except OSError as error:
        raise ConfigurationError(f"{name}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigurationError(f"{name}: not JSON: {' '.join(str(error).split())}") from None
    try:
        return parse_profile(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None
