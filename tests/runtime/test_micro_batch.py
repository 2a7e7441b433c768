from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from serve_app.request.errors import StageUnavailable
from serve_app.runtime.micro_batch import MicroBatcher, SharedCache
from serve_app.runtime.scheduling import Budget, StepScheduler
from serve_app.runtime.tasks import OnTurn, Urgency
from serve_app.runtime.watch import Watch

Compute = Callable[[OnTurn], Awaitable[str]]

DEADLINE_S = 20  # of a wait that ends at once unless something is broken


class BrokenDevice(Exception):
    pass


class Device:
    """Upper-cases texts, a batch at a time. "bad" fails, "fatal" breaks it, "short" loses a result."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.held = False
        self._inside: queue.Queue[list[str]] = queue.Queue()
        self._go = threading.Semaphore(0)

    def run(self, items: Sequence[str]) -> list[str]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        if self.held:
            self._inside.put(list(items))
            assert self._go.acquire(timeout=DEADLINE_S)
        if "fatal" in items:
            raise BrokenDevice("lost")
        if "bad" in items:
            raise ValueError("bad item")
        return [item.upper() for item in items if item != "short"]

    async def inside(self) -> list[str]:
        return await asyncio.to_thread(self._inside.get, timeout=DEADLINE_S)

    def let_go(self) -> None:
        self.held = False
        self._go.release()


@asynccontextmanager
async def a_batcher(*, max_batch_size: int = 8) -> AsyncIterator[tuple[MicroBatcher[str, str], Device]]:
    """A batcher over a device; the key of an item is its length where it begins with a digit."""
    device = Device()
    batcher = MicroBatcher(
        device.run,
        StepScheduler(Budget(max_batch_size)),
        key=lambda item: item[0] if item[0].isdigit() else "",
        is_fatal=lambda error: isinstance(error, BrokenDevice),
        name="test",
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield batcher, device
    finally:
        device.let_go()


async def submitted(batcher: MicroBatcher[str, str], *items: str) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(batcher.submit(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def busy(batcher: MicroBatcher[str, str], device: Device) -> asyncio.Task[str]:
    """Sends "plug" and waits until the device is held inside its batch."""
    device.held = True
    (plug,) = await submitted(batcher, "plug")
    assert await device.inside() == ["plug"]
    return plug


async def test_what_comes_while_the_device_is_busy_is_one_batch() -> None:
    async with a_batcher() as (batcher, device):
        plug = await busy(batcher, device)
        tasks = await submitted(batcher, "a", "b")
        tasks += await submitted(batcher, "c")
        assert batcher.stats()["waiting"] == 3
        device.let_go()
        assert [await task for task in (plug, *tasks)] == ["PLUG", "A", "B", "C"]
        assert device.batches == [["plug"], ["a", "b", "c"]]
        counts = {"batches": 2, "items": 4, "failed": 0, "cancelled": 0, "lowered_budgets": 0, "waiting": 0}
        assert batcher.stats() == counts


async def test_more_urgent_items_go_first() -> None:
    async with a_batcher(max_batch_size=1) as (batcher, device):
        plug = await busy(batcher, device)
        urgencies = {"a": Urgency(), "b": Urgency(priority=3), "c": Urgency(priority=3, time_left_s=-1.0)}
        tasks = [asyncio.create_task(batcher.submit(item, urgency)) for item, urgency in urgencies.items()]
        await asyncio.sleep(0)
        device.let_go()
        await asyncio.gather(plug, *tasks)
        assert device.batches == [["plug"], ["b"], ["c"], ["a"]], "what is late yields to its equals"


async def test_a_batch_ends_where_its_pixels_do() -> None:
    device = Device()
    batcher = MicroBatcher(
        device.run, StepScheduler(Budget(8, pixels=5)), key=lambda _: "", pixels=len, is_fatal=lambda _: False, name="t"
    )
    plug = await busy(batcher, device)
    tasks = await submitted(batcher, "aaa", "bbb", "cc")
    device.let_go()
    await asyncio.gather(plug, *tasks)
    assert device.batches == [["plug"], ["aaa", "cc"], ["bbb"]]


async def test_an_idle_device_starts_at_once() -> None:
    async with a_batcher() as (batcher, device):
        assert await batcher.submit("a") == "A"
        assert await batcher.submit("b") == "B"
        assert device.batches == [["a"], ["b"]]


async def test_the_device_works_on_one_thread_that_is_not_the_event_loops() -> None:
    async with a_batcher() as (batcher, device):
        for item in "abcd":
            await batcher.submit(item)
        assert len(device.threads) == 1
        assert threading.get_ident() not in device.threads


async def test_a_batch_ends_at_its_largest_size_and_the_oldest_go_first() -> None:
    async with a_batcher(max_batch_size=2) as (batcher, device):
        plug = await busy(batcher, device)
        tasks = await submitted(batcher, *"abcde")
        device.let_go()
        await asyncio.gather(plug, *tasks)
        assert device.batches == [["plug"], ["a", "b"], ["c", "d"], ["e"]]


async def test_a_batch_holds_one_key_and_the_oldests_key_goes_first() -> None:
    async with a_batcher() as (batcher, device):
        plug = await busy(batcher, device)
        tasks = await submitted(batcher, "1a", "2a", "1b", "2b", "1c")
        device.let_go()
        assert [await task for task in tasks] == ["1A", "2A", "1B", "2B", "1C"]
        await plug
        assert device.batches == [["plug"], ["1a", "1b", "1c"], ["2a", "2b"]]


async def test_who_goes_away_before_the_batch_is_not_in_it() -> None:
    async with a_batcher() as (batcher, device):
        plug = await busy(batcher, device)
        a, b, c = await submitted(batcher, "a", "b", "c")
        b.cancel()
        await asyncio.wait([b])
        device.let_go()
        assert [await plug, await a, await c] == ["PLUG", "A", "C"]
        assert device.batches == [["plug"], ["a", "c"]]
        assert batcher.stats()["cancelled"] == 1


async def test_when_all_go_away_no_batch_runs_and_the_next_does() -> None:
    async with a_batcher() as (batcher, device):
        plug = await busy(batcher, device)
        (a,) = await submitted(batcher, "a")
        a.cancel()
        await asyncio.wait([a])
        device.let_go()
        await plug
        assert await batcher.submit("b") == "B"
        assert device.batches == [["plug"], ["b"]]


async def test_who_goes_away_during_the_batch_does_not_disturb_the_others() -> None:
    async with a_batcher() as (batcher, device):
        device.held = True
        a, b = await submitted(batcher, "a", "b")
        assert await device.inside() == ["a", "b"]
        a.cancel()
        await asyncio.wait([a])
        device.let_go()
        assert await b == "B"
        assert await batcher.submit("c") == "C"


@pytest.mark.parametrize("position", range(4))
async def test_a_failing_item_fails_alone(position: int) -> None:
    items = list("abc")
    items.insert(position, "bad")
    async with a_batcher() as (batcher, device):
        plug = await busy(batcher, device)
        tasks = await submitted(batcher, *items)
        device.let_go()
        results = await asyncio.gather(plug, *tasks, return_exceptions=True)
        failure = results.pop(position + 1)
        assert isinstance(failure, ValueError) and str(failure) == "bad item"
        assert results == ["PLUG", "A", "B", "C"]
        batcher.check_health()
        assert batcher.stats()["failed"] == 1


async def test_a_missing_result_is_an_error_and_not_a_wait_for_ever() -> None:
    async with a_batcher() as (batcher, device):
        plug = await busy(batcher, device)
        a, short, b = await submitted(batcher, "a", "short", "b")
        device.let_go()
        assert [await plug, await a, await b] == ["PLUG", "A", "B"]
        with pytest.raises(RuntimeError, match="0 results for 1 items"):
            await short


async def test_a_broken_device_fails_everybody_as_retryable() -> None:
    async with a_batcher(max_batch_size=2) as (batcher, device):
        plug = await busy(batcher, device)
        tasks = await submitted(batcher, "a", "fatal", "b")
        device.let_go()
        assert await plug == "PLUG"
        for task in tasks:
            with pytest.raises(StageUnavailable) as caught:
                await task
            assert caught.value.retry_after_s is not None
        assert device.batches == [["plug"], ["a", "fatal"]], "it is not asked again"
        with pytest.raises(StageUnavailable):
            batcher.check_health()
        with pytest.raises(StageUnavailable):
            await batcher.submit("c")


class Computation:
    """Counts how often it is begun; each run waits for `gate` and ends as `outcome` says."""

    def __init__(self, outcome: str | Exception = "value") -> None:
        self.outcome = outcome
        self.begun = 0
        self.cancelled = 0
        self.gate = asyncio.Event()

    async def __call__(self, _: OnTurn) -> str:
        self.begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


async def test_a_batch_too_large_for_the_memory_is_not_tried_again() -> None:
    sizes: list[int] = []

    def run(items: Sequence[str]) -> list[str]:
        sizes.append(len(items))
        if len(items) > 2:
            raise MemoryError
        return [item.upper() for item in items]

    batcher: MicroBatcher[str, str] = MicroBatcher(
        run,
        StepScheduler(Budget(4)),
        key=lambda item: "",
        is_fatal=lambda error: False,
        is_out_of_memory=lambda error: isinstance(error, MemoryError),
        name="test",
    )
    for _ in range(2):
        tasks = [asyncio.create_task(batcher.submit(item)) for item in "abcd"]
        assert [await asyncio.wait_for(task, DEADLINE_S) for task in tasks] == ["A", "B", "C", "D"]
    assert sizes == [4, 2, 2, 2, 2]
    assert batcher.stats()["lowered_budgets"] == 1


async def test_suspects_run_alone_and_turns_are_told() -> None:
    turns: dict[str, list[bool]] = {name: [] for name in ("a", "b", "s", "t")}
    async with a_batcher() as (batcher, device):
        plug = await busy(batcher, device)
        tasks = [
            asyncio.create_task(batcher.submit(name, alone=name in "st", on_turn=turns[name].append)) for name in turns
        ]
        await asyncio.sleep(0)
        device.let_go()
        await asyncio.gather(plug, *tasks)
        assert sorted(map(sorted, device.batches)) == [["a", "b"], ["plug"], ["s"], ["t"]]
        turns["s"].clear()
        await batcher.submit("s", alone=True, on_turn=turns["s"].append)
        await batcher.submit("a", on_turn=turns["s"].append)
    assert turns == {"a": [True, False], "b": [True, False], "t": [True, False], "s": [False]}


async def test_a_batch_that_hangs_fails_health_and_its_items_can_be_abandoned() -> None:
    now = 0.0
    device = Device()
    device.held = True
    batcher: MicroBatcher[str, str] = MicroBatcher(
        device.run,
        StepScheduler(Budget(4)),
        key=lambda item: "",
        is_fatal=lambda error: False,
        watch=Watch(60, clock=lambda: now),
        name="test",
    )
    async with asyncio.timeout(DEADLINE_S):
        a = asyncio.create_task(batcher.submit("a"))
        await device.inside()
        b = asyncio.create_task(batcher.submit("b"))
        await asyncio.sleep(0)
        batcher.check_health()
        now = 61.0
        with pytest.raises(StageUnavailable, match="under way for 61 s"):
            batcher.check_health()
        reason = batcher.overdue()
        assert reason is not None
        batcher.abandon(reason)
        for task in (a, b):
            with pytest.raises(StageUnavailable, match="under way"):
                await task
        with pytest.raises(StageUnavailable):
            await batcher.submit("c")
    device.let_go()


def at_once(value: str) -> Compute:
    async def compute(_: OnTurn) -> str:
        return value

    return compute


async def never(_: OnTurn) -> str:
    raise AssertionError("computed again")


async def waiting(cache: SharedCache[str, str], compute: Compute, count: int) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(cache.get("k", compute)) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_the_urgent_do_not_wait_with_those_who_can() -> None:
    cache: SharedCache[str, str] = SharedCache(4)
    patient: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    waiting = asyncio.create_task(cache.get("p", lambda _: patient, priority=-100))
    await asyncio.sleep(0)
    assert await cache.get("p", at_once("urgent"), priority=100) == "urgent"
    assert not waiting.done()
    patient.set_result("patient")
    assert await waiting == "patient"
    assert cache.stats() == {"cache_hits": 0, "cache_misses": 2, "cache_entries": 1}


async def test_suspects_share_no_computation_with_others() -> None:
    cache: SharedCache[str, str] = SharedCache(4)
    ordinary = asyncio.create_task(cache.get("a", never))
    await asyncio.sleep(0)
    assert await cache.get("a", at_once("alone"), alone=True) == "alone"
    ordinary.cancel()


async def test_all_who_share_a_computation_get_its_turns() -> None:
    """A replica that dies of a text has all who asked for it under suspicion, not only who asked first."""
    cache: SharedCache[str, str] = SharedCache(4)
    gate, told = asyncio.Event(), asyncio.Queue[OnTurn]()

    async def compute(on_turn: OnTurn) -> str:
        on_turn(True)
        told.put_nowait(on_turn)
        await gate.wait()
        return "value"

    turns: dict[str, list[bool]] = {"first": [], "second": [], "late": []}
    tasks = [
        asyncio.create_task(cache.get("k", compute, alone=True, on_turn=turns[name].append))
        for name in ("first", "second")
    ]
    on_turn = await told.get()
    tasks.append(asyncio.create_task(cache.get("k", never, alone=True, on_turn=turns["late"].append)))
    await asyncio.sleep(0)
    assert turns == {"first": [True], "second": [True], "late": [True]}
    on_turn(False)
    assert turns == {"first": [True, False], "second": [True, False], "late": [True, False]}
    gate.set()
    assert await asyncio.gather(*tasks) == ["value"] * 3


async def test_what_many_ask_for_is_computed_once() -> None:
    cache: SharedCache[str, str] = SharedCache(4)
    compute = Computation()
    tasks = await waiting(cache, compute, 3)
    compute.gate.set()
    assert await asyncio.gather(*tasks) == ["value"] * 3
    assert await cache.get("k", never) == "value"
    assert compute.begun == 1
    assert cache.stats() == {"cache_hits": 3, "cache_misses": 1, "cache_entries": 1}


async def test_one_waiter_who_goes_away_does_not_take_the_others_result() -> None:
    cache: SharedCache[str, str] = SharedCache(4)
    compute = Computation()
    first, second, third = await waiting(cache, compute, 3)
    first.cancel()
    third.cancel()
    await asyncio.wait([first, third])
    assert compute.cancelled == 0
    compute.gate.set()
    assert await second == "value"
    assert first.cancelled() and third.cancelled()


async def test_what_nobody_waits_for_is_cancelled() -> None:
    cache: SharedCache[str, str] = SharedCache(4)
    compute = Computation()
    tasks = await waiting(cache, compute, 2)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    assert compute.cancelled == 1
    assert await cache.get("k", at_once("again")) == "again", "a later one is computed anew"


async def test_who_comes_after_the_last_waiter_left_is_not_cancelled_with_it() -> None:
    cache: SharedCache[str, str] = SharedCache(4)
    abandoned = Computation()
    (only,) = await waiting(cache, abandoned, 1)
    only.cancel()
    late = asyncio.create_task(cache.get("k", at_once("late")))
    assert await late == "late"
    assert only.cancelled()


async def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    cache: SharedCache[str, str] = SharedCache(4)
    compute = Computation(ValueError("no"))
    tasks = await waiting(cache, compute, 2)
    compute.gate.set()
    for task in tasks:
        with pytest.raises(ValueError, match="no"):
            await task
    assert cache.stats()["cache_entries"] == 0
    assert await cache.get("k", at_once("yes")) == "yes"


async def test_the_least_recently_used_goes_first() -> None:
    cache: SharedCache[str, str] = SharedCache(2)
    await cache.get("a", at_once("1"))
    await cache.get("b", at_once("2"))
    assert await cache.get("a", never) == "1"
    await cache.get("c", at_once("3"))
    assert cache.stats()["cache_entries"] == 2
    assert await cache.get("a", never) == "1"
    assert await cache.get("c", never) == "3"
    assert await cache.get("b", at_once("new")) == "new"


async def test_no_entries_keeps_nothing_and_still_shares() -> None:
    cache: SharedCache[str, str] = SharedCache(0)
    compute = Computation()
    tasks = await waiting(cache, compute, 2)
    compute.gate.set()
    assert await asyncio.gather(*tasks) == ["value"] * 2
    assert compute.begun == 1
    assert cache.stats()["cache_entries"] == 0
    assert await cache.get("k", at_once("new")) == "new"


async def test_a_failed_batch_lets_go_of_its_memory_before_its_halves_run() -> None:
    class Activations:
        pass

    left_behind: list[bool] = []
    alive: list[weakref.ref[Activations]] = []

    def run(items: Sequence[str]) -> list[str]:
        left_behind.append(any(reference() is not None for reference in alive))
        activations = Activations()
        alive.append(weakref.ref(activations))
        if len(items) > 1:
            raise MemoryError
        return list(items)

    batcher: MicroBatcher[str, str] = MicroBatcher(
        run, StepScheduler(Budget(4)), key=len, is_fatal=lambda _: False, name="test"
    )
    assert await asyncio.gather(*(batcher.submit(item) for item in "abcd")) == list("abcd")
    assert len(left_behind) == 7
    assert not any(left_behind)
