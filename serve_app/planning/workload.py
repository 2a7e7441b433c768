"""What is asked of the simulated service, and when. Pure; every random choice comes from the generator given."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.request.timesteps import split


@dataclass(frozen=True)
class Ask:
    """A request as far as its cost goes.

    Attributes:
        at: when it arrives, in seconds; of no account in a closed loop.
        steps: denoising steps, base and refiner together.
        guided: two rows of each pass instead of one.
        high_noise_frac: the base's share of the trajectory; 1 is the base alone.
        deadline_s: seconds within which it is wanted.
    """

    at: float
    steps: int
    width: int
    height: int
    n: int = 1
    guided: bool = True
    high_noise_frac: float = 1.0
    priority: int = 0
    deadline_s: float | None = None

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def calls(self) -> int:
        """Between deployments, the one to the ingress included."""
        return 2 + self.n * (2 + (self.high_noise_frac < 1))

    @property
    def rows(self) -> int:
        return 2 if self.guided else 1

    @property
    def steps_by_stage(self) -> tuple[int, int]:
        """Of the base and of the refiner, over the published checkpoints' schedule; Heun's doubled ones not counted."""
        return split("euler", self.steps, self.high_noise_frac)

    @property
    def cost(self) -> int:
        """Row-pixel-steps, as the service's admission counts them (`runtime/cost.py`)."""
        return self.n * self.pixels * self.rows * self.steps


@dataclass(frozen=True)
class Mix:
    """What requests are like: each property drawn evenly and by itself."""

    steps: tuple[int, int] = (50, 50)  # fewest and most
    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    n: tuple[int, int] = (1, 1)
    guided_share: float = 1.0
    refined_share: float = 1.0  # of those that go on to the refiner, where high_noise_frac leaves it any
    high_noise_frac: float = 1.0
    deadline_s: float | None = None

    def largest(self) -> Ask:
        """The longest request of the largest size."""
        width, height = max(self.sizes, key=lambda size: size[0] * size[1])
        return Ask(
            at=0.0,
            steps=self.steps[1],
            width=width,
            height=height,
            n=self.n[1],
            guided=self.guided_share > 0,
            high_noise_frac=self.high_noise_frac,
        )

    def draw(self, at: float, rng: random.Random) -> Ask:
        width, height = rng.choice(self.sizes)
        refined = self.high_noise_frac < 1 and rng.random() < self.refined_share
        return Ask(
            at=at,
            steps=rng.randint(*self.steps),
            width=width,
            height=height,
            n=rng.randint(*self.n),
            guided=rng.random() < self.guided_share,
            high_noise_frac=self.high_noise_frac if refined else 1.0,
            deadline_s=self.deadline_s,
        )


def poisson(mix: Mix, rate: float, count: int, seed: int, burst: int = 1) -> list[Ask]:
    """`count` requests at `rate` a second on average; `burst` of them at a time, and the bursts at random."""
    rng = random.Random(seed)
    asks: list[Ask] = []
    now = 0.0
    while len(asks) < count:
        now += rng.expovariate(rate / burst)
        asks += [mix.draw(now, rng) for _ in range(min(burst, count - len(asks)))]
    return asks


def closed_loop(mix: Mix, count: int, seed: int) -> Sequence[Ask]:
    """`count` requests for clients that send their next one as soon as they have their last one's answer."""
    rng = random.Random(seed)
    return [mix.draw(0.0, rng) for _ in range(count)]
