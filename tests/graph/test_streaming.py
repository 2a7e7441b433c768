"""Streams of the running graph, read by OpenAI's own client and through the Python handle."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from serve_app.graph.local import Running
from serve_app.request.schema import Accepted, ImageReady, ImageResult, PartialImage, Progress, parse_request
from tests.graph.test_batching import stats
from tests.reference import Reference

PROMPT = "a lighthouse"
FIELDS: dict[str, Any] = {"seed": 21, "num_inference_steps": 10}


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> np.ndarray:
    return reference.draw(parse_request({"prompt": PROMPT, **FIELDS})).pixels.astype(int)


def client(graph: Running) -> OpenAI:
    return OpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("previews", [0, 1, 3])
def test_openai_s_client_reads_the_stream(graph: Running, expected: np.ndarray, previews: int) -> None:
    stream = client(graph).images.generate(prompt=PROMPT, stream=True, partial_images=previews, extra_body=FIELDS)
    events = list(stream)
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * previews,
        "image_generation.completed",
    ]
    for number, event in enumerate(events[:-1]):
        assert event.type == "image_generation.partial_image" and event.partial_image_index == number
        assert pixels(event.b64_json).shape == expected.shape
    assert np.abs(pixels(events[-1].b64_json) - expected).max() <= 1, "and the previews changed nothing"


async def test_the_async_client_reads_several_pictures(graph: Running, expected: np.ndarray) -> None:
    asynchronous = AsyncOpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=0)
    stream = await asynchronous.images.generate(
        prompt=PROMPT, n=3, stream=True, partial_images=1, extra_body={**FIELDS, "seed": FIELDS["seed"] - 1}
    )
    completed: dict[int, Any] = {}
    async for event in stream:
        fields = event.model_dump()
        if event.type == "image_generation.completed":
            completed[fields["image_index"]] = fields
    assert sorted(completed) == [0, 1, 2]
    assert [completed[index]["seed"] for index in range(3)] == [20, 21, 22]
    assert np.abs(pixels(completed[1]["b64_json"]) - expected).max() <= 1


def test_openai_s_client_raises_what_the_service_refuses(graph: Running) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client(graph).images.generate(prompt=PROMPT, stream=True, size="8x8")  # type: ignore[call-overload]
    assert error.value.param == "width"


def test_progress_through_http(graph: Running) -> None:
    body = {"prompt": PROMPT, **FIELDS, "stream": True, "progress": True}
    response = httpx.post(f"{graph.url}/v1/images/generations", json=body, timeout=60)
    lines = response.text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    told = [(event["stage"], event["step"]) for event in events[:-1]]
    check_told(told)
    assert events[-1]["type"] == "image_generation.completed"


def check_told(told: list[tuple[str, int]]) -> None:
    """Of many steps a second the latest are told, in order, and of each stage the last."""
    every = [
        ("encode", 0), *(("denoise", step) for step in range(9)), *(("refine", step) for step in range(3)),
        ("decode", 0),
    ]  # fmt: skip
    places = [every.index(one) for one in told]
    assert places == sorted(set(places))
    assert {("encode", 0), ("denoise", 8), ("refine", 2), ("decode", 0)} <= set(told)


async def test_the_handle_streams_the_same(graph: Running, expected: np.ndarray) -> None:
    request = parse_request({"prompt": PROMPT, **FIELDS})
    stream = graph.handle.options(stream=True).stream.remote(request, partial_images=2)
    events = [event async for event in stream]
    assert isinstance(events[0], Accepted) and events[0].seed == FIELDS["seed"]
    check_told([(event.stage, event.step) for event in events if isinstance(event, Progress)])
    assert [event.index for event in events if isinstance(event, PartialImage)] == [0, 1]
    ready, result = events[-2:]
    assert isinstance(ready, ImageReady) and isinstance(result, ImageResult)
    assert ready.picture == result.images[0]
    assert np.abs(np.asarray(result.images[0].to_pil()).astype(int) - expected).max() <= 1


async def test_whoever_waits_hears_its_place(graph: Running) -> None:
    """Two full passes of long work stand before it."""
    before = await stats("BaseDenoiser")
    crowd = parse_request({"prompt": PROMPT, "num_inference_steps": 80, "n": 10, "high_noise_frac": 1.0})
    mates = [asyncio.ensure_future(_finish(graph.handle.generate.remote(crowd))) for _ in range(2)]
    async with asyncio.timeout(180):
        while (await stats("BaseDenoiser"))["active"] < 20:
            await asyncio.sleep(0.02)
    late = parse_request({"prompt": PROMPT, "num_inference_steps": 2, "high_noise_frac": 1.0})
    positions = [
        event.queue_position
        async for event in graph.handle.options(stream=True).stream.remote(late)
        if isinstance(event, Progress) and event.queue_position is not None
    ]
    await asyncio.gather(*mates)
    assert positions and positions == sorted(positions, reverse=True) and positions[0] >= 8
    assert (await stats("BaseDenoiser"))["finished"] == before["finished"] + 21


async def _finish(response: Any) -> Any:
    return await response


async def test_a_stream_whose_reader_goes_away_leaves_no_task_behind(graph: Running) -> None:
    before = await stats("BaseDenoiser")
    body = {"prompt": PROMPT, "num_inference_steps": 200, "n": 4, "width": 256, "height": 256}
    body |= {"stream": True, "progress": True}
    async with (
        httpx.AsyncClient(timeout=60) as http,
        http.stream("POST", f"{graph.url}/v1/images/generations", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if re.search(r'"step":[1-9]', line):
                break
    async with asyncio.timeout(60):
        while (now := await stats("BaseDenoiser"))["active"] or now["cancelled"] < before["cancelled"] + 4:
            await asyncio.sleep(0.02)
    assert now["finished"] == before["finished"]
    assert now["max_steps_after_cancel"] <= 1
