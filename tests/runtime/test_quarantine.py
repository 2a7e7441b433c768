"""Requests that killed replicas are refused for a while, and others are not."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from serve_app.request.errors import RequestKillsReplica
from serve_app.request.resolve import ResolvedRequest, resolve
from serve_app.request.schema import ImageRequest
from serve_app.runtime import quarantine
from serve_app.runtime.quarantine import Quarantine, fingerprint
from tests.fakes import FACTS, LIMITS, FakeStages, service

REQUEST = resolve(ImageRequest(prompt="p", seed=1), FACTS, LIMITS, "id")
SAME: dict[str, Any] = {
    "request_id": "other",
    "warnings": ("w",),
    "n": 3,
    "seed": 9,
    "priority": 4,
    "deadline_s": 3.0,
    "output_format": "webp",
    "quality": 3,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def other(value: Any) -> Any:
    return {str: f"{value}x", bool: not value, tuple: (1, 2), type(None): "x"}.get(type(value), 77)


@pytest.mark.parametrize("field", [field.name for field in fields(ResolvedRequest)])
def test_what_is_drawn_makes_the_fingerprint(field: str) -> None:
    changed = replace(REQUEST, **{field: SAME.get(field, other(getattr(REQUEST, field)))})
    assert changed != REQUEST
    assert (fingerprint(changed) == fingerprint(REQUEST)) == (field in SAME)


def test_five_minutes() -> None:
    clock = Clock()
    held = Quarantine(clock)
    held.check(REQUEST)
    held.add(REQUEST)
    for clock.now in (0.0, 299.0):
        with pytest.raises(RequestKillsReplica):
            held.check(replace(REQUEST, seed=5))
        held.check(replace(REQUEST, prompt="another"))
    held.add(REQUEST)  # again: it counts from the last time
    clock.now = 598.0
    with pytest.raises(RequestKillsReplica):
        held.check(REQUEST)
    clock.now = 599.0
    held.check(REQUEST)
    assert len(held) == 0


def test_the_number_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_MAX_ENTRIES", 3)
    held = Quarantine(Clock())
    for number in range(9):
        held.add(replace(REQUEST, prompt=str(number)))
    assert len(held) == 3
    with pytest.raises(RequestKillsReplica):
        held.check(replace(REQUEST, prompt="8"))
    held.check(replace(REQUEST, prompt="0"))


@pytest.mark.parametrize("stage", ["encode", "denoise", "refine", "decode"])
async def test_the_service_refuses_what_killed_replicas_and_draws_the_rest(stage: str) -> None:
    stages = FakeStages(fail={stage: RequestKillsReplica("two replicas")})
    serving = service(stages)
    with pytest.raises(RequestKillsReplica):
        await serving.generate(ImageRequest(prompt="poison"))
    stages.fail.clear()
    before = len(stages.calls)
    with pytest.raises(RequestKillsReplica):
        await serving.generate(ImageRequest(prompt="poison"))
    with pytest.raises(RequestKillsReplica):
        await anext(serving.stream(ImageRequest(prompt="poison")))
    assert len(stages.calls) == before and serving.admission.in_flight == 0, "nothing is queued"
    assert (await serving.generate(ImageRequest(prompt="harmless"))).images
