"""Calls to stages: what is made again, what is not, and what a listener hears."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError
from ray.serve.exceptions import BackPressureError

from serve_app.config.settings import AppConfig, ModelSource
from serve_app.graph import calls
from serve_app.graph.calls import _ReportOnce, retried
from serve_app.graph.replica import working
from serve_app.request.errors import InvalidRequest, Overloaded, PictureFailed, StageUnavailable
from serve_app.request.facts import DecoderFacts, TextFacts
from serve_app.request.resolve import resolve
from serve_app.request.schema import ImageRequest
from serve_app.runtime.tasks import Conditioning, StepReport, Urgency, base_task, encode_task
from tests.fakes import FACTS, LIMITS, conditioning

REQUEST = resolve(ImageRequest(prompt="p"), FACTS, LIMITS, "id")
ENCODE_TASK = encode_task(REQUEST, Urgency())
DENOISE_TASK = base_task(REQUEST, 0, Conditioning(conditioning(), conditioning()), Urgency())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_BACKOFF_S", (0.0, 0.0, 0.0))


class Stage:
    """Raises what it is given, one a call, then answers."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def from_a_replica(cause: Exception) -> BaseException:
    """As Ray hands on what a replica raised."""
    wrapped: BaseException = RayTaskError("run", "Traceback ...", cause).as_instanceof_cause()
    return wrapped


@pytest.mark.parametrize(
    "lost",
    [
        ActorDiedError(),
        ActorUnavailableError("gone", None),
        OutOfMemoryError("killed by the memory monitor"),
        StageUnavailable("engine"),
        from_a_replica(StageUnavailable("engine")),
        asyncio.CancelledError(),  # nobody cancelled the caller: the replica went with the request in it
    ],
    ids=repr,
)
async def test_a_lost_replica_is_tried_again(lost: BaseException) -> None:
    stage = Stage(lost, lost)
    assert await retried("denoise", stage) == "done"
    assert stage.calls == 3


@pytest.mark.parametrize("lost", [ActorUnavailableError("out of reach", None), asyncio.CancelledError()], ids=repr)
async def test_a_call_that_is_given_up_is_cancelled(lost: BaseException) -> None:
    """A replica that is out of reach may still be at it: its rows are not to be held for nobody."""

    class Response:
        cancelled = 0

        def __await__(self) -> Any:
            raise lost
            yield

        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> Any:
            raise lost

        def cancel(self) -> None:
            self.cancelled += 1

    response = Response()
    with pytest.raises(type(lost)):
        await calls._result(response)  # type: ignore[arg-type]
    with pytest.raises(type(lost)):
        await calls._last(response, lambda _: None)  # type: ignore[arg-type]
    assert response.cancelled == 2


async def test_at_most_three_times() -> None:
    stage = Stage(*[ActorDiedError()] * 9)
    with pytest.raises(StageUnavailable) as error:
        await retried("denoise", stage)
    assert stage.calls == 4
    assert error.value.retry_after_s


async def test_a_request_that_is_wrong_is_not_tried_again() -> None:
    stage = Stage(from_a_replica(InvalidRequest("no", param="n")))
    with pytest.raises(InvalidRequest) as error:
        await retried("denoise", stage)
    assert (stage.calls, type(error.value), error.value.param) == (1, InvalidRequest, "n")


async def test_a_fault_of_the_code_is_not_tried_again() -> None:
    stage = Stage(from_a_replica(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError):
        await retried("denoise", stage)
    assert stage.calls == 1


async def test_a_full_stage_says_when_to_come_back() -> None:
    stage = Stage(BackPressureError(num_queued_requests=3, max_queued_requests=3))
    with pytest.raises(Overloaded) as error:
        await retried("denoise", stage)
    assert (stage.calls, error.value.retry_after_s) == (1, 1)


async def test_a_cancelled_caller_stays_cancelled() -> None:
    entered = asyncio.Event()

    async def endless() -> None:
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(retried("denoise", endless))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_retry_reports_no_step_twice() -> None:
    heard: list[StepReport] = []
    report = _ReportOnce(heard.append)
    first = [
        StepReport(0, 4, queue_position=1),
        StepReport(0, 4, queue_position=0),
        *(StepReport(s, 4) for s in (1, 2)),
    ]
    again = [StepReport(0, 4, queue_position=5), *(StepReport(step, 4) for step in (1, 2, 3, 4))]
    for event in [*first, *again]:
        report(event)
    assert heard == [*first, StepReport(3, 4), StepReport(4, 4)]


async def test_stages_of_a_graph_without_a_refiner_have_none() -> None:
    handle: Any = object()
    stages = calls.remote_stages(handle, handle, None, handle)
    with pytest.raises(AssertionError):
        await stages.refine(None, None)  # type: ignore[arg-type]


class Handle:
    """Stands for a deployment: keeps what it is sent; the first calls lose their replica, the others answer."""

    deployment_name = "BaseDenoiser"

    def __init__(self, *answers: Any, lost: int = 0) -> None:
        self.answers, self.lost = list(answers), lost
        self.sent: list[Any] = []
        self.run = self.encode = self.decode = self.describe = self

    def remote(self, *arguments: Any) -> Any:
        self.sent.append(arguments)
        return self._answer()

    async def _answer(self) -> Any:
        await asyncio.sleep(0.02)
        if len(self.sent) <= self.lost:
            raise StageUnavailable("gone")
        return self.answers.pop(0) if self.answers else "done"


async def test_a_task_that_is_sent_again_has_less_time_left() -> None:
    urgency = Urgency(priority=3, time_left_s=60.0)
    for stage, arguments in (
        ("encode", (replace(ENCODE_TASK, urgency=urgency),)),
        ("denoise", (replace(DENOISE_TASK, urgency=urgency), None)),
        ("refine", (replace(DENOISE_TASK, urgency=urgency), None)),
        ("decode", (np.zeros((4, 8, 8), np.float32), urgency)),
    ):
        handle: Any = Handle(lost=2)
        assert await getattr(calls.remote_stages(handle, handle, handle, handle), stage)(*arguments) == "done"
        told = [sent[-1] if stage == "decode" else sent[0].urgency for sent in handle.sent]
        assert [one.priority for one in told] == [3, 3, 3], stage
        left = [60.0, *(one.time_left_s for one in told)]
        for before, after, passed in zip(left[:-1], left[1:], (0.0, 0.02, 0.02), strict=True):
            assert before - after >= 0.9 * passed, stage


async def test_a_replica_of_the_former_checkpoints_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_ASK_AGAIN_S", 0.0)
    new = AppConfig(vae=ModelSource(path="other")).checkpoints
    assert new != AppConfig().checkpoints
    assert AppConfig(model_names=("other",)).checkpoints == AppConfig().checkpoints, "the same is loaded"
    old = calls.Description(AppConfig().checkpoints, DecoderFacts())
    facts = TextFacts(clip_skip_max=1, base_zeroes_missing_negative=True)
    handle: Any = Handle(old, old, calls.Description(new, facts))
    assert await calls.describe(handle, new) == facts
    assert len(handle.sent) == 3


def test_what_a_stage_raises_can_be_read_without_its_libraries() -> None:
    with pytest.raises(RuntimeError) as caught, working():
        raise torch.OutOfMemoryError("17 GB")
    assert (type(caught.value), str(caught.value)) == (RuntimeError, "OutOfMemoryError: 17 GB")
    for own in (PictureFailed("not finite"), asyncio.CancelledError()):
        with pytest.raises(type(own)) as kept, working():
            raise own
        assert kept.value is own
