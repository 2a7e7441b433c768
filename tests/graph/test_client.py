"""The Python client, and the command line over it, against the running graph."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.client.client import AsyncClient, Client, ImageEvent
from serve_app.graph.local import Running
from serve_app.pictures.files import read_parameters
from serve_app.request.errors import InvalidRequest
from serve_app.request.schema import ImageReady, ImageResult, PartialImage, Progress, parse_request
from tests.graph.test_batching import stats
from tests.reference import Reference

PROMPT = "a lighthouse"
FIELDS: dict[str, Any] = {"seed": 21, "num_inference_steps": 10}


@pytest.fixture(scope="module")
def expected(reference: Reference) -> np.ndarray:
    return reference.draw(parse_request({"prompt": PROMPT, **FIELDS})).pixels.astype(int)


def check(result: ImageResult, expected: np.ndarray) -> None:
    assert np.abs(np.asarray(result.images[0].to_pil()).astype(int) - expected).max() <= 1
    assert [(timing.stage, timing.steps) for timing in result.timings] == [
        ("encode", 0), ("denoise", 8), ("refine", 2), ("decode", 0)
    ]  # fmt: skip
    assert result.request_id and result.warnings == []


def check_events(events: list[ImageEvent], expected: np.ndarray) -> None:
    steps = [(event.stage, event.step) for event in events if isinstance(event, Progress) and event.step]
    assert {("denoise", 8), ("refine", 2)} <= set(steps), "of many steps a second the latest, and the last of a stage"
    assert steps == sorted(set(steps))
    assert [event.index for event in events if isinstance(event, PartialImage)] == [0, 1]
    ready, result = events[-2:]
    assert isinstance(ready, ImageReady) and isinstance(result, ImageResult)
    assert ready.picture == result.images[0]
    check(result, expected)


def test_the_same_picture_as_diffusers(graph: Running, expected: np.ndarray) -> None:
    with Client(graph.url or "") as client:
        check(client.generate(PROMPT, **FIELDS), expected)
        check_events(list(client.stream(PROMPT, partial_images=2, **FIELDS)), expected)
        with pytest.raises(InvalidRequest) as error:
            client.generate(PROMPT, width=512)
        assert error.value.param == "width"
        assert client.models()[0] == client.health()["model"] == "sdxl"


async def test_the_same_picture_as_diffusers_async(graph: Running, expected: np.ndarray) -> None:
    async with AsyncClient(graph.url or "") as client:
        check_events([event async for event in client.stream(PROMPT, partial_images=2, **FIELDS)], expected)
        results = await asyncio.gather(*(client.generate(PROMPT, **FIELDS | {"seed": seed}) for seed in range(8)))
    assert [result.images[0].seed for result in results] == list(range(8))


async def test_a_closed_stream_leaves_no_task_behind(graph: Running) -> None:
    before = await stats("BaseDenoiser")
    async with (
        AsyncClient(graph.url or "") as client,
        aclosing(client.stream(PROMPT, num_inference_steps=200, n=4, width=256, height=256)) as stream,
    ):
        async for event in stream:
            if isinstance(event, Progress) and event.step >= 2:
                break
    async with asyncio.timeout(60):
        while (now := await stats("BaseDenoiser"))["active"] or now["cancelled"] < before["cancelled"] + 4:
            await asyncio.sleep(0.02)
    assert now["finished"] == before["finished"]


def test_the_command_line_shows_the_steps(graph: Running, tmp_path: Path) -> None:
    output = tmp_path / "boat.webp"
    command = [sys.executable, "-m", "serve_app.cli", "generate", PROMPT, "-o", str(output), "--url", graph.url or ""]
    flags = ["--num-inference-steps", "10", "--seed", "21", "--n", "2"]
    run = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "20/20" in run.stderr and "Traceback" not in run.stderr
    for index in range(2):
        parameters = read_parameters(output.with_stem(f"boat-{index}").read_bytes())
        assert parameters is not None and parameters["seed"] == 21 + index
    for stage in ("encode", "denoise", "refine", "decode"):
        assert f"{stage} " in run.stdout
