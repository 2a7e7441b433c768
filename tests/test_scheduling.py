"""The policy of the step loop, against random arrivals and departures."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.scheduling import Batch, Job, StepScheduler


def names(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [job.id for job in batch.jobs]


class Passes(RuleBasedStateMachine):
    """A scheduler and, beside it, all that has been put in and not been taken out."""

    max_rows = 4

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = StepScheduler(self.max_rows)
        self.jobs: dict[str, Job] = {}
        self.added = 0
        self.passes = 0
        # Of each key with work: the pass by which it must have had a turn.
        self.due: dict[str, int] = {}

    def keys(self) -> set[object]:
        return {job.key for job in self.jobs.values()}

    @rule(key=st.sampled_from("abc"), rows=st.integers(1, max_rows))
    def add(self, key: str, rows: int) -> None:
        if key not in self.keys():
            self.due[key] = self.passes + len(self.keys()) + 1
        job = Job(f"{self.added}", key, rows)
        self.added += 1
        self.scheduler.add(job)
        self.jobs[job.id] = job

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = self.jobs.pop(data.draw(st.sampled_from(sorted(self.jobs))))
        self.scheduler.remove(gone.id)
        if gone.key not in self.keys():
            del self.due[str(gone.key)]

    @rule()
    def run_a_pass(self) -> None:
        batch = self.scheduler.next_batch()
        if not self.jobs:
            assert batch is None
            return
        assert batch is not None
        self.passes += 1
        chosen = names(batch)
        assert chosen, "a pass has work"
        assert len(set(chosen)) == len(chosen), "nobody is in a pass twice"
        assert all(self.jobs.get(job.id) is job for job in batch.jobs), "only those who are here"
        assert len({job.key for job in batch.jobs}) == 1, "keys are not mixed"
        assert batch.rows == sum(job.rows for job in batch.jobs) <= self.max_rows
        assert chosen == sorted(chosen, key=int), "in order of arrival"

        key = batch.jobs[0].key
        peers = [job for job in self.jobs.values() if job.key == key]
        assert peers[0].id in chosen, "the oldest keeps its place"
        free = self.max_rows - batch.rows
        for left_out in (job for job in peers if job.id not in chosen):
            assert left_out.rows > free, "no row stays empty that somebody could fill"
            overtakers = [j for j in batch.jobs if int(j.id) > int(left_out.id) and j.rows >= left_out.rows]
            assert not overtakers, "only a smaller job overtakes"

        self.due[str(key)] = self.passes + len(self.keys())
        assert all(self.passes <= due for due in self.due.values()), "no key waits longer than one round"

    @invariant()
    def holds_what_was_put_in(self) -> None:
        assert len(self.scheduler) == len(self.jobs)


class PassesOfAnOddBudget(Passes):
    max_rows = 7


Passes.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
PassesOfAnOddBudget.TestCase.settings = Passes.TestCase.settings
TestPasses = Passes.TestCase
TestPassesOfAnOddBudget = PassesOfAnOddBudget.TestCase


def test_nothing_to_do_is_no_batch() -> None:
    assert StepScheduler(4).next_batch() is None


def test_a_job_stays_until_it_is_removed() -> None:
    scheduler = StepScheduler(4)
    scheduler.add(Job("a", "k", 2))
    assert names(scheduler.next_batch()) == names(scheduler.next_batch()) == ["a"]
    scheduler.remove("a")
    assert scheduler.next_batch() is None


def test_freed_rows_are_filled_by_the_next_pass() -> None:
    scheduler = StepScheduler(4)
    for name in "abc":
        scheduler.add(Job(name, "k", 2))
    assert names(scheduler.next_batch()) == ["a", "b"]
    scheduler.remove("a")
    assert names(scheduler.next_batch()) == ["b", "c"]


def test_a_one_row_job_fills_the_row_that_a_two_row_job_cannot() -> None:
    scheduler = StepScheduler(3)
    for name, rows in (("a", 2), ("b", 2), ("c", 1)):
        scheduler.add(Job(name, "k", rows))
    assert names(scheduler.next_batch()) == ["a", "c"]


def test_keys_take_turns_of_one_pass() -> None:
    scheduler = StepScheduler(4)
    for name, key in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "z")):
        scheduler.add(Job(name, key, 2))
    turns = [names(scheduler.next_batch()) for _ in range(6)]
    assert turns == [["a", "c"], ["b"], ["d"]] * 2


def test_a_job_that_cannot_ever_run_is_refused() -> None:
    scheduler = StepScheduler(2)
    for rows in (0, 3):
        with pytest.raises(ValueError, match="rows"):
            scheduler.add(Job("a", "k", rows))
    assert len(scheduler) == 0
    with pytest.raises(ValueError, match="max_rows"):
        StepScheduler(0)


def test_the_same_job_twice_is_refused() -> None:
    scheduler = StepScheduler(2)
    scheduler.add(Job("a", "k", 1))
    with pytest.raises(ValueError, match="here already"):
        scheduler.add(Job("a", "other", 1))
    assert names(scheduler.next_batch()) == ["a"]
