"""What the deployments book against what the machines have. Pure.

Ray lets what does not fit wait for ever: somebody might add a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SLACK = 1e-6  # sums of fractions
_WORDS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GB of memory"}


@dataclass(frozen=True)
class Booking:
    """The replicas that a deployment starts with, and what each books, in Ray's words: CPU, GPU, memory (bytes)."""

    deployment: str
    replicas: int
    resources: Mapping[str, float]

    def total(self, resource: str) -> float:
        return self.replicas * self.resources.get(resource, 0.0)


def bookings(deployments: Iterable[Mapping[str, Any]]) -> list[Booking]:
    """Of deployment options as a config file has them. What they leave open is as in Ray Serve."""
    return [Booking(options["name"], _first_replicas(options), _per_replica(options)) for options in deployments]


def shortfall(booked: Sequence[Booking], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why the machines can't hold all replicas, in one line; None where they may.

    `nodes`: the resources of each. What is found is certain; a set of fractions that fits in sum can still not fit.
    """
    for resource in sorted({name for booking in booked for name in booking.resources}):
        wanted = sum(booking.total(resource) for booking in booked)
        there = sum(node.get(resource, 0.0) for node in nodes)
        if wanted > there + _SLACK:
            of = ", ".join(
                f"{booking.deployment} {booking.replicas} x {_amount(resource, booking.resources[resource])}"
                for booking in booked
                if booking.total(resource)
            )
            return (
                f"the deployments book {_amount(resource, wanted)} {_word(resource)} ({of}), and Ray has "
                f"{_amount(resource, there)} here"
            )
        most = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        for booking in booked:
            each = booking.resources.get(resource, 0.0)
            if booking.replicas and each > most + _SLACK:
                return (
                    f"a replica of {booking.deployment} books {_amount(resource, each)} {_word(resource)}, and no "
                    f"machine has more than {_amount(resource, most)}"
                )
    return _whole_gpus(booked, sum(int(node.get("GPU", 0.0)) for node in nodes))


def _whole_gpus(booked: Sequence[Booking], gpus: int) -> str | None:
    """A replica's share lies on one GPU, and two that are above a half never on the same."""
    apart = [booking for booking in booked if booking.total("GPU") and booking.resources["GPU"] > 0.5 + _SLACK]
    needed = sum(int(booking.replicas * max(1, booking.resources["GPU"])) for booking in apart)
    if needed <= gpus:
        return None
    of = ", ".join(f"{booking.deployment} {booking.replicas} x {booking.resources['GPU']:g}" for booking in apart)
    return f"{of} of a GPU need {needed} GPUs, since no two fit on one, and Ray has {gpus} here"


def _first_replicas(options: Mapping[str, Any]) -> int:
    autoscaling = options.get("autoscaling_config")
    replicas = options.get("num_replicas")
    if autoscaling or replicas == "auto":
        autoscaling = autoscaling or {}
        first = autoscaling.get("initial_replicas")
        return int(autoscaling.get("min_replicas", 1) if first is None else first)
    return 1 if replicas is None else int(replicas)


def _per_replica(options: Mapping[str, Any]) -> dict[str, float]:
    actor = options.get("ray_actor_options") or {}
    found: dict[str, float] = {}
    if bundles := options.get("placement_group_bundles"):  # the replica runs in the first of them
        for bundle in bundles:
            for name, amount in bundle.items():
                found[name] = found.get(name, 0.0) + amount
        return found
    cpus = actor.get("num_cpus")
    found["CPU"] = 1.0 if cpus is None else float(cpus)
    found["GPU"] = float(actor.get("num_gpus") or 0.0)
    found["memory"] = float(actor.get("memory") or 0.0)
    found |= {name: float(amount) for name, amount in (actor.get("resources") or {}).items()}
    return {name: amount for name, amount in found.items() if amount}


def _amount(resource: str, value: float) -> str:
    return f"{value / 2**30:.1f}" if resource == "memory" else f"{round(value, 4):g}"


def _word(resource: str) -> str:
    return _WORDS.get(resource, resource)
