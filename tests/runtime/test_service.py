from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from serve_app.pictures.files import read_parameters
from serve_app.request.errors import InvalidRequest, Overloaded
from serve_app.request.facts import DecoderFacts
from serve_app.request.schema import (
    Accepted,
    ImageReady,
    ImageRequest,
    ImageResult,
    PartialImage,
    Progress,
    StreamEvent,
)
from serve_app.runtime.tasks import DenoiseTask, Latents, OnStep, StepReport
from tests.fakes import FACTS, FakeStages, service


async def test_a_result_holds_pictures_seeds_and_their_parameters() -> None:
    images = service(FakeStages(warnings=("cut",)))
    request = ImageRequest(prompt="p", n=2, seed=5, width=72, prompt_2="", output_format="webp")
    result = await images.generate(request, "mine")
    assert [(image.seed, image.width, image.height, image.output_format) for image in result.images] == [
        (5, 72, 64, "webp"),
        (6, 72, 64, "webp"),
    ]
    assert [(read_parameters(image.data) or {})["seed"] for image in result.images] == [5, 6]
    assert [line.split(" ")[0] for line in result.warnings] == ["prompt_2", "cut"], "the request's, then the stages'"
    assert result.request_id == "mine"
    assert result.created > 1_700_000_000


async def test_a_drawn_seed_is_given_back_and_draws_the_same_again() -> None:
    images = service(FakeStages())
    first = await images.generate(ImageRequest(prompt="p"))
    again = await images.generate(ImageRequest(prompt="p", seed=first.images[0].seed))
    assert again.images[0].data == first.images[0].data


async def test_several_requests_are_all_taken_in_or_none() -> None:
    fake = FakeStages()
    images = service(fake, max_images_in_flight=3)
    with pytest.raises(InvalidRequest):
        await images.generate_all([ImageRequest(prompt="p", n=2)] * 2)
    with pytest.raises(InvalidRequest, match="width"):
        await images.generate_all([ImageRequest(prompt="p"), ImageRequest(prompt="p", width=8)])
    assert fake.calls == []
    results = await images.generate_all([ImageRequest(prompt="p", seed=1), ImageRequest(prompt="q", seed=2)], "mine")
    assert [result.images[0].seed for result in results] == [1, 2]
    assert [result.request_id for result in results] == ["mine", "mine-1"]


async def test_no_requests_are_no_results() -> None:
    assert await service(FakeStages()).generate_all([]) == []


async def test_one_failing_request_fails_those_that_came_with_it_and_leaves_nothing_in_flight() -> None:
    images = service(FakeStages(fail={"decode 2": ValueError("no")}))
    with pytest.raises(ValueError, match="no"):
        await images.generate_all([ImageRequest(prompt="p", seed=1), ImageRequest(prompt="p", seed=2)])
    assert images.admission.in_flight == 0


async def test_a_cancelled_caller_frees_its_slots() -> None:
    fake = FakeStages(gate=asyncio.Event())
    images = service(fake, max_images_in_flight=2)
    caller = asyncio.create_task(images.generate(ImageRequest(prompt="p", n=2, seed=1)))
    await fake.entered.wait()
    assert images.admission.in_flight == 2
    with pytest.raises(Overloaded):
        await images.generate(ImageRequest(prompt="p"))
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert images.admission.in_flight == 0
    assert fake.gate is not None
    fake.gate.set()
    await images.generate(ImageRequest(prompt="p"))


async def test_a_stream_tells_the_progress_and_then_the_result() -> None:
    images = service(FakeStages())
    events = [event async for event in images.stream(ImageRequest(prompt="p", seed=1))]
    assert events[0] == Accepted(events[-1].request_id, 1)  # type: ignore[union-attr]
    assert [event.stage for event in events if isinstance(event, Progress)] == [
        "encode",
        "denoise",  # its last step alone: the first was over in the same moment
        "refine",
        "decode",
    ]
    ready, result = events[-2:]
    assert isinstance(ready, ImageReady) and isinstance(result, ImageResult)
    assert ready == ImageReady(0, result.images[0])
    assert len(events) == 7


async def test_a_stream_without_progress_asks_the_denoisers_for_none() -> None:
    fake = FakeStages()
    events = [event async for event in service(fake).stream(ImageRequest(prompt="p", n=2), progress=False)]
    assert [type(event) for event in events] == [Accepted, ImageReady, ImageReady, ImageResult]
    assert fake.listened == 0


async def test_a_picture_is_told_before_others_of_its_request_are_finished() -> None:
    fake = FakeStages(gate=asyncio.Event(), held_seed=5)
    stream = service(fake).stream(ImageRequest(prompt="p", n=2, seed=5), progress=False)
    async with asyncio.timeout(20):
        events = [await anext(stream), await anext(stream)]
    assert isinstance(events[1], ImageReady)
    assert (events[1].image, events[1].picture.seed) == (1, 6)
    await stream.aclose()  # type: ignore[attr-defined]


async def test_previews_are_pictures_of_the_size_asked_for() -> None:
    request = ImageRequest(prompt="p", n=2, seed=100, width=72, high_noise_frac=0.5, output_format="jpeg")
    events = [event async for event in service(FakeStages()).stream(request, partial_images=3)]
    previews = [event for event in events if isinstance(event, PartialImage)]
    for image in (0, 1):
        assert [preview.index for preview in previews if preview.image == image] == [0, 1, 2]
    for preview in previews:
        picture = Image.open(io.BytesIO(preview.data))
        assert (picture.format, picture.size) == ("JPEG", (72, 64)) == ("JPEG", (preview.width, preview.height))
        red, green, blue = np.asarray(picture).reshape(-1, 3).mean(0)  # by FACTS.decoder.preview_map
        assert (red, green, blue) == pytest.approx((100 + preview.image, 0, 128), abs=3)


async def test_previews_that_the_vae_gives_none_of_are_warned_about() -> None:
    facts = replace(FACTS, decoder=DecoderFacts())
    events = [event async for event in service(FakeStages(), facts).stream(ImageRequest(prompt="p"), partial_images=2)]
    assert not any(isinstance(event, PartialImage) for event in events)
    assert isinstance(events[0], Accepted) and isinstance(events[-1], ImageResult)
    assert ["partial_images has no effect" in line for line in events[0].warnings] == [True]
    assert list(events[0].warnings) == events[-1].warnings


@pytest.mark.parametrize("count", [-1, 4])
async def test_a_number_of_previews_that_nobody_has_is_refused(count: int) -> None:
    fake = FakeStages()
    with pytest.raises(InvalidRequest, match="partial_images"):
        await anext(service(fake).stream(ImageRequest(prompt="p"), partial_images=count))
    assert fake.calls == []


async def test_a_stream_that_fails_raises_after_its_progress() -> None:
    events: list[StreamEvent] = []
    with pytest.raises(ValueError, match="no"):
        async for event in service(FakeStages(fail={"refine": ValueError("no")})).stream(ImageRequest(prompt="p")):
            events.append(event)
    assert [type(event) for event in events] == [Accepted, Progress, Progress]
    assert events[-1] == Progress("denoise", step=2, steps=2)


async def test_who_reads_slowly_holds_up_nobody_and_keeps_little_waiting() -> None:
    """A stream of which nothing is read but the first event, over denoisers that tell a thousand steps."""

    class Talkative(FakeStages):
        async def _denoise(self, task: DenoiseTask, on_step: OnStep | None) -> Latents:
            assert on_step is not None
            for step in range(1, 1_001):
                on_step(StepReport(step, 1_000))
                if step % 100 == 0:
                    await asyncio.sleep(0)
            return await super()._denoise(task, on_step)

    images = service(Talkative(), max_images_in_flight=2)
    streams = [images.stream(ImageRequest(prompt="p", n=2, seed=1), partial_images=1) for _ in range(3)]
    async with asyncio.timeout(20):
        for stream in streams:
            assert isinstance(await anext(stream), Accepted)
            while images.admission.in_flight:  # drawn, though nobody has read it: the next is taken in
                await asyncio.sleep(0.001)
    for stream in streams:
        events = [event async for event in stream]
        # Of each picture: four stages' last progress, a preview, and itself. The whole request: encode, its result.
        assert len(events) <= 2 * (3 + 1 + 1) + 2
        steps = [event.step for event in events if isinstance(event, Progress) and event.stage == "denoise"]
        assert len(steps) == 2 and isinstance(events[-1], ImageResult)
        assert sum(isinstance(event, ImageReady) for event in events) == 2
        assert sum(isinstance(event, PartialImage) for event in events) == 2


async def test_a_stream_that_nobody_reads_on_is_cancelled() -> None:
    fake = FakeStages(gate=asyncio.Event())
    images = service(fake)
    stream = images.stream(ImageRequest(prompt="p", seed=1))
    assert isinstance(await anext(stream), Accepted)
    await fake.entered.wait()
    await stream.aclose()  # type: ignore[attr-defined]
    assert images.admission.in_flight == 0
    assert fake.cancelled == ["denoise 1"]
