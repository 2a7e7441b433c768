from __future__ import annotations

import diffusers.schedulers
import pytest

from serve_app.models.sampling import make_scheduler
from serve_app.request.errors import InvalidRequest
from serve_app.request.schedulers import BY_CLASS, BY_NAME, NAMES, SCHEDULERS, SchedulerName, find, from_webui, to_webui


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_has_a_name_in_webui_and_comes_back(name: SchedulerName) -> None:
    sampler, schedule = to_webui(name)
    assert from_webui(sampler, schedule).scheduler == name
    assert from_webui(name, None).scheduler == name
    assert from_webui(BY_NAME[name].label, None).scheduler == name


def test_the_table_has_every_name_once() -> None:
    assert tuple(row.name for row in SCHEDULERS) == NAMES
    assert len(BY_CLASS) == sum(not row.arguments for row in SCHEDULERS)


@pytest.mark.parametrize("row", SCHEDULERS, ids=NAMES)
def test_a_row_is_true_of_diffusers_class(row: object) -> None:
    row = BY_NAME[row.name]  # type: ignore[attr-defined]
    native = diffusers.schedulers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    scheduler = make_scheduler(native, row.name)
    assert type(scheduler).__name__ == row.diffusers_class
    assert all(scheduler.config[name] == value for name, value in row.arguments.items())
    scheduler.set_timesteps(7)
    # Latents as x / alpha begin at noise of deviation sigma, the others at 1.
    assert (float(scheduler.init_noise_sigma) > 1.01) == row.over_sigmas


def test_the_checkpoints_own_has_a_name_in_webui() -> None:
    assert from_webui("Automatic", None).scheduler is None
    assert from_webui("automatic", "Automatic").scheduler is None
    assert to_webui(None) == ("Automatic", "Automatic")
    with pytest.raises(InvalidRequest, match="scheduler: Karras goes with a sampler by name"):
        from_webui("Automatic", "Karras")


def test_a_scheduler_is_found_by_our_name_and_by_diffusers_class() -> None:
    assert find("lms") is find("LMSDiscreteScheduler") is BY_NAME["lms"]
    assert find("EDMEulerScheduler") is None and find("") is None
