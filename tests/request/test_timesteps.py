"""webui's step count against the timesteps that diffusers' own schedulers visit."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.schedulers import EulerDiscreteScheduler

import serve_app
from serve_app.models.sampling import make_scheduler, take_timesteps
from serve_app.request.facts import NoiseSchedule
from serve_app.request.schedulers import NAMES
from serve_app.request.timesteps import base_steps, high_noise_frac, split, steps_before, timesteps
from serve_app.runtime.tasks import WHOLE, Latents, Noise, Resumed, Span

CONFIG = Path(serve_app.__file__).parent / "demo/base/scheduler/scheduler_config.json"
RESUMED = Resumed(Latents(np.zeros(0, np.float32), np.zeros(0, np.uint8), 0))
SHARES = (0.0, 0.01, 0.1, 0.28, 1 / 3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.99, 1.0)


@cache
def native(spacing: str) -> Any:
    return EulerDiscreteScheduler.from_config(json.loads(CONFIG.read_text()) | {"timestep_spacing": spacing})


def visited(spacing: str, name: str, steps: int) -> Any:
    scheduler = make_scheduler(native(spacing), name)
    scheduler.set_timesteps(steps)
    return scheduler


def true_base_steps(scheduler: Any, share: float) -> int:
    """How many timesteps the base's slice holds; Heun's repeats count once.

    "trailing" of some step counts (61 is the first) gives one timestep too many, -1, in diffusers.
    """
    taken = take_timesteps(scheduler, Noise(0), WHOLE if share == 1 else Span(end=share)).tolist()
    taken = [timestep for timestep in taken if timestep >= 0]
    return len(set(taken)) if scheduler.order == 2 else len(taken)


def test_the_trajectory_is_that_of_the_published_configuration() -> None:
    config = json.loads(CONFIG.read_text())
    published = NoiseSchedule()
    for name in ("timestep_spacing", "steps_offset", "num_train_timesteps", "beta_start", "beta_end"):
        assert getattr(published, name) == config[name]
    assert config["beta_schedule"] == "scaled_linear"


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dpmpp_2m_karras"])
def test_the_base_takes_exactly_the_steps_that_webui_gives_it(name: str, spacing: Any) -> None:
    noise_schedule = NoiseSchedule(timestep_spacing=spacing)
    every = range(1, 151) if name == "euler" else (*range(1, 12), 20, 25, 30, 41, 48, 50, 61, 75, 100, 150)
    for steps in every:
        scheduler = visited(spacing, name, steps)
        for switch_at in SHARES:
            wanted = sum(step / steps < switch_at for step in range(steps))  # webui's rule
            assert steps_before(switch_at, steps) == wanted
            share = high_noise_frac(name, steps, wanted, noise_schedule)
            assert 0 < share <= 1
            assert true_base_steps(scheduler, share) == wanted, (steps, switch_at)
            assert base_steps(name, steps, share, noise_schedule) == wanted, (steps, switch_at)


@pytest.mark.parametrize("steps", [7, 30, 50])
def test_the_refiner_takes_the_rest(steps: int) -> None:
    for wanted in range(steps):
        scheduler = visited("leading", "euler", steps)
        share = high_noise_frac("euler", steps, wanted)
        assert len(take_timesteps(scheduler, RESUMED, Span(start=share))) == steps - wanted


def test_karras_is_exact_until_its_timesteps_coincide() -> None:
    for steps in range(1, 151):
        scheduler = visited("leading", "dpmpp_2m_karras", steps)
        for switch_at in SHARES:
            wanted = steps_before(switch_at, steps)
            got = true_base_steps(scheduler, high_noise_frac("dpmpp_2m_karras", steps, wanted))
            assert abs(got - wanted) <= (0 if steps <= 44 else 3), (steps, switch_at)


@pytest.mark.parametrize("name", NAMES)
def test_the_timesteps_are_diffusers(name: str) -> None:
    for steps in (1, 2, 7, 17, 30, 50, 150):
        theirs = list(dict.fromkeys(visited("leading", name, steps).timesteps.tolist()))
        assert list(dict.fromkeys(timesteps(name, steps))) == pytest.approx(theirs, abs=1e-3)


def test_a_share_of_ours_is_counted_as_diffusers_does() -> None:
    for name in NAMES:
        for share in (0.02, 0.5, 0.8, 0.97):
            assert base_steps(name, 30, share) == true_base_steps(visited("leading", name, 30), share)


def test_steps_are_split_as_diffusers_splits_them() -> None:
    """By its own schedulers, in every number of steps up to 200, the refiner's by the refiner's own rule."""
    for steps in range(1, 200):
        scheduler = visited("leading", "euler", steps)
        for share in (0.3, 0.5, 0.8, 0.95):
            base = take_timesteps(scheduler, Noise(0), Span(end=share))
            refiner = take_timesteps(scheduler, RESUMED, Span(start=share))
            assert split("euler", steps, share) == (len(base), len(refiner)), (steps, share)
    assert split("euler", 30, 1.0) == (30, 0)
