from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from serve_app.request.limits import Limits
from serve_app.request.resolve import resolve
from serve_app.request.schema import ImageRequest
from serve_app.runtime.cost import Cost, cost_of
from tests.fakes import BASE_ALONE, FACTS


def cost(facts: Any = FACTS, **fields: Any) -> Cost:
    return cost_of(resolve(ImageRequest(prompt="p", **fields), facts, Limits()), facts)


def test_steps_fall_to_the_denoisers_as_their_timesteps_do() -> None:
    # Of 10 "leading" timesteps (1, 101, ..., 901) eight are at or above 200.
    assert cost(num_inference_steps=10, high_noise_frac=0.8) == Cost(64 * 64 * 2 * 8, 64 * 64 * 2 * 2)
    assert cost(BASE_ALONE, num_inference_steps=10) == Cost(64 * 64 * 2 * 10)


@pytest.mark.parametrize(
    ("fields", "times"),
    [
        ({"n": 3}, 3),
        ({"width": 128, "height": 256}, 8),
        ({"guidance_scale": 1.0}, 0.5),
        ({"num_inference_steps": 25}, 0.5),
    ],
)
def test_it_is_in_proportion(fields: dict[str, Any], times: float) -> None:
    assert cost(high_noise_frac=1.0, **fields).total == times * cost(high_noise_frac=1.0).total


def test_a_scheduler_of_its_own_counts_as_euler() -> None:
    own = replace(FACTS, base=replace(FACTS.base, native_scheduler="EDMEulerScheduler"))
    assert cost(own, num_inference_steps=10) == cost(num_inference_steps=10)
