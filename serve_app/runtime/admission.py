"""How much work the service takes in, and when to come back where it is full. Pure; the clock is injected."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from serve_app.request.errors import Draining, InvalidRequest, Overloaded

_WINDOW_S = 60.0
_UNKNOWN_RATE_RETRY_S = 5.0
_DRAINING_RETRY_S = 5.0  # until another replica or service is there
_READING_RETRY_S = 1.0

# Whether what the current task works for had arrived before the service began to drain: then it is taken in still.
ARRIVED_IN_TIME: ContextVar[bool] = ContextVar("arrived_in_time", default=False)


class Admission:
    """Counts images in flight against a limit.

    `Retry-After` is computed from what the images cost that left during the last minute and the time they took: that
    since others had left before them, without the time when there was no work; and from what those in flight cost.
    The unit is the caller's (`cost.py`); where it gives none, an image costs 1.
    """

    def __init__(self, max_images: int, clock: Callable[[], float]) -> None:
        self.max_images = max_images
        self.in_flight = 0
        self._cost = 0.0  # of what is in flight
        self.draining = False  # the service ends: what has arrived is finished, nothing new is taken in
        self._clock = clock
        self._left: deque[tuple[float, float, float]] = deque()  # when, at what cost, and the time it took
        self._working_since = 0.0  # the last departure, or the end of an idle time
        self._worked_s = 0.0  # since the last departure, before an idle time

    def drain(self) -> None:
        """Takes in nothing any more but what has arrived (`ARRIVED_IN_TIME`). What is in flight goes on."""
        self.draining = True

    def check_open(self) -> None:
        """Raises `Draining` where nothing is taken in any more, but for what has arrived in time."""
        if self.draining and not ARRIVED_IN_TIME.get():
            raise Draining("the service is shutting down; send the request again", retry_after_s=_DRAINING_RETRY_S)

    @contextmanager
    def hold(self, images: int, cost: float | None = None) -> Iterator[None]:
        """Takes in that many images until the block ends, or raises `Overloaded` with the seconds to wait."""
        release = self.take_in(images, cost)
        finished = False
        try:
            yield
            finished = True
        finally:
            release(finished)

    def take_in(self, images: int, cost: float | None = None) -> Callable[[bool], None]:
        """As `hold`, until what it returns is called, once: with whether the images were finished."""
        cost = float(images) if cost is None else cost
        if images > self.max_images:
            raise InvalidRequest(
                f"n: {images} images in one request, this service takes at most {self.max_images}", param="n"
            )
        self.check_open()
        if self.in_flight + images > self.max_images:
            wait = self.retry_after_s(images)
            raise Overloaded(
                f"the service is full: {self.in_flight} images in flight of {self.max_images}; try again in "
                f"{wait:.0f} s",
                retry_after_s=wait,
            )
        if not self.in_flight:
            self._working_since = self._clock()
        self.in_flight += images
        self._cost += cost

        def release(finished: bool) -> None:
            now = self._clock()
            took_s = self._since_departure_s(now)
            self.in_flight -= images
            self._cost -= cost
            self._working_since, self._worked_s = now, took_s
            if finished and images:
                self._left.append((now, cost, took_s))
                self._worked_s = 0.0
            self._forget(now)

        return release

    def retry_after_s(self, images: int) -> float:
        """Seconds until that many images fit, whole and at least 1, at the rate of the last minute."""
        now = self._clock()
        self._forget(now)
        if not self._left:
            return _UNKNOWN_RATE_RETRY_S
        took_s = sum(took_s for _, _, took_s in self._left) + self._since_departure_s(now)
        rate = sum(cost for _, cost, _ in self._left) / max(took_s, 0.001)
        missing = (self.in_flight + images - self.max_images) * self._cost / max(self.in_flight, 1)
        return float(min(max(math.ceil(missing / rate), 1), 600)) if rate > 0 else _UNKNOWN_RATE_RETRY_S

    def _since_departure_s(self, now: float) -> float:
        return self._worked_s + (now - self._working_since if self.in_flight else 0.0)

    def _forget(self, now: float) -> None:
        while self._left and now - self._left[0][0] > _WINDOW_S:
            self._left.popleft()


class Bodies:
    """Counts the bytes of bodies that are being read and decoded, against a limit: images are counted only after."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        """Holds the bytes of one body until the block ends. It calls what this gives with those that arrive.

        That raises `Overloaded` where they are too many.
        """
        held = 0

        def arrived(count: int) -> None:
            nonlocal held
            if self.bytes + count > self.max_bytes:
                raise Overloaded(
                    f"the service is full: bodies of {self.bytes} bytes are being read, at most {self.max_bytes} are",
                    retry_after_s=_READING_RETRY_S,
                )
            self.bytes += count
            held += count

        try:
            yield arrived
        finally:
            self.bytes -= held
