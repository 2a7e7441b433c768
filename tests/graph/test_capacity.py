"""What is booked against what is there."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.graph.capacity import Booking, bookings, shortfall

GB = 2**30


def booked(**options: Any) -> Booking:
    (booking,) = bookings([{"name": "BaseDenoiser"} | options])
    return booking


@pytest.mark.parametrize(
    ("options", "replicas"),
    [
        ({}, 1),
        ({"num_replicas": None}, 1),
        ({"num_replicas": 3}, 3),
        ({"num_replicas": "auto"}, 1),
        ({"num_replicas": "auto", "autoscaling_config": {"min_replicas": 2}}, 2),
        ({"autoscaling_config": {"min_replicas": 2, "max_replicas": 9}}, 2),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 9}}, 0),
        ({"autoscaling_config": {"min_replicas": 0, "initial_replicas": 4, "max_replicas": 9}}, 4),
        ({"autoscaling_config": {"max_replicas": 9}}, 1),
    ],
)
def test_replicas_that_a_deployment_starts_with(options: dict[str, Any], replicas: int) -> None:
    assert booked(**options).replicas == replicas


@pytest.mark.parametrize(
    ("options", "resources"),
    [
        ({}, {"CPU": 1.0}),
        ({"ray_actor_options": {"num_gpus": 0.4}}, {"CPU": 1.0, "GPU": 0.4}),
        ({"ray_actor_options": {"num_cpus": 0, "memory": GB}}, {"memory": GB}),
        ({"ray_actor_options": {"num_cpus": 2, "resources": {"fast": 1}}}, {"CPU": 2.0, "fast": 1.0}),
        ({"placement_group_bundles": [{"CPU": 1}, {"CPU": 2, "GPU": 1}]}, {"CPU": 3.0, "GPU": 1.0}),
    ],
)
def test_what_a_replica_books(options: dict[str, Any], resources: dict[str, float]) -> None:
    assert booked(**options).resources == resources


def test_what_fits_is_no_fault() -> None:
    some = bookings(
        [
            {"name": "BaseDenoiser", "num_replicas": 10, "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 0.1}},
            {"name": "Refiner", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 0.5}},
        ]
    )
    assert shortfall(some, [{"CPU": 2.0, "GPU": 2.0}]) is None
    assert shortfall(some, [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]) is None
    assert shortfall([booked(autoscaling_config={"min_replicas": 0})], [{}]) is None


@pytest.mark.parametrize(
    ("options", "nodes", "line"),
    [
        (
            {"num_replicas": 3, "ray_actor_options": {"num_cpus": 0.9}},
            [{"CPU": 2.0}],
            "the deployments book 2.7 CPUs (BaseDenoiser 3 x 0.9), and Ray has 2 here",
        ),
        (
            {"ray_actor_options": {"num_cpus": 0.1, "num_gpus": 0.4}},
            [{"CPU": 2.0}],
            "the deployments book 0.4 GPUs (BaseDenoiser 1 x 0.4), and Ray has 0 here",
        ),
        (
            {"ray_actor_options": {"num_cpus": 0, "memory": 20 * GB}},
            [{"CPU": 2.0, "memory": 16.5 * GB}],
            "the deployments book 20.0 GB of memory (BaseDenoiser 1 x 20.0), and Ray has 16.5 here",
        ),
        (
            {"ray_actor_options": {"num_cpus": 3}},
            [{"CPU": 2.0}, {"CPU": 2.0}],
            "a replica of BaseDenoiser books 3 CPUs, and no machine has more than 2",
        ),
        (
            {"num_replicas": 3, "ray_actor_options": {"num_cpus": 0, "num_gpus": 0.6}},
            [{"GPU": 2.0}],
            "BaseDenoiser 3 x 0.6 of a GPU need 3 GPUs, since no two fit on one, and Ray has 2 here",
        ),
        (
            {"ray_actor_options": {"num_cpus": 0, "resources": {"fast": 1}}},
            [{"CPU": 2.0}],
            "the deployments book 1 fast (BaseDenoiser 1 x 1), and Ray has 0 here",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], nodes: list[dict[str, float]], line: str) -> None:
    assert shortfall([booked(**options)], nodes) == line
