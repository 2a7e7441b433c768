"""The simulated cluster against what must hold of any, and against formulas."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config.settings import PolicyName
from serve_app.planning.clock import VirtualClock
from serve_app.planning.plan import alone_s, work_s
from serve_app.planning.profile import Cores, Profile
from serve_app.planning.simulate import STAGES, Replicas, Run, simulate
from serve_app.planning.stages import Router
from serve_app.planning.workload import Ask, Mix, closed_loop, poisson
from serve_app.request.errors import ConfigurationError
from serve_app.runtime.scheduling import POLICIES
from tests.planning.small import (
    BEGIN_S,
    DECODE_S,
    FILE_S,
    FINISH_S,
    PASS_S,
    ROW_S,
    STEP_S,
    TEXT_S,
    content,
    machine,
    queue_alone,
)

SMALL = ((64, 64),)

ASKS = st.lists(
    st.builds(
        Ask,
        at=st.floats(0, 3),
        steps=st.integers(1, 12),
        width=st.sampled_from([32, 64]),
        height=st.just(64),
        n=st.integers(1, 4),
        guided=st.booleans(),
        high_noise_frac=st.sampled_from([0.1, 0.8, 1.0]),
        deadline_s=st.none() | st.floats(0.01, 5),
    ),
    min_size=1,
    max_size=25,
)
REPLICAS = st.builds(
    Replicas,
    encode=st.integers(1, 2),
    denoise=st.integers(1, 3),
    refine=st.integers(1, 2),
    decode=st.integers(1, 2),
    ingress=st.integers(1, 2),
)
CORES = st.none() | st.builds(Cores, count=st.integers(2, 4), slowdown=st.floats(1, 2))


@settings(max_examples=150, deadline=None)
@given(ASKS, REPLICAS, st.none() | st.integers(1, 8), CORES, st.sampled_from(sorted(POLICIES)), st.integers(0, 9))
def test_all_work_is_done_once(
    asks: list[Ask],
    replicas: Replicas,
    concurrency: int | None,
    cores: Cores | None,
    policy: PolicyName,
    seed: int,
) -> None:
    profile = machine().with_policy(policy).model_copy(update={"cores": cores})
    asks.sort(key=lambda ask: ask.at)
    run = simulate(profile, replicas, asks, concurrency=concurrency, seed=seed)

    assert [record.ask for record in run.records] == asks
    for record in run.records:
        assert record.done is not None and record.first_step is not None
        least = sum(alone_s(profile, record.ask).values())
        assert record.latency_s >= least - 1e-9, "nobody is faster than alone"
        assert record.arrived < record.first_step < record.done
        assert concurrency is not None or record.arrived == record.ask.at
    images = sum(ask.n for ask in asks)
    refined = [ask for ask in asks if ask.high_noise_frac < 1]
    calls = {stage: run.counts[stage].calls for stage in STAGES}
    assert calls == {
        "encode": len(asks),
        "denoise": images,
        "refine": sum(ask.n for ask in refined),
        "decode": images,
        "ingress": images,
    }
    for part, stage in enumerate(("denoise", "refine")):
        counts = run.counts[stage]
        steps = [ask.n * ask.steps_by_stage[part] for ask in asks]
        rows = sum(count * ask.rows for count, ask in zip(steps, asks, strict=True))
        assert counts.rows == rows, "every image is in exactly as many passes as it has steps"
        # No size is larger than the smallest measured one, so that each row takes the same.
        work = rows * ROW_S + counts.passes * PASS_S + sum(steps) * STEP_S + counts.calls * (BEGIN_S + FINISH_S)
        assert counts.work_s == pytest.approx(work)
    assert run.counts["encode"].work_s == pytest.approx(2 * len(asks) * TEXT_S)
    assert run.counts["decode"].work_s == pytest.approx(images * DECODE_S)
    assert run.counts["ingress"].work_s == pytest.approx(images * FILE_S)
    for counts in run.counts.values():
        if cores is None:
            assert counts.busy_s == pytest.approx(counts.work_s)
        else:
            assert counts.busy_s >= counts.work_s - 1e-9, "neighbours only slow down"


@settings(max_examples=50, deadline=None)
@given(ASKS, REPLICAS, CORES, st.integers(0, 9))
def test_the_same_seed_gives_the_same_run(asks: list[Ask], replicas: Replicas, cores: Cores | None, seed: int) -> None:
    profile = machine().model_copy(update={"cores": cores})
    one, other = (simulate(profile, replicas, asks, seed=seed) for _ in range(2))
    assert [(r.arrived, r.first_step, r.done) for r in one.records] == [
        (r.arrived, r.first_step, r.done) for r in other.records
    ]
    assert one.stages == other.stages


@settings(deadline=None)
@given(
    st.builds(
        Ask,
        at=st.just(0.0),
        steps=st.integers(1, 30),
        width=st.just(64),
        height=st.sampled_from([64, 128]),
        guided=st.booleans(),
        high_noise_frac=st.sampled_from([0.5, 0.8, 1.0]),
    )
)
def test_a_request_alone_takes_the_sum_of_its_parts(ask: Ask) -> None:
    run = simulate(machine(), Replicas(refine=1), [ask])
    assert run.records[0].latency_s == pytest.approx(sum(alone_s(machine(), ask).values()))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_row_at_a_time_is_a_queue_with_deterministic_service(load: float) -> None:
    """M/D/1: the mean wait is rho / (2 (1 - rho)) service times (Pollaczek 1930, Khinchine 1932)."""
    service_s, steps = 0.01, 5
    profile = queue_alone(service_s)
    mix = Mix(steps=(steps, steps), sizes=SMALL)  # guided: two rows, all that a pass holds
    asks = poisson(mix, load / (service_s * steps), 40_000, seed=3)
    run = simulate(profile, Replicas(), asks)
    wait = mean_latency(run) - service_s * steps
    assert wait == pytest.approx(load / (2 * (1 - load)) * service_s * steps, rel=0.06)
    assert run.stages["denoise"].utilisation == pytest.approx(load, rel=0.02)


def mean_latency(run: Run) -> float:
    return sum(record.latency_s for record in run.counted) / len(run.counted)


def test_a_closed_loop_runs_at_the_speed_of_its_bottleneck() -> None:
    profile = machine()
    asks = closed_loop(Mix(steps=(10, 10), sizes=SMALL), 600, seed=0)
    run = simulate(profile, Replicas(decode=3), asks, concurrency=12)
    # Two guided images fill a pass.
    an_image = (10 * (4 * ROW_S + PASS_S + 2 * STEP_S)) / 2 + BEGIN_S + FINISH_S
    assert work_s(profile, asks[0])["denoise"] == pytest.approx(an_image)
    assert run.throughput == pytest.approx(1 / an_image, rel=0.01)
    assert run.stages["denoise"].utilisation == pytest.approx(1, abs=0.01)
    assert run.stages["denoise"].rows == pytest.approx(4, rel=0.02)
    assert mean_latency(run) == pytest.approx(12 * an_image, rel=0.05), "Little's law"


def test_shared_cores_bound_what_all_replicas_do_together() -> None:
    profile = machine(cores={"count": 2, "slowdown": 1.25})
    asks = closed_loop(Mix(steps=(10, 10), sizes=SMALL), 400, seed=0)
    for denoisers in (4, 8):
        run = simulate(profile, Replicas(denoise=denoisers, decode=4), asks, concurrency=64)
        work = sum(counts.work_s for counts in run.counts.values()) + len(asks) * 4 * profile.hop_s
        end = max(record.done or 0.0 for record in run.records)
        assert 0.95 * end <= work / (2 / 1.25) <= end, "both cores are busy all the time, and never more than both"


def test_what_nobody_waits_for_takes_its_share_of_the_cores() -> None:
    """One core: a request alone ends when all else is done or later; the work beside its five calls is 5 s."""
    ask = Ask(0.0, steps=10, width=64, height=64, high_noise_frac=0.8)
    without, beside = (
        simulate(machine(cores={"count": 1, "beside_s": beside_s}), Replicas(refine=1), [ask] * 20, concurrency=20)
        for beside_s in (0.0, 1.0)
    )
    last, later = (max(record.done or 0.0 for record in run.records) for run in (without, beside))
    assert last + 0.9 * 20 * 5 * 1.0 <= later <= last + 20 * 5 * 1.0
    own = machine(cores=None)
    assert simulate(own, Replicas(refine=1), [ask]).records[0].latency_s == pytest.approx(
        simulate(machine(cores={"count": 99, "beside_s": 9.0}), Replicas(refine=1), [ask]).records[0].latency_s
    ), "with cores to spare nobody waits for it"


def test_work_that_shares_cores() -> None:
    def ends(cores: Cores, works: Sequence[tuple[float, float]]) -> list[float]:
        clock = VirtualClock(cores)
        done: dict[int, float] = {}
        for number, (start, seconds) in enumerate(works):
            clock.at(
                start,
                lambda about: clock.work(about[1], lambda _: done.update({about[0]: clock.now})),
                (number, seconds),
            )
        clock.run()
        return [done[number] for number in range(len(works))]

    assert ends(Cores(count=2), [(0, 1)] * 4) == pytest.approx([2] * 4)
    assert ends(Cores(count=1), [(0, 1), (0.5, 1)]) == pytest.approx([1.5, 2])
    assert ends(Cores(count=2), [(0, 1), (0.5, 1)]) == pytest.approx([1, 1.5])
    assert ends(Cores(count=2, slowdown=1.5), [(0, 1), (0, 1)]) == pytest.approx([1.5, 1.5])
    assert ends(Cores(count=3, slowdown=1.5), [(0, 1), (0, 1)]) == pytest.approx([1.25, 1.25])
    assert ends(Cores(count=2, slowdown=1.5), [(0, 1), (0, 1), (0, 1)]) == pytest.approx([2.25] * 3)


class Calls:
    def __init__(self) -> None:
        self.ongoing = 0


def test_the_router_balances() -> None:
    """The fullest of n bins under two choices is about log log n above the mean (Azar et al. 1994)."""
    replicas = [Calls() for _ in range(200)]
    router = Router(replicas, random.Random(5))
    for _ in range(200 * 50):
        router.pick().ongoing += 1
    assert max(replica.ongoing for replica in replicas) <= 50 + 5
    pair = [Calls(), Calls()]
    firsts = set()
    for seed in range(20):
        firsts.add(pair.index(Router(pair, random.Random(seed)).pick()))
    assert firsts == {0, 1}, "ties go to either"
    pair[0].ongoing = 1
    assert all(Router(pair, random.Random(seed)).pick() is pair[1] for seed in range(20))


def test_what_is_too_much_is_refused_and_late() -> None:
    profile = machine(ingress={"files": {"64x64": FILE_S}, "max_images_in_flight": 10})
    asks = [Ask(at=0.0, steps=5, width=64, height=64, n=2)] * 8
    run = simulate(profile, Replicas(), asks, warmup=0.0)
    refused = [record for record in run.records if record.done is None]
    assert len(refused) == 3
    assert all(record.latency_s == math.inf for record in refused)
    # In a closed loop they come back when they were told to.
    run = simulate(profile, Replicas(ingress=2), asks * 10, concurrency=9, seed=4)
    assert len(run.records) == 80 and sum(record.done is not None for record in run.records) > 60


def test_two_shapes_take_turns_and_do_not_mix() -> None:
    profile = machine()
    asks = [Ask(0.0, steps=6, width=width, height=64, guided=False) for width in (32, 64, 32, 64)]
    run = simulate(profile, Replicas(), asks, warmup=0.0)
    assert run.counts["denoise"].rows == 24
    assert run.counts["denoise"].passes >= 12, "two lanes of two"


def test_the_shortest_first_are_faster_on_average() -> None:
    asks = poisson(Mix(steps=(2, 60), sizes=SMALL), 1.2, 800, seed=1)
    means = {
        policy: mean_latency(simulate(machine().with_policy(policy), Replicas(), asks))
        for policy in ("first_come", "shortest_remaining")
    }
    assert means["shortest_remaining"] < 0.9 * means["first_come"]


@pytest.mark.parametrize(
    ("replicas", "changes", "ask", "concurrency", "line"),
    [
        (Replicas(refine=1), {"refine": None}, Ask(0, 5, 64, 64, high_noise_frac=0.8), None, "has no refine stage"),
        (Replicas(), {}, Ask(0, 5, 64, 64, high_noise_frac=0.8), None, "refine: 0 replicas, and there is work for it"),
        (Replicas(decode=0), {}, Ask(0, 5, 64, 64), None, "decode: 0 replicas"),
        (Replicas(), {}, Ask(0, 5, 64, 64, n=10), 20, "concurrency: 20 x 10 images in flight, 1 x 128 are taken in"),
        (Replicas(), {"denoise": {"max_batch_pixels": 5000}}, Ask(0, 5, 64, 64), None, "can't hold 2 rows of 4096"),
        (Replicas(), {"decode": {"max_batch_pixels": 4000}}, Ask(0, 5, 64, 64), None, "can't hold 4096 pixels"),
    ],
)  # fmt: skip
def test_what_can_never_be_served_is_one_line(
    replicas: Replicas, changes: dict[str, dict[str, int] | None], ask: Ask, concurrency: int | None, line: str
) -> None:
    merged = {name: value and content()[name] | value for name, value in changes.items()}
    profile: Profile = machine(**merged)
    with pytest.raises(ConfigurationError) as caught:
        simulate(profile, replicas, [ask], concurrency=concurrency)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_many_replicas() -> None:
    """A tenth of 1,000 denoisers and 20,000 requests, which take seconds."""
    asks = poisson(Mix(steps=(20, 20), sizes=SMALL), 200, 2_000, seed=0)
    run = simulate(machine(), Replicas(encode=5, denoise=100, decode=8, ingress=10), asks)
    assert all(record.done is not None for record in run.records)
    assert run.throughput == pytest.approx(200, rel=0.1)


def test_bursts_come_together() -> None:
    asks = poisson(Mix(sizes=SMALL), 10, 4_000, seed=0, burst=8)
    assert len({ask.at for ask in asks}) == 500
    assert asks[-1].at == pytest.approx(400, rel=0.15)
