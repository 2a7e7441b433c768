from __future__ import annotations

from contextvars import copy_context

import pytest

from serve_app.request.errors import Draining, InvalidRequest, Overloaded
from serve_app.runtime.admission import ARRIVED_IN_TIME, Admission


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def overloaded(admission: Admission, images: int) -> Overloaded:
    with pytest.raises(Overloaded) as caught, admission.hold(images):
        pass
    return caught.value


def draw(admission: Admission, clock: Clock, images: int, seconds: float) -> None:
    with admission.hold(images):
        clock.now += seconds


def test_images_in_flight_are_counted_up_and_down() -> None:
    admission = Admission(4, Clock())
    with admission.hold(3):
        assert admission.in_flight == 3
        with admission.hold(1):
            assert admission.in_flight == 4
        assert admission.in_flight == 3
    assert admission.in_flight == 0


def test_what_drains_keeps_what_it_has_and_takes_in_nothing() -> None:
    admission = Admission(4, Clock())
    with admission.hold(3):
        admission.draining = True
        for images in (1, 4, 0):
            with pytest.raises(Draining) as caught, admission.hold(images):
                pass
            assert caught.value.retry_after_s == 5
        assert admission.in_flight == 3
    assert admission.in_flight == 0


def test_what_fails_or_is_cancelled_leaves_too() -> None:
    admission = Admission(4, Clock())
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), admission.hold(4):
            raise error
    assert admission.in_flight == 0


def test_a_service_that_drains_takes_in_nothing_and_ends_what_it_has() -> None:
    admission = Admission(4, Clock())
    with admission.hold(3):
        admission.drain()
        with pytest.raises(Draining, match="shutting down") as caught, admission.hold(1):
            pass
        assert caught.value.retry_after_s and caught.value.retry_after_s >= 1
        assert admission.in_flight == 3
    assert admission.in_flight == 0
    with pytest.raises(Draining), admission.hold(1):
        pass


def test_a_service_that_drains_takes_in_what_had_arrived() -> None:
    admission = Admission(4, Clock())
    admission.drain()

    def arrived(in_time: bool) -> None:
        ARRIVED_IN_TIME.set(in_time)
        with admission.hold(4):
            assert admission.in_flight == 4

    copy_context().run(arrived, True)
    with pytest.raises(Draining):
        copy_context().run(arrived, False)
    assert admission.in_flight == 0


def test_what_does_not_fit_is_refused_and_not_counted() -> None:
    admission = Admission(4, Clock())
    with admission.hold(3):
        error = overloaded(admission, 2)
        assert (error.status, admission.in_flight) == (503, 3)
        with admission.hold(1):
            pass


def test_a_request_that_never_fits_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequest) as caught, Admission(4, Clock()).hold(5):
        pass
    assert caught.value.param == "n"


def test_the_wait_is_a_guess_where_no_rate_is_known() -> None:
    clock = Clock()
    admission = Admission(4, clock)
    with admission.hold(4):
        assert overloaded(admission, 1).retry_after_s == 5
        clock.now += 1
    with admission.hold(4):
        assert overloaded(admission, 1).retry_after_s == 1, "four in a second"


def test_the_wait_is_what_is_missing_at_the_rate_of_the_last_minute() -> None:
    clock = Clock()
    admission = Admission(4, clock)
    for _ in range(5):
        draw(admission, clock, 2, 10)  # 10 images in 50 s
    with admission.hold(3):
        assert overloaded(admission, 2).retry_after_s == 5
        assert overloaded(admission, 4).retry_after_s == 15, "one of the four has a place already"


def test_images_that_leave_together_took_their_time() -> None:
    """Eight leave at once ten seconds after the service was idle: 0.8 a second, not eight in no time."""
    clock = Clock()
    admission = Admission(128, clock)
    draw(admission, clock, 1, 5)
    clock.now += 20
    with admission.hold(120):
        draw(admission, clock, 8, 10)
        with admission.hold(8):
            clock.now += 0.25
            assert overloaded(admission, 8).retry_after_s == 14, "nine in 15.25 s of work; the pause counts nothing"


def test_images_that_left_after_a_long_stay_count_with_all_of_it() -> None:
    """Ten took 30 s and left just inside the last minute: one in 3 s, not ten in the moments since."""
    clock = Clock()
    admission = Admission(16, clock)
    draw(admission, clock, 10, 30)
    clock.now += 59.9
    with admission.hold(16):
        clock.now += 0.05
        assert overloaded(admission, 10).retry_after_s == 31


def test_the_rate_forgets_what_is_older_than_a_minute() -> None:
    clock = Clock()
    admission = Admission(4, clock)
    for _ in range(20):
        draw(admission, clock, 4, 0.5)
    clock.now += 61
    with admission.hold(4):
        assert overloaded(admission, 1).retry_after_s == 5


def test_the_wait_is_of_what_those_in_flight_cost() -> None:
    """Short ones left, long ones are there: a place is free when as much work is done as a long one takes."""
    clock = Clock()
    admission = Admission(2, clock)
    for _ in range(4):
        with admission.hold(1, cost=10.0):
            clock.now += 2  # 5 a second
    with admission.hold(1, cost=50.0), admission.hold(1, cost=150.0):
        assert overloaded(admission, 1).retry_after_s == 20
        assert overloaded(admission, 2).retry_after_s == 40


def test_the_wait_is_whole_and_between_a_second_and_ten_minutes() -> None:
    clock = Clock()
    admission = Admission(10, clock)
    for _ in range(3):
        draw(admission, clock, 10, 0)
    with admission.hold(10):
        assert overloaded(admission, 10).retry_after_s == 1
    slow = Admission(1_000, clock)
    for _ in range(2):
        draw(slow, clock, 1, 29)
    with slow.hold(1_000):
        assert overloaded(slow, 1_000).retry_after_s == 600


def test_the_wait_counts_finished_images_alone() -> None:
    clock = Clock()
    admission = Admission(4, clock)
    for _ in range(3):
        with pytest.raises(ValueError), admission.hold(1):
            clock.now += 1
            raise ValueError
    with admission.hold(4):
        assert overloaded(admission, 1).retry_after_s == 5


def test_requests_of_no_images_are_no_rate() -> None:
    admission = Admission(4, Clock())
    for _ in range(3):
        with admission.hold(0):
            pass
    with admission.hold(4):
        assert overloaded(admission, 1).retry_after_s == 5


def test_what_left_long_ago_is_forgotten_without_anyone_asking() -> None:
    clock = Clock()
    admission = Admission(4, clock)
    for _ in range(1000):
        draw(admission, clock, 1, 1.0)
    assert len(admission._left) <= 62
