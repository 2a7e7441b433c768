"""The simulated stages: replicas that take their work from the service's own `StepScheduler`, and who gets a call.

The loops below are those of `engine.py` and `micro_batch.py` without tensors and threads. Pure.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from serve_app.planning.clock import VirtualClock
from serve_app.planning.profile import DecodeStage, DenoiseStage, EncodeStage, IngressStage, Stage
from serve_app.runtime.scheduling import POLICIES, Budget, Job, StepScheduler


class Replica(Protocol):
    ongoing: int  # calls that are with it, as its callers count them


ReplicaT = TypeVar("ReplicaT", bound=Replica)


class Router(Generic[ReplicaT]):
    """Ray Serve's choice of a replica: of two at random, the one with fewer calls ongoing; of equals, either.

    It sees every call: a graph with several ingress replicas knows less, each counting its own.
    """

    def __init__(self, replicas: Sequence[ReplicaT], rng: random.Random) -> None:
        self.replicas = replicas
        self._random = rng.random

    def pick(self) -> ReplicaT:
        count = len(self.replicas)
        if count == 1:
            return self.replicas[0]
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        second += second >= first
        one, other = self.replicas[first], self.replicas[second]
        return other if other.ongoing < one.ongoing else one


class Stay:
    """A call at a stage: one image's at a denoiser or the decoder, one request's at the encoder."""

    __slots__ = ("arrived", "left", "owner", "replica", "started", "then")

    def __init__(self, owner: Any, replica: Any, then: Callable[[Stay], None]) -> None:
        self.owner = owner
        self.replica = replica
        self.then = then  # what its caller does with the answer
        self.left = 0  # passes still to take part in
        self.arrived = 0.0
        self.started: float | None = None


@dataclass
class Counts:
    """What a stage did. Seconds of the clock, save `work_s`, which is what the passes would take undisturbed."""

    calls: int = 0
    passes: int = 0
    rows: int = 0
    busy_s: float = 0.0
    work_s: float = 0.0
    queued_s: float = 0.0  # of all calls, from their arrival to their first pass
    stayed_s: float = 0.0  # from their arrival to their end


Done = Callable[[Stay], None]


class _Loop:
    """What both kinds of replica share."""

    def __init__(self, stage: Stage, budget: Budget, clock: VirtualClock, counts: Counts, done: Done) -> None:
        self.ongoing = 0
        self._clock = clock
        self._counts = counts
        self._done = done
        self._running = False
        self._scheduler = StepScheduler(budget, POLICIES[stage.policy](), stage.patience, clock=lambda: clock.now)

    def _count_pass(self, rows: int, began: float, seconds: float) -> None:
        counts = self._counts
        counts.passes += 1
        counts.rows += rows
        counts.busy_s += self._clock.now - began
        counts.work_s += seconds

    def _leave(self, stay: Stay) -> None:
        counts = self._counts
        counts.calls += 1
        counts.queued_s += (self._clock.now if stay.started is None else stay.started) - stay.arrived
        counts.stayed_s += self._clock.now - stay.arrived
        self._done(stay)


class DenoiserReplica(_Loop):
    """The step loop: takes in what has arrived, runs a pass, lets go what is finished, again."""

    def __init__(self, stage: DenoiseStage, clock: VirtualClock, counts: Counts, done: Done) -> None:
        super().__init__(stage, stage.budget, clock, counts, done)
        self._stage = stage
        self._arrived: list[tuple[Job, Stay]] = []
        self._stays: dict[str, Stay] = {}

    def take(self, job: Job, stay: Stay) -> None:
        stay.arrived = self._clock.now
        stay.left = job.steps
        self._arrived.append((job, stay))
        if not self._running:
            self._running = True
            self._step()

    def _step(self) -> None:
        arrived, self._arrived = self._arrived, []
        begin_s = self._stage.begin_s * len(arrived)
        idle: list[Stay] = []  # those that this stage has no step for
        for job, stay in arrived:
            if job.steps:
                self._scheduler.add(job)
                self._stays[job.id] = stay
            else:
                idle.append(stay)
        if idle:
            seconds = begin_s + self._stage.finish_s * len(idle)
            self._clock.work(seconds, self._nothing_to_do, (idle, self._clock.now, seconds))
            return
        self._run_pass(begin_s)

    def _nothing_to_do(self, about: tuple[list[Stay], float, float]) -> None:
        idle, began, seconds = about
        self._counts.busy_s += self._clock.now - began
        self._counts.work_s += seconds
        for stay in idle:
            self._leave(stay)
        self._run_pass(0.0)

    def _run_pass(self, begin_s: float) -> None:
        batch = self._scheduler.next_batch()
        if batch is None:
            if self._arrived:
                self._step()
            else:
                self._running = False
            return
        jobs = batch.jobs
        finishing = sum(self._stays[job.id].left == 1 for job in jobs)
        pass_s = self._stage.pass_seconds(batch.rows, jobs[0].pixels // jobs[0].rows, len(jobs))
        seconds = begin_s + pass_s + self._stage.finish_s * finishing
        self._clock.work(seconds, self._passed, (jobs, batch.rows, self._clock.now, begin_s, seconds))

    def _passed(self, about: tuple[tuple[Job, ...], int, float, float, float]) -> None:
        jobs, rows, began, begin_s, seconds = about
        now = self._clock.now
        self._count_pass(rows, began, seconds)
        # Where cores are shared all parts of a pass are stretched alike.
        first_step = began + (now - began) * (begin_s / seconds if seconds else 0.0)
        self._scheduler.observe(now - first_step)
        finished = []
        for job in jobs:
            stay = self._stays[job.id]
            stay.left -= 1
            if stay.started is None:
                stay.started = first_step
            if stay.left == 0:
                self._scheduler.remove(job.id)
                finished.append(self._stays.pop(job.id))
        for stay in finished:
            self._leave(stay)
        self._step()


class _MicroBatchReplica(_Loop):
    """Batches of what waits, formed as the device frees up."""

    def __init__(self, stage: Stage, budget: Budget, clock: VirtualClock, counts: Counts, done: Done) -> None:
        super().__init__(stage, budget, clock, counts, done)
        self._stays: dict[str, Stay] = {}

    def take(self, jobs: Sequence[Job], stay: Stay) -> None:
        stay.arrived = self._clock.now
        stay.left = len(jobs)
        for job in jobs:
            self._scheduler.add(job)
            self._stays[job.id] = stay
        if not self._running:
            self._running = True
            self._run_batch()

    def _seconds(self, jobs: tuple[Job, ...]) -> float:
        raise NotImplementedError

    def _run_batch(self) -> None:
        batch = self._scheduler.next_batch()
        if batch is None:
            self._running = False
            return
        stays = []
        for job in batch.jobs:
            self._scheduler.remove(job.id)
            stay = self._stays.pop(job.id)
            if stay.started is None:
                stay.started = self._clock.now
            stays.append(stay)
        seconds = self._seconds(batch.jobs)
        self._clock.work(seconds, self._ran, (stays, self._clock.now, seconds))

    def _ran(self, about: tuple[list[Stay], float, float]) -> None:
        stays, began, seconds = about
        self._count_pass(len(stays), began, seconds)
        self._scheduler.observe(self._clock.now - began)
        for stay in stays:
            stay.left -= 1
            if stay.left == 0:
                self._leave(stay)
        self._run_batch()


class EncoderReplica(_MicroBatchReplica):
    def __init__(self, stage: EncodeStage, clock: VirtualClock, counts: Counts, done: Done) -> None:
        super().__init__(stage, stage.budget, clock, counts, done)
        self._lines = stage.lines

    def _seconds(self, jobs: tuple[Job, ...]) -> float:
        return self._lines[str(jobs[0].key)](len(jobs))


class DecoderReplica(_MicroBatchReplica):
    def __init__(self, stage: DecodeStage, clock: VirtualClock, counts: Counts, done: Done) -> None:
        super().__init__(stage, stage.budget, clock, counts, done)
        self._table = stage.table

    def _seconds(self, jobs: tuple[Job, ...]) -> float:
        return self._table.seconds(len(jobs), jobs[0].pixels)


class FileMaker:
    """Picture files of one ingress replica: a few threads, first come first served."""

    def __init__(self, stage: IngressStage, clock: VirtualClock, counts: Counts, done: Done) -> None:
        self._seconds = stage.line
        self._free = stage.threads
        self._waiting: deque[tuple[int, Stay]] = deque()
        self._clock = clock
        self._counts = counts
        self._done = done

    def take(self, pixels: int, stay: Stay) -> None:
        stay.arrived = self._clock.now
        self._waiting.append((pixels, stay))
        self._start()

    def _start(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            pixels, stay = self._waiting.popleft()
            stay.started = self._clock.now
            seconds = self._seconds(pixels)
            self._clock.work(seconds, self._made, (stay, seconds))

    def _made(self, about: tuple[Stay, float]) -> None:
        stay, seconds = about
        self._free += 1
        counts, now = self._counts, self._clock.now
        assert stay.started is not None
        counts.calls += 1
        counts.passes += 1
        counts.rows += 1
        counts.busy_s += now - stay.started
        counts.work_s += seconds
        counts.queued_s += stay.started - stay.arrived
        counts.stayed_s += now - stay.arrived
        self._start()
        self._done(stay)
