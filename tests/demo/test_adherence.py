"""The model draws what the prompt says, and each classic wiring fault of an SDXL server makes it stop doing so.

The full figures are those of `python -m serve_app.demo.training.evaluate`; here 12 prompts stand for them.
"""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline

from serve_app.demo.grammar import caption, sample_scenes
from serve_app.demo.training.data import to_picture
from serve_app.demo.training.evaluate import draw, generators, judge, read_picture

SCENES = sample_scenes(12, seed=9, held_out=True)
PROMPTS = [caption(scene) for scene in SCENES]
GUIDANCE = 7.5
STEPS = 15


def call(base: DiffusionPipeline, **changes: object) -> dict[str, float]:
    """Figures of one batch of all prompts, drawn with changes to the pipeline's arguments."""
    arguments = {
        "prompt": PROMPTS,
        "guidance_scale": GUIDANCE,
        "num_inference_steps": STEPS,
        "generator": generators(range(len(PROMPTS))),
    }
    return judge(SCENES, base(**{**arguments, **changes}).images)


@pytest.fixture(scope="module")
def sound(base: DiffusionPipeline) -> dict[str, float]:
    return call(base)


def whole(figures: dict[str, float]) -> float:
    return figures["whole pictures"]


def test_held_out_prompts_are_drawn_right(sound: dict[str, float]):
    assert sound["backgrounds"] >= 0.95
    assert sound["colours"] >= 0.85
    assert sound["shapes"] >= 0.85
    assert sound["counts"] >= 0.85
    assert sound["relations"] >= 0.8


def test_refiner_keeps_the_picture(base: DiffusionPipeline, refiner: DiffusionPipeline, sound: dict[str, float]):
    figures = judge(SCENES, draw(base, PROMPTS, range(12), GUIDANCE, STEPS, refiner=refiner, batch=12))
    for name in ("backgrounds", "colours", "shapes", "relations"):
        assert figures[name] >= sound[name] - 0.15


@pytest.mark.parametrize("size", [(96, 128), (160, 96)])
def test_other_sizes(base: DiffusionPipeline, size: tuple[int, int]):
    pictures = draw(base, PROMPTS, range(12), GUIDANCE, STEPS, size_px=size, batch=12)
    figures = judge(SCENES, pictures)
    assert {picture.size for picture in pictures} == {size}
    assert figures["backgrounds"] >= 0.9 and figures["colours"] >= 0.6


def swapped_encoders(base: DiffusionPipeline) -> dict[str, float]:
    context, negative, pooled, negative_pooled = base.encode_prompt(PROMPTS)
    first, second = context.chunk(2, dim=-1)
    return call(
        base,
        prompt=None,
        prompt_embeds=torch.cat([second, first], dim=-1),
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
    )


def missing_latent_scale(base: DiffusionPipeline) -> dict[str, float]:
    latents = base(
        PROMPTS,
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        generator=generators(range(12)),
        output_type="latent",
    ).images
    with torch.no_grad():
        pixels = base.vae.decode(latents).sample
    return judge(SCENES, [to_picture(picture) for picture in pixels])


def guidance_the_wrong_way_round(base: DiffusionPipeline) -> dict[str, float]:
    context, negative, pooled, negative_pooled = base.encode_prompt(PROMPTS)
    return call(
        base,
        prompt=None,
        prompt_embeds=negative,
        negative_prompt_embeds=context,
        pooled_prompt_embeds=negative_pooled,
        negative_pooled_prompt_embeds=pooled,
    )


@pytest.mark.parametrize(
    "defect",
    [
        swapped_encoders,
        missing_latent_scale,
        guidance_the_wrong_way_round,
    ],
)
def test_a_defect_shows(
    base: DiffusionPipeline, sound: dict[str, float], defect: Callable[[DiffusionPipeline], dict[str, float]]
):
    assert whole(defect(base)) <= whole(sound) - 0.3


def test_time_ids_in_the_wrong_order_move_things_off_centre(base: DiffusionPipeline):
    """A crop of (128, 128) where (0, 0) belongs: the model takes the picture for a corner of a larger one."""
    alone = [caption(scene) for scene in sample_scenes(60, seed=9, held_out=True) if len(scene.things) == 1][:12]

    def off_centre(**time_ids: tuple[int, int]) -> float:
        pictures = draw(base, alone, range(12), GUIDANCE, STEPS, batch=12, **time_ids)
        things = [reading.things[0] for reading in map(read_picture, pictures) if reading.things]
        return sum(math.hypot(thing.x - 64, thing.y - 64) for thing in things) / len(things)

    wrong = off_centre(original_size=(128, 128), crops_coords_top_left=(128, 128), target_size=(0, 0))
    assert wrong > 1.4 * off_centre()
