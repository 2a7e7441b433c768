from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serve_app.request.facts import ModelFacts
from serve_app.request.resolve import ResolvedRequest, resolve
from serve_app.request.schema import ImageRequest, Progress
from serve_app.runtime.pipeline import Drawing, LatentPreview, Listener, Stages
from serve_app.runtime.pipeline import draw as draw_images
from serve_app.runtime.tasks import WHOLE, Noise, Resumed, Span, TimeInStage, Urgency
from tests.fakes import BASE_ALONE, FACTS, LIMITS, FakeStages


async def pixels_themselves(index: int, pixels: np.ndarray) -> np.ndarray:
    return pixels


async def draw(asked: ResolvedRequest, stages: Stages, listener: Listener | None = None) -> Drawing[np.ndarray]:
    return await draw_images(asked, stages, pixels_themselves, listener)


def request(facts: ModelFacts = FACTS, **fields: Any) -> ResolvedRequest:
    return resolve(ImageRequest(**{"prompt": "p", "seed": 10, **fields}), facts, LIMITS, "id")


async def test_one_picture_passes_the_stages_in_order() -> None:
    fake = FakeStages(warnings=("cut",))
    drawing = await draw(request(width=72), fake.stages())
    assert fake.calls == ["encode", "denoise 10", "refine 10", "decode 10"]
    assert drawing.warnings == ("cut",)
    (pixels,) = drawing.images
    assert pixels.shape == (64, 72, 3) and pixels.dtype == np.uint8


async def test_n_pictures_are_encoded_once_and_come_in_order_of_their_seeds() -> None:
    fake = FakeStages()
    drawing = await draw(request(n=3), fake.stages())
    assert fake.calls.count("encode") == 1
    for stage in ("denoise", "refine", "decode"):
        assert sorted(call for call in fake.calls if call.startswith(stage)) == [f"{stage} {s}" for s in (10, 11, 12)]
    assert [int(pixels[0, 0, 0]) for pixels in drawing.images] == [10, 11, 12]


async def test_the_pictures_of_a_request_run_side_by_side() -> None:
    fake = FakeStages(gate=asyncio.Event())
    drawing = asyncio.create_task(draw(request(n=3), fake.stages()))
    await fake.entered.wait()
    await asyncio.sleep(0)
    assert [task.start for task in fake.tasks] == [Noise(10), Noise(11), Noise(12)], "all in the denoiser, none done"
    assert fake.gate is not None
    fake.gate.set()
    assert len((await drawing).images) == 3


@pytest.mark.parametrize(("facts", "fields"), [(BASE_ALONE, {}), (FACTS, {"high_noise_frac": 1.0})])
async def test_the_base_alone_draws_what_is_not_refined(facts: ModelFacts, fields: dict[str, Any]) -> None:
    fake = FakeStages()
    drawing = await draw(request(facts, **fields), fake.stages())
    assert fake.calls == ["encode", "denoise 10", "decode 10"]
    assert fake.tasks[0].span == WHOLE
    refine = drawing.timings[2]
    assert (refine.stage, refine.seconds, refine.steps) == ("refine", 0, 0)


async def test_base_and_refiner_get_their_shares_of_the_trajectory() -> None:
    fake = FakeStages()
    asked = request(guidance_scale=3.0, refiner_guidance_scale=1.0, high_noise_frac=0.6, width=72)
    await draw(asked, fake.stages())
    base, refiner = fake.tasks
    assert (base.start, base.span) == (Noise(10), Span(end=0.6))
    assert isinstance(refiner.start, Resumed) and refiner.span == Span(start=0.6)
    assert float(refiner.start.latents.samples[0, 0, 0]) == 10
    assert (base.guidance_scale, refiner.guidance_scale) == (3.0, 1.0)
    assert (base.rows, refiner.rows) == (2, 1)
    assert (base.width, refiner.height) == (72, 64)


async def test_time_ids_are_those_of_diffusers() -> None:
    fake = FakeStages()
    sizes: dict[str, Any] = {"original_size": (1, 2), "crops_coords_top_left": (3, 4), "target_size": (5, 6)}
    negative: dict[str, Any] = {"negative_original_size": (7, 8), "negative_crops_coords_top_left": (9, 10)}
    await draw(request(**sizes, **negative, negative_target_size=(11, 12)), fake.stages())
    base, refiner = fake.tasks
    assert (base.time_ids, base.negative_time_ids) == ((1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 12))
    assert (refiner.time_ids, refiner.negative_time_ids) == ((1, 2, 3, 4, 6.0), (7, 8, 9, 10, 2.5))

    await draw(request(**sizes, **negative), fake.stages())
    base, refiner = fake.tasks[2:]
    assert base.negative_time_ids == base.time_ids, "the base takes both sizes or none"
    assert refiner.negative_time_ids == (7, 8, 9, 10, 2.5), "the refiner takes the original's alone"


@pytest.mark.parametrize("stage", ["denoise 11", "refine 11", "decode 11"])
async def test_one_failing_picture_cancels_the_others_and_its_error_is_raised(stage: str) -> None:
    fake = FakeStages(fail={stage: ValueError("no")}, gate=asyncio.Event(), held_seed=10)
    async with asyncio.timeout(20):
        with pytest.raises(ValueError, match="no"):
            await draw(request(n=2), fake.stages())
    assert fake.cancelled == ["denoise 10"]
    assert not {"refine 10", "decode 10"} & set(fake.calls)


async def test_a_failing_encode_starts_nothing_else() -> None:
    fake = FakeStages(fail={"encode": ValueError("no")})
    with pytest.raises(ValueError, match="no"):
        await draw(request(n=2), fake.stages())
    assert fake.calls == ["encode"]


async def test_cancelling_the_request_cancels_every_picture() -> None:
    fake = FakeStages(gate=asyncio.Event())
    drawing = asyncio.create_task(draw(request(n=3), fake.stages()))
    await fake.entered.wait()
    await asyncio.sleep(0)
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing
    assert sorted(fake.cancelled) == ["denoise 10", "denoise 11", "denoise 12"]


async def test_progress_tells_every_stage_and_step_of_each_picture() -> None:
    events: list[Progress] = []
    await draw(request(n=2), FakeStages().stages(), Listener(events.append))  # type: ignore[arg-type]
    for image in (0, 1):
        assert [event for event in events if event.image == image] == [
            Progress("denoise", image, 1, 2),
            Progress("denoise", image, 2, 2),
            Progress("refine", image, 1, 1),
            Progress("decode", image),
        ]


async def test_no_listener_asks_for_no_steps() -> None:
    fake = FakeStages()
    stages = fake.stages()
    listeners: list[object] = []

    async def denoise(task: Any, on_step: Any) -> Any:
        listeners.append(on_step)
        return await stages.denoise(task, on_step)

    await draw(request(), type(stages)(stages.encode, denoise, stages.refine, stages.decode))
    assert listeners == [None]


async def test_all_four_stages_are_timed_with_their_steps() -> None:
    drawing = await draw(request(n=2), FakeStages().stages())
    assert [(timing.stage, timing.steps) for timing in drawing.timings] == [
        ("encode", 0),
        ("denoise", 2),
        ("refine", 1),
        ("decode", 0),
    ]
    assert all(timing.seconds > 0 for timing in drawing.timings)
    assert drawing.timings[1].queue_seconds > 0
    assert drawing.timings[0].queue_seconds == drawing.timings[3].queue_seconds == 0


async def test_time_on_the_way_to_a_denoiser_counts_as_waiting() -> None:
    stages = FakeStages().stages()

    async def denoise(task: Any, on_step: Any) -> Any:
        await asyncio.sleep(0.05)
        return replace(await stages.denoise(task, on_step), time=TimeInStage(queue_s=0.5, seconds=0.51))

    started = time.perf_counter()
    drawing = await draw(request(), replace(stages, denoise=denoise))
    most = time.perf_counter() - started
    assert 0.5 + 0.05 - 0.51 - 0.001 <= drawing.timings[1].queue_seconds <= 0.5 + most - 0.51


async def test_an_image_goes_on_as_soon_as_it_is_ready() -> None:
    fake = FakeStages(gate=asyncio.Event(), held_seed=10)
    delivered: list[int] = []
    second = asyncio.Event()

    async def deliver(index: int, pixels: np.ndarray) -> int:
        delivered.append(index)
        second.set()
        return index

    drawing = asyncio.create_task(draw_images(request(n=2), fake.stages(), deliver))
    async with asyncio.timeout(20):
        await second.wait()
    assert delivered == [1] and not drawing.done()
    assert fake.gate is not None
    fake.gate.set()
    assert (await drawing).images == [0, 1], "in order all the same"


@pytest.mark.parametrize(
    ("count", "frac", "base", "refiner"),
    [
        (1, 0.8, [0.625], []),
        (3, 0.8, [0.3125, 0.625, 0.9375], []),
        (3, 0.5, [0.5, 1.0], [0.5]),
        (2, 1.0, [1 / 3, 2 / 3], []),
        (0, 0.8, [], []),
    ],
)
async def test_previews_are_spread_over_the_whole_trajectory(
    count: int, frac: float, base: list[float], refiner: list[float]
) -> None:
    fake = FakeStages()
    await draw(request(high_noise_frac=frac), fake.stages(), Listener(lambda event: None, count))
    assert [task.preview_at for task in fake.tasks] == [pytest.approx(f) for f in (base, refiner)[: len(fake.tasks)]]


async def test_previews_are_numbered_through_both_denoisers() -> None:
    heard: list[LatentPreview] = []
    listener = Listener(lambda event: heard.append(event) if isinstance(event, LatentPreview) else None, 3)
    await draw(request(n=2, high_noise_frac=0.5), FakeStages().stages(), listener)
    for image in (0, 1):
        assert [preview.index for preview in heard if preview.image == image] == [0, 1, 2]
        assert all(preview.latents[0, 0, 0] == 10 + image for preview in heard if preview.image == image)


async def test_every_stage_hears_of_the_priority_and_of_the_time_left() -> None:
    fake = FakeStages()
    await draw(request(priority=7, deadline_s=60.0, num_inference_steps=10, high_noise_frac=0.7), fake.stages())
    urgencies = [*fake.urgencies("encode"), *(task.urgency for task in fake.tasks), *fake.urgencies("decode")]
    assert [urgency.priority for urgency in urgencies] == [7] * 4
    left = [urgency.time_left_s or 0 for urgency in urgencies]
    assert left == sorted(left, reverse=True) and 0 < left[-1] < left[0] <= 60
    assert [task.steps_after for task in fake.tasks] == [3, 0]


async def test_without_a_deadline_there_is_none() -> None:
    fake = FakeStages()
    await draw(request(), fake.stages())
    assert fake.urgencies("encode") == fake.urgencies("decode") == [Urgency()]


async def test_a_missed_deadline_is_said() -> None:
    drawing = await draw(request(deadline_s=1e-6), FakeStages().stages())
    (warning,) = drawing.warnings
    assert warning.startswith("deadline_s: missed")
    assert (await draw(request(deadline_s=60.0), FakeStages().stages())).warnings == ()
