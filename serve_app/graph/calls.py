"""Calls from the ingress to a stage: cancelled with their caller, made again where a replica is lost or silent.

Ray Serve does not retry a request whose replica dies. Seeded work gives the same result wherever and
however often it runs, so it is simply sent again, to whichever replica lives.

Work that was in a pass when its replica died may be what killed it. It is run alone the next time, and where it is
alone with a second death, it is not tried again. What waited, was never taken in, or left with a replica that was shut
down in order is free of suspicion.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from serve_app.request.errors import Overloaded, RequestKillsReplica, ServiceError, StageUnavailable
from serve_app.request.facts import DecoderFacts, DenoiserFacts, TextFacts
from serve_app.runtime.engine import ReplicaLeaving
from serve_app.runtime.pipeline import Stages
from serve_app.runtime.tasks import Alive, Conditioning, DenoiseTask, EncodeTask, Latents, OnStep, StepReport, Urgency

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats

logger = logging.getLogger("ray.serve")
ResultT = TypeVar("ResultT")

_RETRIES = 3
_BACKOFF_S = (0.1, 1.0, 4.0)
_ASK_AGAIN_S, _TELL_EVERY = 0.5, 60
_MAX_DEATHS = 2
# A replica that holds a call says so every `WORD_EVERY_S`. One that takes no call within `_TAKEN_S` has stopped, or
# there is none: the call is offered anew, to whichever replicas there are by then.
_SILENCE_S, _TAKEN_S = 30.0, 10.0
# OutOfMemoryError: Ray's memory monitor has killed the replica, whoever had filled the memory.
_DIED = (RayActorError, OutOfMemoryError, WorkerCrashedError)
_LOST = (*_DIED, ObjectLostError, DeploymentUnavailableError, RequestCancelledError)

OnLoss = Callable[[str, str, bool], None]
"""Called with the stage, the cause and whether the work is under suspicion, each time a call is lost."""


class _Silent(Exception):
    """A replica that has taken a call has said nothing for too long."""


class _NotTaken(Exception):
    """No replica took a call in time."""


@dataclass
class Attempt:
    """One try of a call, and how far it got: what is asked when its replica is lost."""

    deaths: int = 0
    taken: bool = False
    waiting: bool = False  # for its first pass, as last told

    @property
    def in_pass(self) -> bool:
        """Whether its work may be in a pass, for all that is known here."""
        return self.taken and not self.waiting


def ignored(stage: str, cause: str, suspect: bool) -> None:
    pass


def remote_stages(
    encoder: DeploymentHandle,
    base: DeploymentHandle,
    refiner: DeploymentHandle | None,
    decoder: DeploymentHandle,
    on_loss: OnLoss = ignored,
) -> Stages:
    """The four stages as calls to deployments."""
    encoding, decoding = encoder.options(stream=True), decoder.options(stream=True)

    async def no_refiner(task: DenoiseTask, on_step: OnStep | None) -> Latents:
        raise AssertionError("no refiner is configured")

    async def encode(task: EncodeTask) -> Conditioning:
        urgency = _running_out(task.urgency)

        async def call(attempt: Attempt) -> Conditioning:
            now = replace(task, urgency=urgency(), deaths=attempt.deaths)
            result: Conditioning = await _result(encoding.encode.remote(now), attempt)
            return result

        return await retried("encode", call, on_loss)

    async def decode(latents: Floats, urgency: Urgency) -> Bytes:
        left = _running_out(urgency)

        async def call(attempt: Attempt) -> Bytes:
            pixels: Bytes = await _result(decoding.decode.remote(latents, left(), attempt.deaths), attempt)
            return pixels

        return await retried("decode", call, on_loss)

    return Stages(
        encode=encode,
        denoise=_denoise("denoise", base, on_loss),
        refine=no_refiner if refiner is None else _denoise("refine", refiner, on_loss),
        decode=decode,
    )


def _denoise(
    stage: str, handle: DeploymentHandle, on_loss: OnLoss
) -> Callable[[DenoiseTask, OnStep | None], Awaitable[Latents]]:
    denoising = handle.options(stream=True)

    async def run(task: DenoiseTask, on_step: OnStep | None) -> Latents:
        urgency = _running_out(task.urgency)
        reporter = None if on_step is None else _ReportOnce(on_step)

        async def call(attempt: Attempt) -> Latents:
            now = replace(task, urgency=urgency(), deaths=attempt.deaths)
            latents: Latents = await _result(denoising.run.remote(now, reporter is not None), attempt, reporter)
            return latents

        return await retried(stage, call, on_loss)

    return run


def _running_out(urgency: Urgency) -> Callable[[], Urgency]:
    """The urgency at each time that it is asked for: a task that is sent again has less time left."""
    began = time.monotonic()
    return lambda: urgency.after(time.monotonic() - began)


class _ReportOnce:
    """Passes each step on once: a retry begins again at the first step, its listener does not.

    Places in the queue count until the first step.
    """

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self._reported = 0

    def __call__(self, report: StepReport) -> None:
        if report.step > self._reported or (report.step == 0 and self._reported == 0):
            self._reported = report.step
            self._on_step(report)


@dataclass(frozen=True)
class Description:
    """What a stage's replica has loaded: of which `AppConfig.checkpoints`, and what must be known of them."""

    checkpoints: str
    facts: TextFacts | DenoiserFacts | DecoderFacts


async def describe(handle: DeploymentHandle, checkpoints: str) -> Any:
    """What a stage's replica says of its checkpoint, once one with `AppConfig.checkpoints` answers.

    While a changed configuration is rolled out, replicas of the former one answer, too.
    """
    for attempt in itertools.count():
        found: Description = await retried("describe", lambda _: _answer(handle.describe.remote()))
        if found.checkpoints == checkpoints:
            break
        if attempt % _TELL_EVERY == 0:
            logger.info("waiting for a replica of %s that has this configuration's checkpoints", handle.deployment_name)
        await asyncio.sleep(_ASK_AGAIN_S)
    return found.facts


async def _answer(response: DeploymentResponse) -> Any:
    try:
        return await response
    except (asyncio.CancelledError, *_LOST):
        response.cancel()  # a replica that is only out of reach may still be working on it
        raise


async def _result(stream: DeploymentResponseGenerator, attempt: Attempt, on_step: OnStep | None = None) -> Any:
    """The last of what a replica sends; before it come signs of life and reports."""
    last = None
    loop = asyncio.get_running_loop()
    try:
        async with _limit(_TAKEN_S, _NotTaken):
            await stream._to_object_ref_gen()  # ends when a replica has taken the call
        attempt.taken = True
        async with _limit(_SILENCE_S, _Silent) as silence:
            async for event in stream:
                silence.reschedule(loop.time() + _SILENCE_S)
                if isinstance(event, Alive):
                    attempt.waiting = event.waiting
                elif isinstance(event, StepReport):
                    attempt.waiting = attempt.waiting and event.step == 0
                    if on_step is not None:
                        on_step(event)
                last = event
    except (asyncio.CancelledError, _Silent, _NotTaken, *_LOST):
        stream.cancel()  # a replica that is only out of reach may still be working on it
        raise
    return last


@asynccontextmanager
async def _limit(seconds: float, error: type[Exception]) -> AsyncIterator[asyncio.Timeout]:
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield timeout
    except TimeoutError:
        if not timeout.expired():
            raise
        raise error from None


async def retried(stage: str, call: Callable[[Attempt], Awaitable[ResultT]], on_loss: OnLoss = ignored) -> ResultT:
    """Makes a call again, at most three times, where what it lost is a replica and not the request.

    Raises `RequestKillsReplica` where two replicas died with it in a pass. A call that no replica took is offered anew
    as long as its caller waits: there may be none for the time that a new one takes to load.
    """
    attempts, deaths = 0, 0
    while True:
        attempt = Attempt(deaths)
        try:
            return await call(attempt)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this caller: the replica went away with the request in it.
            lost: BaseException = ReplicaLeaving("cancelled with its replica")
        except _NotTaken:
            on_loss(stage, "not_taken", False)
            continue
        except (*_LOST, _Silent, StageUnavailable) as error:
            lost = error
        except BackPressureError:
            raise Overloaded(f"the {stage} stage is full", retry_after_s=1) from None
        except RayTaskError as error:
            # What the stage itself raised travels inside Ray's wrapper.
            if isinstance(error.cause, ServiceError) and not isinstance(error.cause, StageUnavailable):
                raise error.cause from None
            if not isinstance(error.cause, (StageUnavailable, *_LOST)):
                raise
            lost = error.cause
        suspect = _may_be_its_fault(lost) and attempt.in_pass
        deaths += suspect
        attempts += 1
        on_loss(stage, _cause(lost), suspect)
        where = "in a pass" if suspect else "in no pass"
        logger.warning("%s: a replica was lost (%s) with the call %s", stage, type(lost).__name__, where)
        if deaths >= _MAX_DEATHS:
            raise RequestKillsReplica(
                f"the {stage} stage lost two replicas that worked on this request; it is not tried again"
            )
        if attempts > _RETRIES:
            break
        await asyncio.sleep(_BACKOFF_S[attempts - 1])
    raise StageUnavailable(f"the {stage} stage is being replaced; send the request again", retry_after_s=5)


def _may_be_its_fault(lost: BaseException) -> bool:
    """Whether a replica died, hung or broke, rather than being shut down in order."""
    if isinstance(lost, ReplicaLeaving):
        return False
    return isinstance(lost, (*_DIED, _Silent, StageUnavailable))


def _cause(lost: BaseException) -> str:
    """A word for the metrics."""
    if isinstance(lost, (ReplicaLeaving, RequestCancelledError)):
        return "drained"
    if isinstance(lost, _Silent):
        return "silent"
    if isinstance(lost, StageUnavailable):
        return "unfit"
    if isinstance(lost, (DeploymentUnavailableError, ObjectLostError)):
        return "unavailable"
    return "died"
