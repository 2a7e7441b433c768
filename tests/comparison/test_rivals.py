"""The rivals draw what the reference draws, over the same HTTP; and their one piece of logic, the grouping."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comparison.rivals.contract import PATH, Asked, BadBody, parse
from comparison.rivals.pipelines import Pipelines
from comparison.rivals.sequential import build_app
from comparison.rivals.serve_batch import groups
from serve_app.config.settings import DEMO_FOLDER
from serve_app.load.arrivals import Closed
from serve_app.load.drive import Settings, drive
from serve_app.load.mixes import Kind, RequestMix
from serve_app.request.schema import parse_request
from tests.load.server import serving_app
from tests.reference import Reference

BODY = {"prompt": "a red circle on a navy background", "seed": 5, "num_inference_steps": 2, "guidance_scale": 7.5}


@pytest.fixture(scope="module")
def pipelines() -> Pipelines:
    return Pipelines(threads=1)


def pixels(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png))).astype(int)


async def test_the_sequential_rival_answers_as_the_service_does(pipelines: Pipelines) -> None:
    with serving_app(build_app(pipelines)) as url, httpx.Client(timeout=60, trust_env=False) as client:
        answer = client.post(url + PATH, json=BODY)
        assert answer.status_code == 200 and answer.headers["server-timing"].startswith("queue;dur=")
        drawn = pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))
        refused = client.post(url + PATH, json=BODY | {"eta": 1.0})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "eta: Extra inputs are not permitted"
        mix = RequestMix(kinds=(Kind(num_inference_steps=(2,)),))
        records = await drive(Settings(url, mix, Closed(2), 4, timeout_s=60))
    assert all(record.ok and 0 < record.stages_s["queue"] < 60 for record in records), records
    expected = Reference(DEMO_FOLDER).draw(parse_request(BODY)).pixels
    assert drawn.shape == (128, 128, 3)
    assert np.abs(drawn - expected).max() <= 1
    # One at a time: somebody waited for a whole picture.
    latencies = sorted(record.latency_s or 0 for record in records)
    assert latencies[-1] > 1.3 * min(record.stages_s["queue"] for record in records)


def test_a_batch_draws_what_single_calls_draw(pipelines: Pipelines) -> None:
    batch = [Asked(**BODY | {"seed": seed, "prompt": prompt}) for seed, prompt in ((1, "a red star"), (2, "a cross"))]  # type: ignore[arg-type]
    together = pipelines.draw(batch)
    for asked, drawn in zip(batch, together, strict=True):
        (alone,) = pipelines.draw([asked])
        assert np.abs(pixels(drawn.png) - pixels(alone.png)).max() <= 1
    assert np.abs(pixels(together[0].png) - pixels(together[1].png)).max() > 20


asked = st.builds(
    Asked,
    prompt=st.sampled_from(["a", "b"]),
    seed=st.integers(0, 3),
    num_inference_steps=st.integers(1, 3),
    guidance_scale=st.sampled_from([0.0, 7.5]),
    width=st.sampled_from([None, 64]),
)


@given(st.lists(asked, max_size=20))
def test_groups_hold_every_place_once_and_share_all_but_prompt_and_seed(batch: list[Asked]) -> None:
    found = groups(batch)
    assert sorted(place for places in found for place in places) == list(range(len(batch)))
    keys = [{batch[place].model_copy(update={"prompt": "", "seed": 0}) for place in places} for places in found]
    assert all(len(key) == 1 for key in keys)
    assert len(set.union(set(), *keys)) == len(found)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"prompt": "x"}', b'{"n": 2}'])
def test_a_wrong_body_is_one_line(body: bytes) -> None:
    with pytest.raises(BadBody) as caught:
        parse(body)
    assert "\n" not in str(caught.value)
