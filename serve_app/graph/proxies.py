"""Serve's HTTP proxies, as far as its public interface says nothing of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

_POLL_S, _ANSWER_S = 0.1, 10.0


async def http_options() -> HTTPOptions | None:
    """What the proxies were started with, for a replica to ask; None where the controller does not answer in time."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            options: HTTPOptions = await controller.get_http_config.remote()
            return options
    except (TimeoutError, RayError, ValueError):  # the last: there is no such actor
        return None


def wait_until_serving() -> None:
    """Returns when every proxy knows the routes of the applications that run."""
    _get_global_client().wait_for_proxies_serving(wait_for_applications_running=True)


def wait_until_idle(timeout_s: float) -> bool:
    """Whether no proxy has a request under way any more, within so many seconds.

    A replica is done when it has handed its answer to the proxy; a client that reads slowly is still being answered.
    """
    deadline = time.monotonic() + timeout_s
    try:
        proxies = ray.get(_get_global_client()._controller.get_proxies.remote(), timeout=timeout_s)
    except (GetTimeoutError, RayActorError):
        return False  # the proxies may be there all the same
    return all_idle(list(proxies.values()), deadline)


def all_idle(proxies: Sequence[Any], deadline: float) -> bool:
    """Drains the proxies, actors all, and whether each is idle by then, on the monotonic clock. A dead one is."""
    while True:
        asked = [(proxy, proxy.update_draining.remote(True), proxy.is_drained.remote()) for proxy in proxies]
        proxies = [proxy for proxy, _, answer in asked if not _is_idle(answer, deadline)]
        if not proxies or time.monotonic() > deadline:
            return not proxies
        time.sleep(_POLL_S)


def _is_idle(answer: Any, deadline: float) -> bool:
    try:
        return bool(ray.get(answer, timeout=max(deadline - time.monotonic(), 0)))
    except ActorDiedError:
        return True  # it has nobody to answer any more
    except (GetTimeoutError, RayActorError):
        return False
