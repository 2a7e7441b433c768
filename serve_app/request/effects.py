"""What diffusers ignores of a request, said in warnings.

A request's field may act in the base, in the refiner, in both or in neither, by rules that are diffusers' own.
`_effects` is the table of those rules; a line is said for every field that was given and does not act
everywhere it could be expected to.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.request.schedulers import SCHEDULERS, find, takes_eta
from serve_app.request.schema import ImageRequest

# A stage that has no such field by its nature: nobody expects it to act there.
_NOT_ITS_OWN = "not its own"


@dataclass(frozen=True)
class StagePlan:
    """How the two denoisers will run this request."""

    refined: bool
    base_guided: bool
    refiner_guided: bool
    base_scheduler: str  # the request's name, or the diffusers class of the checkpoint's own
    refiner_scheduler: str
    base_zeroes_missing_negative: bool
    refiner_takes_aesthetic_score: bool


@dataclass(frozen=True)
class _Effect:
    """A field, whether it was given, and why a stage does not act on it (None: it does)."""

    field: str
    given: bool
    base: str | None
    refiner: str | None

    def warning(self) -> str | None:
        if not self.given or (self.base is None and self.refiner in (None, _NOT_ITS_OWN)):
            return None
        if self.refiner is None and self.base == _NOT_ITS_OWN:
            return None
        if self.base is None:
            return f"{self.field} acts in the base alone: {self.refiner}"
        if self.refiner is None:
            return f"{self.field} acts in the refiner alone: {self.base}"
        return f"{self.field} has no effect: {self.refiner if self.base == _NOT_ITS_OWN else self.base}"


def effect_warnings(request: ImageRequest, facts: StagePlan) -> list[str]:
    """A line for every field that diffusers ignores, or that acts in one of two stages alone."""
    warnings = [line for effect in _effects(request, facts) if (line := effect.warning()) is not None]
    scheduler = find(facts.refiner_scheduler)
    if facts.refined and scheduler is not None and scheduler.in_refiner is not None:
        warnings.append(f"scheduler {scheduler.name} {scheduler.in_refiner}")
    return warnings


def _effects(request: ImageRequest, facts: StagePlan) -> list[_Effect]:
    asked = request.model_fields_set
    off = "guidance is off (guidance_scale is not above 1)"
    alone = "the base alone draws this picture"

    def first(*reasons: tuple[bool, str]) -> str | None:
        """The first reason that holds."""
        return next((reason for holds, reason in reasons if holds), None)

    base_off = (not facts.base_guided, "the base's guidance is off" if facts.refiner_guided else off)
    refiner_off = (not facts.refiner_guided, "the refiner's guidance is off" if facts.base_guided else off)
    no_refiner = (not facts.refined, _NOT_ITS_OWN)  # for fields of both stages
    base_alone = (not facts.refined, alone)  # for fields of the refiner
    scored = facts.refiner_takes_aesthetic_score
    instead = (scored, "the refiner takes an aesthetic score in its place")
    no_score = (not scored, "this refiner takes a target size instead")
    original, target = request.negative_original_size is not None, request.negative_target_size is not None

    def no_eta(scheduler: str) -> tuple[bool, str]:
        named = ", ".join(known.name for known in SCHEDULERS if known.takes_eta)
        return not takes_eta(scheduler), f"of the schedulers by name only {named} has it"

    # fmt: off
    return [
        _Effect("prompt_2", request.prompt_2 == "", "it is empty, so prompt is used", _NOT_ITS_OWN),
        _Effect("negative_prompt", request.negative_prompt is not None,
                first(base_off), first(no_refiner, refiner_off)),
        _Effect(
            "negative_prompt_2",
            request.negative_prompt_2 is not None,
            first(
                base_off,
                (request.negative_prompt_2 == "", "it is empty, so negative_prompt is used"),
                (
                    request.negative_prompt is None and facts.base_zeroes_missing_negative,
                    "this base replaces a missing negative_prompt by zeros",
                ),
            ),
            _NOT_ITS_OWN,
        ),
        _Effect("guidance_rescale", request.guidance_rescale > 0, first(base_off), first(no_refiner, refiner_off)),
        _Effect("eta", request.eta > 0, first(no_eta(facts.base_scheduler)),
                first(no_refiner, no_eta(facts.refiner_scheduler))),
        _Effect("target_size", request.target_size is not None, None, first(no_refiner, instead)),
        _Effect("negative_original_size", original,
                first(base_off, (not target, "the base uses it only with negative_target_size")),
                first(no_refiner, refiner_off)),
        _Effect("negative_target_size", target,
                first(base_off, (not original, "the base uses it only with negative_original_size")),
                first(no_refiner, refiner_off, instead)),
        _Effect("negative_crops_coords_top_left", request.negative_crops_coords_top_left != (0, 0),
                first(base_off, (not (original and target),
                                 "the base uses it only with negative_original_size and negative_target_size")),
                first(no_refiner, refiner_off, (not scored, "this refiner repeats the positive crop"))),
        _Effect("refiner_guidance_scale", request.refiner_guidance_scale is not None, _NOT_ITS_OWN, first(base_alone)),
        _Effect("aesthetic_score", "aesthetic_score" in asked, _NOT_ITS_OWN, first(base_alone, no_score)),
        _Effect("negative_aesthetic_score", "negative_aesthetic_score" in asked, _NOT_ITS_OWN,
                first(base_alone, no_score, refiner_off)),
        _Effect("output_compression", request.output_compression is not None,
                first((request.output_format == "png", "png is lossless")), _NOT_ITS_OWN),
    ]
    # fmt: on
