"""When a pass counts as hung."""

from __future__ import annotations

import pytest

from serve_app.runtime.watch import Watch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def a_watch() -> tuple[Watch, Clock]:
    clock = Clock()
    return Watch(first_pass_s=60, clock=clock), clock


def run(watch: Watch, clock: Clock, kind: str, seconds: float) -> None:
    with watch.over(kind):
        clock.now += seconds


def test_nothing_under_way_is_never_overdue() -> None:
    watch, clock = a_watch()
    assert watch.overdue() is None
    run(watch, clock, "a", 1)
    clock.now += 1e6
    assert watch.overdue() is None


@pytest.mark.parametrize(
    ("earlier", "limit_s"),
    [
        ([], 60),  # the first may compile
        ([0.01], 20),  # a busy machine slows short passes by more than ten times
        ([3.0, 2.5], 30),
        ([2.5, 3.0, 0.1], 30),
        ([55.0], 550),
    ],
)
def test_a_pass_may_take_ten_times_the_slowest_of_its_kind(earlier: list[float], limit_s: float) -> None:
    watch, clock = a_watch()
    for seconds in earlier:
        run(watch, clock, "a", seconds)
    run(watch, clock, "another", 1000)
    with watch.over("a"):
        clock.now += limit_s
        assert watch.overdue() is None
        clock.now += 0.5
        told = watch.overdue()
        assert told is not None and "\n" not in told and f"{limit_s:.0f} s" in told
    assert watch.overdue() is None, "it has ended after all"


def test_a_pass_that_raises_ends_and_teaches_nothing() -> None:
    watch, clock = a_watch()
    with pytest.raises(ValueError), watch.over("a"):
        clock.now += 50
        raise ValueError
    clock.now += 1e6
    assert watch.overdue() is None and watch.limit_s("a") == 60


def test_the_kinds_it_remembers_are_bounded() -> None:
    watch, clock = a_watch()
    for number in range(25_000):
        run(watch, clock, str(number), 0.01)
    assert len(watch._slowest) <= 10_000 and watch.limit_s("24999") == 20
