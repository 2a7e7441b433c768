"""The timesteps that a scheduler visits, and where the refiner takes over.

Computed as diffusers does for each scheduler, without it: by the ingress, which loads no torch, and by the planner.

webui counts sampling steps where diffusers and we cut on training timesteps: its `refiner_switch_at` s gives the base
every step k of n, counted from 0, with k / n < s; our `high_noise_frac` f every timestep at or above round(T - f T)
(`models/sampling.py`). With SDXL's "leading" timesteps the two differ by several steps, so f is chosen to cut between
the base's last timestep and the refiner's first.

With Heun, which visits every timestep but the first twice, a step of the user's is a timestep. Karras's timesteps
can coincide at the end of long trajectories; then no cut parts them, and the nearest one is taken.
"""

from __future__ import annotations

import bisect
import functools
import math

from serve_app.request.facts import NoiseSchedule
from serve_app.request.schedulers import BY_NAME, KARRAS

_KARRAS_RHO = 7.0  # arXiv 2206.00364, equation 5
_FIRST_REFINED = 1e-6  # a share of the base that no timestep falls into


SDXL = NoiseSchedule()


def steps_before(switch_at: float, steps: int) -> int:
    """How many of `steps` webui gives the base: those with step / steps < switch_at."""
    return sum(1 for step in range(steps) if step / steps < switch_at)


def base_steps(scheduler: str, steps: int, high_noise_frac: float, noise_schedule: NoiseSchedule = SDXL) -> int:
    """How many timesteps the base takes of a trajectory that is cut at `high_noise_frac`."""
    total = noise_schedule.num_train_timesteps
    cutoff = round(total - high_noise_frac * total)
    return sum(1 for timestep in timesteps(scheduler, steps, noise_schedule) if timestep >= cutoff)


@functools.lru_cache(maxsize=4096)
def split(scheduler: str, steps: int, share: float, noise_schedule: NoiseSchedule = SDXL) -> tuple[int, int]:
    """The steps of the base and of the refiner where the base has a `high_noise_frac` of `share`."""
    base = steps if share >= 1 else base_steps(scheduler, steps, share, noise_schedule)
    return base, steps - base


def high_noise_frac(scheduler: str, steps: int, wanted: int, noise_schedule: NoiseSchedule = SDXL) -> float:
    """A `high_noise_frac` that gives the base `wanted` of `steps` timesteps; 1 where it takes all of them.

    Where timesteps coincide and no cut gives that many, the nearest number that one gives.
    """
    if wanted >= steps:
        return 1.0
    visited = timesteps(scheduler, steps, noise_schedule)
    for distance in range(steps):
        for count in (wanted - distance, wanted + distance):
            if count == 0:
                return _FIRST_REFINED
            if 0 < count < steps and visited[count] < visited[count - 1]:
                cutoff = math.ceil((visited[count] + visited[count - 1]) / 2)
                if cutoff <= visited[count - 1]:
                    total = noise_schedule.num_train_timesteps
                    return (total - cutoff) / total if cutoff < total else _FIRST_REFINED
    return 1.0


def timesteps(scheduler: str, steps: int, noise_schedule: NoiseSchedule = SDXL) -> list[float]:
    """The training timesteps that a scheduler visits in `steps` steps, falling, each once."""
    total = noise_schedule.num_train_timesteps
    row = BY_NAME[scheduler]
    if row.schedule == KARRAS:
        return _karras(steps, noise_schedule)
    points = steps + 1 if row.one_more else steps
    if noise_schedule.timestep_spacing == "leading":
        ratio = total // points
        visited = [float(k * ratio + noise_schedule.steps_offset) for k in reversed(range(points))]
    elif noise_schedule.timestep_spacing == "trailing":
        return [float(round(total - k * total / steps) - 1) for k in range(steps)]
    else:
        visited = [k * (total - 1) / (points - 1) if points > 1 else 0.0 for k in reversed(range(points))]
        if row.whole:
            visited = [float(round(timestep)) for timestep in visited]
    return visited[:steps]


def _karras(steps: int, noise_schedule: NoiseSchedule) -> list[float]:
    """Karras's noise levels as the timesteps nearest to them in log sigma (arXiv 2206.00364, equation 5)."""
    log_sigmas = _log_sigmas(noise_schedule)
    lowest, highest = (math.exp(log_sigmas[end] / _KARRAS_RHO) for end in (0, -1))
    visited = []
    for k in range(steps):
        ramp = k / (steps - 1) if steps > 1 else 0.0
        log_sigma = _KARRAS_RHO * math.log(highest + ramp * (lowest - highest))
        low = min(max(bisect.bisect_right(log_sigmas, log_sigma) - 1, 0), len(log_sigmas) - 2)
        share = (log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])
        visited.append(float(round(low + min(max(share, 0.0), 1.0))))
    return visited


@functools.cache
def _log_sigmas(noise_schedule: NoiseSchedule) -> list[float]:
    """log sigma of every training timestep, rising; sigma^2 = (1 - a) / a with a the product of 1 - beta."""
    total = noise_schedule.num_train_timesteps
    first, last = math.sqrt(noise_schedule.beta_start), math.sqrt(noise_schedule.beta_end)
    alpha, values = 1.0, []
    for k in range(total):
        alpha *= 1 - (first + (last - first) * k / (total - 1)) ** 2
        values.append(0.5 * math.log((1 - alpha) / alpha))
    return values
