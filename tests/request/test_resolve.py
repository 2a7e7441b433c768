from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import diffusers.schedulers
import pytest

from serve_app.request.errors import InvalidRequest
from serve_app.request.facts import ModelFacts
from serve_app.request.fields import MAX_SEED
from serve_app.request.limits import Limits
from serve_app.request.resolve import ResolvedRequest, parameters, resolve
from serve_app.request.schedulers import CLASSES_WITH_ETA, SCHEDULERS
from serve_app.request.schema import ImageRequest
from tests.fakes import BASE_ALONE, FACTS, LIMITS

_REFINER = FACTS.refiner
assert _REFINER is not None
TARGET_SIZE_REFINER = replace(FACTS, refiner=replace(_REFINER, takes_aesthetic_score=False))
ENCODES_NEGATIVE = replace(FACTS, text=replace(FACTS.text, base_zeroes_missing_negative=False))
NATIVE_LMS = replace(FACTS, refiner=replace(_REFINER, native_scheduler="LMSDiscreteScheduler"))
NATIVE_DDIM = replace(FACTS, base=replace(FACTS.base, native_scheduler="DDIMScheduler"))
NATIVE_TCD = replace(
    FACTS,
    base=replace(FACTS.base, native_scheduler="TCDScheduler"),
    refiner=replace(_REFINER, native_scheduler="TCDScheduler"),
)
NATIVE_DDIM_REFINER = replace(FACTS, refiner=replace(_REFINER, native_scheduler="DDIMScheduler"))


def resolved(facts: ModelFacts = FACTS, limits: Limits = LIMITS, **fields: Any) -> ResolvedRequest:
    return resolve(ImageRequest(**({"prompt": "p"} | fields)), facts, limits, "id")


def refusal(facts: ModelFacts = FACTS, limits: Limits = LIMITS, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        resolved(facts, limits, **fields)
    return caught.value


def test_the_schedulers_that_take_eta_are_known() -> None:
    steps = {
        name: inspect.getattr_static(getattr(diffusers.schedulers, name), "step", None)
        for name in dir(diffusers.schedulers)
        if inspect.isclass(getattr(diffusers.schedulers, name))
    }
    # Schedulers whose libraries are missing have no step to look at.
    with_eta = {name for name, step in steps.items() if step and "eta" in inspect.signature(step).parameters}
    assert with_eta == CLASSES_WITH_ETA
    assert {row.name: row.takes_eta for row in SCHEDULERS} == {
        row.name: row.diffusers_class in with_eta for row in SCHEDULERS
    }


def test_sizes_default_to_the_checkpoints_own() -> None:
    request = resolved()
    assert (request.width, request.height) == (64, 64)
    request = resolved(width=128, height=72)
    assert (request.width, request.height) == (128, 72)
    assert (request.original_size, request.target_size) == ((72, 128), (72, 128)), "(height, width)"


def test_sizes_of_the_micro_conditioning_are_kept() -> None:
    request = resolved(original_size=(1, 2), target_size=(3, 4), crops_coords_top_left=(5, 6))
    assert (request.original_size, request.target_size, request.crops_coords_top_left) == ((1, 2), (3, 4), (5, 6))
    assert request.negative_original_size is request.negative_target_size is None


@pytest.mark.parametrize("name", ["width", "height"])
def test_a_side_stays_within_the_limits(name: str) -> None:
    limits = Limits(min_side_px=64, max_side_px=128)
    for side in (64, 128):
        assert getattr(resolved(limits=limits, **dict[str, Any]({name: side})), name) == side
    for side in (56, 136):
        error = refusal(limits=limits, **dict[str, Any]({name: side}))
        assert error.param == name
        assert error.message == f"{name}: {side} px is outside this service's 64 to 128"


def test_an_area_stays_within_the_limit() -> None:
    limits = Limits(max_pixels=128 * 64)
    assert resolved(limits=limits, width=128, height=64).width == 128
    assert "8704 pixels" in refusal(limits=limits, width=136, height=64).message


def test_the_checkpoints_own_size_is_held_to_the_limits_too() -> None:
    assert refusal(limits=Limits(min_side_px=128)).param == "width"


def test_steps_stay_within_the_limit() -> None:
    limits = Limits(max_steps=60)
    assert resolved(limits=limits, num_inference_steps=60).num_inference_steps == 60
    assert refusal(limits=limits, num_inference_steps=61).param == "num_inference_steps"


def test_clip_skip_is_bounded_by_the_layers_of_the_encoders_in_use() -> None:
    assert resolved(clip_skip=2).clip_skip == 2
    assert refusal(clip_skip=3).param == "clip_skip"
    assert resolved(clip_skip=3, high_noise_frac=1.0).clip_skip == 3, "no refiner's encoder reads it"
    assert refusal(clip_skip=4, high_noise_frac=1.0).param == "clip_skip"
    assert resolved(BASE_ALONE, clip_skip=3).clip_skip == 3


def test_every_picture_has_a_seed_that_can_be_sent_again() -> None:
    assert resolved(seed=MAX_SEED).seed == MAX_SEED
    assert resolved(seed=MAX_SEED - 9, n=10).seed == MAX_SEED - 9
    error = refusal(seed=MAX_SEED - 8, n=10)
    assert error.param == "seed"
    assert str(MAX_SEED - 9) in error.message


def test_an_absent_seed_is_drawn() -> None:
    seeds = {resolved().seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert resolved(seed=0).seed == 0


def test_the_bases_share_defaults_to_0_8_where_there_is_a_refiner() -> None:
    assert (resolved().high_noise_frac, resolved().refined) == (0.8, True)
    assert (resolved(BASE_ALONE).high_noise_frac, resolved(BASE_ALONE).refined) == (1.0, False)
    assert resolved(high_noise_frac=1.0).refined is False
    assert resolved(BASE_ALONE, high_noise_frac=1.0).refined is False


def test_a_share_for_a_refiner_that_is_not_there_is_refused() -> None:
    error = refusal(BASE_ALONE, high_noise_frac=0.8)
    assert error.param == "high_noise_frac"
    assert "no refiner" in error.message


def test_the_refiners_guidance_is_the_bases_where_absent() -> None:
    assert resolved(guidance_scale=3.0).refiner_guidance_scale == 3.0
    assert resolved(guidance_scale=3.0, refiner_guidance_scale=0.0).refiner_guidance_scale == 0.0


def test_quality_defaults_to_95() -> None:
    assert resolved(output_format="jpeg").quality == 95
    assert resolved(output_format="jpeg", output_compression=0).quality == 0


def test_a_request_has_an_id() -> None:
    request = ImageRequest(prompt="p")
    assert resolve(request, FACTS, LIMITS, "mine").request_id == "mine"
    first, second = (resolve(request, FACTS, LIMITS).request_id for _ in range(2))
    assert first and second and first != second


OFF: dict[str, Any] = {"guidance_scale": 1.0}
REFINER_ONLY: dict[str, Any] = {"guidance_scale": 1.0, "refiner_guidance_scale": 5.0}
BASE_ONLY: dict[str, Any] = {"guidance_scale": 5.0, "refiner_guidance_scale": 1.0}
ALONE: dict[str, Any] = {"high_noise_frac": 1.0}
BOTH_SIZES: dict[str, Any] = {"negative_original_size": (64, 64), "negative_target_size": (64, 64)}

# Of a request's field: where it acts. "all" is everywhere it can be expected to, and said of by no warning.
NEGATIVE_CROP: dict[str, Any] = {"negative_crops_coords_top_left": (1, 1)}
ACTS: list[tuple[str, ModelFacts, dict[str, Any], str, str]] = [
    ("prompt_2", FACTS, {"prompt_2": ""}, "nowhere", "it is empty"),
    ("prompt_2", FACTS, {"prompt_2": "q"}, "all", ""),
    ("negative_prompt_2", FACTS, {"negative_prompt_2": "x"}, "nowhere", "replaces a missing negative_prompt by zeros"),
    ("negative_prompt_2", ENCODES_NEGATIVE, {"negative_prompt_2": "x"}, "all", ""),
    ("negative_prompt_2", FACTS, {"negative_prompt_2": "x", "negative_prompt": ""}, "all", ""),
    ("negative_prompt_2", FACTS, {"negative_prompt_2": "", "negative_prompt": "y"}, "nowhere", "it is empty"),
    ("negative_prompt_2", FACTS, OFF | {"negative_prompt_2": "x", "negative_prompt": ""}, "nowhere", "guidance is off"),
    ("negative_prompt_2", FACTS, REFINER_ONLY | {"negative_prompt_2": "x", "negative_prompt": ""}, "nowhere",
     "the base's guidance is off"),
    ("negative_prompt_2", FACTS, BASE_ONLY | {"negative_prompt_2": "x", "negative_prompt": ""}, "all", ""),
    *(
        (name, facts, guidance | {name: value}, acts, why)
        for name, value in (("negative_prompt", "x"), ("negative_prompt", ""), ("guidance_rescale", 0.5))
        for facts, guidance, acts, why in (
            (FACTS, {}, "all", ""),
            (FACTS, OFF, "nowhere", "guidance is off (guidance_scale is not above 1)"),
            (FACTS, BASE_ONLY, "base", "the refiner's guidance is off"),
            (FACTS, REFINER_ONLY, "refiner", "the base's guidance is off"),
            (FACTS, ALONE, "all", ""),
            (BASE_ALONE, OFF, "nowhere", "guidance is off"),
        )
    ),
    ("target_size", FACTS, {"target_size": (64, 64)}, "base", "the refiner takes an aesthetic score in its place"),
    ("target_size", FACTS, ALONE | {"target_size": (64, 64)}, "all", ""),
    ("target_size", TARGET_SIZE_REFINER, {"target_size": (64, 64)}, "all", ""),
    ("negative_original_size", FACTS, BOTH_SIZES, "all", ""),
    ("negative_original_size", FACTS, {"negative_original_size": (64, 64)}, "refiner",
     "only with negative_target_size"),
    ("negative_original_size", FACTS, ALONE | {"negative_original_size": (64, 64)}, "nowhere",
     "only with negative_target_size"),
    ("negative_original_size", FACTS, BASE_ONLY | {"negative_original_size": (64, 64)}, "nowhere",
     "only with negative_target_size"),
    ("negative_original_size", FACTS, BASE_ONLY | BOTH_SIZES, "base", "the refiner's guidance is off"),
    ("negative_original_size", FACTS, REFINER_ONLY | BOTH_SIZES, "refiner", "the base's guidance is off"),
    ("negative_original_size", FACTS, OFF | BOTH_SIZES, "nowhere", "guidance is off"),
    ("negative_original_size", FACTS, ALONE | BOTH_SIZES, "all", ""),
    ("negative_target_size", FACTS, {"negative_target_size": (64, 64)}, "nowhere", "only with negative_original_size"),
    ("negative_target_size", FACTS, BOTH_SIZES, "base", "the refiner takes an aesthetic score in its place"),
    ("negative_target_size", FACTS, REFINER_ONLY | BOTH_SIZES, "nowhere", "the base's guidance is off"),
    ("negative_target_size", FACTS, ALONE | BOTH_SIZES, "all", ""),
    ("negative_target_size", TARGET_SIZE_REFINER, BOTH_SIZES, "all", ""),
    ("negative_target_size", TARGET_SIZE_REFINER, {"negative_target_size": (64, 64)}, "refiner",
     "only with negative_original_size"),
    ("negative_target_size", TARGET_SIZE_REFINER, REFINER_ONLY | BOTH_SIZES, "refiner", "the base's guidance is off"),
    ("negative_crops_coords_top_left", FACTS, NEGATIVE_CROP | BOTH_SIZES, "all", ""),
    ("negative_crops_coords_top_left", FACTS, NEGATIVE_CROP, "refiner",
     "only with negative_original_size and negative_target_size"),
    ("negative_crops_coords_top_left", FACTS, ALONE | NEGATIVE_CROP, "nowhere", "only with negative_original_size"),
    ("negative_crops_coords_top_left", TARGET_SIZE_REFINER, NEGATIVE_CROP, "nowhere",
     "only with negative_original_size"),
    ("negative_crops_coords_top_left", TARGET_SIZE_REFINER, NEGATIVE_CROP | BOTH_SIZES, "base",
     "this refiner repeats the positive crop"),
    ("negative_crops_coords_top_left", FACTS, OFF | NEGATIVE_CROP | BOTH_SIZES, "nowhere", "guidance is off"),
    ("eta", FACTS, {"eta": 0.5}, "nowhere", "only ddim has it"),
    ("eta", FACTS, {"eta": 0.5, "scheduler": "ddim"}, "all", ""),
    ("eta", NATIVE_TCD, {"eta": 0.5}, "all", ""),
    ("eta", NATIVE_DDIM, {"eta": 0.5, "scheduler": "heun"}, "nowhere", "only ddim has it"),
    ("eta", NATIVE_DDIM, {"eta": 0.5}, "base", "only ddim has it"),
    ("eta", NATIVE_DDIM, ALONE | {"eta": 0.5}, "all", ""),
    ("eta", NATIVE_DDIM_REFINER, {"eta": 0.5}, "refiner", "only ddim has it"),
    ("eta", NATIVE_DDIM_REFINER, ALONE | {"eta": 0.5}, "nowhere", "only ddim has it"),
    *(
        (name, facts, alone | {name: 5.0}, acts, why)
        for name in ("aesthetic_score", "negative_aesthetic_score")
        for facts, alone, acts, why in (
            (FACTS, {}, "all", ""),
            (FACTS, ALONE, "nowhere", "the base alone draws this picture"),
            (BASE_ALONE, {}, "nowhere", "the base alone draws this picture"),
            (TARGET_SIZE_REFINER, {}, "nowhere", "this refiner takes a target size instead"),
        )
    ),
    ("negative_aesthetic_score", FACTS, OFF | {"negative_aesthetic_score": 1.0}, "nowhere", "guidance is off"),
    ("negative_aesthetic_score", FACTS, BASE_ONLY | {"negative_aesthetic_score": 1.0}, "nowhere",
     "the refiner's guidance is off"),
    ("negative_aesthetic_score", FACTS, REFINER_ONLY | {"negative_aesthetic_score": 1.0}, "all", ""),
    ("refiner_guidance_scale", FACTS, {"refiner_guidance_scale": 5.0}, "all", ""),
    ("refiner_guidance_scale", FACTS, ALONE | {"refiner_guidance_scale": 5.0}, "nowhere", "the base alone"),
    ("output_compression", FACTS, {"output_compression": 50}, "nowhere", "png is lossless"),
    ("output_compression", FACTS, {"output_compression": 50, "output_format": "jpeg"}, "all", ""),
]  # fmt: skip
SAID = {"nowhere": "has no effect", "base": "acts in the base alone", "refiner": "acts in the refiner alone"}


@pytest.mark.parametrize(("field", "facts", "fields", "acts", "why"), ACTS)
def test_a_field_that_does_not_act_everywhere_is_said_of_once(
    field: str, facts: ModelFacts, fields: dict[str, Any], acts: str, why: str
) -> None:
    lines = [line for line in resolved(facts, **fields).warnings if line.startswith(f"{field} ")]
    if acts == "all":
        assert lines == []
        return
    (line,) = lines
    assert line.startswith(f"{field} {SAID[acts]}: ")
    assert why in line


def test_the_demo_model_says_so_when_it_knows_no_word_of_the_prompt() -> None:
    demo = replace(FACTS, embedded_demo=True)
    (line,) = resolved(demo, prompt="an astronaut riding a horse").warnings
    assert line.startswith("prompt has no word that the embedded demo model knows")
    assert resolved(demo, prompt="a red circle on a white background").warnings == ()
    assert resolved(FACTS, prompt="an astronaut riding a horse").warnings == ()


def test_lms_in_a_refiner_is_warned_of() -> None:
    start = "scheduler lms starts the refiner"
    assert any(line.startswith(start) for line in resolved(FACTS, scheduler="lms").warnings)
    assert any(line.startswith(start) for line in resolved(NATIVE_LMS).warnings)
    assert resolved(FACTS, scheduler="lms", **ALONE).warnings == ()
    assert resolved(NATIVE_LMS, scheduler="euler").warnings == ()


@pytest.mark.parametrize("facts", [FACTS, BASE_ALONE, TARGET_SIZE_REFINER])
def test_a_plain_request_warns_of_nothing(facts: ModelFacts) -> None:
    assert resolved(facts).warnings == ()
    assert resolved(facts, guidance_scale=1.0).warnings == ()


def test_no_field_is_warned_of_twice() -> None:
    everything: dict[str, Any] = {
        "negative_prompt": "x",
        "negative_prompt_2": "y",
        "guidance_rescale": 0.5,
        "negative_crops_coords_top_left": (1, 1),
        "aesthetic_score": 5.0,
        "negative_aesthetic_score": 5.0,
        "eta": 0.5,
        **BOTH_SIZES,
    }
    for facts in (FACTS, BASE_ALONE, TARGET_SIZE_REFINER):
        for guidance in ({}, OFF, *(() if facts is BASE_ALONE else (REFINER_ONLY, BASE_ONLY))):
            subjects = [line.split()[0] for line in resolved(facts, **everything, **guidance).warnings]
            assert len(subjects) == len(set(subjects)), (guidance, subjects)


ROUND_TRIPS: list[dict[str, Any]] = [
    {},
    {"seed": 5, "n": 4},
    {"width": 128, "height": 72},
    {"prompt_2": "q", "negative_prompt": "", "negative_prompt_2": "r", "clip_skip": 1},
    {"original_size": (1, 2), "target_size": (3, 4), "crops_coords_top_left": (5, 6)},
    {"negative_crops_coords_top_left": (7, 8), **BOTH_SIZES},
    {"scheduler": "ddim", "eta": 0.5, "num_inference_steps": 7, "guidance_rescale": 0.25},
    {"high_noise_frac": 0.3, "aesthetic_score": 5.0, "negative_aesthetic_score": 1.0},
    REFINER_ONLY,
    BASE_ONLY,
    OFF,
    ALONE,
    {"output_format": "jpeg", "output_compression": 10},
    {"output_format": "webp"},
]


@pytest.mark.parametrize("facts", [FACTS, TARGET_SIZE_REFINER, BASE_ALONE])
@pytest.mark.parametrize("fields", ROUND_TRIPS)
def test_the_parameters_in_a_picture_ask_for_the_same_picture(fields: dict[str, Any], facts: ModelFacts) -> None:
    if facts is BASE_ALONE and fields.get("high_noise_frac", 1) < 1:
        fields = fields | {"high_noise_frac": 1.0}
    request = resolved(facts, **fields)
    for index in range(request.n):
        kept = json.loads(json.dumps(parameters(request, index)))
        again = resolve(ImageRequest(**kept), facts, LIMITS, "id")
        # What the picture did not use is not kept, so its warnings are not repeated.
        partial = tuple(line for line in request.warnings if " alone: " in line)
        unused: dict[str, Any] = {"warnings": partial, "n": 1, "seed": request.seed + index}
        if not request.refined:
            unused |= {"refiner_guidance_scale": again.refiner_guidance_scale}
        if "aesthetic_score" not in kept:
            unused |= {"aesthetic_score": again.aesthetic_score}
        if "negative_aesthetic_score" not in kept:
            unused |= {"negative_aesthetic_score": again.negative_aesthetic_score}
        assert again == replace(request, **unused)


def test_the_parameters_leave_out_what_the_picture_did_not_use() -> None:
    assert {"aesthetic_score", "negative_aesthetic_score", "refiner_guidance_scale"} <= set(parameters(resolved(), 0))
    alone = set(parameters(resolved(**ALONE), 0))
    assert not alone & {"aesthetic_score", "negative_aesthetic_score", "refiner_guidance_scale", "n"}
    assert not set(parameters(resolved(TARGET_SIZE_REFINER), 0)) & {"aesthetic_score", "negative_aesthetic_score"}
    assert "negative_aesthetic_score" not in parameters(resolved(**BASE_ONLY), 0)
    assert "output_compression" not in parameters(resolved(), 0)
    assert parameters(resolved(output_format="jpeg", output_compression=10), 0)["output_compression"] == 10
