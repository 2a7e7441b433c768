"""Requests really share forward passes, counted at the denoiser."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve

from serve_app.graph.local import Running
from serve_app.request.schema import parse_request

MIXED = [
    parse_request(
        {
            "prompt": f"mixed {number}",
            "seed": number,
            "num_inference_steps": 10 + 2 * (number % 8),
            "guidance_scale": (7.5, 1.0, 3.0)[number % 3],
            "scheduler": ("euler", "heun", "ddim", "unipc")[number % 4],
        }
    )
    for number in range(16)
]


async def stats(deployment: str) -> dict[str, Any]:
    return await serve.get_deployment_handle(deployment, "sdxl").stats.remote()


async def test_sixteen_mixed_requests_share_passes(graph: Running) -> None:
    before = {name: await stats(name) for name in ("BaseDenoiser", "Refiner")}
    for request in MIXED:
        await graph.handle.generate.remote(request)
    alone = {name: await stats(name) for name in before}
    await asyncio.gather(*(graph.handle.generate.remote(request) for request in MIXED))
    together = {name: await stats(name) for name in before}

    def counted(key: str, first: dict[str, Any], last: dict[str, Any]) -> int:
        return sum(last[name][key] - first[name][key] for name in first)

    passes_alone, passes_together = counted("passes", before, alone), counted("passes", alone, together)
    assert counted("steps", before, alone) == counted("steps", alone, together) == passes_alone
    assert passes_together <= 0.4 * passes_alone
    full = together["BaseDenoiser"]["full_passes"] - alone["BaseDenoiser"]["full_passes"]
    assert full >= 1


async def test_equal_texts_are_encoded_once(graph: Running) -> None:
    before = await stats("TextEncoder")
    request = parse_request({"prompt": "a text nobody asked for before", "num_inference_steps": 2, "seed": 1})
    await asyncio.gather(*(graph.handle.generate.remote(request) for _ in range(8)))
    after = await stats("TextEncoder")
    # CLIP-L and bigG read it once each; the refiner's negative "" may be new too.
    assert 2 <= after["items"] - before["items"] <= 3


async def test_a_more_urgent_request_overtakes_those_that_wait(graph: Running) -> None:
    crowd = parse_request({"prompt": "a crowd", "num_inference_steps": 80, "n": 10, "high_noise_frac": 1.0})
    waiting = [asyncio.ensure_future(_finished(graph, crowd)) for _ in range(2)]
    async with asyncio.timeout(180):
        while (await stats("BaseDenoiser"))["active"] < 20:
            await asyncio.sleep(0.02)
    late = {"prompt": "late", "num_inference_steps": 4, "high_noise_frac": 1.0}
    plain = asyncio.ensure_future(_finished(graph, parse_request(late)))
    await _finished(graph, parse_request(late | {"priority": 5}))
    assert not plain.done() and not any(crowded.done() for crowded in waiting)
    await asyncio.gather(plain, *waiting)


async def _finished(graph: Running, request: Any) -> Any:
    return await graph.handle.generate.remote(request)
