"""A storm of clients that go away leaves no task behind, in whatever stage it was."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx

from serve_app.graph.local import Running
from serve_app.request.schema import parse_request
from tests.graph.test_batching import stats
from tests.graph.test_faults import until
from tests.graph.test_parity import far_apart, pixels_of
from tests.reference import Reference

CLIENTS = 200
STAGES = ("TextEncoder", "BaseDenoiser", "Refiner", "VaeDecoder")


async def go_away(url: str, number: int, dice: random.Random) -> str:
    """Asks for a picture and leaves before it can be finished; says how that ended."""
    body: dict[str, Any] = {
        "prompt": f"storm {number % 20}",
        # 400 calls of the UNet, and large ones: longer than anybody stays, on a quick machine too.
        "num_inference_steps": 200,
        "scheduler": "heun",
        "width": 256,
        "height": 256,
        # Some are in the base when they leave, some in the refiner: of the last share the base takes no step.
        "high_noise_frac": dice.choice([1.0, 0.5, 0.002]),
        "guidance_scale": dice.choice([1.0, 7.5]),
        "n": dice.choice([1, 1, 1, 2]),
    }
    headers, patience_s = {}, dice.uniform(0.2, 3.0)
    if number % 4 == 0:
        body |= {"stream": True, "progress": True, "partial_images": 2}
    elif number % 4 == 1:
        headers["x-request-timeout-seconds"], patience_s = f"{patience_s:.2f}", 60.0
    try:
        async with asyncio.timeout(patience_s), httpx.AsyncClient(base_url=url, timeout=None) as client:
            answer = await client.post("/v1/images/generations", json=body, headers=headers)
    except TimeoutError:
        return "left"
    return str(answer.status_code)


async def test_two_hundred_clients_that_go_away_leave_nothing_behind(graph: Running, reference: Reference) -> None:
    assert graph.url is not None
    before = {name: await stats(name) for name in STAGES}
    dice = random.Random(4)
    survivor = parse_request({"prompt": "storm 1", "seed": 3, "num_inference_steps": 12})
    survivors = [asyncio.ensure_future(_draw(graph, survivor)) for _ in range(3)]
    ends: Counter[str] = Counter()

    async def client(number: int) -> None:
        await asyncio.sleep(dice.uniform(0, 4))
        ends[await go_away(graph.url or "", number, dice)] += 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    assert ends.total() == CLIENTS
    assert set(ends) <= {"left", "408", "503"}, "nobody had time for a picture"
    assert ends["left"] >= 50 and ends["408"] >= 5, ends  # both kinds took part; a busy machine answers more with 503

    async def is_empty() -> bool:
        ingress = await graph.handle.stats.remote()
        now = [await stats(name) for name in STAGES]
        return ingress["images_in_flight"] == 0 and not any(s.get("active", 0) or s["waiting"] for s in now)

    for result in await asyncio.gather(*survivors):
        assert far_apart(pixels_of(result)[0], reference.draw(survivor).pixels) <= 1
    await until(is_empty)
    after = {name: await stats(name) for name in STAGES}
    for name in ("BaseDenoiser", "Refiner"):
        assert after[name]["cancelled"] > before[name]["cancelled"], name
        assert after[name]["max_steps_after_cancel"] <= 1, name
        assert after[name]["failed"] == before[name]["failed"], name
    assert after["VaeDecoder"]["items"] - before["VaeDecoder"]["items"] == len(survivors), "nothing else came so far"
    # And it works as before.
    again = await graph.handle.generate.remote(survivor)
    assert far_apart(pixels_of(again)[0], reference.draw(survivor).pixels) <= 1


async def _draw(graph: Running, request: Any) -> Any:
    return await graph.handle.generate.remote(request)
