"""The events of one stream, between those who draw and the one who reads.

Drawing never waits for a reader, so what a slow one has not read must stay small: of progress the latest wins, and
it is told a few times a second; previews and pictures, whose number the request bounds, are all kept.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from serve_app.request.schema import ImageReady, Progress
from serve_app.runtime.pipeline import LatentPreview

Event = Progress | LatentPreview | ImageReady

PROGRESS_INTERVAL_S = 0.1


@dataclass
class _Waiting:
    event: Event
    owed: bool  # is told without regard to the pace


class Coalesced:
    """What waits to be read, in order. The clock is injected, in seconds; nothing here waits.

    Of the progress of one image in one stage only the latest waits. One is given out every `PROGRESS_INTERVAL_S`,
    but the last of a stage that is over at once: it comes before the image's next stage and before its picture. So
    of a request for n images, with the k previews of each, at most n x (4 + k + 1) events wait.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[tuple[object, ...], _Waiting] = {}
        self._number = itertools.count()
        self._next_progress_at = clock()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: Event) -> None:
        if isinstance(event, LatentPreview):
            self._waiting["other", next(self._number)] = _Waiting(event, owed=True)
            return
        stage = event.stage if isinstance(event, Progress) else None
        for waiting in self._waiting.values():
            before = waiting.event
            if isinstance(before, Progress) and before.image == event.image and before.stage != stage:
                waiting.owed = True
        if isinstance(event, ImageReady):
            self._waiting["other", next(self._number)] = _Waiting(event, owed=True)
            return
        # The later takes the earlier one's place: else whoever steps often would always be last.
        key = ("progress", event.image, stage)
        if key in self._waiting:
            self._waiting[key].event = event
        else:
            self._waiting[key] = _Waiting(event, owed=False)

    def finish(self) -> None:
        """Nothing more comes: what waits may be read at once."""
        for waiting in self._waiting.values():
            waiting.owed = True

    def take(self) -> Event | None:
        """The next event; None where none waits or it is too early for what does."""
        now = self._clock()
        for key, waiting in self._waiting.items():
            if waiting.owed or now >= self._next_progress_at:
                del self._waiting[key]
                if isinstance(waiting.event, Progress):
                    self._next_progress_at = now + PROGRESS_INTERVAL_S
                return waiting.event
        return None

    def wait_s(self) -> float | None:
        """Seconds until something may be taken without more coming; None where nothing waits."""
        if not self._waiting:
            return None
        if any(waiting.owed for waiting in self._waiting.values()):
            return 0.0
        return max(self._next_progress_at - self._clock(), 0.0)


class EventStream:
    """The events of one stream on an event loop: `put` by who draws, read by iteration until `close`."""

    def __init__(self) -> None:
        self._events = Coalesced(time.monotonic)
        self._changed = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        """How many events wait for the reader."""
        return len(self._events)

    def put(self, event: Event) -> None:
        self._events.put(event)
        self._changed.set()

    def close(self) -> None:
        """The iteration ends after what waits by now."""
        self._events.finish()
        self._closed = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            while (event := self._events.take()) is not None:
                yield event
            if self._closed:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(self._events.wait_s()):
                    await self._changed.wait()
            except TimeoutError:
                pass
