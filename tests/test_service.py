from __future__ import annotations

import asyncio

import pytest

from serve_app.errors import InvalidRequest, Overloaded
from serve_app.images import read_parameters
from serve_app.schema import ImageRequest, ImageResult, Progress
from tests.fakes import FakeStages, service


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
    stages = [event.stage for event in events[:-1] if isinstance(event, Progress)]
    assert stages == ["encode", "denoise", "denoise", "refine", "decode"]
    assert isinstance(events[-1], ImageResult)


async def test_a_stream_that_fails_raises_after_its_progress() -> None:
    events: list[Progress | ImageResult] = []
    with pytest.raises(ValueError, match="no"):
        async for event in service(FakeStages(fail={"refine": ValueError("no")})).stream(ImageRequest(prompt="p")):
            events.append(event)
    assert len(events) == 3


async def test_a_stream_that_nobody_reads_on_is_cancelled() -> None:
    fake = FakeStages(gate=asyncio.Event())
    images = service(fake)
    stream = images.stream(ImageRequest(prompt="p", seed=1))
    assert await anext(stream) == Progress("encode")
    await fake.entered.wait()
    await stream.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(20):
        while images.admission.in_flight:
            await asyncio.sleep(0)
    assert fake.cancelled == ["denoise 1"]
