"""A cluster on a virtual clock: the graph's stages, its router and its admission, under a given workload. Pure.

A request is encoded once; then each of its images goes on by itself (`pipeline.py`) and the request ends when the
last of them is a file. The same seed gives the same run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any

from serve_app.planning.clock import VirtualClock
from serve_app.planning.profile import DenoiseStage, Profile
from serve_app.planning.stages import (
    Counts,
    DecoderReplica,
    DenoiserReplica,
    EncoderReplica,
    FileMaker,
    Router,
    Stay,
)
from serve_app.planning.workload import Ask
from serve_app.request import schema
from serve_app.request.errors import ConfigurationError, Overloaded
from serve_app.runtime.admission import Admission
from serve_app.runtime.scheduling import Job

STAGES = (*schema.STAGES, "ingress")


@dataclass(frozen=True)
class Replicas:
    """How many of each deployment."""

    encode: int = 1
    denoise: int = 1
    refine: int = 0
    decode: int = 1
    ingress: int = 1

    @property
    def total(self) -> int:
        return sum(getattr(self, stage) for stage in STAGES)

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


@dataclass(slots=True)
class Outcome:
    """What became of a request; seconds of the virtual clock. `done` is None where it was refused."""

    ask: Ask
    arrived: float = 0.0
    first_step: float | None = None
    done: float | None = None

    @property
    def latency_s(self) -> float:
        """Infinite for a refused request: it is late whatever was wanted."""
        return math.inf if self.done is None else self.done - self.arrived


@dataclass(frozen=True)
class StageUse:
    """A stage in the measured part of a run. Waits and stays are means over its calls, in seconds."""

    replicas: int
    utilisation: float
    rows: float  # of a pass, on average
    queued_s: float  # to the first pass
    stayed_s: float


@dataclass(frozen=True)
class Run:
    """A simulated run: a record for each request in order of arrival, and what each stage did.

    `window`: from when to when utilisation and throughput were taken, in seconds.
    """

    records: list[Outcome]
    counted: list[Outcome]  # those after the warm-up
    stages: dict[str, StageUse]
    counts: dict[str, Counts]  # of the whole run
    window: tuple[float, float]
    throughput: float  # images a second in the window


class _Request:
    __slots__ = ("held", "ingress", "left", "record", "steps")

    def __init__(self, record: Outcome, ingress: _Ingress) -> None:
        self.record = record
        self.ingress = ingress
        self.left = record.ask.n  # images
        self.steps = record.ask.steps_by_stage
        self.held: AbstractContextManager[None] | None = None  # what it holds of the ingress's admission


class _Ingress:
    def __init__(self, admission: Admission, files: FileMaker) -> None:
        self.ongoing = 0
        self.admission = admission
        self.files = files


def simulate(
    profile: Profile,
    replicas: Replicas,
    asks: Sequence[Ask],
    *,
    concurrency: int | None = None,
    seed: int = 0,
    warmup: float = 0.2,
) -> Run:
    """Plays a workload through.

    `concurrency`: so many clients, each sending its next request as it has its last one's answer, in place of the
    requests' own times. `warmup`: the share of requests that come before the measured part. Raises
    `ConfigurationError` where the replicas can't do the work at all.
    """
    check_feasible(profile, replicas, asks, concurrency)
    return _Simulation(profile, replicas, asks, concurrency, seed).run(warmup)


def check_feasible(profile: Profile, replicas: Replicas, asks: Sequence[Ask], concurrency: int | None) -> None:
    """Raises `ConfigurationError`, one line, where some request could never be served."""
    refined = any(ask.high_noise_frac < 1 for ask in asks)
    if refined and profile.refine is None:
        raise ConfigurationError("high_noise_frac below 1, but the profile has no refine stage")
    for stage in STAGES:
        if getattr(replicas, stage) < 1 and (stage != "refine" or refined):
            raise ConfigurationError(f"{stage}: {getattr(replicas, stage)} replicas, and there is work for it")
    stages: list[tuple[str, DenoiseStage]] = [("denoise", profile.denoise)]
    if refined and profile.refine is not None:
        stages.append(("refine", profile.refine))
    largest = max((ask.pixels for ask in asks), default=0)
    rows = max((ask.rows for ask in asks), default=0)
    for name, denoiser in stages:
        if asks and not denoiser.budget.holds(rows, rows * largest):
            raise ConfigurationError(f"{name}: a pass of {denoiser.budget} can't hold {rows} rows of {largest} pixels")
    if asks and not profile.decode.budget.holds(1, largest):
        raise ConfigurationError(f"decode: a pass of {profile.decode.budget} can't hold {largest} pixels")
    images, limit = max((ask.n for ask in asks), default=0), profile.ingress.max_images_in_flight
    if images > limit:
        raise ConfigurationError(f"n: {images} images in one request, the ingress takes at most {limit}")
    if concurrency is not None and concurrency * images > replicas.ingress * limit:
        raise ConfigurationError(
            f"concurrency: {concurrency} x {images} images in flight, {replicas.ingress} x {limit} are taken in"
        )


class _Simulation:
    def __init__(
        self, profile: Profile, replicas: Replicas, asks: Sequence[Ask], concurrency: int | None, seed: int
    ) -> None:
        self._profile = profile
        self._replicas = replicas
        self._concurrency = concurrency
        self._clock = clock = VirtualClock(profile.cores)
        self._beside_s = 0.0 if profile.cores is None else profile.cores.beside_s
        self._records = [Outcome(ask, ask.at) for ask in asks]
        self._arrived = self._images = self._ids = self._first_counted = 0
        self._marks: list[tuple[float, int, dict[str, Counts]]] = []  # when, images made by then, and all counts
        self._counts = counts = {stage: Counts() for stage in STAGES}
        rng = random.Random(seed)

        self._encoders = Router(
            [EncoderReplica(profile.encode, clock, counts["encode"], self._reply) for _ in range(replicas.encode)], rng
        )
        self._denoisers = Router(
            [DenoiserReplica(profile.denoise, clock, counts["denoise"], self._reply) for _ in range(replicas.denoise)],
            rng,
        )
        refine = profile.refine
        self._refiners = Router(
            [
                DenoiserReplica(refine, clock, counts["refine"], self._reply)
                for _ in range(replicas.refine)
                if refine is not None
            ],
            rng,
        )
        self._decoders = Router(
            [DecoderReplica(profile.decode, clock, counts["decode"], self._reply) for _ in range(replicas.decode)], rng
        )
        self._ingresses = Router(
            [
                _Ingress(
                    Admission(profile.ingress.max_images_in_flight, lambda: clock.now),
                    FileMaker(profile.ingress, clock, counts["ingress"], self._filed),
                )
                for _ in range(replicas.ingress)
            ],
            rng,
        )

    def run(self, warmup: float) -> Run:
        self._first_counted = int(len(self._records) * warmup)
        if self._concurrency is None:
            for record in self._records:
                self._clock.at(record.ask.at, self._arrive)
        else:
            for _ in range(min(self._concurrency, len(self._records))):
                self._clock.at(0.0, self._arrive)
        self._clock.run()
        return self._result()

    # One request, in the order in which things happen to it.

    def _arrive(self, _: None) -> None:
        if self._arrived == len(self._records):
            return  # a client of a closed loop that has nothing left to send
        record = self._records[self._arrived]
        if self._arrived in (self._first_counted, len(self._records) - 1):
            self._mark()
        self._arrived += 1
        record.arrived = self._clock.now
        ingress = self._ingresses.pick()
        ingress.ongoing += 1
        self._hop(self._at_ingress, _Request(record, ingress))

    def _at_ingress(self, request: _Request) -> None:
        held = request.ingress.admission.hold(request.record.ask.n, request.record.ask.cost)
        try:
            held.__enter__()
        except Overloaded as error:
            request.ingress.ongoing -= 1
            if self._concurrency is not None:
                self._clock.at(self._clock.now + (error.retry_after_s or 0.0), self._arrive)
            return
        request.held = held
        texts = [Job(self._new_id(), name, deadline=self._deadline(request)) for name in self._profile.encode.passes]
        self._call(self._encoders, texts, request, self._encoded)

    def _encoded(self, stay: Stay) -> None:
        request = stay.owner
        after = round(request.record.ask.steps * (1 - request.record.ask.high_noise_frac))
        for _ in range(request.record.ask.n):
            self._call(self._denoisers, self._steps_job(request, request.steps[0], after), request, self._denoised)

    def _denoised(self, stay: Stay) -> None:
        request, record = stay.owner, stay.owner.record
        self._note_first_step(record, stay)
        if record.ask.high_noise_frac < 1:
            self._call(self._refiners, self._steps_job(request, request.steps[1], 0), request, self._refined)
        else:
            self._decode(request)

    def _refined(self, stay: Stay) -> None:
        self._note_first_step(stay.owner.record, stay)
        self._decode(stay.owner)

    def _decode(self, request: _Request) -> None:
        ask = request.record.ask
        shape = (ask.width, ask.height)
        job = Job(self._new_id(), shape, pixels=ask.pixels, priority=ask.priority, deadline=self._deadline(request))
        self._call(self._decoders, [job], request, self._decoded)

    def _decoded(self, stay: Stay) -> None:
        files = stay.owner.ingress.files
        files.take(stay.owner.record.ask.pixels, Stay(stay.owner, files, self._filed))

    def _filed(self, stay: Stay) -> None:
        request = stay.owner
        request.left -= 1
        self._images += 1
        if request.left == 0:
            assert request.held is not None
            request.held.__exit__(None, None, None)
            self._hop(self._answered, request)

    def _answered(self, request: _Request) -> None:
        request.ingress.ongoing -= 1
        request.record.done = self._clock.now
        if self._concurrency is not None:
            self._arrive(None)

    # What the steps above are made of.

    def _hop(self, call: Callable[[Any], None], argument: Any) -> None:
        """Half of a call between deployments: the way there, or the way back."""
        self._clock.work(self._profile.hop_s / 2, call, argument)
        if self._beside_s:
            self._clock.work(self._beside_s / 2, _nobody_waits)

    def _call(self, router: Router[Any], work: Any, request: _Request, then: Callable[[Stay], None]) -> None:
        replica = router.pick()
        replica.ongoing += 1
        self._hop(self._deliver, (replica, work, Stay(request, replica, then)))

    def _deliver(self, about: tuple[Any, Any, Stay]) -> None:
        replica, work, stay = about
        replica.take(work, stay)

    def _reply(self, stay: Stay) -> None:
        self._hop(self._replied, stay)

    def _replied(self, stay: Stay) -> None:
        stay.replica.ongoing -= 1
        stay.then(stay)

    def _steps_job(self, request: _Request, steps: int, after: int) -> Job:
        ask = request.record.ask
        return Job(
            self._new_id(),
            key=(ask.width, ask.height),
            rows=ask.rows,
            pixels=ask.rows * ask.pixels,
            steps=steps,
            steps_after=after,
            priority=ask.priority,
            deadline=self._deadline(request),
        )

    def _deadline(self, request: _Request) -> float | None:
        wanted_in = request.record.ask.deadline_s
        return None if wanted_in is None else request.record.arrived + wanted_in

    def _note_first_step(self, record: Outcome, stay: Stay) -> None:
        if stay.started is not None and (record.first_step is None or stay.started < record.first_step):
            record.first_step = stay.started

    def _new_id(self) -> str:
        self._ids += 1
        return str(self._ids)

    def _mark(self) -> None:
        counts = {stage: replace(count) for stage, count in self._counts.items()}
        self._marks.append((self._clock.now, self._images, counts))

    def _result(self) -> Run:
        if len(self._marks) < 2 or self._marks[0][0] == self._marks[-1][0]:
            # A request or two, or one burst: all of it is measured.
            self._marks = [(0.0, 0, {stage: Counts() for stage in STAGES})]
            self._mark()
        (start, images_before, before), (end, images_after, after) = self._marks[0], self._marks[-1]
        span = end - start
        return Run(
            records=self._records,
            counted=self._records[self._first_counted :],
            stages={stage: self._use(stage, before[stage], after[stage], span) for stage in STAGES},
            counts=self._counts,
            window=(start, end),
            throughput=(images_after - images_before) / span if span else 0.0,
        )

    def _use(self, stage: str, before: Counts, after: Counts, span: float) -> StageUse:
        replicas = getattr(self._replicas, stage)
        servers = replicas * (self._profile.ingress.threads if stage == "ingress" else 1)
        calls, passes = after.calls - before.calls, after.passes - before.passes
        return StageUse(
            replicas=replicas,
            utilisation=(after.busy_s - before.busy_s) / (servers * span) if servers and span else 0.0,
            rows=(after.rows - before.rows) / passes if passes else 0.0,
            queued_s=(after.queued_s - before.queued_s) / calls if calls else 0.0,
            stayed_s=(after.stayed_s - before.stayed_s) / calls if calls else 0.0,
        )


def _nobody_waits(_: None) -> None:
    """The end of work that only takes its share of the cores."""


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank: the smallest value that at least that share of all do not exceed. Nan of nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else math.nan
