"""Batching for the stages that take one forward pass an item: text encoding and decoding.

Ray's `@serve.batch` seals a batch before the replica is free, so under steady load it runs batches of
one. Here a queue fills while the device is busy and is taken when it frees up.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.request.errors import StageUnavailable
from serve_app.runtime.scheduling import Job, StepScheduler
from serve_app.runtime.tasks import Urgency

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
KeyT = TypeVar("KeyT", bound=Hashable)

_AT_LEISURE = Urgency()


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
        name: str,
    ) -> None:
        self._run = run
        self._scheduler = scheduler
        self._key = key
        self._pixels = pixels
        self._is_fatal = is_fatal
        self._waiting: dict[str, tuple[ItemT, asyncio.Future[ResultT]]] = {}
        self._running: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._next_id = 0
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-batch")
        self._fault: BaseException | None = None
        self._counts = {"batches": 0, "items": 0, "failed": 0, "cancelled": 0}

    async def submit(self, item: ItemT, urgency: Urgency = _AT_LEISURE) -> ResultT:
        """The result for one item. Raises what its own work raised, or `StageUnavailable`."""
        self.check_health()
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        job_id, self._next_id = str(self._next_id), self._next_id + 1
        deadline = urgency.deadline(time.monotonic())
        self._scheduler.add(
            Job(job_id, self._key(item), pixels=self._pixels(item), priority=urgency.priority, deadline=deadline)
        )
        self._waiting[job_id] = (item, future)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def check_health(self) -> None:
        """Raises `StageUnavailable` when no item can run here any more."""
        if self._fault is not None:
            raise StageUnavailable(f"this replica's device is lost: {self._fault!r}", retry_after_s=1)

    def stats(self) -> dict[str, int]:
        """Counters since the start, and the items that wait now."""
        return self._counts | {"waiting": len(self._waiting)}

    async def _work(self) -> None:
        try:
            await self._run_batches()
        except BaseException as error:
            # Nothing above should raise; if it does, nobody may wait for ever.
            self._fault = error
            lost = StageUnavailable(f"this replica can't work any more: {error!r}", retry_after_s=1)
            for _, future in [*self._running, *self._waiting.values()]:
                if not future.done():
                    future.set_exception(lost)
            raise

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            self._running = batch
            items = [item for item, _ in batch]
            started = time.monotonic()
            outcomes = await loop.run_in_executor(self._thread, self._attempt, items)
            self._scheduler.observe(time.monotonic() - started)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, _Failure):
                    self._counts["failed"] += 1
                if future.done():
                    continue  # its caller went away during the pass
                if isinstance(outcome, _Failure):
                    future.set_exception(outcome.error)
                else:
                    future.set_result(outcome)
            self._running = []

    def _take(self) -> list[tuple[ItemT, asyncio.Future[ResultT]]]:
        for job_id in [job_id for job_id, (_, future) in self._waiting.items() if future.done()]:
            self._scheduler.remove(job_id)
            del self._waiting[job_id]
            self._counts["cancelled"] += 1
        batch = self._scheduler.next_batch()
        if batch is None:
            return []
        for job in batch.jobs:
            self._scheduler.remove(job.id)
        return [self._waiting.pop(job.id) for job in batch.jobs]

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
        self._counts["batches"] += 1
        self._counts["items"] += len(items)
        return list(results)


@dataclass(frozen=True)
class _Failure:
    error: Exception


class SharedCache(Generic[KeyT, ResultT]):
    """Keeps the most recently used results, and computes each only once however many ask at a time.

    A computation that others share outlives the cancellation of any one of them; it is cancelled when
    nobody waits for it any more. Failures are not kept.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._kept: OrderedDict[KeyT, ResultT] = OrderedDict()
        self._running: dict[tuple[KeyT, int], _Shared[ResultT]] = {}
        self._counts = {"cache_hits": 0, "cache_misses": 0}

    def stats(self) -> dict[str, int]:
        return self._counts | {"cache_entries": len(self._kept)}

    async def get(self, key: KeyT, compute: Callable[[], Awaitable[ResultT]], priority: int = 0) -> ResultT:
        """The result for `key`, from the cache, from a computation under way, or from a new one.

        Those of one priority share a computation: who is more urgent does not wait with who is less.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            self._counts["cache_hits"] += 1
            return self._kept[key]
        shared = self._running.get((key, priority))
        if shared is None:
            self._counts["cache_misses"] += 1
            shared = self._running[key, priority] = _Shared(asyncio.ensure_future(compute()))
        else:
            self._counts["cache_hits"] += 1
        shared.waiters += 1
        try:
            result = await asyncio.shield(shared.task)
        finally:
            shared.waiters -= 1
            if shared.waiters == 0:
                shared.task.cancel()  # no effect where it is done
            if (shared.task.done() or shared.waiters == 0) and self._running.get((key, priority)) is shared:
                del self._running[key, priority]
        self._keep(key, result)
        return result

    def _keep(self, key: KeyT, result: ResultT) -> None:
        if self._max_entries:
            self._kept[key] = result
            self._kept.move_to_end(key)
            while len(self._kept) > self._max_entries:
                self._kept.popitem(last=False)


@dataclass
class _Shared(Generic[ResultT]):
    task: asyncio.Future[ResultT]
    waiters: int = 0
