"""Whether a replica's work moves: a pass that takes far longer than its kind ever took counts as hung.

Pure; the clock is injected. The thread that works opens and closes passes, any other may ask `overdue`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FIRST_PASS_S = 300.0
# A busy machine slows a pass tenfold, and short ones by more: no pass is hung before `_LEAST_S`.
_TIMES_SLOWEST = 10.0
_LEAST_S = 20.0
_MAX_KINDS = 10_000


@dataclass(frozen=True)
class _Pass:
    kind: Hashable
    started: float
    limit_s: float


class Watch:
    """Bounds each pass by ten times the slowest of its kind so far, at least 20 s.

    The first pass of a kind, which may compile or allocate, has a bound of its own.
    """

    def __init__(self, first_pass_s: float = FIRST_PASS_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._first_pass_s = first_pass_s
        self._clock = clock
        self._slowest: dict[Hashable, float] = {}
        self._pass: _Pass | None = None

    @contextmanager
    def over(self, kind: Hashable) -> Iterator[None]:
        """Around a pass. One that raises teaches nothing."""
        started = self._clock()
        self._pass = _Pass(kind, started, self.limit_s(kind))
        try:
            yield
            self._learn(kind, self._clock() - started)
        finally:
            self._pass = None

    def limit_s(self, kind: Hashable) -> float:
        """Seconds that a pass of this kind may take now."""
        slowest = self._slowest.get(kind)
        return self._first_pass_s if slowest is None else max(_TIMES_SLOWEST * slowest, _LEAST_S)

    def overdue(self) -> str | None:
        """One line about the pass under way where it counts as hung."""
        now = self._pass  # another thread may close it meanwhile
        if now is None:
            return None
        age_s = self._clock() - now.started
        if age_s <= now.limit_s:
            return None
        return f"a pass has been under way for {age_s:.0f} s, the limit of its kind is {now.limit_s:.0f} s"

    def _learn(self, kind: Hashable, seconds: float) -> None:
        if len(self._slowest) >= _MAX_KINDS and kind not in self._slowest:
            self._slowest.clear()  # a client may ask for every size there is
        self._slowest[kind] = max(seconds, self._slowest.get(kind, 0.0))
