"""The policy of the step loop, against random arrivals and departures."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve_app.config.settings import PolicyName
from serve_app.runtime.scheduling import (
    POLICIES,
    Batch,
    Budget,
    EarliestDeadline,
    FirstCome,
    Job,
    LeastSlack,
    Policy,
    StepScheduler,
)
from serve_app.runtime.scheduling import ShortestRemaining as Shortest


def names(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [job.id for job in batch.jobs]


class Passes(RuleBasedStateMachine):
    """A scheduler and, beside it, all that has been put in and not come out; both of its bounds are held against it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.jobs: dict[str, Job] = {}  # in order of arrival
        self.left: dict[str, int] = {}  # steps
        self.bound: dict[str, int] = {}  # passes of its lane within which a job is done
        self.waited: dict[str, int] = {}  # passes of others since a lane's last
        self.lanes_meanwhile: dict[str, int] = {}
        self.added = 0

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        rows=st.integers(4, 7),
        pixels=st.sampled_from([None, 40, 100]),
        patience=st.integers(0, 6),
    )
    def start(self, policy: PolicyName, rows: int, pixels: int | None, patience: int) -> None:
        self.budget = Budget(rows, pixels)
        self.patience = patience
        self.scheduler = StepScheduler(self.budget, POLICIES[policy](), patience, clock=lambda: self.now)

    def lane(self, key: object) -> list[Job]:
        return [job for job in self.jobs.values() if job.key == key]

    @rule(
        key=st.sampled_from("abc"),
        rows=st.integers(1, 4),
        steps=st.integers(1, 5),
        priority=st.sampled_from([0, 0, 1, -3]),
        wanted_in=st.none() | st.floats(0, 20),
    )
    def add(self, key: str, rows: int, steps: int, priority: int, wanted_in: float | None) -> None:
        deadline = None if wanted_in is None else self.now + wanted_in
        job = Job(f"{self.added}", key, rows, rows * 10, steps, priority=priority, deadline=deadline)
        self.added += 1
        self.bound[job.id] = self.patience + sum(self.left[peer.id] for peer in self.lane(key)) + steps
        self.scheduler.add(job)
        self.jobs[job.id], self.left[job.id] = job, steps
        if key not in self.waited:
            self.waited[key] = self.lanes_meanwhile[key] = 0

    def take_out(self, job_id: str) -> None:
        job = self.jobs.pop(job_id)
        del self.left[job_id], self.bound[job_id]
        self.scheduler.remove(job_id)
        if not self.lane(job.key):
            del self.waited[str(job.key)], self.lanes_meanwhile[str(job.key)]

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.take_out(data.draw(st.sampled_from(sorted(self.jobs))))

    @rule(seconds=st.floats(0.01, 3))
    def run_a_pass(self, seconds: float) -> None:
        for key in self.waited:
            self.lanes_meanwhile[key] = max(self.lanes_meanwhile[key], len(self.waited))
        batch = self.scheduler.next_batch()
        if not self.jobs:
            assert batch is None
            return
        chosen = names(batch)
        assert batch is not None
        assert chosen, "a pass has work"
        assert len(set(chosen)) == len(chosen), "nobody is in a pass twice"
        assert all(self.jobs.get(job.id) is job for job in batch.jobs), "only those who are here"
        (key,) = {str(job.key) for job in batch.jobs}
        assert batch.rows == sum(job.rows for job in batch.jobs)
        pixels = sum(job.pixels for job in batch.jobs)
        assert self.budget.holds(batch.rows, pixels), "the budget is never exceeded"
        assert sorted([*chosen, *(job.id for job in batch.waiting)]) == sorted(job.id for job in self.lane(key))
        for job in batch.waiting:
            assert not self.budget.holds(batch.rows + job.rows, pixels + job.pixels), "no room is left that fits"

        for other in self.waited:
            self.waited[other] = 0 if other == key else self.waited[other] + 1
            bound = self.patience + self.lanes_meanwhile[other] - 1
            assert self.waited[other] <= bound, f"lane {other} starves"
        self.lanes_meanwhile[key] = 0
        for job in self.lane(key):
            self.bound[job.id] -= 1
            assert self.bound[job.id] >= (job.id not in chosen), f"job {job.id} starves"
        for job_id in chosen:
            self.left[job_id] -= 1
            if self.left[job_id] == 0:
                self.take_out(job_id)
        self.now += seconds
        self.scheduler.observe(seconds)

    @invariant()
    def holds_what_was_put_in(self) -> None:
        if self.added:
            assert len(self.scheduler) == len(self.jobs)


Passes.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestPasses = Passes.TestCase


class EqualsInTurn(RuleBasedStateMachine):
    """Nobody is more urgent than anybody: lanes take turns, and within one the order is that of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = StepScheduler(Budget(5), patience=3)
        self.jobs: dict[str, Job] = {}
        self.due: dict[str, int] = {}  # of each lane with work: the pass by which it must have had a turn
        self.added = self.passes = 0

    def lanes(self) -> set[object]:
        return {job.key for job in self.jobs.values()}

    @rule(key=st.sampled_from("abcde"), rows=st.integers(1, 4))
    def add(self, key: str, rows: int) -> None:
        if key not in self.lanes():
            self.due[key] = self.passes + len(self.lanes()) + 1
        job = Job(f"{self.added}", key, rows, steps=1000)
        self.added += 1
        self.scheduler.add(job)
        self.jobs[job.id] = job

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = self.jobs.pop(data.draw(st.sampled_from(sorted(self.jobs))))
        self.scheduler.remove(gone.id)
        if gone.key not in self.lanes():
            del self.due[str(gone.key)]

    @precondition(lambda self: self.jobs)
    @rule()
    def run_a_pass(self) -> None:
        batch = self.scheduler.next_batch()
        assert batch is not None
        self.passes += 1
        chosen = names(batch)
        assert chosen == sorted(chosen, key=int), "in order of arrival"
        peers = [job for job in self.jobs.values() if job.key == batch.jobs[0].key]
        assert peers[0].id in chosen, "the oldest keeps its place"
        for left_out in batch.waiting:
            overtakers = [j for j in batch.jobs if int(j.id) > int(left_out.id) and j.rows >= left_out.rows]
            assert not overtakers, "only a smaller job overtakes"
        self.due[str(peers[0].key)] = self.passes + len(self.lanes())
        assert all(self.passes <= due for due in self.due.values()), "no lane waits longer than one round"


EqualsInTurn.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestEqualsInTurn = EqualsInTurn.TestCase


def run_to_the_end(scheduler: StepScheduler, jobs: list[Job]) -> list[str]:
    """Job names in the order in which they finish."""
    left = {job.id: job.steps for job in jobs}
    for job in jobs:
        scheduler.add(job)
    finished = []
    while batch := scheduler.next_batch():
        for job in batch.jobs:
            left[job.id] -= 1
            if left[job.id] == 0:
                scheduler.remove(job.id)
                finished.append(job.id)
    return finished


JOBS = st.lists(st.builds(lambda rows, steps: (rows, steps), st.integers(1, 2), st.integers(1, 9)), max_size=12)


@given(JOBS, st.sampled_from(sorted(POLICIES)))
def test_every_job_takes_exactly_its_steps(jobs: list[tuple[int, int]], policy: PolicyName) -> None:
    work = [Job(str(i), "k", rows, steps=steps) for i, (rows, steps) in enumerate(jobs)]
    scheduler = StepScheduler(Budget(3), POLICIES[policy]())
    assert sorted(run_to_the_end(scheduler, work)) == sorted(job.id for job in work)
    assert len(scheduler) == 0


def test_shortest_remaining_lets_a_short_job_by_and_not_a_longer_one() -> None:
    jobs = [Job("long", "k", 2, steps=50), Job("short", "k", 2, steps=10), Job("longer", "k", 2, steps=51)]
    assert run_to_the_end(StepScheduler(Budget(2), Shortest()), jobs) == ["short", "long", "longer"]
    assert run_to_the_end(StepScheduler(Budget(2)), jobs) == ["long", "short", "longer"]


def test_a_long_job_is_overtaken_as_often_as_patience_allows() -> None:
    scheduler = StepScheduler(Budget(1), Shortest(), patience=7)
    scheduler.add(Job("long", "k", steps=3))
    passes = []
    for number in range(20):
        scheduler.add(Job(f"short{number}", "k", steps=1))
        (name,) = names(scheduler.next_batch())
        passes.append(name)
        if name != "long":
            scheduler.remove(name)
    assert passes.index("long") == 7
    assert passes.count("long") > 3, "and never again after that"


def test_the_earliest_deadline_goes_first_and_none_last() -> None:
    jobs = [Job("none", "k"), Job("late", "k", deadline=900.0), Job("soon", "k", deadline=500.0)]
    scheduler = StepScheduler(Budget(1), EarliestDeadline(), clock=lambda: 0.0)
    assert run_to_the_end(scheduler, jobs) == ["soon", "late", "none"]


def test_least_slack_starts_first_what_takes_longest() -> None:
    now = 0.0
    scheduler = StepScheduler(Budget(1), LeastSlack(target_s=60.0), patience=1000, clock=lambda: now)
    scheduler.observe(1.0)
    scheduler.add(Job("short", "k", steps=3))
    now = 5.0
    scheduler.add(Job("long", "k", steps=10))  # must start at 55, the short one at 57
    scheduler.add(Job("refined", "k", steps=4, steps_after=7))  # at 54
    scheduler.add(Job("wanted soon", "k", steps=2, deadline=40.0))  # at 38
    order = []
    while batch := scheduler.next_batch():
        (job,) = batch.jobs
        order.append(job.id)
        if order.count(job.id) == job.steps:
            scheduler.remove(job.id)
    assert order[:4] == ["wanted soon", "wanted soon", "refined", "long"]


def test_with_least_slack_equal_clients_wait_equally_long() -> None:
    """A closed loop of mixed step counts: the longest time is nearer to the mean than in order of arrival."""

    def times(policy: Policy) -> list[float]:
        now, dice = 0.0, random.Random(1)
        scheduler = StepScheduler(Budget(4), policy, patience=1000, clock=lambda: now)
        born: dict[str, float] = {}
        left: dict[str, int] = {}
        took: list[float] = []

        def come() -> None:
            name = str(len(born))
            born[name], left[name] = now, dice.randint(10, 50)
            scheduler.add(Job(name, "k", steps=left[name]))

        for _ in range(8):
            come()
        while len(took) < 400:
            batch = scheduler.next_batch()
            assert batch is not None
            now += 1.0
            scheduler.observe(1.0)
            for job in batch.jobs:
                left[job.id] -= 1
                if left[job.id] == 0:
                    scheduler.remove(job.id)
                    took.append(now - born[job.id])
                    come()
        return sorted(took)

    first_come, least_slack = times(FirstCome()), times(LeastSlack())
    assert abs(sum(least_slack) / sum(first_come) - 1) < 0.02, "the work is the same"
    assert least_slack[380] < 0.9 * first_come[380]


def test_priority_goes_before_the_policy_and_across_lanes() -> None:
    jobs = [Job("a", "x"), Job("b", "y"), Job("urgent", "x", priority=5), Job("first", "z", priority=9)]
    assert run_to_the_end(StepScheduler(Budget(1)), jobs) == ["first", "urgent", "b", "a"]


def test_late_work_yields_to_work_that_can_still_make_it() -> None:
    now = 100.0
    scheduler = StepScheduler(Budget(1), clock=lambda: now)
    scheduler.observe(1.0)
    scheduler.add(Job("hopeless", "k", steps=10, deadline=109.0))
    scheduler.add(Job("in time", "k", steps=10, deadline=111.0))
    scheduler.add(Job("no deadline", "k", steps=10))
    assert names(scheduler.next_batch()) == ["in time"]
    now = 104.0  # it waited: 9 steps are left and 7 seconds
    assert names(scheduler.next_batch()) == ["no deadline"]


def test_steps_of_later_stages_count_towards_a_deadline() -> None:
    scheduler = StepScheduler(Budget(1), clock=lambda: 0.0)
    scheduler.observe(1.0)
    scheduler.add(Job("a", "k", steps=4, steps_after=5, deadline=8.0))
    scheduler.add(Job("b", "k", steps=4, deadline=8.0))
    assert names(scheduler.next_batch()) == ["b"]


def test_a_pass_s_expected_time_follows_what_is_measured() -> None:
    def is_late(step_s: list[float]) -> bool:
        scheduler = StepScheduler(Budget(1), clock=lambda: 0.0)
        for seconds in step_s:
            scheduler.observe(seconds)
        scheduler.add(Job("a", "k", steps=10, deadline=15.0))
        scheduler.add(Job("b", "k"))
        return names(scheduler.next_batch()) == ["b"]

    assert not is_late([])  # nothing measured: nothing is known to be late
    assert not is_late([1.0])
    assert is_late([2.0])
    assert not is_late([1.0, 2.0])  # one slow pass is no trend
    assert is_late([1.0] + [2.0] * 20)


def test_the_pixel_budget_limits_a_pass() -> None:
    scheduler = StepScheduler(Budget(16, pixels=100))
    for name, pixels in (("a", 60), ("b", 60), ("c", 40)):
        scheduler.add(Job(name, "k", 2, pixels))
    batch = scheduler.next_batch()
    assert names(batch) == ["a", "c"]
    assert batch is not None and [job.id for job in batch.waiting] == ["b"]
    with pytest.raises(ValueError, match="101 pixels"):
        scheduler.add(Job("d", "k", 2, 101))


def test_nothing_to_do_is_no_batch() -> None:
    assert StepScheduler(Budget(4)).next_batch() is None


def test_a_job_stays_until_it_is_removed() -> None:
    scheduler = StepScheduler(Budget(4))
    scheduler.add(Job("a", "k", 2))
    assert names(scheduler.next_batch()) == names(scheduler.next_batch()) == ["a"]
    scheduler.remove("a")
    assert scheduler.next_batch() is None


def test_freed_rows_are_filled_by_the_next_pass() -> None:
    scheduler = StepScheduler(Budget(4))
    for name in "abc":
        scheduler.add(Job(name, "k", 2))
    assert names(scheduler.next_batch()) == ["a", "b"]
    scheduler.remove("a")
    assert names(scheduler.next_batch()) == ["b", "c"]


def test_a_one_row_job_fills_the_row_that_a_two_row_job_cannot() -> None:
    scheduler = StepScheduler(Budget(3))
    for name, rows in (("a", 2), ("b", 2), ("c", 1)):
        scheduler.add(Job(name, "k", rows))
    assert names(scheduler.next_batch()) == ["a", "c"]


def test_keys_take_turns_of_one_pass() -> None:
    scheduler = StepScheduler(Budget(4))
    for name, key in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "z")):
        scheduler.add(Job(name, key, 2))
    turns = [names(scheduler.next_batch()) for _ in range(6)]
    assert turns == [["a", "c"], ["b"], ["d"]] * 2


def test_a_job_that_cannot_ever_run_is_refused() -> None:
    scheduler = StepScheduler(Budget(2))
    for rows in (0, 3):
        with pytest.raises(ValueError, match="rows"):
            scheduler.add(Job("a", "k", rows))
    assert len(scheduler) == 0
    for rows, pixels in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="no room"):
            Budget(rows, pixels)


def test_the_same_job_twice_is_refused() -> None:
    scheduler = StepScheduler(Budget(2))
    scheduler.add(Job("a", "k", 1))
    with pytest.raises(ValueError, match="here already"):
        scheduler.add(Job("a", "other", 1))
    assert names(scheduler.next_batch()) == ["a"]


class Suspects(RuleBasedStateMachine):
    """Some jobs run alone: from the first pass of one to its last nothing else is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = StepScheduler(Budget(6), patience=3)
        self.jobs: dict[str, Job] = {}
        self.left: dict[str, int] = {}
        self.begun: set[str] = set()
        self.added = 0

    @rule(key=st.sampled_from("ab"), rows=st.integers(1, 3), steps=st.integers(1, 4), alone=st.booleans())
    def add(self, key: str, rows: int, steps: int, alone: bool) -> None:
        job = Job(f"{self.added}", key, rows, steps=steps, alone=alone)
        self.added += 1
        self.scheduler.add(job)
        self.jobs[job.id], self.left[job.id] = job, steps

    def take_out(self, job_id: str) -> None:
        del self.jobs[job_id], self.left[job_id]
        self.begun.discard(job_id)
        self.scheduler.remove(job_id)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.take_out(data.draw(st.sampled_from(sorted(self.jobs))))

    @precondition(lambda self: self.jobs)
    @rule()
    def run_a_pass(self) -> None:
        batch = self.scheduler.next_batch()
        assert batch is not None and batch.jobs, "a pass has work"
        chosen = set(names(batch))
        waiting_alone = [job for job in self.jobs.values() if job.alone]
        if any(job.alone for job in batch.jobs):
            assert len(chosen) == 1 and self.begun <= chosen, "nothing else is under way"
            first = min(waiting_alone, key=lambda job: (job.id not in self.begun, int(job.id)))
            assert chosen == {first.id}, "one after the other, in order of arrival"
        elif waiting_alone:
            assert chosen <= self.begun, "what has not begun waits"
        self.begun |= chosen
        for job_id in chosen:
            self.left[job_id] -= 1
            if self.left[job_id] == 0:
                self.take_out(job_id)

    @invariant()
    def holds_what_was_put_in(self) -> None:
        assert len(self.scheduler) == len(self.jobs)

    def teardown(self) -> None:
        bound = sum(self.left.values())
        while self.jobs:
            self.run_a_pass()
            bound -= 1
            assert bound >= 0, "each pass takes somebody on"


Suspects.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSuspects = Suspects.TestCase


def test_a_lowered_budget_is_that_of_its_key_alone_and_only_goes_down() -> None:
    scheduler = StepScheduler(Budget(8))
    for name in "abcd":
        scheduler.add(Job(f"{name}1", "large", rows=2, steps=9))
        scheduler.add(Job(f"{name}2", "small", rows=2, steps=9))
    assert scheduler.lower("large", 4)
    assert not scheduler.lower("large", 4) and not scheduler.lower("large", 6), "no news"
    assert not scheduler.lower("other", 8), "it holds as many anyway"
    rows = {str(batch.jobs[0].key): batch.rows for batch in (scheduler.next_batch(), scheduler.next_batch()) if batch}
    assert rows == {"large": 4, "small": 8}
    assert scheduler.lower("large", 1)
    batch = next(b for b in (scheduler.next_batch(), scheduler.next_batch()) if b and b.jobs[0].key == "large")
    assert batch.rows == 2, "one job runs, however large it is"
