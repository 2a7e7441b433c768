"""The step loop of a denoiser: one thread that joins what waits, runs a forward pass, lets leave what is done.

It knows neither diffusers nor Ray: a `Runner` does the tensor work, a `StepScheduler` the choosing.
All of both happens on the engine's own thread, so the event loop stays free to answer health checks
and to take in, report and cancel tasks while a pass runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from serve_app.request.errors import StageUnavailable
from serve_app.runtime.scheduling import Batch, Job, StepScheduler
from serve_app.runtime.stats import EngineStats
from serve_app.runtime.tasks import WORD_LEAVES_S, OnStep, OnTurn, StepReport, TimeInStage
from serve_app.runtime.watch import Watch

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Floats

TaskT = TypeVar("TaskT")
TaskT_contra = TypeVar("TaskT_contra", contravariant=True)
StateT = TypeVar("StateT")
OutputT = TypeVar("OutputT")
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


logger = logging.getLogger("ray.serve")


class ReplicaLeaving(StageUnavailable):
    """The replica is shut down in order: no work of its own harmed it."""


class Runner(Protocol[TaskT_contra, StateT, OutputT, ResultT_co]):
    """The tensor work of a step loop. Every method runs on the engine's thread."""

    def begin(self, task: TaskT_contra) -> StateT:
        """The task's state before its first step. Until its first pass it holds no memory of the device."""

    def job(self, state: StateT, job_id: str, arrived: float) -> Job:
        """What the task asks of the scheduler; its `steps` may be 0. `arrived`: when, on the scheduler's clock."""

    def forward(self, states: Sequence[StateT]) -> Sequence[OutputT]:
        """One forward pass over all states. It may raise; it must not change a state, but for where its data is."""

    def advance(self, state: StateT, output: OutputT) -> Floats | None:
        """Moves one state on by one step; returns a preview where the task asked for one of this step."""

    def finish(self, state: StateT, time: TimeInStage) -> ResultT_co:
        """The result after the last step."""

    def is_fatal(self, error: Exception) -> bool:
        """Whether no further pass can succeed in this process (a broken CUDA context)."""

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether a smaller pass may succeed where this one failed."""


@dataclass(eq=False)
class _Entry(Generic[TaskT, StateT, ResultT]):
    task: TaskT
    future: asyncio.Future[ResultT]
    loop: asyncio.AbstractEventLoop
    on_step: OnStep | None
    on_turn: OnTurn | None
    id: str
    arrived: float
    started: float | None = None  # its first pass
    state: StateT | None = None
    steps: int = 0
    taken: int = 0
    position: int | None = None  # as last told
    cancelled: bool = False
    steps_after_cancel: int = field(default=0)


class StepEngine(Generic[TaskT, StateT, OutputT, ResultT]):
    """Runs tasks step by step, sharing every forward pass among all that fit."""

    def __init__(
        self,
        runner: Runner[TaskT, StateT, OutputT, ResultT],
        scheduler: StepScheduler,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        watch: Watch | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._clock = clock
        self._watch = watch or Watch(clock=clock)
        self._wake = threading.Condition()
        self._arrived: list[_Entry[TaskT, StateT, ResultT]] = []
        self._entries: dict[str, _Entry[TaskT, StateT, ResultT]] = {}
        self._newcomers: set[str] = set()  # entries in no pass yet, and not told that they wait
        self._out_of_memory = False  # in the pass under way, or a part of it
        self._largest_part = 0  # rows of the largest part of it that went through
        self._next_id = 0
        self._closing = False
        self._fault: BaseException | None = None
        self._stats = EngineStats(max_rows=scheduler.budget.rows)
        self._thread = threading.Thread(target=self._loop, name=f"{name}-engine", daemon=True)
        self._thread.start()

    async def run(self, task: TaskT, on_step: OnStep | None = None, on_turn: OnTurn | None = None) -> ResultT:
        """Runs one task to its result.

        `on_turn(waiting)` is called when a first pass leaves the task out, and when it is then taken in; of a task that
        runs alone always when it begins. Cancelling the caller frees the task's rows by the next pass. Raises what the
        task's own work raised, or `StageUnavailable` when the engine itself is dead: the task may be run elsewhere.
        """
        loop = asyncio.get_running_loop()
        entry: _Entry[TaskT, StateT, ResultT] = _Entry(
            task, loop.create_future(), loop, on_step, on_turn, id=str(self._next_id), arrived=self._clock()
        )
        self._next_id += 1
        with self._wake:
            self.check_health()  # under the lock, so that no entry arrives at an engine that just died
            self._arrived.append(entry)
            self._wake.notify()
        try:
            return await entry.future
        except asyncio.CancelledError:
            entry.cancelled = True
            raise

    def check_health(self) -> None:
        """Raises `StageUnavailable` when no task can run here any more."""
        if isinstance(self._fault, ReplicaLeaving):
            raise ReplicaLeaving(self._fault.message, retry_after_s=1)
        if self._fault is not None or not self._thread.is_alive():
            raise StageUnavailable(f"the engine of this replica has stopped: {self._fault!r}", retry_after_s=1)
        if (overdue := self._watch.overdue()) is not None:
            raise StageUnavailable(overdue, retry_after_s=1)

    def overdue(self) -> str | None:
        """One line where the pass under way counts as hung. For any thread."""
        return self._watch.overdue()

    def abandon(self, reason: str) -> None:
        """Fails all tasks as unavailable, from any thread, while the engine's own hangs. The process must end then."""
        self._die(StageUnavailable(reason, retry_after_s=1))

    def stats(self) -> dict[str, Any]:
        """The counters of `EngineStats`, and the tasks in the engine now."""
        with self._wake:
            waiting = len(self._arrived)
        active = len(self._entries)
        return asdict(self._stats) | {"active": active, "waiting": waiting}

    def close(self) -> None:
        """Ends the thread after the pass it is in; tasks still in the engine fail as unavailable."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def join(self) -> None:
        """Waits for the end of the thread, after `close`."""
        self._thread.join()

    # What follows runs on the engine's thread.

    def _loop(self) -> None:
        try:
            while self._wait_for_work():
                started = self._clock()
                self._admit_arrived()
                self._step()
                self._stats.busy_s += self._clock() - started
            self._die(ReplicaLeaving("the replica is shutting down", retry_after_s=1))
        except BaseException as error:
            self._die(error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._arrived or self._entries or self._closing):
                self._wake.wait()
            return not self._closing

    def _admit_arrived(self) -> None:
        with self._wake:
            arrived, self._arrived = self._arrived, []
            # All of them before any is admitted: a fatal error in one must not strand the others.
            self._entries |= {entry.id: entry for entry in arrived}
        if arrived:
            with self._watch.over("admission"):
                for entry in arrived:
                    self._admit(entry)

    def _admit(self, entry: _Entry[TaskT, StateT, ResultT]) -> None:
        if entry.cancelled:
            self._leave(entry)
            self._stats.cancelled += 1
            return
        try:
            state = self._runner.begin(entry.task)
            job = self._runner.job(state, entry.id, entry.arrived)
            self._scheduler.add(job)
            entry.state, entry.steps = state, job.steps
            if entry.on_turn is not None:
                self._newcomers.add(entry.id)
        except Exception as error:
            if self._runner.is_fatal(error):
                raise
            self._fail(entry, error)
            return
        if entry.steps == 0:
            self._finish(entry)

    def _step(self) -> None:
        self._drop_cancelled()
        batch = self._scheduler.next_batch()
        if batch is None:
            return
        started = self._clock()
        entries = [self._entries[job.id] for job in batch.jobs]
        for entry in entries:
            if entry.started is None:
                entry.started = started
                self._tell_begun(entry, batch.jobs[0].alone)
        if self._newcomers:
            self._tell_left_out()
        self._tell_positions(batch)
        with self._watch.over((batch.jobs[0].key, batch.rows)):
            outputs = self._timed_forward(entries, batch)
            for entry, output in outputs:
                self._advance(entry, output)
        self._scheduler.observe(self._clock() - started)

    def _tell_begun(self, entry: _Entry[TaskT, StateT, ResultT], alone: bool) -> None:
        if entry.on_turn is None:
            return
        if alone or entry.id not in self._newcomers:  # else nobody said that it waits
            self._report(entry, entry.on_turn, False)
        self._newcomers.discard(entry.id)
        if alone:
            time.sleep(WORD_LEAVES_S)

    def _tell_left_out(self) -> None:
        for job_id in self._newcomers:
            entry = self._entries[job_id]
            assert entry.on_turn is not None
            self._report(entry, entry.on_turn, True)
        self._newcomers.clear()

    def _tell_positions(self, batch: Batch) -> None:
        for position, job in enumerate(batch.waiting):
            entry = self._entries[job.id]
            if entry.on_step is not None and entry.started is None and entry.position != position:
                entry.position = position
                self._report(entry, entry.on_step, StepReport(0, entry.steps, position))

    def _drop_cancelled(self) -> None:
        for entry in [entry for entry in self._entries.values() if entry.cancelled]:
            self._leave(entry)
            self._stats.cancelled += 1
            self._stats.max_steps_after_cancel = max(self._stats.max_steps_after_cancel, entry.steps_after_cancel)

    def _timed_forward(
        self, entries: list[_Entry[TaskT, StateT, ResultT]], batch: Batch
    ) -> list[tuple[_Entry[TaskT, StateT, ResultT], OutputT]]:
        splits = self._stats.split_passes
        started, cpu_started = self._clock(), time.thread_time()
        self._out_of_memory, self._largest_part = False, 0
        outputs = self._forward(entries, batch.jobs)
        cpu_s, seconds = time.thread_time() - cpu_started, self._clock() - started
        self._stats.forward_s += seconds
        if outputs and self._stats.split_passes == splits:
            self._stats.count_pass(batch.rows, seconds, cpu_s)
        if self._out_of_memory and outputs and len(entries) > 1:
            self._lower_budget(batch)
        return outputs

    def _lower_budget(self, batch: Batch) -> None:
        key = batch.jobs[0].key
        if self._scheduler.lower(key, self._largest_part):
            self._stats.lowered_budgets += 1
            logger.warning(
                "a pass of %d rows of size %s does not fit into the memory: from now on at most %d",
                batch.rows,
                key,
                self._largest_part,
            )

    def _forward(
        self, entries: list[_Entry[TaskT, StateT, ResultT]], jobs: Sequence[Job]
    ) -> list[tuple[_Entry[TaskT, StateT, ResultT], OutputT]]:
        # A pass that raises is run again in halves, so that one task's fault (or a pass too large for
        # the memory left) is not its batch mates'.
        outputs: Sequence[OutputT] | None = None
        try:
            outputs = self._runner.forward([entry.state for entry in entries if entry.state is not None])
        except Exception as error:
            if self._runner.is_fatal(error):
                raise
            self._out_of_memory |= self._runner.is_out_of_memory(error)
            # The traceback keeps all that the failed pass had allocated: it must be gone before the halves run.
            error.__traceback__ = None
            if len(entries) == 1:
                self._fail(entries[0], error)
                return []
        if outputs is None:
            self._stats.split_passes += 1
            middle = len(entries) // 2
            return self._forward(entries[:middle], jobs[:middle]) + self._forward(entries[middle:], jobs[middle:])
        rows = sum(job.rows for job in jobs)
        self._largest_part = max(self._largest_part, rows)
        self._stats.passes += 1
        self._stats.rows += rows
        self._stats.full_passes += rows == self._scheduler.budget.rows
        return list(zip(entries, outputs, strict=True))

    def _advance(self, entry: _Entry[TaskT, StateT, ResultT], output: OutputT) -> None:
        if entry.cancelled:
            entry.steps_after_cancel += 1
            return  # dropped before the next pass
        state = entry.state
        assert state is not None
        try:
            preview = self._runner.advance(state, output)
        except Exception as error:
            if self._runner.is_fatal(error):
                raise
            self._fail(entry, error)
            return
        entry.taken += 1
        self._stats.steps += 1
        if entry.on_step is not None:
            self._report(entry, entry.on_step, StepReport(entry.taken, entry.steps, preview=preview))
        if entry.taken == entry.steps:
            self._finish(entry)

    def _finish(self, entry: _Entry[TaskT, StateT, ResultT]) -> None:
        assert entry.state is not None
        try:
            now = self._clock()
            queue_s = (now if entry.started is None else entry.started) - entry.arrived
            result = self._runner.finish(entry.state, TimeInStage(queue_s, now - entry.arrived))
        except Exception as error:
            if self._runner.is_fatal(error):
                raise
            self._fail(entry, error)
            return
        self._leave(entry)
        self._stats.finished += 1
        self._report(entry, _set_result, entry.future, result)

    def _fail(self, entry: _Entry[TaskT, StateT, ResultT], error: Exception) -> None:
        self._leave(entry)
        self._stats.failed += 1
        self._report(entry, _set_exception, entry.future, error)

    def _leave(self, entry: _Entry[TaskT, StateT, ResultT]) -> None:
        del self._entries[entry.id]
        self._newcomers.discard(entry.id)
        if entry.state is not None:
            self._scheduler.remove(entry.id)
            entry.state = None  # frees its tensors now, not when its owner gets round to it

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self._fault = error
            stranded = [*self._entries.values(), *self._arrived]
            self._entries.clear()
            self._arrived.clear()
        kind = ReplicaLeaving if isinstance(error, ReplicaLeaving) else StageUnavailable
        for entry in stranded:
            lost = kind(f"the engine of this replica has stopped: {error!r}", retry_after_s=1)
            self._report(entry, _set_exception, entry.future, lost)

    @staticmethod
    def _report(entry: _Entry[TaskT, StateT, ResultT], callback: Callable[..., None], *args: object) -> None:
        try:
            entry.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass  # the event loop is closed: nobody is left to be told


def _set_result(future: asyncio.Future[ResultT], result: ResultT) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[ResultT], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
