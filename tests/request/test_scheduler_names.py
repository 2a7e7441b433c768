from __future__ import annotations

import pytest

from serve_app.models.sampling import SCHEDULERS
from serve_app.request.scheduler_names import DIFFUSERS_CLASSES, OUR_NAMES, from_webui, to_webui


@pytest.mark.parametrize("name", OUR_NAMES)
def test_every_scheduler_has_a_name_in_webui_and_comes_back(name: str) -> None:
    sampler, schedule = to_webui(name)  # type: ignore[arg-type]
    assert from_webui(sampler, schedule).scheduler == name
    assert from_webui(name, None).scheduler == name


def test_diffusers_classes_are_those_that_take_no_arguments_of_ours() -> None:
    assert {kind.__name__: name for name, (kind, arguments) in SCHEDULERS.items() if not arguments} == DIFFUSERS_CLASSES
