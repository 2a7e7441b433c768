"""The smallest number of replicas that keeps a promise: bounds first, then simulation. Pure.

The search starts from what utilisation alone demands, adds a replica where calls wait longest until the promise is
kept, and takes away from each stage what it can spare, the most costly stage first. Then it tries whether a little more
of one stage spares more of another. It ends where neither helps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from serve_app.planning.profile import DenoiseStage, Profile
from serve_app.planning.simulate import STAGES, Outcome, Replicas, Run, percentile, simulate
from serve_app.planning.workload import Ask, Mix
from serve_app.request.errors import ConfigurationError

# What is worth most is taken away first.
_BY_COST = ("denoise", "refine", "decode", "encode", "ingress")
_MOST = 20_000  # replicas of a stage
_LIVES = 20  # a run is as long as that many stays of a request in a busy service
_FEWEST_REQUESTS, _MOST_REQUESTS = 4_000, 40_000


@dataclass(frozen=True)
class Plan:
    """Replicas that keep the promise, the run that shows it, and how many settings were tried."""

    replicas: Replicas
    run: Run
    tried: int


def best_pass_s(stage: DenoiseStage, ask: Ask) -> float:
    """A step's seconds of one image in the pass that is best filled with such images."""
    fits = (k for k in range(1, stage.max_batch_rows // ask.rows + 1))
    return min(
        stage.pass_seconds(k * ask.rows, ask.pixels, k) / k
        for k in fits
        if k == 1 or stage.budget.holds(k * ask.rows, k * ask.rows * ask.pixels)
    )


def work_s(profile: Profile, ask: Ask) -> dict[str, float]:
    """Seconds of each stage that a request takes at least: in passes filled at their best."""
    base, refiner = ask.steps_by_stage
    decode, encode = profile.decode, profile.encode
    work = dict.fromkeys(STAGES, 0.0)
    work["encode"] = sum(
        min(line(k) / k for k in range(1, encode.max_batch_size + 1)) for line in encode.lines.values()
    )
    work["decode"] = ask.n * min(
        decode.table.seconds(k, ask.pixels) / k
        for k in range(1, decode.max_batch_size + 1)
        if k == 1 or decode.budget.holds(k, k * ask.pixels)
    )
    work["ingress"] = ask.n * profile.ingress.line(ask.pixels) / profile.ingress.threads
    for name, stage, steps in (("denoise", profile.denoise, base), ("refine", profile.refine, refiner)):
        if stage is not None and (name == "denoise" or ask.high_noise_frac < 1):
            work[name] = ask.n * (stage.begin_s + steps * best_pass_s(stage, ask) + stage.finish_s)
    return work


def alone_s(profile: Profile, ask: Ask) -> dict[str, float]:
    """Seconds in each stage, and of all `hops`, of a request that is alone and whose images have a replica each."""
    stages = {
        "encode": sum(line(1) for line in profile.encode.lines.values()),
        "decode": profile.decode.table.seconds(1, ask.pixels),
        "ingress": profile.ingress.line(ask.pixels),
        "hops": profile.hop_s * (4 + (ask.high_noise_frac < 1)),
    }
    base, refiner = ask.steps_by_stage
    for name, stage, steps in (("denoise", profile.denoise, base), ("refine", profile.refine, refiner)):
        stages[name] = 0.0
        if stage is not None and (name == "denoise" or ask.high_noise_frac < 1):
            a_pass = stage.pass_seconds(ask.rows, ask.pixels, 1)
            stages[name] = stage.begin_s + steps * a_pass + stage.finish_s
    return stages


def least_replicas(profile: Profile, asks: Sequence[Ask], rate: float | None, concurrency: int | None) -> Replicas:
    """What utilisation demands: below it a stage gets more work than it can do even in its best passes.

    Raises `ConfigurationError` where replicas share cores and these are too few.
    """
    refined = any(ask.high_noise_frac < 1 for ask in asks)
    work = _mean(work_s, profile, asks)
    load = {stage: seconds * (rate or 0.0) for stage, seconds in work.items()}
    if profile.cores is not None:
        load["ingress"] *= profile.ingress.threads
        calls_s = (rate or 0.0) * sum(ask.calls for ask in asks) / len(asks) * (profile.hop_s + profile.cores.beside_s)
        needed, count = sum(load.values()) * profile.cores.slowdown + calls_s, profile.cores.count
        if needed >= count:
            raise ConfigurationError(
                f"the load takes {needed:.2f} cores even in full passes, the machine has {count}: no number of "
                "replicas helps"
            )
        load = dict.fromkeys(load, 0.0)  # more replicas add no cores
    least = {stage: math.floor(load[stage]) + 1 for stage in STAGES}
    least["refine"] *= refined
    if concurrency is not None:
        images = concurrency * max(ask.n for ask in asks)
        least["ingress"] = max(least["ingress"], math.ceil(images / profile.ingress.max_images_in_flight))
    return Replicas(**least)


def keeps(run: Run, p99_s: float) -> bool:
    """Whether a run's 99th percentile is in time, and stays so: its second half's alone must be, too.

    A refused request is late.
    """
    later = run.counted[len(run.counted) // 2 :]
    return max(_p99(run.counted), _p99(later)) <= p99_s


def _p99(records: Sequence[Outcome]) -> float:
    return percentile([record.latency_s for record in records], 0.99)


def find_plan(
    profile: Profile,
    asks: Sequence[Ask],
    p99_s: float,
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    seed: int = 0,
    tell: Callable[[Replicas, Run], None] = lambda replicas, run: None,
) -> Plan:
    """Searches the replicas; `tell` is called with each run. Raises `ConfigurationError` where no number is enough."""
    alone = {ask: sum(alone_s(profile, ask).values()) for ask in _kinds(asks)}
    shortest = percentile([alone[replace(ask, at=0.0)] for ask in asks], 0.99)
    if shortest > p99_s:
        raise ConfigurationError(
            f"p99: {p99_s:g} s is out of reach: alone in the service a request takes {shortest:.2f} s already"
        )
    least = least_replicas(profile, asks, rate, concurrency)
    undisturbed = _mean(alone_s, profile, asks)
    runs: dict[Replicas, Run] = {}

    def attempt(replicas: Replicas) -> Run:
        if replicas not in runs:
            runs[replicas] = simulate(profile, replicas, asks, concurrency=concurrency, seed=seed)
            tell(replicas, runs[replicas])
        return runs[replicas]

    def without_the_spare(replicas: Replicas) -> Replicas:
        """From each stage what it can spare, the most costly first. Takes it that more never hurts."""
        for stage in _BY_COST:
            low, high = getattr(least, stage), getattr(replicas, stage)
            while low < high:
                middle = (low + high) // 2
                if keeps(attempt(replace(replicas, **{stage: middle})), p99_s):
                    high = middle
                else:
                    low = middle + 1
            replicas = replace(replicas, **{stage: high})
        return replicas

    found = least
    while not keeps(run := attempt(found), p99_s):
        found = _more(found, run, undisturbed, profile)
    found = without_the_spare(found)
    traded = True
    while traded:
        traded = False
        for stage in _BY_COST:
            if 0 < getattr(found, stage) < _MOST:
                other = without_the_spare(_with_more(found, stage))
                if _price(other) < _price(found):
                    found, traded = other, True
    return Plan(found, attempt(found), len(runs))


def _price(replicas: Replicas) -> tuple[int, ...]:
    return (replicas.total, *(getattr(replicas, stage) for stage in _BY_COST))


def _with_more(replicas: Replicas, stage: str) -> Replicas:
    """A tenth more of a stage, at least one."""
    count = getattr(replicas, stage)
    return replace(replicas, **{stage: count + max(count // 10, 1)})


def _more(replicas: Replicas, run: Run, undisturbed: dict[str, float], profile: Profile) -> Replicas:
    """More of the stage where a call loses most time to others."""
    lost = {
        stage: use.stayed_s - undisturbed[stage] for stage, use in run.stages.items() if getattr(replicas, stage) > 0
    }
    stage = max(lost, key=lambda name: lost[name])
    refused = any(record.done is None for record in run.counted)
    served = [record for record in run.counted if record.done is not None]
    if refused and (lost[stage] < sum(undisturbed.values()) or not served):
        stage = "ingress"  # nothing waits long: it is only that too little is taken in at once
    count = getattr(replicas, stage)
    if count >= _MOST or (profile.cores is not None and count >= 4 * profile.cores.count):
        raise ConfigurationError(f"p99: not reached with {replicas}")
    return _with_more(replicas, stage)


def requests_to_simulate(profile: Profile, mix: Mix, rate: float | None, concurrency: int | None) -> int:
    """Enough for a steady state and for a 99th percentile, and not more than takes seconds."""
    if rate is None:
        return min(max(_FEWEST_REQUESTS, _LIVES * (concurrency or 1)), _MOST_REQUESTS)
    stay_s = busy_stay_s(profile, mix.largest())
    return min(max(_FEWEST_REQUESTS, math.ceil(rate * stay_s * _LIVES)), _MOST_REQUESTS)


def busy_stay_s(profile: Profile, ask: Ask) -> float:
    """Seconds of a request whose every pass is full."""
    base, refiner = ask.steps_by_stage
    total = sum(alone_s(profile, ask).values())
    for stage, steps in ((profile.denoise, base), (profile.refine, refiner)):
        if stage is not None and steps:
            full = max(stage.max_batch_rows // ask.rows, 1)
            alone = stage.pass_seconds(ask.rows, ask.pixels, 1)
            total += steps * (stage.pass_seconds(full * ask.rows, ask.pixels, full) - alone)
    return total


def _kinds(asks: Sequence[Ask]) -> Counter[Ask]:
    """Requests that differ in more than when they came, and how many there are of each."""
    return Counter(replace(ask, at=0.0) for ask in asks)


def _mean(of: Callable[[Profile, Ask], dict[str, float]], profile: Profile, asks: Sequence[Ask]) -> dict[str, float]:
    total: dict[str, float] = {}
    for ask, count in _kinds(asks).items():
        for name, seconds in of(profile, ask).items():
            total[name] = total.get(name, 0.0) + count * seconds / len(asks)
    return total
