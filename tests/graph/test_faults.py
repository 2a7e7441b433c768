"""Replicas die, clients go away, the service is full: nobody's request is lost and no slot stays taken."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve

from serve_app.graph.calls import remote_stages
from serve_app.graph.local import Running
from serve_app.request.errors import PictureFailed
from serve_app.request.schema import ImageRequest, ImageResult, PartialImage, Progress, parse_request
from serve_app.runtime.tasks import Urgency
from tests.graph.test_batching import stats
from tests.graph.test_parity import far_apart, pixels_of
from tests.reference import Reference

LONG = {"prompt": "a long way", "num_inference_steps": 200, "seed": 4, "width": 256, "height": 256}


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    """Waits for a condition; the time is a bound on a hang, not a claim."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("deployment", ["BaseDenoiser", "Refiner", "VaeDecoder", "TextEncoder"])
async def test_a_killed_replica_loses_no_request(deployment: str, graph: Running, reference: Reference) -> None:
    requests = [
        parse_request(
            # New texts each time, or the text encoder would answer from its cache.
            {"prompt": f"{deployment} {number}", "seed": number, "num_inference_steps": 40, "high_noise_frac": 0.5}
        )
        for number in range(20)
    ]
    before = await stats(deployment)
    tasks = [asyncio.ensure_future(_draw(graph, request)) for request in requests]
    counter = {"VaeDecoder": "items", "TextEncoder": "items"}.get(deployment, "steps")

    async def has_begun() -> bool:
        return bool((await stats(deployment))[counter] > before[counter])

    await until(has_begun)
    assert not all(task.done() for task in tasks)
    os.kill(before["pid"], signal.SIGKILL)
    results = await asyncio.gather(*tasks)
    assert (await stats(deployment))["pid"] != before["pid"]
    for request, result in zip(requests, results, strict=True):
        assert far_apart(pixels_of(result)[0], reference.draw(request).pixels) <= 1


@pytest.mark.parametrize(("deployment", "stage"), [("BaseDenoiser", "denoise"), ("Refiner", "refine")])
async def test_a_stream_goes_on_over_a_killed_replica(
    deployment: str, stage: str, graph: Running, reference: Reference
) -> None:
    """No step is told twice, no preview is lost or told twice, and the picture is the same."""
    request = parse_request(LONG | {"high_noise_frac": 0.5})
    victim = (await stats(deployment))["pid"]
    told: dict[str, list[int]] = {"denoise": [], "refine": []}
    lasts: dict[str, int] = {}
    previews, results, killed = 0, [], False
    async for event in graph.handle.options(stream=True).stream.remote(request, partial_images=3):
        if isinstance(event, Progress) and event.stage in told and event.step:
            told[event.stage].append(event.step)
            lasts[event.stage] = event.steps
            if event.stage == stage and event.step >= 5 and not killed:
                os.kill(victim, signal.SIGKILL)
                killed = True
        previews += isinstance(event, PartialImage)
        if isinstance(event, ImageResult):
            results.append(event)
    for name, steps in told.items():
        assert steps == sorted(set(steps)) and steps[-1] == lasts[name], name
    assert previews == 3
    assert (await stats(deployment))["pid"] != victim
    (result,) = results
    assert far_apart(pixels_of(result)[0], reference.draw(request).pixels) <= 1


async def _draw(graph: Running, request: ImageRequest) -> Any:
    return await graph.handle.generate.remote(request)


@pytest.mark.parametrize("stage", ["BaseDenoiser", "Refiner"])
async def test_a_client_that_goes_away_frees_its_slot(stage: str, graph: Running) -> None:
    body = LONG | {"high_noise_frac": 1.0 if stage == "BaseDenoiser" else 0.05}
    before = {name: await stats(name) for name in ("BaseDenoiser", "Refiner", "VaeDecoder")}

    async def is_active() -> bool:
        now = await stats(stage)
        return bool(now["active"] == 1 and now["steps"] > before[stage]["steps"])

    async def is_free() -> bool:
        return bool((await stats(stage))["active"] == 0)

    async with httpx.AsyncClient(base_url=graph.url or "", timeout=60) as client:
        request = asyncio.ensure_future(client.post("/v1/images/generations", json=body))
        await until(is_active)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(is_free)
    after = {name: await stats(name) for name in before}
    assert after[stage]["cancelled"] == before[stage]["cancelled"] + 1
    assert after[stage]["finished"] == before[stage]["finished"]
    assert after[stage]["steps"] - before[stage]["steps"] < LONG["num_inference_steps"] * 0.9
    # Once the cancellation had arrived the task was in one more pass at most ...
    assert after[stage]["max_steps_after_cancel"] <= 1
    # ... and no stage after this one got any of it.
    later = ("Refiner", "VaeDecoder") if stage == "BaseDenoiser" else ("VaeDecoder",)
    for name in later:
        for counter in ("passes", "active", "waiting", "items", "batches"):
            assert after[name].get(counter) == before[name].get(counter), (name, counter)


async def test_a_cancelled_handle_call_frees_all_images(graph: Running) -> None:
    before = await stats("BaseDenoiser")
    response = graph.handle.generate.remote(parse_request(LONG | {"n": 5}))

    async def are_active() -> bool:
        return bool((await stats("BaseDenoiser"))["active"] == 5)

    async def are_free() -> bool:
        return bool((await stats("BaseDenoiser"))["active"] == 0)

    task = asyncio.ensure_future(_await(response))
    await until(are_active)
    response.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(are_free)
    assert (await stats("BaseDenoiser"))["cancelled"] == before["cancelled"] + 5
    assert (await graph.handle.stats.remote())["images_in_flight"] == 0


async def _await(response: Any) -> Any:
    return await response


async def test_a_cancelled_request_leaves_its_mates_alone(graph: Running, reference: Reference) -> None:
    mates = [parse_request({"prompt": "shared text", "seed": s, "num_inference_steps": 20}) for s in range(4)]
    doomed = graph.handle.generate.remote(parse_request({"prompt": "shared text", "seed": 99}))
    tasks = [asyncio.ensure_future(_draw(graph, request)) for request in mates]
    doomed.cancel()
    for request, result in zip(mates, await asyncio.gather(*tasks), strict=True):
        assert far_apart(pixels_of(result)[0], reference.draw(request).pixels) <= 1


async def test_a_full_service_says_when_to_come_back(graph: Running) -> None:
    body = {"prompt": "one of many", "n": 10, "num_inference_steps": 40}
    async with httpx.AsyncClient(base_url=graph.url or "", timeout=300) as client:
        answers = await asyncio.gather(*(client.post("/v1/images/generations", json=body) for _ in range(16)))
        codes = [answer.status_code for answer in answers]
        assert codes.count(200) == 12  # 128 images at once
        refused = [answer for answer in answers if answer.status_code != 200]
        for answer in refused:
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"
        again = await client.post("/v1/images/generations", json=body | {"n": 1})
        assert again.status_code == 200


def test_a_connection_cut_in_mid_body_is_no_harm(graph: Running) -> None:
    assert graph.url is not None
    host, port = graph.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    answer = httpx.get(f"{graph.url}/health", timeout=60)
    assert answer.status_code == 200
    assert answer.json()["images_in_flight"] == 0


def test_pictures_are_what_they_were(graph: Running, reference: Reference) -> None:
    """After all of the above the graph still draws diffusers' picture."""
    request = parse_request({"prompt": "still here", "seed": 8, "num_inference_steps": 12})
    result = graph.handle.generate.remote(request).result(timeout_s=120)
    assert np.abs(pixels_of(result)[0].astype(int) - reference.draw(request).pixels.astype(int)).max() <= 1


async def test_a_stage_s_own_error_comes_through_whole_and_is_not_retried(graph: Running) -> None:
    decoder = serve.get_deployment_handle("VaeDecoder", "sdxl")
    stages = remote_stages(decoder, decoder, None, decoder)
    before = await stats("VaeDecoder")
    with pytest.raises(PictureFailed, match="no finite picture"):
        await stages.decode(np.full((4, 16, 16), np.nan, dtype=np.float32), Urgency())
    assert (await stats("VaeDecoder"))["batches"] == before["batches"] + 1
