"""The clients that people have, unmodified, against the running graph: the same picture through every format."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from serve_app.graph.local import Running
from serve_app.pictures.infotext import parse_infotext
from serve_app.request.schema import parse_request
from tests.graph.test_parity import far_apart
from tests.reference import Reference

PROMPT, NEGATIVE = "a lighthouse, stormy sea", "blurry"
STEPS, GUIDANCE, SEED = 20, 6.0, 77
FIELDS: dict[str, Any] = {
    "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED,
    "scheduler": "euler_ancestral", "high_noise_frac": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def truth(reference: Reference) -> np.ndarray:
    return reference.draw(parse_request({"prompt": PROMPT, **FIELDS})).pixels


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_openai(url: str) -> bytes:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.images.generate(prompt=PROMPT, extra_body=FIELDS)
    assert answer.usage is not None and answer.usage.input_tokens > 10
    assert answer.data is not None and answer.data[0].b64_json is not None
    return base64.b64decode(answer.data[0].b64_json)


def by_openai_url(url: str) -> bytes:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.images.generate(prompt=PROMPT, response_format="url", extra_body=FIELDS)
    assert answer.data is not None and answer.data[0].url is not None
    return base64.b64decode(answer.data[0].url.removeprefix("data:image/png;base64,"))


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite runs as without a network, where Hugging Face's client asks nobody, not even this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def by_hugging_face(url: str) -> bytes:
    client = InferenceClient(model=f"{url}/hugging-face/text-to-image", token="none", provider="hf-inference")
    assert client.health_check()
    picture = client.text_to_image(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=SEED,
        scheduler="EulerAncestralDiscreteScheduler",
        extra_body={"high_noise_frac": 0.8},
    )
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def by_webui(url: str) -> bytes:
    """What webui's usual clients do: look around, draw, read the infotext."""
    with httpx.Client(base_url=url, timeout=120) as client:
        samplers = {item["name"] for item in client.get("/sdapi/v1/samplers").json()}
        assert "Euler a" in samplers
        body = {
            "prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS, "cfg_scale": GUIDANCE, "seed": SEED,
            "sampler_name": "Euler a", "width": 128, "height": 128, "batch_size": 1, "n_iter": 1,
        }  # fmt: skip
        answer = client.post("/sdapi/v1/txt2img", json=body).json()
    assert answer["warnings"] == []
    data = base64.b64decode(answer["images"][0])
    texts = [json.loads(answer["info"])["infotexts"][0], Image.open(io.BytesIO(data)).info["parameters"]]
    for text in texts:
        read = parse_infotext(text)
        assert (read["Prompt"], read["Seed"], read["Sampler"]) == (PROMPT, str(SEED), "Euler a")
    return data


def by_webui_infotext(url: str) -> bytes:
    """A picture's own text, sent back, draws it again."""
    text = Image.open(io.BytesIO(by_webui(url))).info["parameters"]
    answer = httpx.post(f"{url}/sdapi/v1/txt2img", json={"infotext": text}, timeout=120).json()
    return base64.b64decode(answer["images"][0])


def by_stability(url: str) -> bytes:
    body = {
        "text_prompts": [{"text": PROMPT}, {"text": NEGATIVE, "weight": -1}], "steps": STEPS, "cfg_scale": GUIDANCE,
        "seed": SEED, "sampler": "K_EULER_ANCESTRAL",
    }  # fmt: skip
    path = f"{url}/v1/generation/stable-diffusion-xl-1024-v1-0/text-to-image"
    answer = httpx.post(path, json=body, headers={"Accept": "application/json"}, timeout=120).json()
    assert answer["artifacts"][0]["seed"] == SEED
    return base64.b64decode(answer["artifacts"][0]["base64"])


def by_azure(url: str) -> bytes:
    parameters = {name: value for name, value in FIELDS.items() if name != "negative_prompt"}
    body = {
        "input_data": {
            "columns": ["prompt", "negative_prompt"],
            "data": [[PROMPT, NEGATIVE]],
            "index": [0],
            "parameters": parameters,
        }
    }
    (row,) = httpx.post(f"{url}/score", json=body, timeout=120).json()
    assert row["prompt"] == PROMPT and row["nsfw_content_detected"] is None
    return base64.b64decode(row["generated_image"])


def by_address(url: str) -> bytes:
    return httpx.get(f"{url}/imagine", params={"prompt": PROMPT, **FIELDS}, timeout=120).content


@pytest.mark.parametrize(
    "draw",
    [
        by_openai,
        by_openai_url,
        by_hugging_face,
        by_webui,
        by_webui_infotext,
        by_stability,
        by_azure,
        by_address,
    ],
    ids=lambda draw: draw.__name__,
)
def test_the_same_picture_through_every_format(draw: Callable[[str], bytes], graph: Running, truth: np.ndarray) -> None:
    assert graph.url is not None
    assert far_apart(pixels(draw(graph.url)), truth) <= 1


def test_hugging_face_s_client_says_what_is_wrong(graph: Running) -> None:
    client = InferenceClient(model=f"{graph.url}/hugging-face/text-to-image", token="none")
    with pytest.raises(HfHubHTTPError, match="width"):
        client.text_to_image(PROMPT, width=100)


def test_openai_s_client_lists_and_names_models(graph: Running) -> None:
    client = openai.OpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=0)
    names = [model.id for model in client.models.list()]
    assert names[0] == "sdxl" and client.models.retrieve(names[0]).owned_by == "sdxl-serve"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")


def test_webui_s_progress_and_interrupt(graph: Running) -> None:
    """A client that watches its picture and ends it."""
    answer: dict[str, Any] = {}

    def draw() -> None:
        body = {"prompt": PROMPT, "steps": 200, "batch_size": 4, "width": 256, "height": 256, "force_task_id": "mine"}
        answer.update(httpx.post(f"{graph.url}/sdapi/v1/txt2img", json=body, timeout=300).json())

    thread = threading.Thread(target=draw)
    thread.start()
    seen: list[float] = []
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        now = httpx.get(f"{graph.url}/sdapi/v1/progress", timeout=120).json()
        if now["state"]["sampling_step"]:
            seen.append(now["progress"])
            if len(seen) >= 5 and now["progress"] > 0.1:
                break
        time.sleep(0.05)
    named = httpx.post(f"{graph.url}/internal/progress", json={"id_task": "mine"}, timeout=120).json()
    assert named["active"] and named["progress"] >= seen[-1]
    another = httpx.post(f"{graph.url}/sdapi/v1/interrupt", params={"id_task": "theirs"}, timeout=120)
    assert another.status_code == 404
    # Of no name, since the fixture binds loopback.
    assert httpx.post(f"{graph.url}/sdapi/v1/interrupt", timeout=120).status_code == 200
    thread.join(timeout=180)
    assert answer["images"] == [] and "interrupted" in answer["warnings"][0]
    assert seen == sorted(seen) and 0 < seen[-1] < 1
