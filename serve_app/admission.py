"""How much work the service takes in, and when to come back where it is full. Pure; the clock is injected."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.errors import InvalidRequest, Overloaded

_WINDOW_S = 60.0
_UNKNOWN_RATE_RETRY_S = 5.0


class Admission:
    """Counts images in flight against a limit.

    `Retry-After` is computed from the rate at which images left during the last minute, as far as there was work.
    """

    def __init__(self, max_images: int, clock: Callable[[], float]) -> None:
        self.max_images = max_images
        self.in_flight = 0
        self._clock = clock
        self._left: deque[tuple[float, int]] = deque()  # when, and how many
        self._idle: deque[tuple[float, float]] = deque()  # from when to when there was no work
        self._idle_since = -math.inf

    @contextmanager
    def hold(self, images: int) -> Iterator[None]:
        """Takes in that many images, or raises `Overloaded` with the seconds to wait."""
        if images > self.max_images:
            raise InvalidRequest(
                f"n: {images} images in one request, this service takes at most {self.max_images}", param="n"
            )
        if self.in_flight + images > self.max_images:
            wait = self.retry_after_s(images)
            raise Overloaded(
                f"the service is full: {self.in_flight} images in flight of {self.max_images}; try again in "
                f"{wait:.0f} s",
                retry_after_s=wait,
            )
        if not self.in_flight:
            self._idle.append((self._idle_since, self._clock()))
        self.in_flight += images
        finished = False
        try:
            yield
            finished = True
        finally:
            self.in_flight -= images
            now = self._clock()
            if not self.in_flight:
                self._idle_since = now
            if finished and images:
                self._left.append((now, images))
            self._forget(now)

    def retry_after_s(self, images: int) -> float:
        """Seconds until that many images fit, whole and at least 1, at the rate of the last minute."""
        now = self._clock()
        self._forget(now)
        if not self._left:
            return _UNKNOWN_RATE_RETRY_S
        idle_s = sum(end - max(start, now - _WINDOW_S) for start, end in self._idle)
        rate = sum(count for _, count in self._left) / max(_WINDOW_S - idle_s, 0.001)
        missing = self.in_flight + images - self.max_images
        return float(min(max(math.ceil(missing / rate), 1), 600))

    def _forget(self, now: float) -> None:
        while self._left and now - self._left[0][0] > _WINDOW_S:
            self._left.popleft()
        while self._idle and now - self._idle[0][1] > _WINDOW_S:
            self._idle.popleft()
