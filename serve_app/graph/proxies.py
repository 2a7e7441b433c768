"""Serve's HTTP proxies, in two words that its public interface lacks."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.serve.context import _get_global_client

_POLL_S = 0.1


def wait_until_serving() -> None:
    """Returns when every proxy knows the routes of the applications that run."""
    _get_global_client().wait_for_proxies_serving(wait_for_applications_running=True)


def wait_until_idle(timeout_s: float) -> bool:
    """Whether no proxy has a request under way any more, within so many seconds.

    A replica is done when it has handed its answer to the proxy; a client that reads slowly is still being answered.
    """
    deadline = time.monotonic() + timeout_s
    proxies: list[Any] = list(ray.get(_get_global_client()._controller.get_proxies.remote()).values())
    try:
        ray.get([proxy.update_draining.remote(True) for proxy in proxies], timeout=timeout_s)
        while time.monotonic() < deadline:
            if all(ray.get([proxy.is_drained.remote() for proxy in proxies], timeout=timeout_s)):
                return True
            time.sleep(_POLL_S)
    except GetTimeoutError:
        pass
    except RayActorError:
        return True  # a proxy that died has nobody to answer
    return False
