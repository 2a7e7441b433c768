"""Profiles: strict, deterministic, and every request in them one that the service takes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.load.mixes import MIXES, RequestMix, parse_mix, request_at
from serve_app.request.errors import ConfigurationError
from serve_app.request.fields import MAX_IMAGES
from serve_app.request.schema import parse_request

seeds = st.integers(0, 2**40)


@pytest.mark.parametrize("name", MIXES)
@given(place=st.integers(0, 10_000), seed=seeds)
def test_every_request_of_a_named_profile_is_valid_and_repeats(name: str, place: int, seed: int) -> None:
    asked = request_at(MIXES[name], place, seed)
    assert asked == request_at(MIXES[name], place, seed)
    request = parse_request(asked.body)
    assert (request.num_inference_steps, request.n) == (asked.steps, asked.images)
    assert request.scheduler != "lms"


@given(seed=seeds)
def test_unique_seeds_do_not_meet(seed: int) -> None:
    taken = [request_at(MIXES["many"], place, seed).body["seed"] for place in range(50)]
    assert all(later - earlier >= MAX_IMAGES for earlier, later in pairwise(taken))


def test_mixed_draws_evenly_from_10_to_50() -> None:
    counts = Counter(request_at(MIXES["mixed"], place, 1).steps for place in range(4_100))
    assert set(counts) == set(range(10, 51))
    assert max(counts.values()) < 2 * min(counts.values())


def test_another_seed_asks_other_things() -> None:
    bodies = [[request_at(MIXES["mixed"], place, seed).body for place in range(5)] for seed in (1, 2)]
    assert bodies[0] != bodies[1]
    assert bodies[0][0]["prompt"] != bodies[0][1]["prompt"]


def test_kinds_come_by_their_weights() -> None:
    counts = Counter(request_at(MIXES["short-behind-long"], place, 0).kind for place in range(4_000))
    assert 0.2 < counts["short"] / 4_000 < 0.3


WHOLE: dict[str, Any] = {
    "prompts": ["a red circle on a white background"],
    "seeds": [7],
    "kinds": [
        {
            "name": "only",
            "num_inference_steps": {"first": 3, "last": 3},
            "sizes": ["128x64"],
            "n": [2],
            "guidance_scale": [0.0],
            "schedulers": ["ddim"],
            "priority": [5],
            "deadline_s": [9.5],
        }
    ],
}


def test_every_field_of_a_profile_reaches_the_body() -> None:
    asked = request_at(parse_mix(WHOLE, "x"), 4, 2)
    assert asked.kind == "only" and asked.deadline_s == 9.5
    assert asked.body == {
        "prompt": "a red circle on a white background", "seed": 7, "num_inference_steps": 3, "guidance_scale": 0.0,
        "n": 2, "width": 128, "height": 64, "scheduler": "ddim", "priority": 5, "deadline_s": 9.5,
    }  # fmt: skip


def test_what_is_absent_is_not_asked() -> None:
    body = request_at(MIXES["uniform"], 0, 0).body
    assert body.keys() == {"prompt", "seed", "num_inference_steps", "guidance_scale", "n"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": []}, "p.yaml: kind: unknown key"),
        ({"kinds": []}, "p.yaml: kinds: tuple should have at least 1 item"),
        ({"kinds": [{}]}, "p.yaml: kinds.0.num_inference_steps: field required"),
        ({"kinds": [{"num_inference_steps": [0]}]}, "p.yaml: kinds.0.num_inference_steps"),
        ({"kinds": [{"num_inference_steps": [10.5]}]}, "p.yaml: kinds.0.num_inference_steps"),
        ({"kinds": [{"num_inference_steps": {"first": 9, "last": 3}}]}, "first 9 is above last 3"),
        ({"kinds": [{"num_inference_steps": [5], "sizes": ["100x64"]}]}, "p.yaml: kinds.0: width: input should"),
        ({"kinds": [{"num_inference_steps": [5], "guidance_scale": [-1.0]}]}, "p.yaml: kinds.0: guidance_scale: "),
        ({"kinds": [{"num_inference_steps": [5], "schedulers": ["eular"]}]}, "p.yaml: kinds.0.schedulers.0: "),
        ({"kinds": [{"num_inference_steps": [5], "n": [11]}]}, "p.yaml: kinds.0.n.0: "),
        ({"kinds": [{"num_inference_steps": [5]}] * 2}, "two kinds have the same name"),
        ({"prompts": [" "]}, "p.yaml: prompts: prompt: is empty"),
        ({"prompts": "gramar"}, "p.yaml: prompts"),
        ({"seeds": [-1]}, "p.yaml: seeds"),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_one_line_that_names_the_key(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_mix(WHOLE | change, "p.yaml")
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_writes_and_reads_itself() -> None:
    for mix in MIXES.values():
        assert parse_mix(mix.model_dump(mode="json"), "x") == mix
    assert isinstance(parse_mix(WHOLE, "x"), RequestMix)
