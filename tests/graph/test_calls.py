"""Calls to stages: what is made again, what is not, and what a listener hears."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from serve_app.config.settings import AppConfig, ModelSource
from serve_app.graph import calls, replica
from serve_app.graph.calls import Attempt, _ReportOnce, retried
from serve_app.graph.replica import Call, End, working
from serve_app.request.errors import InvalidRequest, Overloaded, PictureFailed, RequestKillsReplica, StageUnavailable
from serve_app.request.facts import DecoderFacts, TextFacts
from serve_app.request.resolve import resolve
from serve_app.request.schema import ImageRequest
from serve_app.runtime.engine import ReplicaLeaving
from serve_app.runtime.tasks import Alive, Conditioning, StepReport, Urgency, base_task, encode_task
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

    async def __call__(self, attempt: Attempt) -> str:
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


class Response:
    """A call as Ray gives it: taken at once or never, then the events, then an end, an error or silence."""

    def __init__(self, *events: Any, ends: bool = True, taken: bool = True) -> None:
        self.events, self.ends, self.taken = list(events), ends, taken
        self.cancelled = 0

    async def _to_object_ref_gen(self) -> None:
        if not self.taken:
            await asyncio.Event().wait()

    def __await__(self) -> Any:
        return self.__anext__().__await__()

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        if not self.events:
            if self.ends:
                raise StopAsyncIteration
            await asyncio.Event().wait()
        event = self.events.pop(0)
        if isinstance(event, BaseException):
            raise event
        return event

    def cancel(self) -> None:
        self.cancelled += 1


@pytest.mark.parametrize("lost", [ActorUnavailableError("out of reach", None), asyncio.CancelledError()], ids=repr)
async def test_a_call_that_is_given_up_is_cancelled(lost: BaseException) -> None:
    """A replica that is out of reach may still work on it: its rows must not be held for nobody."""
    for follow in (calls._answer, lambda response: calls._result(response, Attempt())):
        response: Any = Response(lost)
        with pytest.raises(type(lost)):
            await follow(response)
        assert response.cancelled == 1


@dataclass
class Try:
    """One try of a call: what comes of it, and the deaths that it was told of."""

    lost: BaseException | None = None
    taken: bool = True
    waiting: bool = False


class Tries:
    def __init__(self, *tries: Try) -> None:
        self.tries = list(tries)
        self.deaths: list[int] = []
        self.losses: list[tuple[str, bool]] = []

    async def __call__(self, attempt: Attempt) -> str:
        self.deaths.append(attempt.deaths)
        now = self.tries.pop(0)
        attempt.taken, attempt.waiting = now.taken, now.waiting
        if now.lost is not None:
            raise now.lost
        return "done"

    async def run(self) -> str:
        return await retried("denoise", self, lambda stage, cause, suspect: self.losses.append((cause, suspect)))


DEATHS: list[tuple[BaseException, str]] = [
    (ActorDiedError(), "died"),
    (ActorUnavailableError("gone", None), "died"),
    (OutOfMemoryError("killed by the memory monitor"), "died"),
    (calls._Silent(), "silent"),
    (StageUnavailable("the device is lost"), "unfit"),
    (from_a_replica(StageUnavailable("a pass hangs")), "unfit"),
]
IN_ORDER: list[tuple[BaseException, str]] = [
    (from_a_replica(ReplicaLeaving("shut down")), "drained"),
    (asyncio.CancelledError(), "drained"),
    (RequestCancelledError("id"), "drained"),
    (ObjectLostError("ref", None, ""), "unavailable"),
    (DeploymentUnavailableError(DeploymentID("BaseDenoiser", "sdxl")), "unavailable"),
]


@pytest.mark.parametrize(("lost", "cause"), DEATHS, ids=repr)
async def test_work_whose_replicas_die_twice_is_tried_no_more(lost: BaseException, cause: str) -> None:
    tries = Tries(Try(lost), Try(lost), Try())
    with pytest.raises(RequestKillsReplica) as caught:
        await tries.run()
    assert tries.deaths == [0, 1], "the second time it is run alone"
    assert tries.losses == [(cause, True)] * 2
    assert (caught.value.status, caught.value.retry_after_s) == (500, None)


@pytest.mark.parametrize(("lost", "cause"), DEATHS, ids=repr)
@pytest.mark.parametrize("where", [{"taken": False}, {"waiting": True}], ids=str)
async def test_work_that_was_in_no_pass_is_free_of_suspicion(
    lost: BaseException, cause: str, where: dict[str, bool]
) -> None:
    tries = Tries(*[Try(lost, **where)] * 3, Try())
    assert await tries.run() == "done"
    assert tries.deaths == [0, 0, 0, 0]
    assert tries.losses == [(cause, False)] * 3


@pytest.mark.parametrize(("lost", "cause"), IN_ORDER, ids=repr)
async def test_a_replica_that_is_shut_down_in_order_is_no_death(lost: BaseException, cause: str) -> None:
    tries = Tries(*[Try(lost)] * 3, Try())
    assert await tries.run() == "done"
    assert tries.deaths == [0, 0, 0, 0]
    assert tries.losses == [(cause, False)] * 3


async def test_one_death_and_one_loss_without_suspicion_end_nothing() -> None:
    tries = Tries(Try(ActorDiedError()), Try(ActorDiedError(), waiting=True), Try())
    assert await tries.run() == "done"
    assert tries.deaths == [0, 1, 1]


async def test_a_call_that_nobody_takes_is_offered_anew_and_that_is_no_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_TAKEN_S", 0.01)
    offered: list[Any] = []

    async def call(attempt: Attempt) -> Any:
        offered.append(Response("done", taken=len(offered) > 8))
        return await calls._result(offered[-1], attempt)

    losses: list[str] = []
    assert await retried("encode", call, lambda stage, cause, suspect: losses.append(cause)) == "done"
    assert len(offered) == 10 and losses == ["not_taken"] * 9
    assert [response.cancelled for response in offered] == [1] * 9 + [0]


async def test_a_replica_that_falls_silent_is_left_and_one_that_speaks_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_SILENCE_S", 0.2)

    class Speaking(Response):
        async def __anext__(self) -> Any:
            await asyncio.sleep(0.05)
            return await super().__anext__()

    alive: Any = Speaking(*[Alive()] * 8, "done")
    assert await calls._result(alive, Attempt()) == "done", "in all it takes longer than a silence may"
    silent: Any = Response(Alive(), ends=False)
    with pytest.raises(calls._Silent):
        await calls._result(silent, Attempt())
    assert (alive.cancelled, silent.cancelled) == (0, 1)


@pytest.mark.parametrize(
    ("events", "in_pass"),
    [
        ([], True),
        ([Alive()], True),
        ([Alive(waiting=True)], False),
        ([Alive(waiting=True), StepReport(0, 9, queue_position=2)], False),
        ([Alive(waiting=True), Alive()], True),
        ([Alive(waiting=True), StepReport(1, 9)], True),
    ],
)
async def test_what_a_replica_says_tells_who_may_have_killed_it(events: list[Any], in_pass: bool) -> None:
    attempt = Attempt()
    response: Any = Response(*events, ActorDiedError())
    with pytest.raises(ActorDiedError):
        await calls._result(response, attempt)
    assert attempt.in_pass == in_pass


async def told(call: Call, end: End, work: Any) -> list[Any]:
    return [event async for event in call.told(end, work)]


async def test_short_work_says_nothing_but_its_result() -> None:
    assert await told(Call(suspect=False), End(), asyncio.sleep(0, "done")) == ["done"]


async def test_long_work_gives_signs_of_life_and_tells_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "FIRST_WORD_S", 0.02)
    monkeypatch.setattr(replica, "WORD_EVERY_S", 0.05)
    call = Call(suspect=False)

    async def work() -> str:
        call.turn(True)
        await asyncio.sleep(0.2)
        call.turn(False)
        call.report(StepReport(1, 2))
        await asyncio.sleep(0.2)
        return "done"

    events = await told(call, End(), work())
    words = [event for event in events if isinstance(event, Alive)]
    assert words == sorted(words, key=lambda word: not word.waiting), "first it waits, then no more"
    assert [words.count(Alive(waiting)) >= 2 for waiting in (True, False)] == [True, True]
    assert events[-1] == "done" and StepReport(1, 2) in events


async def test_a_suspect_waits_until_it_is_said_to_begin() -> None:
    call = Call(suspect=True)
    began = []

    async def work() -> str:
        began.append(True)
        call.turn(False)
        await asyncio.sleep(0.01)
        return "done"

    events = call.told(End(), work())
    assert await anext(events) == Alive(waiting=True) and not began
    assert [event async for event in events] == [Alive(), "done"]


async def test_a_dying_replica_lets_calls_wait_for_its_end() -> None:
    """One that refused them at once would be the least busy one and get them all."""
    end = End()
    end.is_near = True
    events = Call(suspect=False).told(end, asyncio.sleep(0, "done"))
    assert await anext(events) == Alive(waiting=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(events), 0.05)


async def test_a_caller_that_goes_away_cancels_the_work() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    waiting = asyncio.ensure_future(told(Call(suspect=False), End(), work()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait_for(cancelled.wait(), 5)


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

    async def endless(attempt: Attempt) -> None:
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
    handle: Any = Handle()
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

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, *arguments: Any) -> Response:
        self.sent.append(arguments)
        if len(self.sent) <= self.lost:
            return Late(ReplicaLeaving("gone"))
        return Late(self.answers.pop(0) if self.answers else "done")


class Late(Response):
    async def __anext__(self) -> Any:
        await asyncio.sleep(0.02)
        return await super().__anext__()


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
        told = [sent[1] if stage == "decode" else sent[0].urgency for sent in handle.sent]
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
    end = End()
    with pytest.raises(RuntimeError) as caught, working(end):
        raise torch.OutOfMemoryError("17 GB")
    assert (type(caught.value), str(caught.value)) == (RuntimeError, "OutOfMemoryError: 17 GB")
    for own in (PictureFailed("not finite"), asyncio.CancelledError()):
        with pytest.raises(type(own)) as kept, working(end):
            raise own
        assert kept.value is own
    assert not end.is_near
