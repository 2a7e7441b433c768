"""What the replicas of every tensor stage share: their GPU fraction, their checks, their signs of life, their end."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import ray
from ray import serve

from serve_app.config.settings import AppConfig, ComputeConfig, check_max_ongoing_requests
from serve_app.request.errors import ConfigurationError, ServiceError, StageUnavailable
from serve_app.runtime.engine import ReplicaLeaving
from serve_app.runtime.tasks import Alive, StepReport

if TYPE_CHECKING:
    from serve_app.models.device import Compute

logger = logging.getLogger("ray.serve")
ResultT = TypeVar("ResultT")

# A replica that can't work any more ends itself after the answers are out, and Serve starts another.
_LAST_WORDS_S = 1.0
_WATCH_EVERY_S = 1.0
# The first word on a call comes late enough that short work says none besides its result.
FIRST_WORD_S, WORD_EVERY_S = 0.5, 5.0


def prepare(config: AppConfig, compute: ComputeConfig) -> Compute:
    """Checks this replica's deployment options and sets up its device."""
    from serve_app.models.device import set_up

    check_options(config)
    gpus = ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)
    chosen = set_up(compute, gpu_fraction=gpus)
    logger.info("computing on %s in %s, %g GPU", chosen.device, chosen.dtype, gpus)
    return chosen


def check_options(config: AppConfig) -> None:
    """Refuses deployment options that would cap batches silently, as far as one replica knows them.

    `sdxl-serve check` knows the number of the ingress's replicas as well.
    """
    options = getattr(serve.get_replica_context(), "_deployment_config", None)
    if options is not None:
        try:
            check_max_ongoing_requests(config, options.max_ongoing_requests, "max_ongoing_requests")
        except ValueError as error:
            raise ConfigurationError(str(error)) from None


def identity() -> dict[str, Any]:
    """Which replica this is: its tag, process and node."""
    context = serve.get_replica_context()
    return {
        "replica": context.replica_tag,
        "pid": os.getpid(),
        "node": ray.get_runtime_context().get_node_id(),
    }


class Call:
    """One call on its way through this replica: what its caller learns of it, until the result. On the event loop.

    A `suspect` was in a pass when another replica died: of it, each turn is told, and that it waits before it is
    handed on. Others count as working until they are said to wait.
    """

    def __init__(self, suspect: bool) -> None:
        self._suspect = suspect
        self._waiting = suspect
        self._reports: deque[StepReport] = deque()
        self._news = asyncio.Event()

    def report(self, report: StepReport) -> None:
        self._reports.append(report)
        self._news.set()

    def turn(self, waiting: bool) -> None:
        """Whether its work waits for its first pass now."""
        self._waiting = waiting
        self._news.set()

    async def told(
        self, end: End, work: Coroutine[Any, Any, ResultT]
    ) -> AsyncGenerator[Alive | StepReport | ResultT, None]:
        """Does the work and yields what happens on the way: reports, signs of life and, last, its result.

        A sign of life is due after half a second, then every five, and at once where the work that was said to wait
        does so no more.
        """
        if end.is_near:
            # A dying replica that refused calls at once would be the least busy one, and get them all. Who waits
            # here learns of the end from Ray, which then sends nothing more this way.
            work.close()
            yield Alive(waiting=True)
            await asyncio.Event().wait()
        said: bool | None = None  # whether it waits, as last told
        if self._suspect:
            said = True
            try:
                yield Alive(waiting=True)
            except BaseException:
                work.close()
                raise
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._news.set())
        word_due = time.monotonic() + FIRST_WORD_S
        try:
            while not task.done():
                await self._wait_for_news(word_due - time.monotonic())
                while self._reports:
                    yield self._reports.popleft()
                now = time.monotonic()
                if not task.done() and (now >= word_due or (said is not None and said != self._waiting)):
                    said, word_due = self._waiting, now + WORD_EVERY_S
                    yield Alive(said)
            while self._reports:
                yield self._reports.popleft()
            with working(end):
                result = await task
            yield result
        finally:
            task.cancel()

    async def _wait_for_news(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()


class End:
    """The end of a replica that can't work any more: its device is lost, or a pass hangs."""

    def __init__(self) -> None:
        self.is_near = False

    def announce(self) -> None:
        """Ends the process in a moment: the answers to those who wait go out first."""
        if not self.is_near:
            self.is_near = True
            logger.error("this replica can't work any more and ends")
            threading.Thread(target=self._end, name="end", daemon=True).start()

    @staticmethod
    def _end() -> NoReturn:
        time.sleep(_LAST_WORDS_S)
        os._exit(1)


def end_when_hung(end: End, overdue: Callable[[], str | None], abandon: Callable[[str], None]) -> None:
    """Watches over the work from a thread of its own: ends the process when a pass hangs.

    `abandon(reason)` fails whatever waits; it is called on the running event loop.
    """
    loop = asyncio.get_running_loop()

    def watch() -> None:
        while True:
            time.sleep(_WATCH_EVERY_S)
            if (reason := overdue()) is not None:
                break
        logger.error("%s", reason)
        end.announce()
        loop.call_soon_threadsafe(abandon, reason)

    threading.Thread(target=watch, name="watch", daemon=True).start()


@contextmanager
def working(end: End) -> Iterator[None]:
    """A stage's own work: what it raises leaves as something that the ingress can read.

    Where the device is lost, this process ends, once the answers under way are out.
    """
    try:
        yield
    except ReplicaLeaving:
        raise
    except StageUnavailable:
        end.announce()
        raise
    except ServiceError:
        raise
    except Exception as error:
        # A torch.OutOfMemoryError would bring torch into the ingress, which unpickles it.
        logger.exception("a task failed")
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
