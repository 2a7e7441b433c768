"""A Ray instance of our own with the graph running on it: for the command line, and for tests.

Ray is imported on use only: what it reads from the environment is set before.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve_app.config.serve_file import ServeConfig
from serve_app.config.settings import APP_NAME
from serve_app.graph import environment
from serve_app.graph.capacity import Booking, bookings, shortfall
from serve_app.graph.rollout import Rollout, last_line, wait_until_running
from serve_app.models.check import check_sources
from serve_app.request.errors import ConfigurationError

_POLL_S, _ANSWER_S = 0.2, 5.0
# Of Ray's memory monitor; the first is a share of all memory, the second 0 where it is off.
_THRESHOLD, _REFRESH = "RAY_memory_usage_threshold", "RAY_memory_monitor_refresh_ms"


@dataclass(frozen=True)
class Running:
    """A graph that is up."""

    handle: Any  # ray.serve.handle.DeploymentHandle of the ingress
    url: str | None  # of its HTTP, where it was started here
    ray_address: str  # for `ray.init` in other processes
    environment: dict[str, str] = field(default_factory=dict)  # with which they join it: `ray.init(address="auto")`

    def drain(self, timeout_s: float) -> bool:
        """Takes in no new work (503), and waits until what is under way has ended and is sent.

        False where something had not ended within so many seconds.
        """
        deadline = time.monotonic() + timeout_s
        while self._under_way():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        if self.url is None:
            return True
        from serve_app.graph import proxies

        return proxies.wait_until_idle(max(deadline - time.monotonic(), _ANSWER_S))

    def _under_way(self) -> bool:
        """Asks every replica of the ingress, anew each time: one may have started meanwhile."""
        try:
            answers = self.handle.broadcast("drain").results(timeout_s=_ANSWER_S, return_exceptions=True)
        except Exception:  # no replica lives at the moment, or the application was deleted
            return APP_NAME in _applications()
        return any(answer != 0 for answer in answers)


def _nothing(_: str) -> None:
    pass


@contextmanager
def running(
    config: ServeConfig,
    *,
    http: bool = True,
    host: str | None = None,
    port: int | None = None,
    address: str | None = None,
    replace: bool = False,
    tell: Callable[[str], None] = _nothing,
) -> Iterator[Running]:
    """Runs the graph until the block ends, with HTTP or for its handle alone.

    Starts a Ray instance on this machine, or joins the one at `address`, whose HTTP stays as it is. It never
    attaches to whatever cluster happens to run here, as a bare `ray.init()` would. A Ray of our own listens on
    loopback and wants its token; `host` is its HTTP's alone, and each replica's gRPC server, which wants the token
    too, binds every address (docs/security.md). Checks come before anything is started; a deployment
    that fails is one line in a `ConfigurationError`, as soon as it is known.

    An application of our name at an `address` is left alone unless `replace` says otherwise, and at the end only the
    one that was deployed here is deleted. `tell` is given lines to show while the deployments start.
    """
    if config.only_by_ray:
        raise ConfigurationError(f"{config.only_by_ray[0]}: not supported here; `serve run` and KubeRay take it")
    if address is not None and (host is not None or port is not None):
        raise ConfigurationError("a host and a port are for a Ray of our own, not for the one at an address")
    if address is None and replace:
        raise ConfigurationError("there is nothing to replace on a Ray of our own: --replace goes with --address")
    check_sources(config.app)
    options = dict(config.http_options)
    options["host"] = host or options.get("host", "127.0.0.1")
    options["port"] = options.get("port", 8000) if port is None else port
    own = address is None
    http = http and config.proxy_location != "Disabled"
    if http and own:
        _check_port_free(options["host"], options["port"])
    if own:
        environment.check_surroundings()
        if warning := environment.set_for_own_ray():
            tell(warning)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # What does not answer health checks does not drain either, and holds its share of a GPU meanwhile.
    os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")

    import ray
    from ray import serve

    from serve_app.graph import proxies
    from serve_app.graph.build import build_graph, deployment_options

    _start_ray(address)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: it says what it starts
    deploying, there_before, deployed_at = False, None, None
    try:
        _check_room(bookings(deployment_options(config.app, config.deployments).values()), own, tell)
        if not own and APP_NAME in _applications() and not replace:
            raise ConfigurationError(
                f"{address}: an application {APP_NAME!r} is there already; --replace puts this one in its place"
            )
        target = serve.RunTarget(
            build_graph(config.app, config.deployments),
            name=APP_NAME,
            route_prefix=config.route_prefix,
            logging_config=config.logging_config,
        )
        try:
            serve.start(
                proxy_location=config.proxy_location if http else "Disabled", http_options=options if http else None
            )
            there_before, deploying = _deployed_at(), True
            (handle,) = serve.run_many([target], wait_for_applications_running=False)
        except Exception as error:  # Serve's, of many kinds: an option that it refuses, an actor that dies
            raise ConfigurationError(f"Serve did not start: {last_line(error)}") from error
        deployed_at = _deployed_at()
        rollout = Rollout(tell, _log() if own else "logs/serve/controller_*.log of the cluster's head")
        wait_until_running(APP_NAME, rollout, lambda: _say_memory(rollout) if own else None)
        proxies.wait_until_serving()
        url = None
        if http and own and config.route_prefix is not None:
            url = f"http://{_in_url(options['host'])}:{options['port']}{config.route_prefix.rstrip('/')}"
        ray_address = ray.get_runtime_context().gcs_address
        joining = environment.for_other_processes(ray_address) if own else {"RAY_ADDRESS": ray_address}
        yield Running(handle, url, ray_address, joining)
    finally:
        try:
            # The cluster and what else it serves are not ours, nor is an application that somebody has put there since.
            if not own and deploying and _is_ours(_deployed_at(), there_before, deployed_at):
                serve.delete(APP_NAME)
        except Exception as error:
            tell(f"{address}: the application {APP_NAME!r} may still be there: {last_line(error)}")
        finally:
            ray.shutdown()  # a Ray of our own ends with it, replicas and all


def _start_ray(address: str | None) -> None:
    """Joins the Ray at an address, or starts one. Its faults are one line."""
    import ray

    start: dict[str, Any] = (
        {"address": "local", "include_dashboard": False} if address is None else {"address": address}
    )
    handler = signal.getsignal(signal.SIGTERM)
    if address is None:
        _check_memory()
    else:
        _check_reachable(address)
    try:
        ray.init(**start, log_to_driver=False, logging_level="ERROR", namespace="serve")
    except Exception as error:
        what = "Ray did not start" if address is None else f"{address}: no Ray was joined"
        raise ConfigurationError(f"{what}: {last_line(error)}") from error
    finally:
        # Ray takes SIGTERM for itself: whoever has a way of its own to end keeps it.
        if handler not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_reachable(address: str) -> None:
    """Ray would try for minutes. An address on loopback it takes for this machine's outside one, unless it is told."""
    from ray._private.services import canonicalize_bootstrap_address

    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        return  # Ray's own words for addresses
    used = canonicalize_bootstrap_address(address) or address
    try:
        socket.create_connection((used.rpartition(":")[0].strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        hint = ""
        if used != address:
            hint = f" at {used}; what listens on loopback alone is joined with {environment.LOOPBACK}=0"
        raise ConfigurationError(f"{address}: {error.strerror or error}{hint}") from None


def _check_room(booked: list[Booking], own: bool, tell: Callable[[str], None]) -> None:
    """Refuses what a Ray of our own can't place. A cluster at an address may grow: there it is said, and waited for."""
    import ray

    fault = shortfall(booked, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if fault is not None and own:
        raise ConfigurationError(fault)
    if fault is not None:
        tell(f"{fault}; waiting for the cluster to grow")


def _applications() -> dict[str, Any]:
    from ray import serve

    return dict(serve.status().applications)


def _deployed_at() -> float | None:
    application = _applications().get(APP_NAME)
    return None if application is None else float(application.last_deployed_time_s)


def _is_ours(now: float | None, before: float | None, deployed: float | None) -> bool:
    """By the times of deployment: now, before ours was sent, and of ours, None where that was never learnt."""
    return now is not None and (now != before if deployed is None else now == deployed)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _log() -> str:
    """Where the whole report of a failed replica is: the replica's own log has its work alone."""
    import ray

    session = ray.get_runtime_context().get_session_name()
    return f"{environment.ray_folder()[1]}/ray/{session}/logs/serve/controller_*.log"


def _memory_line() -> str | None:
    """What is to be said where Ray's memory monitor ends whatever runs; None where it does not."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    threshold = float(os.environ.get(_THRESHOLD, "0.95"))
    if os.environ.get(_REFRESH) == "0":
        return None
    used, there = get_used_memory(), get_system_memory()
    if used <= threshold * there:
        return None
    return (
        f"{used / 2**30:.1f} of {there / 2**30:.1f} GB are in use, and above {threshold:.0%} Ray's memory monitor ends "
        f"its processes; {_THRESHOLD} sets it"
    )


def _check_memory() -> None:
    if line := _memory_line():
        raise ConfigurationError(f"memory: {line}")


def _say_memory(rollout: Rollout) -> None:
    # The figures change all the time: once is enough.
    if line := _memory_line():
        rollout.say_once("memory", line)


def _check_port_free(host: str, port: int) -> None:
    if not 0 < port < 2**16:
        raise ConfigurationError(f"port {port} on {host}: there is no such port")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ConfigurationError(f"port {port} on {host}: {error.strerror}") from None
