"""Requests that killed replicas are refused for a while. Pure; the clock is injected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

from serve_app.request.errors import RequestKillsReplica
from serve_app.request.resolve import ResolvedRequest

REFUSED_S = 300.0
_MAX_ENTRIES = 1_000
# What does not decide what the stages compute. Where a client leaves the seed open, each try has another.
_NOT_DRAWN = ("request_id", "warnings", "n", "seed", "priority", "deadline_s", "output_format", "quality")


def fingerprint(request: ResolvedRequest) -> str:
    """Equal for requests that ask the same of the models: all that is drawn but the seed."""
    drawn = {name: value for name, value in asdict(request).items() if name not in _NOT_DRAWN}
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


class Quarantine:
    """Remembers for five minutes what killed replicas."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}  # the first to end first

    def __len__(self) -> int:
        return len(self._until)

    def check(self, request: ResolvedRequest) -> None:
        """Raises `RequestKillsReplica` where such a request killed replicas a short while ago."""
        self._forget()
        if self._until and fingerprint(request) in self._until:
            raise RequestKillsReplica(
                f"such a request ended the process that worked on it, twice; it is refused for {REFUSED_S / 60:.0f} "
                "minutes"
            )

    def add(self, request: ResolvedRequest) -> None:
        self._forget()
        name = fingerprint(request)
        self._until.pop(name, None)
        self._until[name] = self._clock() + REFUSED_S
        while len(self._until) > _MAX_ENTRIES:
            del self._until[next(iter(self._until))]

    def _forget(self) -> None:
        now = self._clock()
        while self._until and (first := next(iter(self._until))) and self._until[first] <= now:
            del self._until[first]
