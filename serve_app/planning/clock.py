"""A virtual clock: events in order of time, and work that may share the cores of one machine. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

from serve_app.planning.profile import Cores

_Event = tuple[float, int, Callable[[Any], None], Any]


class VirtualClock:
    """Runs callbacks in order of their time; equal times in the order in which they were asked for.

    Work takes as long as it says where every replica has a device of its own. Where they share `cores`, all work
    under way gets an equal share: b pieces on C cores go at C/b of their speed once b > C, and before that at what
    `slowdown` says of busy neighbours. Work is kept by the progress a piece would have made since the start
    (processor sharing's virtual time), so a change of speed costs nothing.
    """

    def __init__(self, cores: Cores | None = None) -> None:
        self.now = 0.0
        self._cores = cores
        self._events: list[_Event] = []
        self._working: list[_Event] = []
        self._progress = 0.0
        self._count = 0

    def at(self, time: float, call: Callable[[Any], None], argument: Any = None) -> None:
        """Calls at a time, which is not in the past."""
        self._count += 1
        heapq.heappush(self._events, (time, self._count, call, argument))

    def work(self, seconds: float, call: Callable[[Any], None], argument: Any = None) -> None:
        """Calls when that much work is done, from now on."""
        if self._cores is None:
            self.at(self.now + seconds, call, argument)
        else:
            self._count += 1
            heapq.heappush(self._working, (self._progress + seconds, self._count, call, argument))

    def run(self) -> None:
        """Until nothing is left to do."""
        events, working = self._events, self._working
        while events or working:
            next_event = events[0][0] if events else math.inf
            if not working:
                self.now, _, call, argument = heapq.heappop(events)
            else:
                speed = self._speed(len(working))
                next_done = self.now + max(working[0][0] - self._progress, 0.0) / speed
                if next_done <= next_event:
                    self.now = next_done
                    self._progress, _, call, argument = heapq.heappop(working)
                else:
                    self._progress += (next_event - self.now) * speed
                    self.now, _, call, argument = heapq.heappop(events)
            call(argument)

    def _speed(self, busy: int) -> float:
        assert self._cores is not None
        count, slowdown = self._cores.count, self._cores.slowdown
        if busy > count:
            return count / busy / slowdown
        return 1.0 if busy == 1 else 1.0 / (1.0 + (slowdown - 1.0) * (busy - 1) / (count - 1))
