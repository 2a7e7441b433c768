"""The ways in, over real HTTP, from Python and from the command line: one request, one picture."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image

from serve_app.graph.local import Running
from serve_app.pictures.files import read_parameters
from serve_app.request.schema import ImageRequest, parse_request
from tests.graph.test_batching import stats
from tests.graph.test_parity import far_apart, pixels_of
from tests.reference import Reference

FIELDS: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": "blurry", "seed": 21}
PROMPT = "a paper boat"


@pytest.fixture(scope="module")
def truth(reference: Reference) -> np.ndarray:
    return reference.draw(parse_request({"prompt": PROMPT, **FIELDS})).pixels


@pytest.fixture
def http(graph: Running) -> httpx.Client:
    return httpx.Client(base_url=graph.url or "", timeout=120)


def pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def mean_distance(one: np.ndarray, other: np.ndarray) -> float:
    """In grey levels."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def test_openai_client(graph: Running, truth: np.ndarray) -> None:
    client = OpenAI(base_url=f"{graph.url}/v1", api_key="none")
    answer = client.images.generate(prompt=PROMPT, model="sdxl", size="128x128", extra_body=FIELDS)
    assert answer.data is not None
    data = base64.b64decode(answer.data[0].b64_json or "")
    assert far_apart(pixels(data), truth) <= 1
    assert answer.data[0].seed == 21  # type: ignore[attr-defined]
    assert answer.size == "128x128"
    assert next(model.id for model in client.models.list()) == "sdxl"
    url = client.images.generate(prompt=PROMPT, response_format="url", extra_body=FIELDS)
    assert url.data is not None and (url.data[0].url or "").startswith("data:image/png;base64,")


def test_openai_client_shows_our_errors(graph: Running) -> None:
    client = OpenAI(base_url=f"{graph.url}/v1", api_key="none")
    with pytest.raises(BadRequestError, match="multiple of 8") as bad:
        client.images.generate(prompt=PROMPT, size="100x100")  # type: ignore[call-overload]
    assert bad.value.param == "width"
    assert bad.value.request_id
    with pytest.raises(NotFoundError, match="dall-e-3") as unknown:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert unknown.value.code == "model_not_found"


def test_azure_ml_sample_body(http: httpx.Client, truth: np.ndarray) -> None:
    body = {"input_data": {"columns": ["prompt"], "data": [PROMPT], "index": [0], "parameters": FIELDS}}
    answer = http.post("/score", json=body, headers={"Authorization": "Bearer x", "x-ms-client-request-id": "abc"})
    assert answer.status_code == 200
    (row,) = answer.json()
    assert set(row) == {"prompt", "generated_image", "nsfw_content_detected"}
    assert (row["prompt"], row["nsfw_content_detected"]) == (PROMPT, None)
    assert far_apart(pixels(base64.b64decode(row["generated_image"])), truth) <= 1
    assert answer.headers["x-ms-client-request-id"] == "abc"
    assert answer.headers["x-ms-request-id"] == answer.headers["x-request-id"]


def test_azure_ml_rows_are_drawn_side_by_side_in_order(http: httpx.Client) -> None:
    body = {"input_data": {"columns": ["prompt"], "data": ["one", "two", "three"], "parameters": FIELDS}}
    rows = http.post("/score", json=body).json()
    assert [row["prompt"] for row in rows] == ["one", "two", "three"]
    assert len({row["generated_image"] for row in rows}) == 3


def test_imagine(http: httpx.Client, truth: np.ndarray) -> None:
    answer = http.get("/imagine", params={"prompt": PROMPT, "img_size": 128, **FIELDS})
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-sdxl-seed"] == "21"
    assert far_apart(pixels(answer.content), truth) <= 1


def test_command_line(graph: Running, truth: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "boat.png"
    flags = [part for name, value in FIELDS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "serve_app.cli", "generate", PROMPT, "-o", str(output), "--url", graph.url or ""]
    run = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert far_apart(pixels(output.read_bytes()), truth) <= 1
    assert "seed 21" in run.stdout and "denoise" in run.stdout
    wrong = subprocess.run([*command, "--width", "100"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == "sdxl-serve: width: input should be a multiple of 8"


def test_every_answer_says_where_the_time_went(http: httpx.Client) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT, **FIELDS}, headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    stages = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert list(stages) == ["encode", "denoise", "refine", "decode", "queue"]
    assert all(float(duration) > 0 for duration in stages.values())
    assert "x-sdxl-warnings" not in answer.headers


def test_warnings_ride_in_body_and_header(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, **FIELDS, "quality": "hd", "sharpness": 3, "eta": 0.5, "negative_prompt": "word " * 100}
    answer = http.post("/v1/images/generations", json=body)
    warnings = answer.json()["warnings"]
    said = " ".join(warnings)
    for name in ("quality", "sharpness", "eta", "negative_prompt is cut at 77 tokens"):
        assert name in said
    assert len(json.loads(answer.headers["x-sdxl-warnings"])) == len(warnings)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_picture_carries_what_draws_it_again(output_format: str, http: httpx.Client, graph: Running) -> None:
    body = {"prompt": PROMPT, "n": 2, "num_inference_steps": 5, "output_format": output_format, "scheduler": "ddim"}
    answer = http.post("/v1/images/generations", json=body).json()
    sent = [base64.b64decode(item["b64_json"]) for item in answer["data"]]
    for item, data, other in zip(answer["data"], sent, reversed(sent), strict=True):
        assert (Image.open(io.BytesIO(data)).format or "").lower() == output_format
        parameters = read_parameters(data)
        assert parameters is not None and parameters["seed"] == item["seed"]
        again = pixels_of(graph.handle.generate.remote(ImageRequest(**parameters)).result(timeout_s=180))[0]
        if output_format == "png":
            assert far_apart(again, pixels(data)) <= 1
        else:  # single pixels of a lossy format may be anything; the whole is far nearer than another seed's
            assert mean_distance(again, pixels(data)) < 0.6 * mean_distance(again, pixels(other))
    assert answer["data"][1]["seed"] == answer["data"][0]["seed"] + 1


def test_routes_for_people_and_probes(http: httpx.Client) -> None:
    assert http.get("/health").json()["status"] == "ok"
    assert "swagger" in http.get("/docs").text.lower()
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/images/generations", "/score", "/imagine", "/v1/models", "/health"} <= set(paths)


BAD_BODIES: dict[str, tuple[bytes, int, str | None]] = {
    "broken JSON": (b'{"prompt": "x"', 400, None),
    "not an object": (b'["x"]', 400, None),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, None),
    "NaN": (b'{"prompt": "x", "guidance_scale": NaN}', 400, None),
    "infinite": (b'{"prompt": "x", "guidance_scale": 1e999}', 400, "guidance_scale"),
    "wrong type": (b'{"prompt": "x", "num_inference_steps": "20"}', 400, "num_inference_steps"),
    "size that does not divide": (b'{"prompt": "x", "width": 100}', 400, "width"),
    "size beyond the limit": (b'{"prompt": "x", "width": 4096, "height": 4096}', 400, "width"),
    "no steps": (b'{"prompt": "x", "num_inference_steps": 0}', 400, "num_inference_steps"),
    "huge steps": (b'{"prompt": "x", "num_inference_steps": 100000}', 400, "num_inference_steps"),
    "steps beyond the limit": (b'{"prompt": "x", "num_inference_steps": 400}', 400, "num_inference_steps"),
    "empty prompt": (b'{"prompt": ""}', 400, "prompt"),
    "no prompt": (b"{}", 400, "prompt"),
    "200 KB prompt": (json.dumps({"prompt": "x" * 200_000}).encode(), 400, "prompt"),
    "1 MB prompt": (json.dumps({"prompt": "x" * 2**20}).encode(), 413, None),
    "NUL": (b'{"prompt": "x\\u0000"}', 400, "prompt"),
    "no images": (b'{"prompt": "x", "n": 0}', 400, "n"),
    "eleven images": (b'{"prompt": "x", "n": 11}', 400, "n"),
    "unknown scheduler": (b'{"prompt": "x", "scheduler": "plms"}', 400, "scheduler"),
    "unknown model": (b'{"prompt": "x", "model": "sd-2"}', 404, "model"),
    "clip_skip beyond the layers": (b'{"prompt": "x", "clip_skip": 12}', 400, "clip_skip"),
    "50 MB body": (b'{"prompt": "' + b"x" * (50 * 2**20) + b'"}', 413, None),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_input_is_refused_before_anything_is_queued(name: str, graph: Running) -> None:
    body, status, param = BAD_BODIES[name]
    before = await stats("TextEncoder")
    with httpx.Client(base_url=graph.url or "", timeout=60) as http:
        answer = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert "\n" not in error["message"]
        # The same through Azure's route, in its envelope.
        try:
            fields = json.loads(body)
        except ValueError:
            fields = None
        if status == 400 and isinstance(fields, dict) and "prompt" in fields:
            prompt = fields.pop("prompt")
            rows = {"input_data": {"columns": ["prompt"], "data": [prompt], "parameters": fields}}
            text = json.dumps(rows).replace("Infinity", "1e999")
            answer = http.post("/score", content=text, headers={"content-type": "application/json"})
            assert answer.status_code == 400
            assert list(answer.json()) == ["message"]
    after = await stats("TextEncoder")
    assert all(after[key] == before[key] for key in ("batches", "cache_hits", "cache_misses", "waiting"))
