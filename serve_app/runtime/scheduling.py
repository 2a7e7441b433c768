"""Which work takes part in the next forward pass: pure, deterministic policy over plain data.

It knows nothing of tensors, threads or Ray; the clock is injected. A job is one image's stay in a denoiser, or
one item of a micro-batch: it takes rows of every pass it is in until its owner removes it. Guidance, step number,
step count, scheduler and seed may all differ within a pass; what must be equal is the job's `key`. The jobs of
one key are a lane. A pass is of one lane: first it is chosen whose turn it is, then who of it goes.

Two bounds hold whatever arrives, and the tests prove them on random arrivals:

- A lane that has work waits for at most `patience` + L - 1 passes of other lanes, L lanes at most having work
  meanwhile; for at most L - 1 where nobody is more urgent.
- A job leaves after at most `patience` + E + s passes of its lane: s its own steps, E those that were left of
  the jobs of its lane when it came. `patience` is how often later arrivals may go before it.

Jobs that run alone stand aside of both: such a job starts once nothing else is under way, and until it leaves
nothing else runs. If it ends its process, it is known who did.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from serve_app.config.settings import PolicyName, SchedulingConfig

# A pass's expected time follows the measured ones by this share of each difference.
_SMOOTHING = 0.1


@dataclass(frozen=True)
class Budget:
    """What one forward pass may hold: rows, and rows x the pixels of each (None: any number)."""

    rows: int
    pixels: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or (self.pixels is not None and self.pixels < 1):
            raise ValueError(f"{self} leaves no room for anything")

    def holds(self, rows: int, pixels: int) -> bool:
        return rows <= self.rows and (self.pixels is None or pixels <= self.pixels)


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        key: what a forward pass can't mix (latent shape, conditioning length).
        rows: rows of each pass it is in.
        pixels: picture pixels of all its rows together.
        steps: passes it takes in all.
        steps_after: steps that later stages will take on it, of about the same length; for its deadline alone.
        priority: larger goes first.
        deadline: when it is wanted, in seconds of the scheduler's clock.
        alone: it shares no pass, and nothing else is under way from its first pass to its last.
    """

    id: str
    key: Hashable
    rows: int = 1
    pixels: int = 0
    steps: int = 1
    steps_after: int = 0
    priority: int = 0
    deadline: float | None = None
    alone: bool = False


@dataclass(frozen=True)
class Batch:
    """The jobs of one forward pass, in order; and those of the same lane that wait, next first."""

    jobs: tuple[Job, ...]
    rows: int
    waiting: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Standing:
    """Where a job stands: what a policy orders it by.

    Attributes:
        steps_left: in this stage.
        arrived: when it came, in seconds of the scheduler's clock.
        step_s: how long a step takes at present where a job is in every pass of its lane.
    """

    job: Job
    steps_left: int
    arrived: float
    step_s: float


class Policy(Protocol):
    """The order of equally urgent jobs within a lane; what came first breaks ties."""

    def order(self, standing: Standing) -> float:
        """Smaller goes first."""


class FirstCome:
    """In order of arrival: the oldest keep their place until they are done."""

    def order(self, standing: Standing) -> float:
        return 0.0


class ShortestRemaining:
    """The fewest steps left first: the shortest mean time (Schrage 1968), at the expense of long jobs."""

    def order(self, standing: Standing) -> float:
        return float(standing.steps_left)


class EarliestDeadline:
    """The earliest deadline first; jobs without one come last."""

    def order(self, standing: Standing) -> float:
        return math.inf if standing.job.deadline is None else standing.job.deadline


class LeastSlack:
    """What must start soonest to be done in time goes first (least laxity, Mok 1983).

    A job without a deadline is wanted `target_s` after it came. Where none has one, all take about equally long,
    however many steps they have: the shortest of longest times, at the expense of short jobs.
    """

    def __init__(self, target_s: float = 60.0) -> None:
        self.target_s = target_s

    def order(self, standing: Standing) -> float:
        job = standing.job
        deadline = standing.arrived + self.target_s if job.deadline is None else job.deadline
        return deadline - (standing.steps_left + job.steps_after) * standing.step_s


POLICIES: dict[PolicyName, Callable[[], Policy]] = {
    "first_come": FirstCome,
    "shortest_remaining": ShortestRemaining,
    "earliest_deadline": EarliestDeadline,
    "least_slack": LeastSlack,
}


@dataclass
class _Waiting:
    """A job in the scheduler and what has become of it."""

    job: Job
    arrival: int
    arrived: float
    steps_left: int
    overtaken: int = 0
    begun: bool = False


@dataclass
class _Lane:
    jobs: dict[str, _Waiting] = field(default_factory=dict)  # in order of arrival
    passed_over: int = 0  # passes of other lanes since this one's last


_ALONE: Hashable = object()  # in place of the lane of a job that has none


class StepScheduler:
    """Fills passes up to a budget.

    More urgent jobs go first: of a higher priority, and among equals those that can still meet their deadline
    (or have none) before those that can't. The policy orders the rest. Equally urgent lanes take turns, a pass each. A
    job that does not fit into what a pass has left is passed by for smaller ones behind it, which costs it nothing.
    """

    def __init__(
        self,
        budget: Budget,
        policy: Policy | None = None,
        patience: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget
        self.patience = patience
        self._policy = policy or FirstCome()
        self._clock = clock
        self._lanes: OrderedDict[Hashable, _Lane] = OrderedDict()  # the longest unserved first
        self._keys: dict[str, Hashable] = {}
        self._begun: set[str] = set()  # jobs of the lanes that were in a pass
        self._alone: dict[str, _Waiting] = {}  # jobs that run alone, in order of arrival
        self._running_alone: str | None = None
        self._lowered: dict[Hashable, int] = {}  # rows that passes of a key may have, where fewer than the budget's
        self._arrivals = 0
        self._pass_s = 0.0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, job: Job) -> None:
        """Takes a job in; it may be part of the very next pass."""
        if job.id in self._keys:
            raise ValueError(f"job {job.id} is here already")
        if job.rows < 1 or not self.budget.holds(job.rows, job.pixels):
            raise ValueError(f"job {job.id} takes {job.rows} rows and {job.pixels} pixels, a pass holds {self.budget}")
        jobs = self._alone if job.alone else self._lanes.setdefault(job.key, _Lane()).jobs
        self._keys[job.id] = _ALONE if job.alone else job.key
        jobs[job.id] = _Waiting(job, self._arrivals, self._clock(), job.steps)
        self._arrivals += 1

    def remove(self, job_id: str) -> None:
        """Drops a job: finished, failed or cancelled. Its rows are free from the next pass on."""
        key = self._keys.pop(job_id)
        if key is _ALONE:
            del self._alone[job_id]
            if self._running_alone == job_id:
                self._running_alone = None
            return
        lane = self._lanes[key]
        del lane.jobs[job_id]
        self._begun.discard(job_id)
        if not lane.jobs:
            del self._lanes[key]

    def observe(self, seconds: float) -> None:
        """Tells how long a pass took, from which it is judged what can still meet its deadline."""
        self._pass_s = self._pass_s + _SMOOTHING * (seconds - self._pass_s) if self._pass_s else seconds

    def lower(self, key: Hashable, rows: int) -> bool:
        """Passes of this key hold at most that many rows from now on, or one job. Whether that is news."""
        if rows >= self._lowered.get(key, self.budget.rows):
            return False
        self._lowered[key] = rows
        return True

    def next_batch(self) -> Batch | None:
        """The next pass, None when there is nothing to do. Counts a step of every job in it."""
        if not self._keys:
            return None
        if self._alone and not self._begun:
            return self._next_alone()
        now = self._clock()
        key = self._choose_lane(now)
        for other, lane in self._lanes.items():
            lane.passed_over = 0 if other == key else lane.passed_over + 1
        self._lanes.move_to_end(key)
        rows = self._lowered.get(key, self.budget.rows)
        return self._fill(self._in_order(self._lanes[key], now), rows)

    def _next_alone(self) -> Batch:
        if self._running_alone is None:
            first = min(self._alone.values(), key=lambda waiting: (-waiting.job.priority, waiting.arrival))
            self._running_alone = first.job.id
        chosen = self._alone[self._running_alone]
        chosen.steps_left -= 1
        return Batch((chosen.job,), chosen.job.rows)

    def _choose_lane(self, now: float) -> Hashable:
        lanes = self._lanes
        if self._alone:  # what has begun ends first
            lanes = OrderedDict(
                (key, lane) for key, lane in lanes.items() if any(waiting.begun for waiting in lane.jobs.values())
            )
        if len(lanes) == 1:
            return next(iter(lanes))
        key, lane = max(lanes.items(), key=lambda item: item[1].passed_over)  # the first of equals
        if lane.passed_over >= self.patience:
            return key
        return min(lanes, key=lambda k: min(self._urgency(w, now) for w in lanes[k].jobs.values()))

    def _in_order(self, lane: _Lane, now: float) -> list[_Waiting]:
        def rank(waiting: _Waiting) -> tuple[float, ...]:
            if waiting.overtaken >= self.patience:
                return (0, waiting.arrival)  # nobody who came later goes before it any more
            standing = Standing(waiting.job, waiting.steps_left, waiting.arrived, self._step_s)
            return (1, *self._urgency(waiting, now), self._policy.order(standing), waiting.arrival)

        return sorted(lane.jobs.values(), key=rank)

    def _urgency(self, waiting: _Waiting, now: float) -> tuple[float, bool]:
        """Smaller is more urgent: (-priority, whether it is late whatever is done)."""
        job = waiting.job
        if job.deadline is None:
            return (-job.priority, False)
        # Even in every pass that its lane gets, it needs this long.
        needed = (waiting.steps_left + job.steps_after) * self._step_s
        return (-job.priority, now + needed > job.deadline)

    @property
    def _step_s(self) -> float:
        """Lanes take turns: a lane's next pass begins when all have had theirs."""
        return self._pass_s * len(self._lanes)

    def _fill(self, ordered: list[_Waiting], most_rows: int) -> Batch:
        chosen: list[Job] = []
        left: list[Job] = []
        rows = pixels = 0
        newest = -1  # the latest arrival that has gone so far
        for waiting in ordered:
            job = waiting.job
            held_back = bool(self._alone) and not waiting.begun
            fits = self.budget.holds(rows + job.rows, pixels + job.pixels) and (
                rows + job.rows <= most_rows or not chosen
            )
            if fits and not held_back:
                chosen.append(job)
                rows, pixels = rows + job.rows, pixels + job.pixels
                waiting.steps_left -= 1
                waiting.begun = True
                self._begun.add(job.id)
                newest = max(newest, waiting.arrival)
            else:
                left.append(job)
                waiting.overtaken += newest > waiting.arrival
        return Batch(tuple(chosen), rows, tuple(left))


def scheduler_for(settings: SchedulingConfig, budget: Budget) -> StepScheduler:
    """The scheduler of a stage with these settings."""
    return StepScheduler(budget, POLICIES[settings.policy](), settings.patience)
