"""Whether the proxies have ended what they had: actors of the graph's Ray stand in for them."""

from __future__ import annotations

import time

import pytest
import ray

from serve_app.graph.local import Running
from serve_app.graph.proxies import all_idle

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Proxy:
    """As Serve's, with requests that end after so many questions; None: never."""

    def __init__(self, questions: int | None) -> None:
        self._questions = questions
        self._draining = False

    def update_draining(self, draining: bool) -> None:
        self._draining = draining

    def is_drained(self) -> bool:
        if self._questions is None or not self._draining:
            return False
        self._questions -= 1
        return self._questions < 0


def test_each_proxy_is_asked_by_itself(graph: Running) -> None:
    idle, slow, never, dead = (Proxy.remote(questions) for questions in (0, 3, None, 0))
    ray.get([proxy.is_drained.remote() for proxy in (idle, slow, never, dead)], timeout=120)
    ray.kill(dead)
    assert all_idle([dead, slow, idle], time.monotonic() + 120), "a dead one has nobody to answer"
    assert not all_idle([dead, never, idle], time.monotonic() + 1), "another may be sending still"
    assert all_idle([], time.monotonic())
