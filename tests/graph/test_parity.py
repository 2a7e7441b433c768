"""The graph's pictures are diffusers' pictures: whatever the request, whatever else is in flight."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest
from ray import serve

from serve_app.graph.calls import remote_stages
from serve_app.graph.local import Running
from serve_app.request.facts import ModelFacts
from serve_app.request.limits import Limits
from serve_app.request.resolve import resolve
from serve_app.request.schema import ImageRequest
from serve_app.runtime.pipeline import Stages, draw
from serve_app.runtime.tasks import DenoiseTask, Latents
from tests.cases import CASES, TRAFFIC
from tests.reference import Expected, Reference, whole_pipelines


@pytest.fixture(scope="module")
def expected(reference: Reference) -> dict[str, list[Expected]]:
    return {name: [reference.draw(request, i) for i in range(request.n)] for name, request in CASES.items()}


def far_apart(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The largest difference of any pixel, in grey levels."""
    assert ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


def pixels_of(result: Any) -> list[np.ndarray]:
    return [np.array(image.to_pil()) for image in result.images]


def test_reference_decodes_as_the_pipelines_do(reference: Reference) -> None:
    request = CASES["scheduler euler"].model_copy(update={"scheduler": None})
    assert far_apart(reference.draw(request).pixels, whole_pipelines(reference, request)) == 0


@pytest.mark.parametrize("name", CASES)
def test_pixels(name: str, graph: Running, expected: dict[str, list[Expected]]) -> None:
    result = graph.handle.generate.remote(CASES[name]).result(timeout_s=120)
    for ours, theirs in zip(pixels_of(result), expected[name], strict=True):
        assert far_apart(ours, theirs.pixels) <= 1
    steps = {timing.stage: timing.steps for timing in result.timings}
    assert steps["denoise"] == expected[name][0].steps["denoise"]
    assert steps["refine"] == expected[name][0].steps.get("refine", 0)
    idle = [line for line in result.warnings if "takes no step" in line]
    assert len(idle) == list(expected[name][0].steps.values()).count(0)


class Recorder:
    """The deployments as stages, with what passes between them kept."""

    def __init__(self, stages: Stages) -> None:
        self.latents: dict[str, Latents] = {}
        self.stages = dataclasses.replace(
            stages, denoise=self._kept("denoise", stages.denoise), refine=self._kept("refine", stages.refine)
        )

    def _kept(self, stage: str, run: Any) -> Any:
        async def kept(task: DenoiseTask, on_step: Any) -> Latents:
            self.latents[stage] = await run(task, on_step)
            return self.latents[stage]

        return kept


async def pixels_themselves(index: int, pixels: np.ndarray) -> np.ndarray:
    return pixels


async def test_latents_of_each_stage(graph: Running, expected: dict[str, list[Expected]]) -> None:
    handles = [serve.get_deployment_handle(n, "sdxl") for n in ("TextEncoder", "BaseDenoiser", "Refiner", "VaeDecoder")]
    facts = ModelFacts(*[(await handle.describe.remote()).facts for handle in handles[:3]])
    took_part = {"denoise": 0, "refine": 0}
    for name, request in CASES.items():
        recorder = Recorder(remote_stages(*handles))
        resolved = resolve(request.model_copy(update={"n": 1}), facts, Limits())
        drawing = await draw(resolved, recorder.stages, pixels_themselves)
        theirs = expected[name][0]
        assert set(recorder.latents) == set(theirs.latents), name
        for stage, latents in recorder.latents.items():
            assert latents.steps == theirs.steps[stage], (name, stage)
            took_part[stage] += latents.steps > 0
            scale = np.abs(theirs.latents[stage]).max()
            assert np.abs(latents.samples - theirs.latents[stage]).max() <= 2e-4 * scale, (name, stage)
        assert far_apart(drawing.images[0], theirs.pixels) <= 1
    # Most cases must have exercised both denoisers, or the comparison says little.
    assert took_part["denoise"] >= 30
    assert took_part["refine"] >= 30


async def test_pixels_amid_other_requests(graph: Running, expected: dict[str, list[Expected]]) -> None:
    stop = False
    drawn = 0

    async def keep_busy(request: ImageRequest) -> None:
        nonlocal drawn
        while not stop:
            await graph.handle.generate.remote(request)
            drawn += 1

    base = serve.get_deployment_handle("BaseDenoiser", "sdxl")
    before = await base.stats.remote()
    traffic = [asyncio.create_task(keep_busy(request)) for request in TRAFFIC]
    try:
        for name, request in CASES.items():
            result = await graph.handle.generate.remote(request)
            for ours, theirs in zip(pixels_of(result), expected[name], strict=True):
                assert far_apart(ours, theirs.pixels) <= 1, name
            assert not any(task.done() for task in traffic)
    finally:
        stop = True
        await asyncio.gather(*traffic)
    assert drawn >= len(TRAFFIC)
    after = await base.stats.remote()
    # They did ride with others: passes of one image would prove nothing.
    assert after["steps"] - before["steps"] > 2 * (after["passes"] - before["passes"])


async def test_traffic_itself_is_right(graph: Running, reference: Reference) -> None:
    results = await asyncio.gather(*(graph.handle.generate.remote(request) for request in TRAFFIC))
    for request, result in zip(TRAFFIC, results, strict=True):
        assert far_apart(pixels_of(result)[0], reference.draw(request).pixels) <= 1, request.prompt
