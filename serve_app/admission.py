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

    `Retry-After` is computed from the rate at which images left during the last minute.
    """

    def __init__(self, max_images: int, clock: Callable[[], float]) -> None:
        self.max_images = max_images
        self.in_flight = 0
        self._clock = clock
        self._left: deque[tuple[float, int]] = deque()

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
        self.in_flight += images
        finished = False
        try:
            yield
            finished = True
        finally:
            self.in_flight -= images
            if finished and images:
                self._left.append((self._clock(), images))
                self._forget(self._clock())

    def retry_after_s(self, images: int) -> float:
        """Seconds until that many images fit, whole and at least 1, at the rate of the last minute."""
        now = self._clock()
        self._forget(now)
        if len(self._left) < 2:
            return _UNKNOWN_RATE_RETRY_S
        span = max(now - self._left[0][0], 0.001)
        rate = sum(count for _, count in self._left) / span
        missing = self.in_flight + images - self.max_images
        return float(min(max(math.ceil(missing / rate), 1), 600))

    def _forget(self, now: float) -> None:
        while self._left and now - self._left[0][0] > _WINDOW_S:
            self._left.popleft()
