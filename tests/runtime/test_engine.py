"""The step loop over a runner that only counts. Where a test needs the engine inside a pass, it holds it there."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from serve_app.request.errors import StageUnavailable
from serve_app.runtime.engine import ReplicaLeaving, StepEngine
from serve_app.runtime.scheduling import Budget, Job, StepScheduler
from serve_app.runtime.tasks import StepReport, TimeInStage
from serve_app.runtime.watch import Watch

DEADLINE_S = 20  # of a wait that ends at once unless the engine is broken


@dataclass(frozen=True)
class Task:
    name: str
    steps: int = 1
    rows: int = 1
    key: str = "k"
    fails_in: str = ""  # begin, forward, advance or finish
    at_step: int = 0
    fatal: bool = False
    priority: int = 0
    preview_at: int = 0
    alone: bool = False


@dataclass
class State:
    task: Task
    values: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    name: str
    values: tuple[int, ...]


class BrokenDevice(Exception):
    pass


class CountingRunner:
    """A state is the list of its own steps. `passes`: who was in each pass that was tried, in order."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.passes: list[list[str]] = []
        self.threads: set[int] = set()
        self.stays: dict[str, TimeInStage] = {}
        self.held = False
        self._inside: queue.Queue[list[str]] = queue.Queue()
        self._go = threading.Semaphore(0)

    async def inside(self) -> list[str]:
        """Waits until the engine is inside a held pass, and says who is in it."""
        return await asyncio.to_thread(self._inside.get, timeout=DEADLINE_S)

    def let_go(self, *, hold_next: bool = False) -> None:
        self.held = hold_next
        self._go.release()

    def begin(self, task: Task) -> State:
        self.begun.append(task.name)
        self._fail_if(task, "begin", 0)
        return State(task)

    def job(self, state: State, job_id: str, arrived: float) -> Job:
        task = state.task
        return Job(job_id, task.key, task.rows, steps=task.steps, priority=task.priority, alone=task.alone)

    def forward(self, states: Sequence[State]) -> list[int]:
        self.threads.add(threading.get_ident())
        names = [state.task.name for state in states]
        self.passes.append(names)
        if self.held:
            self._inside.put(names)
            assert self._go.acquire(timeout=DEADLINE_S)
        for state in states:
            self._fail_if(state.task, "forward", len(state.values))
        return [len(state.values) for state in states]

    def advance(self, state: State, output: int) -> np.ndarray | None:
        self._fail_if(state.task, "advance", len(state.values))
        state.values.append(output)
        return np.full(1, len(state.values)) if state.task.preview_at == len(state.values) else None

    def finish(self, state: State, time: TimeInStage) -> Result:
        self._fail_if(state.task, "finish", 0)
        self.stays[state.task.name] = time
        return Result(state.task.name, tuple(state.values))

    def is_fatal(self, error: Exception) -> bool:
        return isinstance(error, BrokenDevice)

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    @staticmethod
    def _fail_if(task: Task, where: str, step: int) -> None:
        if task.fails_in == where and (task.at_step == step or where in ("begin", "finish")):
            raise BrokenDevice("lost") if task.fatal else ValueError(f"{task.name} fails in {where}")


Engine = StepEngine[Task, State, int, Result]


@asynccontextmanager
async def an_engine(max_rows: int = 4, *, held: bool = False) -> AsyncIterator[tuple[Engine, CountingRunner]]:
    runner = CountingRunner()
    runner.held = held
    engine: Engine = StepEngine(runner, StepScheduler(Budget(max_rows)), "test")
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield engine, runner
    finally:
        runner.let_go()
        engine.close()


async def start(engine: Engine, *tasks: Task) -> list[asyncio.Task[Result]]:
    """Hands tasks to the engine; they are in it or wait in front of it when this returns."""
    before = engine.stats()["waiting"]
    running = [asyncio.create_task(engine.run(task)) for task in tasks]
    while engine.stats()["waiting"] < before + len(tasks):
        await asyncio.sleep(0)
    return running


async def hold_one(engine: Engine, runner: CountingRunner, task: Task) -> asyncio.Task[Result]:
    """Starts a task and waits until the engine is held inside its first pass."""
    running = asyncio.create_task(engine.run(task))
    assert await runner.inside() == [task.name]
    return running


def whole(task: Task) -> Result:
    return Result(task.name, tuple(range(task.steps)))


async def test_a_task_takes_its_steps_and_gives_its_result() -> None:
    async with an_engine() as (engine, runner):
        assert await engine.run(Task("a", steps=3)) == Result("a", (0, 1, 2))
        assert runner.passes == [["a"]] * 3


async def test_a_task_joins_between_two_steps_of_another() -> None:
    async with an_engine(held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=3))
        (b,) = await start(engine, Task("b", steps=3))
        runner.let_go()
        assert [await a, await b] == [Result("a", (0, 1, 2)), Result("b", (0, 1, 2))]
        assert runner.passes == [["a"], ["a", "b"], ["a", "b"], ["b"]]


async def test_a_task_that_is_done_makes_room_at_once() -> None:
    async with an_engine(max_rows=2, held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=2))
        others = await start(engine, Task("b", steps=1), Task("c", steps=2))
        runner.let_go()
        await asyncio.gather(a, *others)
        assert runner.passes == [["a"], ["a", "b"], ["c"], ["c"]]


async def test_different_step_counts_share_every_pass() -> None:
    tasks = [Task("b", steps=1), Task("c", steps=4), Task("d", steps=2)]
    async with an_engine(held=True) as (engine, runner):
        plug = await hold_one(engine, runner, Task("a", steps=4))
        running = await start(engine, *tasks)
        runner.let_go()
        await plug
        assert [await task for task in running] == [whole(task) for task in tasks]
        assert runner.passes == [["a"], ["a", "b", "c", "d"], ["a", "c", "d"], ["a", "c"], ["c"]]


async def test_what_cannot_share_a_pass_takes_turns() -> None:
    async with an_engine(held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=3, key="small"))
        (b,) = await start(engine, Task("b", steps=2, key="large"))
        runner.let_go()
        await asyncio.gather(a, b)
        assert runner.passes == [["a"], ["a"], ["b"], ["a"], ["b"]]


async def test_a_task_of_no_steps_runs_no_pass() -> None:
    async with an_engine() as (engine, runner):
        assert await engine.run(Task("a", steps=0)) == Result("a", ())
        assert runner.passes == []
        assert engine.stats() | {"finished": 1, "passes": 0, "active": 0} == engine.stats()


async def test_the_event_loop_is_free_during_a_pass() -> None:
    async with an_engine(held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a"))
        engine.check_health()
        assert engine.stats()["active"] == 1
        await start(engine, Task("b"))
        assert engine.stats()["waiting"] == 1
        assert not a.done()
        runner.let_go()
        await a
        assert threading.get_ident() not in runner.threads
        assert len(runner.threads) == 1


async def test_steps_are_reported_in_order_and_before_the_result() -> None:
    async with an_engine() as (engine, _):
        events: list[object] = []
        events.append(await engine.run(Task("a", steps=3), on_step=events.append))
        assert events == [StepReport(1, 3), StepReport(2, 3), StepReport(3, 3), Result("a", (0, 1, 2))]


async def test_a_preview_comes_with_its_step() -> None:
    async with an_engine() as (engine, _):
        heard: list[StepReport] = []
        await engine.run(Task("a", steps=3, preview_at=2), on_step=heard.append)
        assert [None if report.preview is None else list(report.preview) for report in heard] == [None, [2], None]


async def test_a_task_hears_its_place_while_it_waits_and_each_change_of_it() -> None:
    async with an_engine(max_rows=1, held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=2))
        (b,) = await start(engine, Task("b", steps=2))
        heard: list[StepReport] = []
        c = asyncio.create_task(engine.run(Task("c", steps=1), on_step=heard.append))
        while engine.stats()["waiting"] < 2:
            await asyncio.sleep(0)
        runner.let_go()
        await asyncio.gather(a, b, c)
        assert runner.passes == [["a"], ["a"], ["b"], ["b"], ["c"]]
        assert heard == [StepReport(0, 1, 1), StepReport(0, 1, 0), StepReport(1, 1)]


async def test_more_urgent_tasks_go_first() -> None:
    async with an_engine(max_rows=1, held=True) as (engine, runner):
        plug = await hold_one(engine, runner, Task("plug"))
        tasks = await start(engine, Task("a"), Task("b", priority=1), Task("c", priority=2))
        runner.let_go()
        await asyncio.gather(plug, *tasks)
        assert runner.passes == [["plug"], ["c"], ["b"], ["a"]]


async def test_a_stay_says_how_long_it_was_and_how_much_of_it_waiting() -> None:
    async with an_engine(max_rows=1, held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a"))
        (b,) = await start(
            engine,
            Task("b", steps=0),
        )
        (c,) = await start(engine, Task("c"))
        await asyncio.sleep(0.05)
        runner.let_go()
        await asyncio.gather(a, b, c)
        assert runner.stays["a"].queue_s < runner.stays["a"].seconds
        assert 0.05 <= runner.stays["c"].queue_s <= runner.stays["c"].seconds
        assert runner.stays["b"].queue_s == runner.stays["b"].seconds >= 0.05, "it never had a pass"


async def test_a_listener_that_raises_harms_nobody() -> None:
    def raises(report: StepReport) -> None:
        raise ValueError("listener")

    heard: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(str(context["exception"])))
    async with an_engine() as (engine, _):
        assert await engine.run(Task("a", steps=2), on_step=raises) == Result("a", (0, 1))
    assert heard == ["listener"] * 2


async def test_a_cancelled_task_leaves_before_the_next_pass_and_its_rows_go_to_the_next() -> None:
    async with an_engine(max_rows=2, held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=50, rows=2))
        (b,) = await start(engine, Task("b", steps=2, rows=2))
        a.cancel()
        with pytest.raises(asyncio.CancelledError):
            await a
        runner.let_go()
        assert await b == Result("b", (0, 1))
        assert runner.passes == [["a"], ["b"], ["b"]]
        stats = engine.stats()
        assert (stats["cancelled"], stats["max_steps_after_cancel"], stats["finished"]) == (1, 1, 1)
        assert stats["steps"] == 2, "the cancelled one takes none"
        assert (stats["active"], stats["waiting"]) == (0, 0)


async def test_the_mates_of_a_cancelled_task_do_not_notice() -> None:
    async with an_engine(held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=3))
        b, c = await start(engine, Task("b", steps=9), Task("c", steps=3))
        runner.let_go(hold_next=True)
        assert await runner.inside() == ["a", "b", "c"]
        b.cancel()
        await asyncio.wait([b])
        runner.let_go()
        assert [await a, await c] == [Result("a", (0, 1, 2)), Result("c", (0, 1, 2))]
        assert b.cancelled()
        assert runner.passes == [["a"], ["a", "b", "c"], ["a", "c"], ["c"]]
        assert engine.stats()["max_steps_after_cancel"] == 1


async def test_a_task_cancelled_while_it_waits_is_never_begun() -> None:
    async with an_engine(held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a"))
        (b,) = await start(engine, Task("b"))
        b.cancel()
        await asyncio.wait([b])
        (c,) = await start(engine, Task("c"))
        runner.let_go()
        await asyncio.gather(a, c)
        assert runner.begun == ["a", "c"]
        assert (engine.stats()["cancelled"], engine.stats()["max_steps_after_cancel"]) == (1, 0)


async def test_cancelling_a_finished_task_is_nothing() -> None:
    async with an_engine() as (engine, _):
        a = asyncio.create_task(engine.run(Task("a")))
        await a
        a.cancel()
        assert await engine.run(Task("b")) == Result("b", (0,))
        assert engine.stats()["cancelled"] == 0


@pytest.mark.parametrize("poisoned", range(4))
async def test_a_pass_that_raises_is_split_until_the_culprit_is_alone(poisoned: int) -> None:
    tasks = [Task(name, steps=3) for name in "abcd"]
    tasks[poisoned] = Task("x", steps=3, fails_in="forward", at_step=1)
    async with an_engine(held=True, max_rows=5) as (engine, runner):
        plug = await hold_one(engine, runner, Task("plug"))
        running = await start(engine, *tasks)
        runner.let_go()
        await plug
        results = await asyncio.gather(*running, return_exceptions=True)
        failure = results.pop(poisoned)
        assert isinstance(failure, ValueError) and str(failure) == "x fails in forward"
        tasks.pop(poisoned)
        assert results == [whole(task) for task in tasks]
        engine.check_health()
        stats = engine.stats()
        assert (stats["failed"], stats["finished"], stats["active"]) == (1, 4, 0)
        assert stats["split_passes"] == 2, "four, then the two with the culprit"
        assert stats["steps"] == 1 + 3 * 3 + 1


async def test_a_pass_too_large_for_the_memory_goes_through_in_parts() -> None:
    class SmallMemory(CountingRunner):
        def forward(self, states: Sequence[State]) -> list[int]:
            if len(states) > 1:
                raise MemoryError("too large")
            return super().forward(states)

    runner = SmallMemory()
    runner.held = True
    engine: Engine = StepEngine(runner, StepScheduler(Budget(4)), "test")
    async with asyncio.timeout(DEADLINE_S):
        plug = await hold_one(engine, runner, Task("plug"))
        tasks = [Task(name, steps=2) for name in "abc"]
        running = await start(engine, *tasks)
        runner.let_go()
        await plug
        assert [await task for task in running] == [whole(task) for task in tasks]
        # It is learned: no further pass of this size is tried.
        split = engine.stats()["split_passes"]
        again = await start(engine, *tasks)
        assert [await task for task in again] == [whole(task) for task in tasks]
    stats = engine.stats()
    assert (stats["failed"], stats["lowered_budgets"], stats["split_passes"]) == (0, 1, split)
    engine.close()


async def test_a_fault_that_is_none_of_memory_lowers_no_budget() -> None:
    async with an_engine(held=True) as (engine, runner):
        plug = await hold_one(engine, runner, Task("plug"))
        running = await start(engine, Task("a"), Task("b", fails_in="forward"))
        runner.let_go()
        await asyncio.gather(plug, *running, return_exceptions=True)
        await asyncio.gather(*await start(engine, *(Task(name, steps=3) for name in "abcd")))
        assert ["a", "b", "c", "d"] in runner.passes
        assert engine.stats()["lowered_budgets"] == 0


async def test_a_task_larger_than_the_memory_lowers_no_budget() -> None:
    """It fails alone; that others would fit is not known of it."""

    class Full(CountingRunner):
        def forward(self, states: Sequence[State]) -> list[int]:
            raise MemoryError

    engine: Engine = StepEngine(Full(), StepScheduler(Budget(4)), "test")
    with pytest.raises(MemoryError):
        await engine.run(Task("a"))
    assert engine.stats()["lowered_budgets"] == 0
    engine.close()


async def test_turns_are_told() -> None:
    turns: dict[str, list[bool]] = {name: [] for name in "abs"}

    def run(engine: Engine, task: Task) -> asyncio.Task[Result]:
        return asyncio.create_task(engine.run(task, on_turn=turns[task.name].append))

    async with an_engine(max_rows=2, held=True) as (engine, runner):
        plug = await hold_one(engine, runner, Task("plug", steps=2))
        a, b = run(engine, Task("a")), run(engine, Task("b"))
        s = run(engine, Task("s", alone=True))
        while engine.stats()["waiting"] < 3:
            await asyncio.sleep(0)
        runner.let_go()
        await asyncio.gather(plug, a, b, s)
        # The suspect waits for what is under way, and what came with it waits for the suspect.
        assert runner.passes == [["plug"], ["plug"], ["s"], ["a", "b"]]
    assert turns == {"a": [True, False], "b": [True, False], "s": [True, False]}


async def test_who_is_taken_in_at_once_is_told_nothing_but_for_suspects() -> None:
    turns: list[bool] = []
    async with an_engine() as (engine, _):
        await engine.run(Task("a", steps=3), on_turn=turns.append)
        assert turns == []
        await engine.run(Task("a", steps=3, alone=True), on_turn=turns.append)
        assert turns == [False]


async def test_a_pass_that_hangs_fails_health_and_its_tasks_can_be_abandoned() -> None:
    now = 0.0
    runner = CountingRunner()
    runner.held = True
    engine: Engine = StepEngine(
        runner, StepScheduler(Budget(4)), "test", clock=lambda: now, watch=Watch(60, clock=lambda: now)
    )
    async with asyncio.timeout(DEADLINE_S):
        a = await hold_one(engine, runner, Task("a"))
        (b,) = await start(engine, Task("b"))
        now = 59.0
        engine.check_health()
        assert engine.overdue() is None
        now = 61.0
        with pytest.raises(StageUnavailable, match="under way for 61 s"):
            engine.check_health()
        reason = engine.overdue()
        assert reason is not None
        with pytest.raises(StageUnavailable):
            await engine.run(Task("c"))
        engine.abandon(reason)
        for task in (a, b):
            with pytest.raises(StageUnavailable, match="under way"):
                await task
        runner.let_go()
        engine.join()  # the pass ends after all: the thread ends quietly


async def test_work_that_is_shut_down_in_order_says_so() -> None:
    async with an_engine(held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=5))
        engine.close()
        runner.let_go()
        with pytest.raises(ReplicaLeaving):
            await a
        with pytest.raises(ReplicaLeaving):
            await engine.run(Task("late"))


@pytest.mark.parametrize("where", ["begin", "advance", "finish"])
async def test_a_task_whose_own_work_raises_fails_alone(where: str) -> None:
    async with an_engine(held=True) as (engine, runner):
        plug = await hold_one(engine, runner, Task("plug", steps=3))
        bad, good = await start(engine, Task("bad", steps=2, fails_in=where), Task("good", steps=2))
        runner.let_go()
        with pytest.raises(ValueError, match=f"bad fails in {where}"):
            await bad
        assert [await plug, await good] == [Result("plug", (0, 1, 2)), Result("good", (0, 1))]
        engine.check_health()
        assert (engine.stats()["failed"], engine.stats()["active"]) == (1, 0)


async def test_a_task_larger_than_a_pass_fails_alone() -> None:
    async with an_engine(max_rows=2) as (engine, _):
        with pytest.raises(ValueError, match="3 rows"):
            await engine.run(Task("a", rows=3))
        assert await engine.run(Task("b", rows=2)) == Result("b", (0,))


@pytest.mark.parametrize("where", ["begin", "forward", "advance", "finish"])
async def test_a_broken_device_fails_everybody_as_retryable(where: str) -> None:
    async with an_engine(held=True) as (engine, runner):
        plug = await hold_one(engine, runner, Task("plug", steps=9))
        running = await start(
            engine, Task("a", steps=9), Task("bad", fails_in=where, fatal=True), Task("b", steps=9), Task("c", steps=9)
        )
        runner.let_go()
        for task in (plug, *running):
            with pytest.raises(StageUnavailable) as caught:
                await task
            assert caught.value.retry_after_s is not None
        with pytest.raises(StageUnavailable, match="BrokenDevice"):
            engine.check_health()
        with pytest.raises(StageUnavailable):
            await engine.run(Task("late"))
        assert (engine.stats()["active"], engine.stats()["waiting"]) == (0, 0)


async def test_who_waits_when_the_device_breaks_fails_too() -> None:
    async with an_engine(held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", fails_in="forward", fatal=True))
        (b,) = await start(engine, Task("b"))
        runner.let_go()
        for task in (a, b):
            with pytest.raises(StageUnavailable):
                await task
        assert runner.begun == ["a"]


async def test_closing_ends_after_the_pass_and_fails_who_is_left() -> None:
    async with an_engine(held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=5))
        (b,) = await start(engine, Task("b"))
        engine.close()
        runner.let_go()
        for task in (a, b):
            with pytest.raises(StageUnavailable):
                await task
        assert runner.passes == [["a"]]
        with pytest.raises(StageUnavailable):
            await engine.run(Task("late"))


async def test_an_idle_engine_closes() -> None:
    async with an_engine() as (engine, _):
        await engine.run(Task("a"))
        engine.close()
        with pytest.raises(StageUnavailable):  # now, or once the thread has ended
            await engine.run(Task("late"))


async def test_the_counters_count() -> None:
    async with an_engine(max_rows=4, held=True) as (engine, runner):
        a = await hold_one(engine, runner, Task("a", steps=3, rows=2))
        (b,) = await start(engine, Task("b", steps=1, rows=2))
        runner.let_go()
        await asyncio.gather(a, b)
        stats = engine.stats()
        by_rows = stats.pop("by_rows")
        assert {rows: times["passes"] for rows, times in by_rows.items()} == {2: 2, 4: 1}
        assert 0 < sum(times["seconds"] for times in by_rows.values()) == pytest.approx(stats["forward_s"])
        assert all(0 <= times["cpu_s"] <= times["seconds"] for times in by_rows.values()), "held, it computes nothing"
        assert 0 < stats.pop("forward_s") <= stats.pop("busy_s")
        assert stats == {
            "max_rows": 4,
            "passes": 3,
            "rows": 2 + 4 + 2,
            "steps": 4,
            "full_passes": 1,
            "split_passes": 0,
            "lowered_budgets": 0,
            "finished": 2,
            "failed": 0,
            "cancelled": 0,
            "max_steps_after_cancel": 0,
            "active": 0,
            "waiting": 0,
        }


async def test_a_caller_whose_event_loop_is_gone_does_not_stop_the_engine() -> None:
    async with an_engine(held=True) as (engine, runner):
        abandoned: list[asyncio.Task[Result]] = []

        def in_a_loop_of_its_own() -> None:
            loop = asyncio.new_event_loop()
            abandoned.append(loop.create_task(engine.run(Task("gone", steps=2))))
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

        plug = await hold_one(engine, runner, Task("plug", steps=2))
        await asyncio.to_thread(in_a_loop_of_its_own)
        runner.let_go()
        assert await plug == Result("plug", (0, 1))
        assert await engine.run(Task("after")) == Result("after", (0,))
        assert "gone" in runner.begun
        abandoned[0]._log_destroy_pending = False  # type: ignore[attr-defined]


async def test_a_failed_pass_lets_go_of_its_memory_before_its_halves_run() -> None:
    """Out of memory is mended by smaller passes alone if what the large one had allocated is gone by then."""

    class Activations:
        pass

    left_behind: list[bool] = []
    alive: list[weakref.ref[Activations]] = []

    class FullDevice(CountingRunner):
        def forward(self, states: Sequence[State]) -> list[int]:
            left_behind.append(any(reference() is not None for reference in alive))
            activations = Activations()
            alive.append(weakref.ref(activations))
            if len(states) > 1:
                raise MemoryError
            return super().forward(states)

        def begin(self, task: Task) -> State:
            assert all_have_arrived.wait(DEADLINE_S)
            return super().begin(task)

    all_have_arrived = threading.Event()
    engine: Engine = StepEngine(FullDevice(), StepScheduler(Budget(4)), "test")
    tasks = await start(engine, *(Task(name, steps=2) for name in "abcd"))
    all_have_arrived.set()
    await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
    assert engine.stats()["split_passes"] >= 1
    assert not any(left_behind)
    engine.close()
