"""When a benchmark asks: open loops, whose arrivals wait for nobody, and the closed loop, whose clients do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Poisson:
    """Independent clients: gaps are exponential with mean 1 / `rate_per_s`."""

    rate_per_s: float

    def due_s(self, seed: int) -> Iterator[float]:
        rng = random.Random(f"poisson/{seed}")
        now = 0.0
        while True:
            now += rng.expovariate(self.rate_per_s)
            yield now


@dataclass(frozen=True)
class Bursts:
    """`size` requests at once, at 0 s and then every `every_s` seconds."""

    size: int
    every_s: float

    def due_s(self, seed: int) -> Iterator[float]:
        for burst in itertools.count():
            yield from itertools.repeat(burst * self.every_s, self.size)


@dataclass(frozen=True)
class Closed:
    """`concurrency` clients, each of which asks again as soon as it is answered."""

    concurrency: int


OpenLoop = Poisson | Bursts
Arrivals = OpenLoop | Closed


def schedule_s(arrivals: OpenLoop, seed: int, requests: int | None, duration_s: float | None) -> list[float]:
    """Seconds from the start at which each request is due, in order: at most `requests`, all before `duration_s`.

    At least one of the two bounds is given.
    """
    assert requests is not None or duration_s is not None
    due = itertools.islice(arrivals.due_s(seed), requests)
    return list(due if duration_s is None else itertools.takewhile(lambda at: at < duration_s, due))
