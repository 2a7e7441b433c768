"""Calls from the ingress to a stage: cancelled with their caller, retried where a replica is lost.

Ray Serve does not retry a request whose replica dies. Seeded work gives the same result wherever and
however often it runs, so it is simply sent again, to whichever replica lives.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from serve_app.request.errors import Overloaded, ServiceError, StageUnavailable
from serve_app.request.facts import DecoderFacts, DenoiserFacts, TextFacts
from serve_app.runtime.pipeline import OnStep, Stages
from serve_app.runtime.tasks import Conditioning, DenoiseTask, EncodeTask, Latents, StepReport, Urgency

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats

logger = logging.getLogger("ray.serve")
ResultT = TypeVar("ResultT")

_RETRIES = 3
_BACKOFF_S = (0.1, 1.0, 4.0)
_ASK_AGAIN_S, _TELL_EVERY = 0.5, 60
# OutOfMemoryError: Ray's memory monitor has killed the replica, whoever had filled the memory.
_LOST = (
    RayActorError,
    OutOfMemoryError,
    ObjectLostError,
    WorkerCrashedError,
    DeploymentUnavailableError,
    RequestCancelledError,
)


def remote_stages(
    encoder: DeploymentHandle, base: DeploymentHandle, refiner: DeploymentHandle | None, decoder: DeploymentHandle
) -> Stages:
    """The four stages as calls to deployments."""

    async def no_refiner(task: DenoiseTask, on_step: OnStep | None) -> Latents:
        raise AssertionError("no refiner is configured")

    async def encode(task: EncodeTask) -> Conditioning:
        urgency = _running_out(task.urgency)
        return await retried("encode", lambda: _result(encoder.encode.remote(replace(task, urgency=urgency()))))

    async def decode(latents: Floats, urgency: Urgency) -> Bytes:
        left = _running_out(urgency)
        return await retried("decode", lambda: _result(decoder.decode.remote(latents, left())))

    return Stages(
        encode=encode,
        denoise=_denoise("denoise", base),
        refine=no_refiner if refiner is None else _denoise("refine", refiner),
        decode=decode,
    )


def _denoise(stage: str, handle: DeploymentHandle) -> Callable[[DenoiseTask, OnStep | None], Awaitable[Latents]]:
    async def run(task: DenoiseTask, on_step: OnStep | None) -> Latents:
        urgency = _running_out(task.urgency)
        if on_step is None:
            return await retried(stage, lambda: _result(handle.run.remote(replace(task, urgency=urgency()))))
        reporter, streaming = _ReportOnce(on_step), handle.options(stream=True)
        return await retried(
            stage,
            lambda: _last(streaming.run_reporting.remote(replace(task, urgency=urgency())), reporter),
        )

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
        found: Description = await retried("describe", lambda: _result(handle.describe.remote()))
        if found.checkpoints == checkpoints:
            break
        if attempt % _TELL_EVERY == 0:
            logger.info("waiting for a replica of %s that has this configuration's checkpoints", handle.deployment_name)
        await asyncio.sleep(_ASK_AGAIN_S)
    return found.facts


async def _result(response: DeploymentResponse) -> Any:
    try:
        return await response
    except (asyncio.CancelledError, *_LOST):
        response.cancel()  # a replica that is only out of reach may still be at it
        raise


async def _last(stream: DeploymentResponseGenerator, on_step: OnStep) -> Any:
    last = None
    try:
        async for event in stream:
            if isinstance(event, StepReport):
                on_step(event)
            last = event
    except (asyncio.CancelledError, *_LOST):
        stream.cancel()
        raise
    return last


async def retried(stage: str, call: Callable[[], Awaitable[ResultT]]) -> ResultT:
    """Makes a call again, at most three times, where what it lost is a replica and not the request."""
    for attempt in range(_RETRIES + 1):
        try:
            return await call()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this caller: the replica went away with the request in it.
            lost: BaseException = StageUnavailable("cancelled with its replica")
        except (*_LOST, StageUnavailable) as error:
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
        if attempt < _RETRIES:
            logger.warning("%s: a replica was lost (%s), trying again", stage, type(lost).__name__)
            await asyncio.sleep(_BACKOFF_S[attempt])
    raise StageUnavailable(f"the {stage} stage is being replaced; send the request again", retry_after_s=5)
