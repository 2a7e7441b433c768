"""Batching for the stages that take one forward pass an item: text encoding and decoding.

Ray's `@serve.batch` seals a batch before the replica is free, so under steady load it runs batches of
one. Here a queue fills while the device is busy and is taken when it frees up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.request.errors import StageUnavailable
from serve_app.runtime.scheduling import Job, StepScheduler
from serve_app.runtime.tasks import WORD_LEAVES_S, OnTurn, Urgency
from serve_app.runtime.watch import Watch

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
KeyT = TypeVar("KeyT", bound=Hashable)


_AT_LEISURE = Urgency()
logger = logging.getLogger("ray.serve")


@dataclass(eq=False)
class _Entry(Generic[ItemT, ResultT]):
    item: ItemT
    future: asyncio.Future[ResultT]
    on_turn: OnTurn | None
    alone: bool
    told: bool = False  # that it waits


class MicroBatcher(Generic[ItemT, ResultT]):
    """Runs `run(items)` on one thread, over waiting items of one key at a time.

    A `StepScheduler` chooses them, as it does for a denoiser: an item is a job of one step and one row. One whose
    caller went away before its batch was formed is dropped. A batch that raises is run again in halves, so that one
    item's fault is not its mates'.
    """

    def __init__(
        self,
        run: Callable[[Sequence[ItemT]], Sequence[ResultT]],
        scheduler: StepScheduler,
        *,
        key: Callable[[ItemT], Hashable],
        pixels: Callable[[ItemT], int] = lambda item: 0,
        is_fatal: Callable[[Exception], bool],
        is_out_of_memory: Callable[[Exception], bool] = lambda error: False,
        watch: Watch | None = None,
        name: str,
    ) -> None:
        self._run = run
        self._scheduler = scheduler
        self._key = key
        self._pixels = pixels
        self._is_fatal = is_fatal
        self._is_out_of_memory = is_out_of_memory
        self._watch = watch or Watch()
        self._waiting: dict[str, _Entry[ItemT, ResultT]] = {}
        self._running: list[_Entry[ItemT, ResultT]] = []
        self._next_id = 0
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-batch")
        self._fault: BaseException | None = None
        self._counts = {"batches": 0, "items": 0, "failed": 0, "cancelled": 0, "lowered_budgets": 0}
        self._out_of_memory = False  # in the batch under way, or a part of it
        self._largest_part = 0  # items of the largest part of it that went through

    async def submit(
        self, item: ItemT, urgency: Urgency = _AT_LEISURE, *, alone: bool = False, on_turn: OnTurn | None = None
    ) -> ResultT:
        """The result for one item. Raises what its own work raised, or `StageUnavailable`.

        `alone`: in a batch of its own. `on_turn(waiting)` is called, on the event loop, when a batch leaves the item
        out, and when it is then taken in; of one that runs alone always when it is taken in.
        """
        self.check_health()
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        job_id, self._next_id = str(self._next_id), self._next_id + 1
        deadline = urgency.deadline(time.monotonic())
        self._scheduler.add(
            Job(
                job_id,
                self._key(item),
                pixels=self._pixels(item),
                priority=urgency.priority,
                deadline=deadline,
                alone=alone,
            )
        )
        entry = self._waiting[job_id] = _Entry(item, future, on_turn, alone)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        elif self._running:
            _tell_waiting(entry)
        return await future

    def check_health(self) -> None:
        """Raises `StageUnavailable` when no item can run here any more."""
        if self._fault is not None:
            raise StageUnavailable(f"this replica's device is lost: {self._fault!r}", retry_after_s=1)
        if (overdue := self._watch.overdue()) is not None:
            raise StageUnavailable(overdue, retry_after_s=1)

    def overdue(self) -> str | None:
        """One line where the batch under way counts as hung. For any thread."""
        return self._watch.overdue()

    def abandon(self, reason: str) -> None:
        """Fails all items as unavailable, on the event loop, while the thread hangs. The process must end then."""
        self._lose(StageUnavailable(reason, retry_after_s=1))

    def stats(self) -> dict[str, int]:
        """Counters since the start, and the items that wait now."""
        return self._counts | {"waiting": len(self._waiting)}

    async def _work(self) -> None:
        try:
            await self._run_batches()
        except BaseException as error:
            # Nothing above should raise; if it does, nobody may wait for ever.
            self._lose(error)
            raise

    def _lose(self, error: BaseException) -> None:
        self._fault = error
        lost = StageUnavailable(f"this replica can't work any more: {error!r}", retry_after_s=1)
        for entry in [*self._running, *self._waiting.values()]:
            if not entry.future.done():
                entry.future.set_exception(lost)

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            self._running = batch
            items = [entry.item for entry in batch]
            if batch[0].alone and batch[0].on_turn is not None:
                await asyncio.sleep(WORD_LEAVES_S)
            started = time.monotonic()
            outcomes = await loop.run_in_executor(self._thread, self._watched, items)
            self._scheduler.observe(time.monotonic() - started)
            for entry, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, _Failure):
                    self._counts["failed"] += 1
                if entry.future.done():
                    continue  # its caller went away during the pass
                if isinstance(outcome, _Failure):
                    entry.future.set_exception(outcome.error)
                else:
                    entry.future.set_result(outcome)
            self._running = []

    def _take(self) -> list[_Entry[ItemT, ResultT]]:
        for job_id in [job_id for job_id, entry in self._waiting.items() if entry.future.done()]:
            self._scheduler.remove(job_id)
            del self._waiting[job_id]
            self._counts["cancelled"] += 1
        batch = self._scheduler.next_batch()
        if batch is None:
            return []
        for job in batch.jobs:
            self._scheduler.remove(job.id)
        taken = [self._waiting.pop(job.id) for job in batch.jobs]
        for entry in taken:
            if entry.on_turn is not None and (entry.told or entry.alone):
                entry.on_turn(False)
        for entry in self._waiting.values():
            _tell_waiting(entry)
        return taken

    def _watched(self, items: list[ItemT]) -> list[ResultT | _Failure]:
        key = self._key(items[0])
        self._out_of_memory, self._largest_part = False, 0
        with self._watch.over((key, len(items))):
            outcomes = self._attempt(items)
        if self._out_of_memory and self._largest_part and len(items) > 1:
            self._lower_budget(key, len(items))
        return outcomes

    def _lower_budget(self, key: Hashable, items: int) -> None:
        if self._scheduler.lower(key, self._largest_part):
            self._counts["lowered_budgets"] += 1
            logger.warning(
                "a batch of %d of %s does not fit into the memory: from now on at most %d",
                items,
                key,
                self._largest_part,
            )

    def _attempt(self, items: list[ItemT]) -> list[ResultT | _Failure]:
        if self._fault is not None:
            lost = StageUnavailable(f"this replica's device is lost: {self._fault!r}", retry_after_s=1)
            return [_Failure(lost) for _ in items]
        results: list[ResultT] | None
        try:
            results = list(self._run(items))
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for {len(items)} items")
        except Exception as error:
            self._out_of_memory |= self._is_out_of_memory(error)
            # The traceback keeps all that the failed pass had allocated: it must be gone before the halves run.
            error.__traceback__ = None
            if self._is_fatal(error):
                self._fault = error
            elif len(items) == 1:
                return [_Failure(error)]
            results = None
        if results is None:
            middle = len(items) // 2 if self._fault is None else len(items)
            return self._attempt(items[:middle]) + (self._attempt(items[middle:]) if items[middle:] else [])
        self._largest_part = max(self._largest_part, len(items))
        self._counts["batches"] += 1
        self._counts["items"] += len(items)
        return list(results)


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _tell_waiting(entry: _Entry[ItemT, ResultT]) -> None:
    if entry.on_turn is not None and not entry.told:
        entry.told = True
        entry.on_turn(True)


class SharedCache(Generic[KeyT, ResultT]):
    """Keeps the most recently used results, and computes each only once however many ask at a time.

    A computation that others share outlives the cancellation of any one of them; it is cancelled when
    nobody waits for it any more. Failures are not kept.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._kept: OrderedDict[KeyT, ResultT] = OrderedDict()
        self._running: dict[tuple[KeyT, int, bool], _Shared[ResultT]] = {}
        self._counts = {"cache_hits": 0, "cache_misses": 0}

    def stats(self) -> dict[str, int]:
        return self._counts | {"cache_entries": len(self._kept)}

    async def get(
        self,
        key: KeyT,
        compute: Callable[[OnTurn], Awaitable[ResultT]],
        priority: int = 0,
        *,
        alone: bool = False,
        on_turn: OnTurn | None = None,
    ) -> ResultT:
        """The result for `key`, from the cache, from a computation under way, or from a new one.

        Those of one priority share a computation: who is more urgent does not wait with who is less, and who must be
        run `alone` shares only with its like. `compute` is given what to call with each turn of its work
        (`MicroBatcher.submit`); all who share it get those turns by `on_turn`, who joins late the last one at once.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            self._counts["cache_hits"] += 1
            return self._kept[key]
        group = (key, priority, alone)
        shared = self._running.get(group)
        if shared is None:
            self._counts["cache_misses"] += 1
            shared = self._running[group] = _Shared()
            shared.task = asyncio.ensure_future(compute(shared.turn))
        else:
            self._counts["cache_hits"] += 1
        shared.waiters += 1
        if on_turn is not None:
            shared.follow(on_turn)
        try:
            result = await asyncio.shield(shared.task)
        finally:
            shared.waiters -= 1
            if on_turn is not None:
                shared.followers.remove(on_turn)
            if shared.waiters == 0:
                shared.task.cancel()  # no effect where it is done
            if (shared.task.done() or shared.waiters == 0) and self._running.get(group) is shared:
                del self._running[group]
        self._keep(key, result)
        return result

    def _keep(self, key: KeyT, result: ResultT) -> None:
        if self._max_entries:
            self._kept[key] = result
            self._kept.move_to_end(key)
            while len(self._kept) > self._max_entries:
                self._kept.popitem(last=False)


class _Shared(Generic[ResultT]):
    task: asyncio.Future[ResultT]

    def __init__(self) -> None:
        self.waiters = 0
        self.followers: list[OnTurn] = []
        self._waits: bool | None = None  # as last told

    def turn(self, waits: bool) -> None:
        self._waits = waits
        for follower in self.followers:
            follower(waits)

    def follow(self, on_turn: OnTurn) -> None:
        self.followers.append(on_turn)
        if self._waits is not None:
            on_turn(self._waits)
